import copy

import pytest
import torch
from torch.nn.functional import layer_norm

from varfast import Policy
from varfast.models import KVCache
from varfast.policies.precision import Linear


def logits_of(policy, tokens, labels, dtype):
    policy.var.compute_dtype = dtype
    return policy.var(labels, policy.vqvae.var_input(tokens).to(policy.var.pos_1LC.dtype))


@pytest.mark.parametrize("shared_adaln", [False, True])
@torch.no_grad()
def test_head_with_bfloat16_operands_adds_little_to_the_error(make_models, shared_adaln):
    """Against float64: the error of the bf16 transformer, with our head and with a float32 head after it."""
    sizes = {"depth": 4, "patch_nums": (1, 2, 3, 4), "vocab_size": 256, "shared_adaln": shared_adaln}
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(256, (8, 30), generator=generator), torch.arange(8) % 5
    policy = Policy(*make_models(**sizes), dtype="bfloat16")
    ours = logits_of(policy, tokens, labels, torch.bfloat16)
    seen = []
    hook = policy.var.blocks[-1].register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    logits_of(policy, tokens, labels, torch.bfloat16)
    hook.remove()
    scale, shift = policy.var.head_nm.constants(policy.var.class_emb(labels))
    normed = layer_norm(seen[0].float(), seen[0].shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    float32_head = normed @ policy.var.head.weight.T + policy.var.head.bias
    wide = Policy(*make_models(**sizes))
    wide.var.double()
    exact = logits_of(wide, tokens, labels, torch.float64)
    assert ours.dtype == torch.float32

    def error(logits):  # of the log-probabilities, which is what counts
        return float((logits.double().log_softmax(-1) - exact.log_softmax(-1)).square().mean().sqrt())

    assert 0 < error(ours) < 1.09 * error(float32_head)  # 16 blocks of width 1024: 1.02

    def excess(logits):
        return error(logits) ** 2 - error(float32_head) ** 2

    assert excess(ours.bfloat16()) > 1.3 * excess(ours)  # 16-bit logits are worse, and the test can tell


def test_head_gradient_in_bfloat16_equals_float64(make_models):
    var, _ = make_models(depth=2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 14, 128, generator=generator).bfloat16().requires_grad_()
    upstream = torch.randn(2, 14, 32, generator=generator)
    var.head(x).backward(upstream)
    wide = x.detach().double().requires_grad_()
    weight = var.head.weight.detach().bfloat16().double().requires_grad_()
    (wide @ weight.T).backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2**-7, atol=0.02)
    torch.testing.assert_close(var.head.weight.grad.double(), weight.grad, rtol=2**-7, atol=0.05)
    torch.testing.assert_close(var.head.bias.grad, upstream.sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch_nums", [(2,), (1, 2), (1, 2, 3), (1, 5)])
def test_kv_cache_keeps_what_a_block_still_needs(make_models, patch_nums):
    """Written scale by scale and block by block, as the transformer does, each block reads what it wrote."""
    config = make_models(patch_nums=patch_nums, depth=3)[0].config
    cache = KVCache(config, 2, torch.float32, torch.device("cpu"))
    start = 0
    for scale, end in enumerate(config.scale_ends):
        for block in range(3):
            k, v = cache.of_block(block)
            assert k.shape == (2, 3, config.num_tokens, 64)
            k[:, :, start:end] = 100 * block + scale
            v[:, :, start:end] = -(100 * block + scale)
            expected = torch.cat(
                [torch.full((e - s,), 100.0 * block + i) for i, (s, e) in enumerate(spans(config, scale))]
            )
            assert torch.equal(k[1, 2, :end, 0], expected)
            assert torch.equal(v[0, 1, :end, 63], -expected)
        start = end
    rows = cache._k.shape[2]
    assert rows == 3 * (config.num_tokens - patch_nums[-1] ** 2) + patch_nums[-1] ** 2


def spans(config, scale):
    return list(zip((0, *config.scale_ends), config.scale_ends, strict=False))[: scale + 1]


@torch.no_grad()
def test_frozen_copy_has_16_bit_matrices_and_follows_refresh_alone(make_models):
    policy = Policy(*make_models(depth=2), dtype="bfloat16")
    tokens, labels = torch.arange(28).view(2, 14), torch.tensor([0, 1])
    inputs = policy.vqvae.var_input(tokens)
    before = policy.var(labels, inputs)
    frozen = policy.var.frozen_copy()
    assert torch.equal(frozen(labels, inputs), before)
    assert frozen.blocks[0].ffn.fc1.weight.dtype == frozen.head.weight.dtype == torch.bfloat16
    assert frozen.pos_1LC is not policy.var.pos_1LC
    assert frozen.low_precision_copies() == []
    assert frozen.blocks[0].ffn.fc1._low_weight is None
    assert not any(p.requires_grad for p in frozen.parameters())
    for parameter in policy.var.parameters():
        parameter.mul_(1.1)
    assert torch.equal(frozen(labels, inputs), before)
    frozen.refresh(policy.var)
    assert torch.equal(frozen(labels, inputs), policy.var(labels, inputs))
    assert list(frozen.state_dict()) == list(policy.var.state_dict())


def by_hand(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.5)


def by_fused_adamw(parameters):
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


class Halving(torch.optim.Optimizer):
    """Writes behind autograd's back, as bitsandbytes and apex do."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.mul_(0.5)


def doubled(var):
    return {name: 2 * tensor if tensor.is_floating_point() else tensor for name, tensor in var.state_dict().items()}


CHANGES = {
    "in place": lambda var: by_hand(list(var.parameters())),
    "fused AdamW": lambda var: by_fused_adamw(list(var.parameters())),
    "an optimizer of someone else": lambda var: Halving(list(var.parameters())).step(),
    "load_state_dict": lambda var: var.load_state_dict(doubled(var)),
    "load_state_dict, assigned": lambda var: var.load_state_dict(doubled(var), assign=True),
    "data replaced": lambda var: [setattr(p, "data", p.data * 2) for p in var.parameters()],
    "foreach": lambda var: torch._foreach_mul_([p.detach() for p in var.parameters()], 2.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_low_precision_copies_follow_every_change_of_the_weights(make_models, change):
    """Forward reads what was changed, without being told: as a new model, which has no copies yet."""
    var, vqvae = make_models(depth=2)
    var.compute_dtype = torch.bfloat16
    labels, inputs = torch.tensor([0, 1]), vqvae.var_input(torch.arange(28).view(2, 14))
    with torch.no_grad():
        before = var(labels, inputs)
    CHANGES[change](var)
    after = var(labels, inputs)
    fresh = type(var)(var.config)
    fresh.load_state_dict(var.state_dict())
    fresh.compute_dtype = torch.bfloat16
    assert torch.equal(after, fresh(labels, inputs))
    assert not torch.equal(after, before)


def test_low_precision_copies_are_no_part_of_a_checkpoint_and_follow_a_deep_copy(make_models):
    var, vqvae = make_models(depth=1)
    names, labels, inputs = list(var.state_dict()), torch.tensor([0]), vqvae.var_input(torch.arange(14)[None])
    var.compute_dtype = torch.bfloat16
    var(labels, inputs)
    pairs = var.low_precision_copies()
    assert len(pairs) == 7  # of qkv, proj, fc1, fc2, ada_lin with its bias, and head
    assert all(c.dtype == torch.bfloat16 and torch.equal(c, p.bfloat16()) for p, c in pairs)
    assert all(a is b for (_, a), (_, b) in zip(pairs, var.low_precision_copies(), strict=True))  # kept, not made anew
    assert list(var.state_dict()) == names
    other = copy.deepcopy(var)
    by_hand(list(other.parameters()))
    assert all(torch.equal(c, p.bfloat16()) for p, c in other.low_precision_copies())
    assert all(torch.equal(c, p.bfloat16()) for p, c in var.low_precision_copies())
    var.compute_dtype = torch.float32
    assert var.low_precision_copies() == []


def test_refresh_copies_writes_all_in_place(make_models):
    var, _ = make_models(depth=2)
    var.compute_dtype = torch.bfloat16
    pairs = var.low_precision_copies()
    for parameter in var.parameters():
        numpy_view = parameter.detach().numpy()  # nothing tells PyTorch of this change
        numpy_view *= 1.5
    assert not any(torch.equal(c, p.bfloat16()) for p, c in pairs if p.any())
    var.refresh_copies()
    assert all(torch.equal(c, p.bfloat16()) for p, c in pairs)
    assert all(a is b for (_, a), (_, b) in zip(pairs, var.low_precision_copies(), strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_gradients_in_bfloat16_equal_float64(bias, frozen):
    generator = torch.Generator().manual_seed(0)
    linear = Linear(64, 48, bias)
    linear.weight.requires_grad_(not frozen)
    x = torch.randn(3, 10, 64, generator=generator).bfloat16().requires_grad_()
    upstream = torch.randn(3, 10, 48, generator=generator).bfloat16()
    linear(x).backward(upstream)
    wide_x, weight = x.detach().double().requires_grad_(), linear.weight.detach().bfloat16().double().requires_grad_()
    (wide_x @ weight.T).backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), wide_x.grad, rtol=2**-7, atol=0.02)
    saved = linear(x).grad_fn.saved_tensors[0]
    assert (saved is None) == frozen  # activations that no gradient needs are not kept
    if frozen:
        assert linear.weight.grad is None
    else:
        assert linear.weight.grad.dtype == torch.float32
        torch.testing.assert_close(linear.weight.grad.double(), weight.grad, rtol=2**-7, atol=0.03)
    if bias:
        torch.testing.assert_close(linear.bias.grad.double(), upstream.double().sum((0, 1)), rtol=1e-6, atol=1e-6)
