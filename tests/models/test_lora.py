import copy
import sys

import pytest
import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from varfast import InputError, Policy
from varfast.advantages import group_advantages
from varfast.policies.lora import lora_layers, merged_state, without_lora
from varfast.policies.precision import Head
from varfast.policies.var.config import VARLoRAConfig
from varfast.policies.var.weights import load_var
from varfast.types import Batch

from ..learners import make_learner

ALL = ("mat_qkv", "proj", "fc1", "fc2", "ada_lin")
LABELS = [0, 1, 2]
TOKENS = torch.arange(42).view(3, 14) * 7 % 32


@pytest.fixture
def make_adapted(make_models):
    """A policy with an adapter that has moved from its start, if asked; its base as a state_dict."""

    def make(dtype="float32", moved=True, targets=ALL, rank=4, alpha=6.0, seed=0, **sizes):
        var, vqvae = make_models(**({"depth": 2} | sizes))
        base = {name: tensor.clone() for name, tensor in var.state_dict().items()}
        policy = Policy(var, vqvae, dtype=dtype)
        policy.add_lora(VARLoRAConfig(rank=rank, alpha=alpha, targets=targets), seed)
        if moved:
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for parameter in adapter(policy).values():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return policy, base

    return make


def adapter(policy):
    return {name: p for name, p in policy.var.named_parameters() if p.requires_grad}


def plain(policy, state, dtype="float32"):
    """A policy without adapter, with these weights."""
    var = type(policy.var)(policy.var.config)
    var.load_state_dict(state)
    return Policy(var, copy.deepcopy(policy.vqvae), dtype=dtype)


def logp(policy, **keys):
    with torch.no_grad():
        return policy.token_logp(LABELS, TOKENS, 0.7, **keys)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_add_lora_starts_as_the_model_it_is_put_into(make_adapted, dtype):
    policy, base = make_adapted(dtype, moved=False)
    before = plain(policy, base, dtype)
    assert torch.equal(logp(policy), logp(before))
    assert torch.equal(policy.sample(LABELS, seed=0).tokens_BL, before.sample(LABELS, seed=0).tokens_BL)
    assert all(parameter.dtype == torch.float32 for parameter in adapter(policy).values())


def test_add_lora_draws_from_the_seed_alone(make_adapted):
    torch.manual_seed(1)
    first = adapter(make_adapted(moved=False)[0])
    torch.manual_seed(2)
    second = adapter(make_adapted(moved=False)[0])
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = adapter(make_adapted(moved=False, seed=1)[0])
    ups, downs = ([n for n in first if f"lora_{kind}" in n] for kind in "BA")
    assert len(ups) == len(downs) == 10
    assert all(not first[name].any() for name in ups)
    assert all(not torch.equal(first[name], other[name]) for name in downs)


@pytest.mark.parametrize(
    ("targets", "shared", "wanted"),
    [
        (("fc1", "proj"), False, ["blocks.0.attn.proj", "blocks.0.ffn.fc1"]),
        (("ada_lin",), False, ["blocks.0.ada_lin.1"]),
        (("ada_lin", "fc2"), True, ["shared_ada_lin.1", "blocks.0.ffn.fc2"]),
    ],
)
def test_add_lora_takes_the_targets_and_freezes_the_rest(make_adapted, targets, shared, wanted):
    policy, _ = make_adapted(targets=targets, depth=1, shared_adaln=shared)
    assert list(lora_layers(policy.var)) == wanted
    assert {name.partition(".lora_")[0] for name in adapter(policy)} == set(wanted)
    assert [p.shape[int("lora_B" in name)] for name, p in adapter(policy).items()] == [4] * 2 * len(wanted)


def test_add_lora_without_peft_says_what_to_install(make_models, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"policy.lora: .*pip install 'varfast\[lora\]', or policy.lora=null"):
        Policy(*make_models()).add_lora(VARLoRAConfig(), 0)


def test_products_are_in_the_compute_dtype(make_adapted):
    policy, _ = make_adapted("bfloat16")
    seen = []
    for layer in lora_layers(policy.var).values():
        for module in (layer, *layer.lora_A.values(), *layer.lora_B.values()):
            module.register_forward_hook(lambda m, given, out: seen.append((given[0].dtype, out.dtype)))
    logp(policy)
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 30
    frozen = {n: p.dtype for n, p in policy.var.named_parameters() if n.endswith(("base_layer.weight", "head.weight"))}
    assert len(frozen) == 11
    assert set(frozen.values()) == {torch.bfloat16}
    rest = {p.dtype for n, p in policy.var.named_parameters() if n not in frozen}
    assert rest == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_is_the_base_bit_for_bit_and_takes_no_memory(make_adapted, dtype):
    policy, base = make_adapted(dtype, moved=False)
    reference = policy.frozen_copy()
    make_learner(policy, reference, minibatch=4, lr=1e-2).step(scored(policy), 0)
    assert float((logp(policy) - logp(reference)).abs().max()) > 1e-2
    assert torch.equal(logp(reference), logp(plain(policy, base, dtype)))
    own = {t.data_ptr() for t in (*policy.var.parameters(), *policy.var.buffers())}
    theirs = {t.data_ptr() for t in (*reference.var.parameters(), *reference.var.buffers())}
    assert theirs < own
    assert list(reference.var.state_dict()) == list(base)
    assert not any(p.requires_grad for p in reference.var.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reference_that_moves_is_the_adapter_of_the_last_refresh(make_adapted, dtype):
    policy, base = make_adapted(dtype, moved=False)
    reference = policy.frozen_copy(moves=True)
    assert torch.equal(logp(reference), logp(plain(policy, base, dtype)))
    learner = make_learner(policy, reference, minibatch=4, lr=1e-2)
    for step in range(2):
        before = logp(policy)
        learner.step(scored(policy), step)
        assert torch.equal(logp(reference), before)  # the policy moves alone
        assert float((logp(policy) - before).abs().max()) > 1e-3
        reference.refresh(policy)
        assert torch.equal(logp(reference), logp(policy))
        # What is sampled is the reference too, by the copies that it reads.
        rollouts = [p.sample([0, 1, 2, 3], 0.7, seed=step) for p in (policy, reference)]
        assert torch.equal(rollouts[0].tokens_BL, rollouts[1].tokens_BL)
    own = {t.data_ptr() for t in adapter(policy).values()}
    theirs = {p.data_ptr() for name, p in reference.var.named_parameters() if "lora_" in name}
    assert len(theirs) == len(own)
    assert not own & theirs
    rest = [{p.data_ptr() for p in m.var.parameters()} for m in (policy, reference)]
    assert rest[0] - own == rest[1] - theirs
    assert not any(p.requires_grad for p in reference.var.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rollout_and_update_have_one_policy_and_see_each_step(make_adapted, dtype):
    policy, _ = make_adapted(dtype)
    tolerance = 1e-4 if dtype == "float32" else 0.1
    for _ in range(2):
        rollout = policy.sample([0, 1, 2, 3] * 2, 0.7, seed=0)
        # The frozen matrices are read as they are stored; the adapter's, by the copies that the update reads.
        copied = {id(p) for p, _ in policy.var.low_precision_copies() if p.ndim == 2}
        wanted = [] if dtype == "float32" else adapter(policy).values()
        assert copied == {id(p) for p in wanted}
        with torch.no_grad():
            given = [p.token_logp(rollout.labels_B, rollout.tokens_BL, 0.7) for p in (policy, policy.frozen_copy())]
        assert float((given[0] - rollout.logp_BL).abs().max()) < tolerance
        assert float((given[1] - rollout.logp_BL).abs().max()) > 3 * tolerance
        with torch.no_grad():
            for parameter in adapter(policy).values():
                parameter.mul_(1.1)


def scored(policy):
    rollout = policy.sample([0, 0, 0, 0, 1, 1, 1, 1], 0.7, seed=0)
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(0))
    return Batch.of(rollout, group_advantages(rewards, 4))


@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
@pytest.mark.parametrize("shared_adaln", [False, True])
def test_gradient_of_a_step_is_that_of_w_plus_ba_in_float64(make_adapted, checkpointing, shared_adaln):
    policy, base = make_adapted(shared_adaln=shared_adaln)
    given = scored(policy)
    with torch.no_grad():  # a policy that has moved from its rollout
        for parameter in adapter(policy).values():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    trained = {name: p.detach().double().requires_grad_() for name, p in adapter(policy).items()}
    matrices = dict(wide)
    for name in {name.partition(".lora_")[0] for name in trained}:
        a, b = (trained[f"{name}.lora_{kind}.default.weight"] for kind in "AB")
        matrices[f"{name}.weight"] = wide[f"{name}.weight"] + 6.0 / 4 * b @ a
    model = type(policy.var)(policy.var.config).double()
    model.compute_dtype = torch.float64
    codes = policy.vqvae.var_input(given.rollout.tokens_BL).double()

    def wide_logp(state):
        logits = functional_call(model, state, (given.rollout.labels_B, codes))
        return (logits / 0.7).log_softmax(-1).gather(-1, given.rollout.tokens_BL[..., None])[..., 0]

    new, reference = wide_logp(matrices), wide_logp(wide).detach()
    ratio, advantage = (new - given.rollout.logp_BL).exp(), given.advantages_BL[:, 0].double()[:, None]
    k3 = (reference - new).exp() - (reference - new) - 1
    loss = -(torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) - 0.2 * k3).mean(1).mean()
    loss.backward()

    update = {"minibatch": 8, "micro_batch": 2, "lr": 1e-30, "grad_clip": 1e9, "checkpointing": checkpointing}
    stats = make_learner(policy, **update).step(given, 0)
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in adapter(policy).items():
        assert parameter.grad is not None
        exact = trained[name].grad
        assert float((parameter.grad - exact).norm()) < 1e-4 * float(exact.norm()), name
    assert all(p.grad is None for p in policy.var.parameters() if not p.requires_grad)


def test_a_gradient_that_is_not_finite_reaches_no_adapter(make_adapted):
    policy, _ = make_adapted()
    before = {name: p.detach().clone() for name, p in adapter(policy).items()}
    bad = Batch.of(scored(policy).rollout, torch.full((8,), float("nan")))
    stats = make_learner(policy, minibatch=4).step(bad, 0)
    assert stats["skipped_steps"] == 2
    assert all(torch.equal(before[name], p) for name, p in adapter(policy).items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_state_is_w_plus_ba_from_the_float32_base(make_adapted, tmp_path, dtype):
    policy, base = make_adapted(dtype)
    merged = merged_state(policy.var, base)
    assert list(merged) == list(base)
    moved = set()
    for name, parameter in adapter(policy).items():
        if "lora_A" not in name:
            continue
        where = name.partition(".lora_")[0]
        up = policy.var.get_parameter(name.replace("lora_A", "lora_B")).detach().double()
        exact = base[f"{where}.weight"].double() + 1.5 * up @ parameter.detach().double()
        torch.testing.assert_close(merged[f"{where}.weight"].double(), exact, rtol=3e-7, atol=3e-7)
        moved.add(f"{where}.weight")
    assert len(moved) == 10
    assert all(torch.equal(merged[name], base[name]) for name in base if name not in moved)
    torch.save(merged, tmp_path / "var.pth")
    loaded = load_var(str(tmp_path / "var.pth")).state_dict()
    assert all(torch.equal(loaded[name], merged[name]) for name in base)
    if dtype == "float32":
        torch.testing.assert_close(logp(plain(policy, merged)), logp(policy), rtol=0, atol=2e-5)


def test_without_lora_leaves_the_adapter_where_it_was(make_adapted):
    policy, _ = make_adapted()
    before = logp(policy)
    assert not lora_layers(without_lora(policy.var))
    assert len(lora_layers(policy.var)) == 10
    assert torch.equal(before, logp(policy))


@pytest.mark.parametrize(("frozen", "products"), [(True, 1), (False, 2)])
def test_backward_of_the_16_bit_head_makes_no_gradient_of_frozen_weights(frozen, products):
    head = Head(64, 32).requires_grad_(not frozen)
    logits = head(torch.randn(3, 5, 64, dtype=torch.bfloat16, requires_grad=True))
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() == products * 2 * 15 * 64 * 32
