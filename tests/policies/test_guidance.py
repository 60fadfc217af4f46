"""Guidance inside the policy, against plain forward passes in float64.

Axes: B image, N row, L token, V vocabulary.
"""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats

from varfast import InputError, kernels
from varfast.advantages import group_advantages
from varfast.losses.grpo import kl_to_reference
from varfast.perf.graphs import Replayed
from varfast.policies.driver import Driver
from varfast.policies.guidance import guided_logits
from varfast.policies.var.config import VARLoRAConfig, VARPolicyConfig
from varfast.policies.var.policy import VARPolicy
from varfast.runs.before_after import BeforeAfter
from varfast.runs.folder import RunFolder
from varfast.train import train
from varfast.types import Batch, Sampling

from ..learners import make_learner
from .test_nexttoken import POLICIES
from .test_nexttoken import make as make_next_token

LABELS = [0, 1, 2, 3, 4, 0]
CFG, TEMPERATURE = 1.5, 0.7
NULL = 5  # the label that stands for none, after the five of tiny models


def plain_logits(policy, labels, tokens_BL, cfg, patch_nums):
    """(B, L, V) float64, from two plain passes: the specification. With the model that has the gradients."""
    wide = copy.deepcopy(policy.var).double()
    wide.compute_dtype = torch.float64
    read = policy.teacher_input(tokens_BL).double()
    conditional, unconditional = wide(torch.tensor(labels), read), wide(torch.full((len(labels),), NULL), read)
    last = len(patch_nums) - 1
    t_L = torch.tensor([cfg * k / last for k, side in enumerate(patch_nums) for _ in range(side * side)])
    t_L1 = t_L.double().unsqueeze(1)
    return (1 + t_L1) * conditional - t_L1 * unconditional, wide


def gathered(logp_BLV, tokens_BL):
    return logp_BLV.gather(-1, tokens_BL.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guided_logits_and_their_gradient_are_those_of_the_formula(dtype):
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional, weight = torch.randn(3, 2, 5, 7, generator=generator, dtype=torch.float64)
    t_L1 = torch.tensor([0.0, 0.5, 1.0, 4.0, -0.5]).double().unsqueeze(1)
    halves = [conditional.requires_grad_(), unconditional.requires_grad_()]
    expected = (1 + t_L1) * conditional - t_L1 * unconditional
    (expected * weight).sum().backward()
    logits = torch.cat([half.detach() for half in halves]).to(dtype).requires_grad_()
    given = logits * 1
    got = guided_logits(given, t_L1.flatten())
    assert got.data_ptr() == given.data_ptr()  # in place
    tolerance = {"rtol": 0, "atol": 3e-6 if dtype == torch.float32 else 1e-14}
    torch.testing.assert_close(got.double(), expected, **tolerance)
    (got * weight).sum().backward()
    torch.testing.assert_close(logits.grad.double(), torch.cat([half.grad for half in halves]), **tolerance)


def test_guided_logits_are_differentiated_once():
    logits = torch.randn(2, 1, 3, requires_grad=True)
    got = guided_logits(logits * 1, torch.ones(1)).sum()
    got.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="it cannot run twice"):
        got.backward()


@pytest.mark.parametrize("patch_nums", [(1, 2, 3), (2, 3, 5)])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_logp_entropy_and_gradient_equal_two_plain_passes_in_float64(make_policy, patch_nums, checkpointing):
    policy = make_policy(depth=2, patch_nums=patch_nums)
    rollout = policy.sample(LABELS, TEMPERATURE, seed=0, cfg=CFG)
    logits, wide = plain_logits(policy, LABELS, rollout.tokens_BL, CFG, patch_nums)
    logp_BLV = (logits / TEMPERATURE).log_softmax(-1)
    logp_BL, entropy_BL = gathered(logp_BLV, rollout.tokens_BL), -(logp_BLV.exp() * logp_BLV).sum(-1)
    weight_BL = torch.randn(logp_BL.shape, generator=torch.Generator().manual_seed(1)).double()
    (weight_BL * (logp_BL + 0.5 * entropy_BL)).sum().backward()

    forced = policy.teacher_forced(rollout, checkpointing=checkpointing, entropy=True)
    torch.testing.assert_close(forced.logp_BL.double(), logp_BL, rtol=0, atol=5e-5)
    torch.testing.assert_close(forced.entropy_BL.double(), entropy_BL, rtol=0, atol=5e-5)
    torch.testing.assert_close(rollout.entropy_BL.double(), entropy_BL, rtol=0, atol=5e-5)
    (weight_BL.float() * (forced.logp_BL + 0.5 * forced.entropy_BL)).sum().backward()
    for (name, ours), theirs in zip(policy.var.named_parameters(), wide.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        assert float((ours.grad.double() - theirs.grad).abs().max()) <= 2e-5 * max(1.0, scale), name
    assert float(wide.class_emb.weight.grad[NULL].abs().max()) > 0.1  # through the half without a label too


def test_a_kernel_may_write_the_gradient_over_the_logits(make_policy):
    """As on a GPU: the gradient arrives where the logits were, and both halves are written from it."""
    if not kernels.selection.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    found = []
    for impl in ("reference", "triton"):
        policy = make_policy()
        kernels.configure({"selective_log_softmax": impl})
        try:
            logp_BL = policy.token_logp([0, 1], torch.arange(28).view(2, 14), TEMPERATURE, cfg=CFG)
            logp_BL.sum().backward()
        finally:
            kernels.configure({})
        found.append([logp_BL.detach(), *(p.grad for p in policy.var.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{}, {"patch_nums": (2, 3, 5), "shared_adaln": True}, {"patch_nums": (1,)}])
@pytest.mark.parametrize("cfg", [0.5, 4.0])
def test_sample_logp_equals_token_logp(make_policy, sizes, cfg):
    policy = make_policy(**({"depth": 2} | sizes))
    rollout = policy.sample(LABELS, TEMPERATURE, seed=1, cfg=cfg, micro_batch=3)
    forced = policy.token_logp(LABELS, rollout.tokens_BL, TEMPERATURE, cfg=cfg)
    assert float((forced - rollout.logp_BL).abs().max()) < 5e-5
    assert rollout.on_policy
    assert (rollout.cfg, rollout.rows(slice(2, 4)).how) == (cfg, Sampling(TEMPERATURE, cfg))
    rows = rollout.rows(slice(2, 4))
    torch.testing.assert_close(policy.teacher_forced(rows).logp_BL, rollout.logp_BL[2:4], rtol=0, atol=5e-5)
    assert not policy.sample(LABELS, seed=1, cfg=cfg, top_k=3).on_policy


def test_llamagen_is_guided_by_the_scale_of_its_code(make_config):
    """uncond + s (cond - uncond); rollout, teacher forcing, its gradient and the first ratio of GRPO."""
    policy, scale = make_next_token("llamagen"), 2.0
    rollout = policy.sample(LABELS, TEMPERATURE, seed=0, cfg=scale, micro_batch=2)
    wide = copy.deepcopy(policy.transformer).double()
    wide.compute_dtype = torch.float64
    conditional, unconditional = (wide(torch.tensor(ids), rollout.tokens_BL) for ids in (LABELS, [NULL] * 6))
    logits = unconditional + scale * (conditional - unconditional)
    logp_BL = gathered((logits / TEMPERATURE).log_softmax(-1), rollout.tokens_BL)
    assert float((rollout.logp_BL.double() - logp_BL.detach()).abs().max()) < 5e-5
    forced = policy.teacher_forced(rollout)
    assert float((forced.logp_BL.detach() - rollout.logp_BL).abs().max()) < 5e-5
    logp_BL.sum().backward()
    forced.logp_BL.sum().backward()
    for (name, ours), theirs in zip(policy.transformer.named_parameters(), wide.parameters(), strict=True):
        scale = max(1.0, float(theirs.grad.abs().max()))
        assert float((ours.grad.double() - theirs.grad).abs().max()) <= 1e-4 * scale, name
    found = make_learner(policy, minibatch=4, lr=1e-3).step(scored(policy, cfg=2.0), 0)
    assert found["ratio_gap_max"] < 1e-4
    of_1, unguided = (policy.sample(LABELS, seed=0, cfg=cfg) for cfg in (1.0, 0.0))
    assert torch.equal(of_1.tokens_BL, unguided.tokens_BL)
    assert torch.equal(policy.teacher_forced(of_1).logp_BL, policy.teacher_forced(unguided).logp_BL)
    llamagen = {"policy": {"family": "llamagen", "checkpoint": "random", **POLICIES["llamagen"]}}
    assert make_config(**llamagen, rollout__cfg=1.5).rollout.rows == 2
    with pytest.raises(InputError, match="rollout.cfg=1 guides nothing with policy.family=llamagen"):
        make_config(**llamagen, rollout__cfg=1.0)


def test_taming_cannot_be_guided(make_config):
    policy = make_next_token("taming")
    with pytest.raises(InputError, match="knows no label that stands for none, so it cannot be guided"):
        policy.token_logp([0], torch.zeros(1, 9, dtype=torch.int64), cfg=CFG)
    taming = {"policy": {"family": "taming", "checkpoint": "random", **POLICIES["taming"]}}
    make_config(**taming)
    with pytest.raises(InputError, match="policy.family=taming know no label that stands for none"):
        make_config(**taming, rollout__cfg=CFG)


@torch.no_grad()
def test_tokens_are_drawn_from_the_guided_distribution(make_policy):
    """Of the second scale, given the first token, whose every value is enumerated."""
    policy, draws = make_policy(patch_nums=(1, 2)), 6000
    with torch.no_grad():
        policy.var.head.weight.mul_(0.5)  # logits of which most codes are seen
    tokens_BL = policy.sample([3] * draws, 1.0, seed=2, cfg=2.0).tokens_BL
    every_VL = torch.zeros(32, 5, dtype=torch.int64)
    every_VL[:, 0] = torch.arange(32)
    prob_VLV = plain_logits(policy, [3] * 32, every_VL, 2.0, (1, 2))[0].softmax(-1)
    expected_V = prob_VLV[0, 0] @ prob_VLV[:, 2] * draws
    unguided_VLV = plain_logits(policy, [3] * 32, every_VL, 0.0, (1, 2))[0].softmax(-1)
    observed_V = torch.bincount(tokens_BL[:, 2], minlength=32).double()

    def p_value(expected_V):
        cell = (expected_V.sort().values.cumsum(0) / 10).floor().unique(return_inverse=True)[1]  # of 10 at least
        pooled = torch.zeros(2, int(cell.max()) + 1).double()
        pooled.index_add_(1, cell, torch.stack([observed_V, expected_V])[:, expected_V.argsort()])
        return stats.chisquare(pooled[0].numpy(), (pooled[1] * draws / pooled[1].sum()).numpy()).pvalue

    assert p_value(expected_V) > 1e-3
    assert p_value(unguided_VLV[0, 0] @ unguided_VLV[:, 2] * draws) < 1e-9


def scored(policy, **how):
    rollout = policy.sample([0, 0, 0, 0, 1, 1, 1, 1], TEMPERATURE, seed=0, **how)
    return Batch.of(rollout, group_advantages(torch.randn(8, generator=torch.Generator().manual_seed(0)), 4))


def test_grpo_s_first_ratio_is_1_only_if_the_update_is_guided_as_the_rollout_was(make_policy):
    policy = make_policy(depth=2)
    batch = scored(policy, cfg=CFG)
    found = make_learner(policy, minibatch=4, micro_batch=2, lr=1e-3).step(batch, 0)
    assert found["ratio_gap_max"] < 1e-4
    assert found["kl"] > 1e-8
    policy = make_policy(depth=2)
    as_peers_do = replace(batch, rollout=replace(batch.rollout, cfg=0.0))
    assert make_learner(policy, minibatch=4, lr=1e-3).step(as_peers_do, 0)["ratio_gap_mean"] > 0.3


def test_a_filtered_rollout_is_refused(make_policy):
    policy = make_policy()
    with pytest.raises(InputError, match="drawn with top_k or top_p"):
        make_learner(policy, minibatch=4).step(scored(policy, cfg=CFG, top_k=3), 0)


def test_the_kl_is_to_the_guided_reference(make_policy):
    policy = make_policy(depth=2)
    reference = policy.frozen_copy()
    assert float(kl_to_reference(reference, policy.sample(LABELS, seed=0, cfg=CFG), 2).max()) < 1e-8
    with torch.no_grad():
        for parameter in policy.var.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    rollout = policy.sample(LABELS, seed=0, cfg=CFG)
    logits = [
        plain_logits(p, LABELS, rollout.tokens_BL, CFG, (1, 2, 3))[0].log_softmax(-1) for p in (policy, reference)
    ]
    ours, theirs = (gathered(logp_BLV.detach(), rollout.tokens_BL) for logp_BLV in logits)
    expected_B = ((theirs - ours).exp() - (theirs - ours) - 1).mean(1)
    torch.testing.assert_close(kl_to_reference(reference, rollout).double(), expected_B, rtol=1e-3, atol=1e-7)


def test_captured_passes_are_told_apart_by_their_guidance(make_policy, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Replayed, "__call__", lambda self, key, *inputs: seen.append(key) or self._function(key, *inputs)
    )
    for cfg in (0.0, CFG):
        policy = make_policy()
        learner = make_learner(policy, minibatch=8)
        learner._captures = True
        learner.step(scored(policy, cfg=cfg), 0)
    hows = [Sampling(TEMPERATURE, cfg) for cfg in (0.0, CFG)]
    assert seen == [key for how in hows for key in (how, (how, True))]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_rollout_and_update_equal_the_eager_ones_on_a_gpu(make_models, dtype):
    """Of one guidance after another: a graph of the first is not replayed for the second."""
    ends = []
    for captured in (False, True):
        policy = VARPolicy(*make_models(depth=2), device="cuda", dtype=dtype)
        policy.cuda_graph = captured
        learner = make_learner(policy, minibatch=4, lr=1e-3, cuda_graph=True)
        learner._captures = captured
        found = []
        for step, cfg in enumerate([0.0, 0.0, CFG, CFG, CFG, 3.0, 3.0, 3.0]):
            rollout = policy.sample([0, 0, 0, 0, 1, 1, 1, 1], TEMPERATURE, seed=1, step=step, cfg=cfg)
            rewards = torch.randn(8, generator=torch.Generator().manual_seed(step)).cuda()
            found.append(learner.step(Batch.of(rollout, group_advantages(rewards, 4)), step))
            found.append(rollout.logp_BL.cpu())
        ends.append((found, torch.cat([p.detach().flatten() for p in policy.var.parameters()])))
    for eager, replayed in zip(*(found for found, _ in ends), strict=True):
        assert torch.equal(eager, replayed) if isinstance(eager, torch.Tensor) else eager == replayed
    assert torch.equal(ends[0][1], ends[1][1])


def test_an_adapter_is_guided_too(make_policy):
    policy = make_policy(depth=2)
    policy.add_lora(VARLoRAConfig(rank=2, targets=("mat_qkv", "fc1")), seed=0)
    for name, parameter in policy.var.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.constant_(parameter, 0.02)
    rollout = policy.sample(LABELS, TEMPERATURE, seed=0, cfg=CFG)
    forced = policy.teacher_forced(rollout).logp_BL
    torch.testing.assert_close(forced.detach(), rollout.logp_BL, rtol=0, atol=5e-5)
    forced.sum().backward()
    assert all(p.grad is not None for p in policy.var.parameters() if p.requires_grad)


def test_check_usable_samples_what_is_trained(make_policy):
    policy = make_policy()
    with torch.no_grad():
        policy.var.class_emb.weight[NULL] = 1e30
    policy.check_usable([0, 3], 1.0, 0)
    with pytest.raises(InputError, match="logits hold NaN or infinite numbers"):
        policy.check_usable([0, 3], 1.0, 0, CFG)


def test_a_family_without_a_label_for_none_refuses_guidance(make_policy, make_config, monkeypatch):
    monkeypatch.setattr(VARPolicy, "_strengths", Driver._strengths)
    policy = make_policy()
    tokens_BL = policy.sample([0], seed=0).tokens_BL
    monkeypatch.setattr(VARPolicyConfig, "unguided_cfg", None)
    with pytest.raises(InputError, match="policy.family=var know no label that stands for none"):
        make_config(rollout__cfg=CFG)
    make_config()
    for call in (
        lambda: policy.sample([0], seed=0, cfg=CFG),
        lambda: policy.token_logp([0], tokens_BL, cfg=CFG),
    ):
        with pytest.raises(InputError, match="cfg=1.5: VARPolicy knows no label that stands for none"):
            call()


@pytest.mark.parametrize("cfg", [-0.1, float("nan")])
def test_negative_guidance_is_refused(make_policy, make_config, cfg):
    with pytest.raises(InputError, match="want cfg >= 0"):
        make_policy().token_logp([0], torch.zeros(1, 14, dtype=torch.int64), cfg=cfg)
    with pytest.raises(InputError, match="rollout.cfg"):
        make_config(rollout__cfg=cfg)


def test_guidance_of_a_model_that_is_pre_trained_without_class_dropout_is_refused(make_config):
    pretrain = {"policy__checkpoint": "pretrain", "pretrain__class_dropout": 0.0}
    with pytest.raises(InputError, match="set pretrain.class_dropout=0.1, or rollout.cfg=0"):
        make_config(**pretrain, rollout__cfg=CFG)
    make_config(**pretrain)


def metrics(config):
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


def trained(config):
    return torch.load(RunFolder(config.run.dir).weights(config), weights_only=True)


def test_a_guided_run_and_one_that_goes_on_are_the_same(make_config):
    straight = make_config(rollout__cfg=CFG, update__lr=1e-3)
    assert train(straight) == 0
    rows = metrics(straight)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["ratio_gap_max"] < 1e-4 and row["grad_norm"] > 0 for row in rows)
    content = json.loads((Path(straight.run.dir) / "before_after.json").read_text())
    assert content["settings"]["cfg"] == CFG
    in_parts = {"rollout__cfg": CFG, "update__lr": 1e-3, "run__dir": straight.run.dir + "_in_parts"}
    for steps in (2, 3):
        assert train(make_config(**in_parts, run__steps=steps)) == 0
    expected, found = trained(straight), trained(make_config(**in_parts))
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())
    with pytest.raises(InputError, match="rollout.cfg"):
        train(make_config(**in_parts | {"rollout__cfg": 2.0}))
    unguided = make_config(run__dir=straight.run.dir + "_unguided", update__lr=1e-3)
    assert train(unguided) == 0
    assert metrics(unguided)[0]["entropy"] != rows[0]["entropy"]
    assert "cfg" not in BeforeAfter(Path(unguided.run.dir), unguided, [0])._settings
