"""The stages of a GRPO step, and a whole one, against plain PyTorch and against the roofline. Decoder: bench_decode.py.

    pytest bench/bench_step.py --benchmark-only
    VARFAST_BENCH_LARGE=1 pytest bench/bench_step.py --benchmark-only     on a CPU: d16 too, in ten minutes

Random weights: times do not depend on their values. On a GPU d16 and d30; on a CPU the digits' model, and d16 with 4
images; in bfloat16 where the device computes in it. Peers do the same work: `plain` with every op in plain PyTorch,
eagerly, in the same dtype; `compiled` as plain, with the transformer under torch.compile; `public` in float32, sampling
with the guidance half, which the public code always computes. FLOPs and bytes: varfast.roofline.
"""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path

import harness
import pytest
import torch

from varfast import kernels
from varfast.config import Config, load_config
from varfast.grpo import group_advantages
from varfast.kernels.selection import _OPS
from varfast.policy import Policy
from varfast.rewards import WeightedSum
from varfast.roofline import available_bytes, measure_here, planned, stage_counts, with_dtype
from varfast.train import random_policy
from varfast.types import ScoredRollout
from varfast.update import Updater

CONFIGS = Path(__file__).parent.parent / "configs"
CUDA, DEVICE = harness.CUDA, harness.DEVICE
LARGE = CUDA or os.environ.get("VARFAST_BENCH_LARGE") == "1"
ROLLOUTS = [("digits", 512)] + ([("d16", 4)] if LARGE else [])
STEPS = ROLLOUTS
if CUDA:
    ROLLOUTS = [(model, images) for model in ("d16", "d30") for images in (16, 64, 512)]
    STEPS = [("d16", 512), ("d30", 512)]


@functools.lru_cache(maxsize=1)  # one model at a time on the device
def models(name: str) -> dict[str, Policy]:
    """Ours and the peers, with the same weights."""
    ours = random_policy(step_config(name, 2), DEVICE)
    dtype = str(ours.var.compute_dtype).removeprefix("torch.")
    policies = {"ours": ours, "plain": Policy(ours.var, ours.vqvae, DEVICE, dtype, fast=False)}
    if CUDA:
        policies["compiled"] = Policy(ours.var, ours.vqvae, DEVICE, dtype, fast=False)
        # What a user of torch.compile would do: every scale and the whole forward pass are graphs of their own.
        twin = policies["compiled"].var = copy.copy(ours.var)
        twin.forward_scale = torch.compile(twin.forward_scale, dynamic=False)
        twin.forward = torch.compile(twin.forward, dynamic=False)
        policies["compiled"]._sampler._original = twin
    if not CUDA:
        policies["public"] = Policy(copy.deepcopy(ours.var), ours.vqvae, DEVICE, "float32", fast=False)
    return policies


@functools.cache
def step_config(name: str, images: int) -> Config:
    """The paper's settings for so many images a step, and the micro-batches that fit."""
    labels = min(32, images // 2)
    overrides = [
        "policy.checkpoint=random",
        f"rollout.labels_per_step={labels}",
        f"rollout.group_size={images // labels}",
    ]
    overrides += [f"update.minibatch={min(32, images)}", f"run.device={DEVICE.type}"]
    overrides.append("run.dtype=auto")
    if name == "digits":
        return planned(with_dtype(load_config(CONFIGS / "digits.yaml", overrides), DEVICE), available_bytes(DEVICE))
    overrides += [f"policy.preset={name}", "policy.vqvae_checkpoint=null", "rollout.micro_batch=null"]
    overrides += ["update.micro_batch=null"]
    return planned(with_dtype(load_config(CONFIGS / "d30.yaml", overrides), DEVICE), available_bytes(DEVICE))


def by(name, call):
    """Ours as it is, a peer with every op in plain PyTorch."""

    def run():
        if name != "ours":
            kernels.configure(dict.fromkeys(_OPS, "reference"))
        call()
        kernels.configure({})

    return run


def measure(benchmark, rows, stages, name, images, calls, what):
    config = step_config(name, images)
    counts = stage_counts(config)
    flop, io_bytes = (sum(getattr(counts[s], kind) for s in stages) for kind in ("flop", "io_bytes"))
    row = harness.Row(what, f"{name}, {images} images", "forward", 0.0, flop=flop, io_bytes=io_bytes)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        calls["ours"]()
        row.peak_bytes = torch.cuda.max_memory_allocated()
    ceilings = measure_here(DEVICE, getattr(torch, config.run.dtype))
    harness.measure(benchmark, rows, ceilings, row, {who: by(who, call) for who, call in calls.items()})
    benchmark.extra_info |= {"images_per_s": round(images / row.ms * 1e3, 1), "threads": torch.get_num_threads()}


def labels_of(images):
    return (torch.arange(images) % 10).sort().values.to(DEVICE)


@pytest.mark.parametrize(("name", "images"), ROLLOUTS)
def test_rollout(benchmark, rows, name, images):
    micro_batch, labels = step_config(name, images).rollout.micro_batch, labels_of(images)

    def sampling(policy, cfg):
        return lambda: policy.sample(labels, 0.7, seed=0, cfg=cfg, micro_batch=micro_batch)

    calls = {who: sampling(policy, 1.5 if who == "public" else 0.0) for who, policy in models(name).items()}
    measure(benchmark, rows, ["rollout"], name, images, calls, "rollout")


@pytest.mark.parametrize(("name", "images"), [("d16", 32), ("d30", 32)] if CUDA else STEPS)
def test_update(benchmark, rows, name, images):
    """Reference, forward, backward and optimizer of so many images."""
    config, labels = step_config(name, images), labels_of(images)
    rewards = torch.randn(images, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    advantages = group_advantages(rewards, config.rollout.group_size)

    def updating(policy):
        updater = Updater(policy, policy.frozen_copy(), config.grpo, config.update, 1, 0)
        scored = ScoredRollout(policy.sample(labels, 0.7, seed=0, micro_batch=config.rollout.micro_batch), advantages)
        return lambda: updater.step(scored, 0)

    calls = {who: updating(policy) for who, policy in models(name).items()}
    measure(benchmark, rows, ["reference", "update", "optimizer"], name, images, calls, "update")


@pytest.mark.parametrize(("name", "images"), STEPS)
def test_step(benchmark, rows, name, images):
    config, labels = step_config(name, images), labels_of(images)
    reward = WeightedSum(config.reward, DEVICE)

    def stepping(policy):
        updater = Updater(policy, policy.frozen_copy(), config.grpo, config.update, 1, 0)

        def step():
            rollout, pictures = policy.sample_images(labels, 0.7, seed=0, micro_batch=config.rollout.micro_batch)
            advantages = group_advantages(reward(pictures, labels).total_B, config.rollout.group_size)
            updater.step(ScoredRollout(rollout, advantages), 0)

        return step

    # The public code has no GRPO step; ours in float32 stands for it.
    calls = {who: stepping(policy) for who, policy in models(name).items()}
    measure(benchmark, rows, list(stage_counts(config)), name, images, calls, "step")
