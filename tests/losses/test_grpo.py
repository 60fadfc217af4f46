"""GRPO with each of its settings, from logits: loss and gradient against the formulas in float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from varfast import kernels
from varfast.losses.config import EntropyConfig, GRPOConfig
from varfast.losses.entropy import EntropyBonus, adapted, schedule
from varfast.losses.grpo import GRPO, scale_weights
from varfast.train import train
from varfast.types import Batch, InputError, TokenLogp

from ..runs import metrics

SIDES = (1, 2, 3)
B, L, V = 6, 14, 23
SETTINGS = {
    "default": {},
    "no KL": {"kl_beta": 0.0},
    "sequence": {"ratio": "sequence"},
    "unbiased": {"kl_gradient": "unbiased"},
    "entropy": {"entropy": {}},
    "entropy alone": {"entropy": {"coef": 0.1, "target": 0.99, "clamp": [0.0, 1.0]}, "kl_beta": 0.0},
    "scales": {"scale_alpha": 0.7},
    "paper": {"ratio": "sequence", "entropy": {}, "kl_beta": 3.0},
    "all": {"ratio": "sequence", "kl_gradient": "unbiased", "entropy": {"target": 0.5}, "scale_alpha": 0.6},
}


def drawn():
    """Logits, tokens, log-probabilities of the rollout and of the reference, advantages; entropies of the rollout."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, L, V, generator=generator, dtype=torch.float64)
    tokens = torch.randint(V, (B, L), generator=generator)

    def moved(size):
        other = logits + size * torch.randn(B, L, V, generator=generator, dtype=torch.float64)
        return other.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

    advantages = torch.linspace(-1.0, 2.0, B, dtype=torch.float64)  # losses of tokens do not cancel
    return SimpleNamespace(logits=logits, tokens=tokens, old=moved(0.3), ref=moved(0.3), advantages=advantages)


def formula(given, config, step, total):
    """Written out for a leaf of logits: the papers' loss."""
    logits = given.logits.clone().requires_grad_()
    every = logits.log_softmax(-1)
    logp = every.gather(-1, given.tokens[..., None])[..., 0]
    advantages = given.advantages[:, None].expand(B, L)
    if config.scale_alpha:
        weights = torch.cat([torch.full((s * s,), float(s * s) ** -config.scale_alpha) for s in SIDES]).double()
        advantages = advantages * weights / weights.mean()
    token_ratio = (logp - given.old).exp()
    if config.ratio == "token":
        ratio = token_ratio
    elif config.scale_alpha:  # GSPO-token
        ratio = (logp - given.old).mean(1, keepdim=True).exp().detach() * (logp - logp.detach()).exp()
    else:
        ratio = (logp - given.old).mean(1, keepdim=True).exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    q = given.ref - logp
    kl = q.exp() - q - 1
    if config.kl_gradient == "unbiased":
        kl = token_ratio * kl
    loss = -(surrogate - config.kl_beta * kl).mean(1).mean()
    if config.entropy is not None:
        entropy = -(every.exp() * every).sum(-1)
        norm = float(entropy.detach().mean()) / math.log(V)
        c = config.entropy.coef * (0.5 if (step, total) == (0, 40) else 1.0)
        if abs(config.entropy.target - norm) > 0.015:
            c *= math.exp(3 * (config.entropy.target - norm))
        low, high = config.entropy.clamp
        loss = loss - min(max(c, low), high) * entropy.mean()
    loss.backward()
    return loss.detach(), logits.grad


def batch_of(given, config, dtype, weights):
    logp = given.logits.log_softmax(-1)
    rollout = SimpleNamespace(
        logp_BL=given.old.to(dtype), entropy_BL=-(logp.exp() * logp).sum(-1).to(dtype), tokens_BL=given.tokens
    )
    reference = given.ref.to(dtype) if config.kl_beta else None
    whole = Batch.of(rollout, given.advantages.to(dtype), weights)
    return Batch(rollout, whole.advantages_BL, reference)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_equal_the_formula_in_float64(monkeypatch, name, dtype, impl):
    config, given = GRPOConfig(**SETTINGS[name]), drawn()
    if impl == "reference":
        plain = kernels.grpo_token_loss
        monkeypatch.setattr(kernels, "grpo_token_loss", lambda *a, **k: plain(*a, **k, impl="reference"))
    step, total = 0, 40  # the first of two steps of warm-up
    exact_loss, exact_gradient = formula(given, config, step, total)
    loss = GRPO(config, V)
    weights = scale_weights(SIDES, config.scale_alpha).to(dtype) if config.scale_alpha else None
    batch = batch_of(given, config, dtype, weights)
    loss.begin(batch, step, total)
    logits = given.logits.to(dtype).requires_grad_()
    found = kernels.selective_log_softmax(logits, given.tokens)
    value, stats = loss(TokenLogp(*found) if loss.needs_entropy else TokenLogp(found[0]), batch)
    value.backward()
    assert float((logits.grad - exact_gradient).norm() / exact_gradient.norm()) < 1e-6
    assert float(value.detach()) == pytest.approx(float(exact_loss), rel=1e-6)
    assert stats.shape == (len(loss.stats),)
    assert not stats.requires_grad


def test_statistics_have_the_names_of_what_is_measured():
    names = lambda **settings: [stat.name for stat in GRPO(GRPOConfig(**settings), V).stats]  # noqa: E731
    assert names() == list(kernels.GRPO_STATS)
    assert names(kl_beta=0.0) == list(kernels.GRPO_STATS[1:])
    assert names(entropy={}) == [*kernels.GRPO_STATS, "entropy_coef", "entropy_norm"]
    config, given = GRPOConfig(entropy={"target": 0.5}, kl_beta=0.0), drawn()
    loss, batch = GRPO(config, V), batch_of(given, config, torch.float64, None)
    loss.begin(batch, 20, 40)
    _, stats = loss(TokenLogp(given.old, batch.rollout.entropy_BL), batch)
    named = dict(zip((stat.name for stat in loss.stats), stats.tolist(), strict=True))
    norm = float(batch.rollout.entropy_BL.mean()) / math.log(V)
    assert named["entropy_norm"] == pytest.approx(norm, rel=1e-6)
    assert named["entropy_coef"] == pytest.approx(2.2e-3 * math.exp(3 * (0.5 - norm)), rel=1e-6)
    assert named["ratio_gap_max"] == 0.0


def test_schedule_warms_up_stays_and_falls():
    found = [schedule(step, 100) for step in range(100)]
    assert found[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert set(found[5:86]) == {1.0}
    assert found[92] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 15)))
    assert 0 < found[99] < 0.02
    assert schedule(0, 1) == 1.0


def test_weight_of_the_entropy_follows_the_papers_rule():
    config = EntropyConfig()
    weight = lambda norm, coef=2.2e-3: float(adapted(coef, torch.tensor(norm, dtype=torch.float64), config))  # noqa: E731
    assert weight(0.78) == weight(0.766) == weight(0.794) == pytest.approx(2.2e-3)
    assert weight(0.70) == pytest.approx(2.2e-3 * math.exp(0.24))
    assert weight(0.90) == pytest.approx(2.2e-3 * math.exp(-0.36))
    assert weight(0.10) == pytest.approx(4e-3)
    assert weight(0.78, coef=1e-5) == pytest.approx(7e-5)
    assert weight(0.78, coef=0.0) == pytest.approx(7e-5)  # the clamp comes last


def test_a_captured_update_would_read_the_weight_of_each_step():
    """The tensor stays where it is, and holds another number after the next `begin`."""
    bonus = EntropyBonus(EntropyConfig(), V)
    place, found = bonus.now.data_ptr(), []
    for entropy in (1.0, 2.5):
        bonus.begin(torch.full((2, 3), entropy), 20, 40)
        found.append(bonus.now.tolist())
    assert bonus.now.data_ptr() == place
    assert found[0][0] > found[1][0]
    assert [norm for _, norm in found] == pytest.approx([1.0 / math.log(V), 2.5 / math.log(V)])


def test_images_without_an_advantage_are_left_out_only_where_nothing_else_moves_them():
    given = drawn()
    given.advantages = given.advantages * 0
    for settings, kept in (({"kl_beta": 0.0}, [False] * B), ({"kl_beta": 0.0, "entropy": {}}, None), ({}, None)):
        config = GRPOConfig(**settings)
        keep = GRPO(config, V).keep(batch_of(given, config, torch.float32, None))
        assert (keep if keep is None else keep.tolist()) == kept


def test_scale_weights_by_hand():
    # 1, 4 and 9 tokens, of 1, 1/4 and 1/9 each: a sum of 3 over 14.
    weights = scale_weights(SIDES, 1.0)
    expected = torch.tensor([1.0] + [1 / 4] * 4 + [1 / 9] * 9) * 14 / 3
    torch.testing.assert_close(weights, expected)
    assert weights.dtype == torch.float32
    assert torch.equal(scale_weights(SIDES, 0.0), torch.ones(14))
    public = scale_weights((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 0.7)
    assert float(public.mean()) == pytest.approx(1.0)
    assert float(public[0] / public[-1]) == pytest.approx(256**0.7)


@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_a_family_of_single_tokens_trains_with_all_settings_it_has(make_config, cfg):
    sizes = {"depth": 1, "width": 32, "num_heads": 4, "vocab_size": V, "num_classes": 5, "side": 3}
    vq = {"base_channels": 32, "channel_multipliers": [1, 1], "num_res_blocks": 1, "latent_width": 32, "code_width": 4}
    policy = {"family": "llamagen", "checkpoint": "random", "gpt": sizes | {"mlp_width": 48}, "vq": vq}
    grpo = {"ratio": "sequence", "kl_gradient": "unbiased", "reference_ema": 0.9, "entropy": {"target": 0.9}}
    config = make_config(policy=policy, grpo=grpo, rollout__cfg=cfg, run__steps=2, update__epochs=2, update__lr=1e-3)
    assert train(config) == 0
    for line in metrics(config.run.dir):
        norm = line["entropy"] / math.log(V)
        assert line["entropy_norm"] == pytest.approx(norm, rel=1e-5)
        assert line["ratio_gap_max"] < 1e-4
        assert 7e-5 <= line["entropy_coef"] <= 4e-3
        assert line["kl"] > 1e-9  # measured over both epochs
    with pytest.raises(InputError, match=r"grpo.scale_alpha=0.7 .* policy.family=llamagen has no scales: leave it out"):
        make_config(policy=policy, grpo={"scale_alpha": 0.7})


@pytest.mark.parametrize(
    "beside",
    [{"run__strict": True, "run__dtype": "bfloat16"}, {"policy__lora": {"rank": 2}, "update__lr": 1e-2}],
    ids=["strict", "adapter"],
)
def test_all_settings_of_the_loss_work_in_strict_mode_and_with_an_adapter(make_config, beside):
    grpo = SETTINGS["all"] | {"normalise_std": False}
    config = make_config(grpo=grpo, run__steps=2, update__epochs=2, **beside)
    assert train(config) == 0
    gaps = [line["ratio_gap_max"] for line in metrics(config.run.dir)]
    assert all(gap == 0.0 if "run__strict" in beside else gap < 1e-4 for gap in gaps)
    assert all(line["entropy_norm"] > 0 and line["grad_norm"] > 0 for line in metrics(config.run.dir))


def test_an_advantage_a_token_stays_with_its_image_in_a_micro_batch():
    given, weights = drawn(), scale_weights(SIDES, 0.7)
    batch = batch_of(given, GRPOConfig(), torch.float32, weights)
    rollout = SimpleNamespace(rows=lambda index: None)
    part = Batch(rollout, batch.advantages_BL).rows(torch.tensor([4, 1]))
    torch.testing.assert_close(part.advantages_BL, given.advantages[[4, 1]].float()[:, None] * weights)
