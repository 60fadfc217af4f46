import pytest
import torch
from torch.nn.functional import layer_norm

from varfast import Policy
from varfast.models import KVCache


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
def test_compute_twin_shares_or_copies_and_refreshes(make_models):
    policy = Policy(*make_models(depth=2), dtype="bfloat16")
    tokens, labels = torch.arange(28).view(2, 14), torch.tensor([0, 1])
    inputs = policy.vqvae.var_input(tokens)
    shared, frozen = policy.var.compute_twin(shared=True), policy.var.compute_twin(shared=False)
    before = policy.var(labels, inputs)
    assert torch.equal(shared(labels, inputs), before)
    assert torch.equal(frozen(labels, inputs), before)
    assert shared.blocks[0].ffn.fc1.weight.dtype == torch.bfloat16
    assert shared.pos_1LC is policy.var.pos_1LC
    for parameter in policy.var.parameters():
        parameter.mul_(1.1)
    assert not torch.equal(shared(labels, inputs), policy.var(labels, inputs))
    shared.refresh(policy.var)
    assert torch.equal(shared(labels, inputs), policy.var(labels, inputs))
    assert torch.equal(frozen(labels, inputs), before)
    assert list(shared.state_dict()) == list(policy.var.state_dict())
