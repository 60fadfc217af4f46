import copy
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from varfast import InputError, Policy
from varfast.advantages import group_advantages
from varfast.losses.config import GRPOConfig
from varfast.optim.config import UpdateConfig
from varfast.optim.gradients import Gradients
from varfast.optim.schedule import learning_rate, scheduled
from varfast.perf.graphs import GraphPool, Replayed
from varfast.policies.var.config import VARLoRAConfig
from varfast.policies.var.cost import VARCost
from varfast.randomness import Key, Purpose, keyed_generator
from varfast.types import Batch, Sampling

from .learners import make_learner


def scored_rollout(policy, count=8, seed=0, **inference):
    rollout = policy.sample([0, 0, 0, 0, 1, 1, 1, 1][:count], 0.7, seed=seed, **inference)
    rewards = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return Batch.of(rollout, group_advantages(rewards, 4))


def learner(policy, kl_beta=0.2, **update):
    return make_learner(policy, kl_beta=kl_beta, **({"minibatch": 4} | update))


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.var.parameters()])


def test_first_ratio_is_one_and_later_ones_are_not(make_policy):
    policy = make_policy(depth=2)
    stats = learner(policy, lr=1e-3, epochs=3).step(scored_rollout(policy), 0)
    assert 0 <= stats["ratio_gap_mean"] <= stats["ratio_gap_max"] < 1e-4
    assert stats["kl"] > 1e-6
    assert stats["ratio_mean"] != pytest.approx(1.0, abs=1e-6)


def test_step_equals_plain_autograd_in_float64(make_policy):
    """One minibatch against the formula written out, every weight, in double precision."""
    policy = make_policy(depth=1)
    scored = scored_rollout(policy)
    reference = policy.frozen_copy()
    with torch.no_grad():  # a policy that has moved from its rollout and from its reference
        for parameter in policy.var.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    wide, wide_reference = (copy.deepcopy(p.var).double() for p in (policy, reference))
    start = weights(policy).double()

    def logp(model):
        model.compute_dtype = torch.float64
        logits = model(scored.rollout.labels_B, policy.vqvae.var_input(scored.rollout.tokens_BL).double())
        return (logits / 0.7).log_softmax(-1).gather(-1, scored.rollout.tokens_BL[..., None])[..., 0]

    new, old = logp(wide), scored.rollout.logp_BL.double()
    with torch.no_grad():
        q_from = logp(wide_reference)
    ratio, advantage = (new - old).exp(), scored.advantages_BL[:, 0].double()[:, None]
    k3 = (q_from - new).exp() - (q_from - new) - 1
    loss = -(torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) - 0.2 * k3).mean(1).mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in wide.parameters()])
    norm = gradient.norm()

    maker = make_learner(policy, reference, minibatch=8, micro_batch=2, lr=1e-3)
    stats = maker.step(scored, 0)
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert stats["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    # Adam's first step is lr * g / (|g| + eps), with g clipped to norm 1.
    clipped = gradient * min(1.0, 1.0 / (norm.item() + 1e-6))
    expected = start - 1e-3 * clipped / (clipped.abs() + 1e-8)
    sure = clipped.abs() > 1e-5
    assert float(sure.double().mean()) > 0.5
    torch.testing.assert_close(weights(policy).double()[sure], expected[sure], rtol=0, atol=2e-6)


def test_micro_batches_give_the_same_step(make_policy):
    results = []
    for micro_batch in (None, 1, 2):
        policy = make_policy(depth=2)
        stats = learner(policy, micro_batch=micro_batch).step(scored_rollout(policy), 0)
        results.append((weights(policy), stats))
    for other_weights, other in results[1:]:
        torch.testing.assert_close(other_weights, results[0][0], rtol=0, atol=2e-5)
        assert other["loss"] == pytest.approx(results[0][1]["loss"], abs=1e-6)


def test_only_the_policy_moves(make_policy):
    policy = make_policy(depth=2)
    maker = learner(policy)
    before = weights(maker.state.reference)
    vqvae = [p.clone() for p in policy.vqvae.parameters()]
    maker.step(scored_rollout(policy), 0)
    assert torch.equal(weights(maker.state.reference), before)
    assert not torch.equal(weights(policy), before)
    assert all(torch.equal(a, b) for a, b in zip(vqvae, policy.vqvae.parameters(), strict=True))


def test_rewarded_tokens_become_more_likely(make_policy):
    policy = make_policy(depth=2)
    scored = scored_rollout(policy)
    learner(policy, kl_beta=0.0, lr=1e-3).step(scored, 0)
    with torch.no_grad():
        moved = (
            policy.token_logp(scored.rollout.labels_B, scored.rollout.tokens_BL, 0.7) - scored.rollout.logp_BL
        ).mean(1)
    assert float((moved * scored.advantages_BL[:, 0]).sum()) > 0
    assert float(torch.corrcoef(torch.stack([moved, scored.advantages_BL[:, 0]]))[0, 1]) > 0.5


def test_no_signal_and_no_kl_moves_nothing(make_policy):
    policy = make_policy()
    before = weights(policy)
    rollout = policy.sample([0] * 4, 0.7, seed=0)
    learner(policy, kl_beta=0.0).step(Batch.of(rollout, torch.zeros(4)), 0)
    assert torch.equal(weights(policy), before)


def test_kl_pulls_back_to_the_reference(make_policy):
    policy = make_policy(depth=2)
    maker = learner(policy, kl_beta=1.0, lr=3e-3)
    with torch.no_grad():
        for parameter in policy.var.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    rollout = policy.sample([0, 1, 2, 3] * 8, 0.7, seed=0)
    kl = [maker.step(Batch.of(rollout, torch.zeros(32)), step)["kl"] for step in range(20)]
    assert kl[-1] < 0.5 * kl[0]


def test_step_refuses_a_rollout_that_is_not_on_policy(make_policy):
    policy = make_policy()
    with pytest.raises(InputError, match="top_k or top_p"):
        learner(policy).step(scored_rollout(policy, top_k=3), 0)


def test_a_gradient_that_is_not_finite_reaches_no_weight_and_is_counted(make_policy):
    policy = make_policy()
    scored = scored_rollout(policy)
    maker = learner(policy, minibatch=4)
    before = weights(policy)
    bad = Batch.of(scored.rollout, torch.full((8,), float("nan")))
    assert maker.step(bad, 0)["skipped_steps"] == 2
    assert torch.equal(weights(policy), before)
    half = scored.advantages_BL[:, 0].clone()
    order = torch.randperm(8, generator=keyed_generator(0, Purpose.MINIBATCHES, 1, 0))
    half[order[0]] = float("inf")  # in the first minibatch alone
    stats = maker.step(Batch.of(scored.rollout, half), 1)
    assert stats["skipped_steps"] == 1
    assert not torch.equal(weights(policy), before)
    assert weights(policy).isfinite().all()
    assert all(math.isfinite(x) for x in (stats["loss"], stats["kl"], stats["ratio_mean"], stats["grad_norm"]))


def test_step_stops_after_max_skipped_steps_in_a_row(make_policy):
    policy = make_policy()
    bad = Batch.of(scored_rollout(policy).rollout, torch.full((8,), float("nan")))
    maker = learner(policy, minibatch=4, max_skipped_steps=3)
    maker.step(bad, 0)
    with pytest.raises(InputError, match="3 gradients in a row were not finite; none of them reached a weight"):
        maker.step(bad, 1)


@pytest.mark.parametrize("one_buffer", [False, True])
def test_clipped_step_equals_clip_grad_norm_and_adamw_in_float64(make_policy, one_buffer):
    policy = make_policy(depth=2)
    maker = learner(policy, lr=1e-2, grad_clip=1e-3, cuda_graph=one_buffer)
    generator = torch.Generator().manual_seed(0)
    wide = [p.detach().double().requires_grad_() for p in policy.var.parameters()]
    reference = torch.optim.AdamW(wide, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    for _ in range(3):
        for mine, theirs in zip(policy.var.parameters(), wide, strict=True):
            gradient = torch.randn(mine.shape, generator=generator)
            mine.grad = mine.grad.copy_(gradient) if one_buffer else gradient
            theirs.grad = gradient.double()
        norm, not_finite = maker.state.adamw.step()
        expected = torch.nn.utils.clip_grad_norm_(wide, 1e-3)
        reference.step()
        torch.testing.assert_close(norm.double(), expected, rtol=1e-5, atol=0)
        assert not not_finite
    exact = torch.cat([p.detach().flatten() for p in wide])
    torch.testing.assert_close(weights(policy).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", ["attention", "full"])
def test_checkpointing_gives_the_same_gradient(make_policy, checkpointing):
    gradients, kept = [], []
    for mode in ("none", checkpointing):
        policy = make_policy(depth=2, shared_adaln=checkpointing == "full")
        saved = []
        tokens = torch.arange(28).view(2, 14) % 32
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            logp = policy.token_logp([0, 1], tokens, 0.7, checkpointing=mode)
        kept.append(sum(saved))
        logp.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.var.parameters()]))
    assert torch.equal(*gradients)
    assert kept[1] < kept[0]


def test_images_without_signal_are_left_out_without_a_kl_term(make_policy, monkeypatch):
    """The same gradient as with all images, from one in four; steps without any image are taken all the same."""
    policy = make_policy(depth=2)
    rollout = policy.sample([0, 1, 2, 3] * 8, 0.7, seed=0)
    advantages = torch.randn(32, generator=torch.Generator().manual_seed(0))
    advantages[torch.arange(32) % 4 != 1] = 0.0
    gradients, images = [], []
    forced = policy.teacher_forced
    monkeypatch.setattr(policy, "teacher_forced", lambda r, **k: (images.append(len(r.prompts)), forced(r, **k))[1])
    for smallest in (0.0, 1e-30):  # 1e-30 is no signal either, but not 0
        maker = learner(policy, kl_beta=0.0, minibatch=8, lr=1e-30, micro_batch=2)

        def record(buffer, step=maker.state.adamw.step):
            gradients.append(torch.cat([p.grad.flatten() for p in policy.var.parameters()]))
            return step(buffer)

        monkeypatch.setattr(maker.state.adamw, "step", record)
        maker.step(Batch.of(rollout, advantages.where(advantages != 0, smallest)), 0)
    assert sum(images) == 8 + 32
    for left_out, all_images in zip(gradients[:4], gradients[4:], strict=True):
        torch.testing.assert_close(left_out, all_images, rtol=0, atol=1e-6 * float(all_images.abs().max()) + 1e-20)


def test_a_step_without_signal_still_moves_by_adams_moments(make_policy):
    ends = []
    for smallest in (0.0, 1e-30):
        policy = make_policy(depth=2)
        maker = learner(policy, kl_beta=0.0, minibatch=8)
        scored = scored_rollout(policy)
        maker.step(scored, 0)
        moved = weights(policy)
        stats = maker.step(Batch.of(scored.rollout, torch.full((8,), smallest)), 1)
        assert not torch.equal(weights(policy), moved)
        assert stats["loss"] == pytest.approx(0.0, abs=1e-20)
        assert "kl" not in stats  # nothing measured it
        ends.append(weights(policy))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("minibatch", "measured"), [(0, True), (1, False)])
def test_the_gap_to_the_rollout_is_not_measured_after_adams_moments_have_moved(make_policy, minibatch, measured):
    """Only one of two minibatches has images to learn from; before the second one, moments have moved the weights."""
    policy = make_policy(depth=2)
    maker = learner(policy, kl_beta=0.0, minibatch=4, lr=1e-2)
    maker.step(scored_rollout(policy), 0)
    rollout = policy.sample([0, 0, 0, 0, 1, 1, 1, 1], 0.7, seed=1)
    rows = list(torch.randperm(8, generator=keyed_generator(0, Purpose.MINIBATCHES, 1, 0)).split(4))
    advantages = torch.zeros(8)
    advantages[rows[minibatch]] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    stats = maker.step(Batch.of(rollout, advantages), 1)
    assert stats["update_images"] == 4
    if measured:
        assert stats["ratio_gap_max"] < 1e-4
    else:
        assert math.isnan(stats["ratio_gap_max"])
        assert math.isnan(stats["ratio_gap_mean"])
    assert math.isfinite(stats["ratio_mean"])
    assert math.isfinite(stats["loss"])


def test_reference_is_asked_once_a_rollout(make_policy, monkeypatch):
    policy = make_policy(depth=2)
    maker = learner(policy, epochs=3, minibatch=4)
    images = []
    forced = maker.state.reference.teacher_forced
    monkeypatch.setattr(
        maker.state.reference, "teacher_forced", lambda r, **k: (images.append(len(r.prompts)), forced(r, **k))[1]
    )
    maker.step(scored_rollout(policy), 0)
    assert sum(images) == 8


def test_apex_is_used_where_it_can_be_imported_and_named_where_not(make_policy, monkeypatch):
    policy = make_policy()
    with pytest.raises(InputError, match="update.optimizer=apex: NVIDIA Apex cannot be imported"):
        learner(policy, optimizer="apex")

    class FusedAdam(torch.optim.Adam):  # apex's signature, without its kernel
        def __init__(self, params, lr, betas, adam_w_mode):
            assert adam_w_mode
            super().__init__(params, lr=lr, betas=betas, decoupled_weight_decay=True)

    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "apex.optimizers", SimpleNamespace(FusedAdam=FusedAdam))
    scored = scored_rollout(policy)
    twin = make_policy()
    learner(policy, optimizer="apex", grad_clip=1e-3).step(scored, 0)
    learner(twin, grad_clip=1e-3).step(scored, 0)
    torch.testing.assert_close(weights(policy), weights(twin), rtol=0, atol=1e-6)
    before = weights(policy)
    stats = learner(policy, optimizer="apex").step(Batch.of(scored.rollout, torch.full((8,), float("nan"))), 0)
    assert stats["skipped_steps"] == 2
    assert torch.equal(weights(policy), before)


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_average_is_that_of_the_weights_after_every_optimizer_step(make_policy, decay):
    """Against the sum written out in float64; a step left out counts once more for the weights that stay."""
    policy = make_policy(depth=2)
    maker = learner(policy, lr=1e-2, ema_decay=decay)
    recorded = [weights(policy).double()]
    clipped_step = maker.state.adamw.step

    def record(buffer):
        measured = clipped_step(buffer)
        recorded.append(weights(policy).double())
        return measured

    maker.state.adamw.step = record
    good = scored_rollout(policy)
    for step, scored in enumerate((good, Batch.of(good.rollout, torch.full((8,), float("nan"))), good)):
        stats = maker.step(scored, step)
        assert stats["skipped_steps"] == (2 if step == 1 else 0)
    assert len(recorded) == 1 + 3 * 2
    expected = decay**6 * recorded[0]
    for age, moved in enumerate(reversed(recorded[1:])):
        expected += decay**age * (1 - decay) * moved
    averages = maker.state.further()["ema"]
    assert list(averages) == [name for name, _ in policy.var.named_parameters()]
    found = torch.cat([t.flatten() for t in averages.values()])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert float((found.double() - recorded[-1]).abs().max()) > 1e-3
    maker.state.deliver()
    assert torch.equal(weights(policy), found)


def test_without_the_options_there_is_no_further_state(make_policy):
    policy = make_policy()
    maker = learner(policy)
    maker.step(scored_rollout(policy), 0)
    before = weights(policy)
    maker.state.deliver()
    assert torch.equal(weights(policy), before)
    assert maker.state.further() == {}


def test_learning_rate_schedules():
    def rates(**settings):
        return [learning_rate(UpdateConfig(lr=1.0, **settings), step, 10) for step in (0, 1, 4, 9)]

    assert rates() == [1.0] * 4
    assert rates(warmup_steps=4) == [0.25, 0.5, 1.0, 1.0]
    assert rates(warmup_share=0.31) == [0.25, 0.5, 1.0, 1.0]  # of 10 steps
    assert rates(warmup_share=0.4) == rates(warmup_steps=4)
    assert rates(lr_schedule="linear") == pytest.approx([1.0, 0.9, 0.6, 0.1])
    assert rates(lr_schedule="cosine") == pytest.approx([1.0, 0.97553, 0.65451, 0.02447], abs=1e-5)
    to_a_hundredth = [scheduled(2.0, step, 12, 2, "cosine", floor=0.01) for step in (0, 1, 2, 7, 12)]  # of pre-training
    assert to_a_hundredth == pytest.approx([1.0, 2.0, 2.0, 1.01, 0.02])


@pytest.fixture
def bitsandbytes():
    """The optional package, without which the tests of adamw8bit alone are skipped."""
    pytest.importorskip("bitsandbytes.functional")
    return pytest.importorskip("bitsandbytes")


EIGHT_BITS = {"optimizer": "adamw8bit", "lr": 1e-3, "grad_clip": 1e-3}


def test_adamw8bit_follows_adamw_in_float64(make_policy, bitsandbytes):
    """20 steps on the same gradients, a direction and as much noise: matrices of 8 bits come 1.4 % of the way apart."""
    policy = make_policy(depth=2, num_classes=50)
    maker = learner(policy, **EIGHT_BITS, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    parameters = dict(policy.var.named_parameters())
    wide = {n: p.detach().double().requires_grad_() for n, p in parameters.items()}
    start = {n: p.detach().clone() for n, p in wide.items()}
    decayed, others = ([p for p in wide.values() if (p.ndim >= 2) == flag] for flag in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-3)
    towards = {n: torch.randn(p.shape, generator=generator) for n, p in parameters.items()}
    for _ in range(20):
        for name, parameter in parameters.items():
            parameter.grad = towards[name] + torch.randn(parameter.shape, generator=generator)
            wide[name].grad = parameter.grad.double()
        maker.state.adamw.step()
        torch.nn.utils.clip_grad_norm_(wide.values(), 1e-3)
        reference.step()
    for name, parameter in parameters.items():
        state = maker.state.adamw.optimizer.state[parameter]
        way, own_way = wide[name].detach() - start[name], parameter.detach() - start[name]
        apart = float((own_way - way).norm() / way.norm())
        float32 = parameter.numel() < 4096 or name == "class_emb.weight"
        assert state["state1"].dtype == state["state2"].dtype == (torch.float32 if float32 else torch.uint8), name
        assert apart < 2e-4 if float32 else 0.005 < apart < 0.03, name
    assert not bitsandbytes.optim.GlobalOptimManager.get_instance().pid2config  # of the process


def test_adamw8bit_s_state_takes_the_bytes_that_roofline_says(make_policy, bitsandbytes):
    policy = make_policy(depth=2, num_classes=50)
    maker = learner(policy, **EIGHT_BITS)
    maker.step(scored_rollout(policy), 0)
    states = maker.state.adamw.optimizer.state_dict()["state"].values()
    held = sum(tensor.nbytes for state in states for name, tensor in state.items() if name != "step")
    weights = VARCost(policy.var.config, policy.vqvae.config, "float32").weights
    assert held == weights.moment_bytes("adamw8bit") < 0.5 * weights.moment_bytes("adamw")


def test_adamw8bit_is_not_reached_by_a_gradient_that_is_not_finite_or_0(make_policy, bitsandbytes):
    policy = make_policy(depth=2)
    maker = learner(policy, **EIGHT_BITS, kl_beta=0.0, minibatch=4)
    scored = scored_rollout(policy)
    maker.step(scored, 0)

    def state():
        moments = maker.state.adamw.optimizer.state_dict()["state"].values()
        return torch.cat([weights(policy), *(t.flatten().float() for of_one in moments for t in of_one.values())])

    before = state()
    assert maker.step(Batch.of(scored.rollout, torch.full((8,), float("nan"))), 1)["skipped_steps"] == 2
    assert maker.step(Batch.of(scored.rollout, torch.zeros(8)), 2)["skipped_steps"] == 0
    assert torch.equal(state(), before)


def test_adamw8bit_says_what_it_lacks(make_policy, monkeypatch, bitsandbytes):
    def no_kernel(*_, **__):
        raise NotImplementedError("no kernel for this device")

    with monkeypatch.context() as patch:
        patch.setattr(bitsandbytes.functional, "optimizer_update_8bit_blockwise", no_kernel)
        with pytest.raises(InputError, match="bitsandbytes cannot step on cpu: no kernel for this device"):
            learner(make_policy(), **EIGHT_BITS)
    monkeypatch.delitem(sys.modules, "varfast.optim.adamw8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(InputError, match=r"bitsandbytes cannot be imported; pip install 'varfast\[adamw8bit\]'"):
        learner(make_policy(), **EIGHT_BITS)


class AsCaptured:
    """What a graph does, without one: arguments are copied into tensors of its own, the host sees no value."""

    made: list = []  # noqa: RUF012 - of one test

    def __init__(self, function, *inputs, pool, warm_up):
        assert not warm_up
        self._function, self._inputs = function, tuple(x.clone() for x in inputs)
        AsCaptured.made.append(self)
        self.replays = 0

    def __call__(self, *inputs):
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self.replays += 1
        with NothingOnTheHost():
            return tuple(x.clone() for x in self._function(*self._inputs))


class NothingOnTheHost(TorchDispatchMode):
    """Fails where a value is read on the host, or a shape depends on one: a capture cannot have that."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        refused = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "is_nonzero")
        assert not any(name in str(function) for name in refused), function
        return function(*args, **(kwargs or {}))


PAPER = {"ratio": "sequence", "kl_gradient": "unbiased", "entropy": {"coef": 0.1, "target": 0.5, "clamp": (0.0, 1.0)}}


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch": 2},
        {"epochs": 2},
        {"micro_batch": 2, "checkpointing": "full"},
        {"micro_batch": 2, "epochs": 2, "grpo": PAPER},
    ],
)
@pytest.mark.parametrize("lora", [False, True])
def test_a_captured_update_is_the_eager_one(make_policy, monkeypatch, settings, lora):
    """Captured passes on a CPU, where the graph calls the function: equal bits in weights and statistics."""
    monkeypatch.setattr(Replayed, "make", AsCaptured)
    AsCaptured.made = []
    ends = []
    for captured in (False, True):
        policy = make_policy(depth=2)
        if lora:
            policy.add_lora(VARLoRAConfig(rank=2), seed=0)
        maker = learner(policy, lr=1e-3, **settings)
        maker._captures = captured
        found = [maker.step(scored_rollout(policy, seed=step), step) for step in range(3)]
        ends.append((weights(policy), found))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert len(AsCaptured.made) == (3 if "micro_batch" in settings else 2)  # reference, first pass, later ones
    assert all(graph.replays > 1 for graph in AsCaptured.made)


def test_weight_of_the_entropy_is_logged_and_lifts_the_entropy(make_policy):
    """Advantages are 0 and there is no KL: the bonus alone moves the policy."""
    policy = make_policy(depth=2)
    maker = learner(policy, kl_beta=0.0, lr=3e-3, grpo={"entropy": {"coef": 0.5, "target": 0.9, "clamp": (0.0, 1.0)}})
    norms = []
    for step in range(4):
        rollout = policy.sample([0, 1, 2, 3] * 2, 0.7, seed=0)
        found = maker.step(Batch.of(rollout, torch.zeros(8)), step)
        norm = float(rollout.entropy_BL.mean()) / math.log(32)
        assert found["entropy_norm"] == pytest.approx(norm, rel=1e-6)
        expected = 0.5 * math.exp(3 * (0.9 - norm)) if abs(0.9 - norm) > 0.015 else 0.5
        assert found["entropy_coef"] == pytest.approx(min(1.0, expected), rel=1e-5)
        norms.append(norm)
    assert norms == sorted(norms)
    assert norms[-1] > norms[0] + 0.01


def test_a_second_epoch_compares_with_the_rollouts_policy_and_the_reference_of_its_start(make_policy):
    """K passes over one rollout: the old log-probabilities stay those of the rollout, in float64 written out."""
    policy = make_policy(depth=1)
    scored, reference = scored_rollout(policy), policy.frozen_copy()
    maker = make_learner(policy, reference, minibatch=8, lr=3e-3, epochs=2)
    seen = []
    loss_of = maker.loss.__class__.__call__

    def record(self, logp, batch):
        seen.append((logp.logp_BL.detach().double(), batch.rollout.logp_BL.double(), batch.logp_ref_BL.double()))
        return loss_of(self, logp, batch)

    maker.loss = type("Recording", (type(maker.loss),), {"__call__": record})(GRPOConfig(), 32)
    stats = maker.step(scored, 0)
    (_, old, ref), (second, old_again, ref_again) = [[x.sort(dim=0).values for x in found] for found in seen]
    assert torch.equal(old, old_again)
    assert torch.equal(ref, ref_again)
    ratios = [(logp - old).exp().mean() for logp, old, _ in seen]
    assert stats["ratio_mean"] == pytest.approx(float(sum(ratios)) / 2, rel=1e-5)
    assert not torch.allclose(second, old, atol=1e-4)


def test_gradients_stay_where_they_are_and_are_those_of_autograd(make_policy):
    policy = make_policy(depth=2)
    parameters = list(policy.var.parameters())
    tokens = torch.arange(28).view(2, 14) % 32

    def backward(labels):
        policy.token_logp(labels, tokens, 0.7).sum().backward()

    backward([0, 1])
    backward([2, 3])
    expected = [p.grad for p in parameters]
    gradients = Gradients(parameters)
    places = [p.grad.data_ptr() for p in parameters]
    gradients.flat_N.fill_(7.0)  # of the minibatch before
    gradients.overwrite()
    backward([0, 1])
    gradients.attach()
    backward([2, 3])
    assert [p.grad.data_ptr() for p in parameters] == places
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, expected, strict=True))
    gradients.zero()
    assert all(not p.grad.any() for p in parameters)


def test_norm_of_the_gradients_is_that_of_float64():
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (1, 65, 3_000_000)]
    gradients = Gradients(parameters)
    for parameter in parameters:
        parameter.grad.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    exact = torch.cat([p.grad.double() for p in parameters]).norm()
    torch.testing.assert_close(gradients.norm().double(), exact, rtol=1e-6, atol=0)
    parameters[1].grad[64] = float("inf")
    assert not gradients.norm().isfinite()


def test_a_capture_that_fails_is_said_once_and_runs_eagerly(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Replayed, "make", fail)
    said = []
    run = Replayed(lambda key, x: (key * x,), GraphPool(), said.append)
    assert [run(3, torch.tensor(float(i)))[0].item() for i in range(4)] == [0.0, 3.0, 6.0, 9.0]
    assert len(said) == 1
    assert said[0].endswith("operation not permitted when stream is capturing")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings", [{}, {"micro_batch": 2}, {"epochs": 2}, {"micro_batch": 2, "checkpointing": "full"}]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_update_equals_the_eager_one_on_a_gpu(make_models, settings, dtype):
    ends = []
    for captured in (False, True):
        policy = Policy(*make_models(depth=2), device="cuda", dtype=dtype)
        maker = learner(policy, lr=1e-3, cuda_graph=True, **settings)
        maker._captures = captured  # the same gradients in one buffer, whose norm is summed in an order of its own
        found = []
        for step in range(4):  # a rollout between updates: its graph shares their memory
            rollout = policy.sample([0, 0, 0, 0, 1, 1, 1, 1], 0.7, seed=1, step=step)
            rewards = torch.randn(8, generator=torch.Generator().manual_seed(step)).cuda()
            found.append(maker.step(Batch.of(rollout, group_advantages(rewards, 4)), step))
        assert len(maker._policy_pass._graphs) == captured * (1 + ("micro_batch" in settings))
        ends.append((weights(policy), found))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_memory_is_flat_over_20_steps_on_a_gpu(make_models, captured):
    policy = Policy(*make_models(depth=2), device="cuda", dtype="bfloat16")
    policy.cuda_graph = captured
    maker = learner(policy, cuda_graph=captured, micro_batch=2)
    peaks = []
    for step in range(20):
        torch.cuda.reset_peak_memory_stats()
        rollout, _ = policy.sample_images([0, 0, 0, 0, 1, 1, 1, 1], Sampling(0.7), Key(0, step), micro_batch=4)
        rewards = torch.randn(8, generator=torch.Generator().manual_seed(step)).cuda()
        maker.step(Batch.of(rollout, group_advantages(rewards, 4)), step)
        peaks.append((torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))
    for of_kind in zip(*peaks, strict=True):
        assert max(of_kind[10:]) <= max(of_kind[2:10])
