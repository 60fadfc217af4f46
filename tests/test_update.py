import copy

import pytest
import torch

from varfast import InputError
from varfast.config import GRPOConfig, UpdateConfig
from varfast.grpo import group_advantages
from varfast.types import ScoredRollout
from varfast.update import Updater, learning_rate


def scored_rollout(policy, count=8, seed=0, **inference):
    rollout = policy.sample([0, 0, 0, 0, 1, 1, 1, 1][:count], 0.7, seed=seed, **inference)
    rewards = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return ScoredRollout(rollout, group_advantages(rewards, 4))


def updater(policy, kl_beta=0.2, **update):
    reference = policy.frozen_copy() if kl_beta else None
    return Updater(policy, reference, GRPOConfig(kl_beta=kl_beta), UpdateConfig(**({"minibatch": 4} | update)), 10, 0)


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.var.parameters()])


def test_first_ratio_is_one_and_later_ones_are_not(make_policy):
    policy = make_policy(depth=2)
    stats = updater(policy, lr=1e-3, epochs=3).step(scored_rollout(policy), 0)
    assert 0 <= stats.ratio_gap_mean <= stats.ratio_gap_max < 1e-4
    assert stats.kl > 1e-6
    assert stats.ratio_mean != pytest.approx(1.0, abs=1e-6)


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
    ratio, advantage = (new - old).exp(), scored.advantages_B.double()[:, None]
    k3 = (q_from - new).exp() - (q_from - new) - 1
    loss = -(torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) - 0.2 * k3).mean(1).mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in wide.parameters()])
    norm = gradient.norm()

    maker = Updater(policy, reference, GRPOConfig(), UpdateConfig(minibatch=8, micro_batch=2, lr=1e-3), 10, 0)
    stats = maker.step(scored, 0)
    assert stats.loss == pytest.approx(loss.item(), rel=1e-4)
    assert stats.grad_norm == pytest.approx(norm.item(), rel=1e-4)
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
        stats = updater(policy, micro_batch=micro_batch).step(scored_rollout(policy), 0)
        results.append((weights(policy), stats))
    for other_weights, other in results[1:]:
        torch.testing.assert_close(other_weights, results[0][0], rtol=0, atol=2e-5)
        assert other.loss == pytest.approx(results[0][1].loss, abs=1e-6)


def test_only_the_policy_moves(make_policy):
    policy = make_policy(depth=2)
    maker = updater(policy)
    before = weights(maker.reference)
    vqvae = [p.clone() for p in policy.vqvae.parameters()]
    maker.step(scored_rollout(policy), 0)
    assert torch.equal(weights(maker.reference), before)
    assert not torch.equal(weights(policy), before)
    assert all(torch.equal(a, b) for a, b in zip(vqvae, policy.vqvae.parameters(), strict=True))


def test_rewarded_tokens_become_more_likely(make_policy):
    policy = make_policy(depth=2)
    scored = scored_rollout(policy)
    updater(policy, kl_beta=0.0, lr=1e-3).step(scored, 0)
    with torch.no_grad():
        moved = (
            policy.token_logp(scored.rollout.labels_B, scored.rollout.tokens_BL, 0.7) - scored.rollout.logp_BL
        ).mean(1)
    assert float((moved * scored.advantages_B).sum()) > 0
    assert float(torch.corrcoef(torch.stack([moved, scored.advantages_B]))[0, 1]) > 0.5


def test_no_signal_and_no_kl_moves_nothing(make_policy):
    policy = make_policy()
    before = weights(policy)
    rollout = policy.sample([0] * 4, 0.7, seed=0)
    updater(policy, kl_beta=0.0).step(ScoredRollout(rollout, torch.zeros(4)), 0)
    assert torch.equal(weights(policy), before)


def test_kl_pulls_back_to_the_reference(make_policy):
    policy = make_policy(depth=2)
    maker = updater(policy, kl_beta=1.0, lr=3e-3)
    with torch.no_grad():
        for parameter in policy.var.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    rollout = policy.sample([0, 1, 2, 3] * 8, 0.7, seed=0)
    kl = [maker.step(ScoredRollout(rollout, torch.zeros(32)), step).kl for step in range(20)]
    assert kl[-1] < 0.5 * kl[0]


def test_step_refuses_a_rollout_that_is_not_on_policy(make_policy):
    policy = make_policy()
    with pytest.raises(InputError, match="cfg, top_k or top_p"):
        updater(policy).step(scored_rollout(policy, top_k=3), 0)


def test_a_gradient_that_is_not_finite_reaches_no_weight(make_policy):
    policy = make_policy()
    scored = scored_rollout(policy)
    before = weights(policy)
    bad = ScoredRollout(scored.rollout, torch.full((8,), float("nan")))
    with pytest.raises(RuntimeError, match="non-finite"):
        updater(policy).step(bad, 0)
    assert torch.equal(weights(policy), before)


def test_learning_rate_schedules():
    def rates(**settings):
        return [learning_rate(UpdateConfig(lr=1.0, **settings), step, 10) for step in (0, 1, 4, 9)]

    assert rates() == [1.0] * 4
    assert rates(warmup_steps=4) == [0.25, 0.5, 1.0, 1.0]
    assert rates(lr_schedule="linear") == pytest.approx([1.0, 0.9, 0.6, 0.1])
    assert rates(lr_schedule="cosine") == pytest.approx([1.0, 0.97553, 0.65451, 0.02447], abs=1e-5)
