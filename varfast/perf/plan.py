"""The plan of memory: micro-batches, checkpointing and CUDA graphs of a step that fit a device."""

from __future__ import annotations

import math
from dataclasses import replace

from varfast.perf.cost import Checkpointing
from varfast.perf.memory import (
    USABLE,
    MemoryPlan,
    RolloutPlan,
    UpdatePlan,
    captured_decode_bytes,
    captured_rollout_bytes,
    held_states,
    kept_bytes,
    memory,
)
from varfast.perf.work import Work

# See update_plan: below this many rows at a time, recomputing costs less than more passes over the weights.
ENOUGH_ROWS = 8


def plan_memory(work: Work, device_bytes: float | None, may_capture_update: bool = False) -> MemoryPlan:
    """Follow the config; what it leaves open is chosen to run fastest in the memory of a device.

    Args:
        device_bytes: all of the memory that this process may use; None: no limit.
        may_capture_update: if update.cuda_graph is null, capture the update when a plan with its graph fits.
    """
    room = math.inf if device_bytes is None else device_bytes
    asked = work.config.update.cuda_graph
    if asked is None and may_capture_update:
        captured = _plan(work, room, captures_update=True)
        if memory(work, captured).fits(room):
            return captured
    return _plan(work, room, captures_update=bool(asked))


def _plan(work: Work, device_bytes: float, captures_update: bool) -> MemoryPlan:
    asked, free = work.config.rollout, device_bytes - held_states(work).total
    sampled, update = rollout_micro_batch(work, free), update_plan(work, free)
    # A captured rollout holds its memory while the update runs. If that made the update's micro-batch smaller, the
    # rollout is not captured: with enough images to fill the memory, kernels take longer than their launches. A
    # captured update shares the memory of the rollout's graph.
    beside_graph = update
    if work.config.run.fast and asked.cuda_graph is not False and not captures_update:
        held = captured_rollout_bytes(work, sampled) + captured_decode_bytes(work, sampled)
        beside_graph = update_plan(work, free - held / USABLE)
    graph = beside_graph == update if asked.cuda_graph is None else asked.cuda_graph
    micro_batch, checkpointing = beside_graph if graph else update
    plan = MemoryPlan(RolloutPlan(sampled, graph), UpdatePlan(micro_batch, checkpointing, captures_update))
    # A captured update also holds its memory during the rollout, which then has less.
    while captures_update and asked.micro_batch is None and sampled > 1 and not memory(work, plan).fits(device_bytes):
        sampled = largest_divisor(work.images, sampled / 2)
        plan = replace(plan, rollout=RolloutPlan(sampled, graph))
    return plan


def rollout_micro_batch(work: Work, free_bytes: float) -> int:
    """Images to sample and decode at a time: what the config names, else as many as fit, at least 1.

    That is the largest divisor of a step's images whose key-value cache, activations and decoding take at most 0.9 of
    `free_bytes`. d16 in bfloat16: 27.8 + 10.1 + 85 MB an image, so 512 images need 71 GB free.

    Args:
        free_bytes: the device's memory without the states.
    """
    asked, cost = work.config.rollout.micro_batch, work.cost
    if asked is not None:  # it need not divide the images of one of several processes
        return largest_divisor(work.images, asked)
    one = work.rows * (cost.kv_cache_bytes + cost.rollout_activation_bytes) + cost.decode_activation_bytes
    return largest_divisor(work.images, (USABLE * free_bytes - work.images * kept_bytes(work)) / one)


def update_plan(work: Work, free_bytes: float) -> tuple[int, Checkpointing]:
    """Images of a forward and backward pass, and what to recompute: what the config names, else what fits best.

    The checkpointing modes none, attention and full are tried in this order. The first is taken with which the whole
    minibatch or at least 8 images fit into 0.9 of `free_bytes`, or the micro-batch that the config names; else full.
    The micro-batch is the largest divisor of the minibatch that fits, at least 1; with DPO, of its pairs, at least one
    pair. With guidance an image is two rows of the model, and 4 images are as much as 8 here.

    Why 8: each further micro-batch reads the weights and adds to the gradient once more, 12 bytes a parameter; for d30
    24 GB, 5.6 ms on an H200. Forward and backward of 8 of its images take 57 ms, so at 8 that is 10 % more; at 4, 20 %.
    Recomputing the attention branch costs 12 % (d30; full: 33 %). So above 8 images, smaller micro-batches cost less
    than recomputing; below 8 they cost more.

    Args:
        free_bytes: the device's memory without the states.
    Returns: (micro_batch, checkpointing).
    """
    asked = work.config.update
    named = None if asked.micro_batch is None else min(asked.micro_batch, work.minibatch)
    enough = named or min(ENOUGH_ROWS // work.rows, work.minibatch)
    modes: tuple[Checkpointing, ...] = ("none", "attention", "full")
    if asked.checkpointing != "auto":
        modes = (asked.checkpointing,)
    for mode in modes:
        one = work.rows * work.cost.update_activation_bytes(mode)
        largest = work.unit * largest_divisor(work.minibatch // work.unit, USABLE * free_bytes / one / work.unit)
        if largest >= enough:
            break
    return named or largest, mode


def largest_divisor(total: int, limit: float) -> int:
    """Of `total`, at most `limit`, but at least 1."""
    return max((d for d in range(1, total + 1) if total % d == 0 and d <= limit), default=1)
