"""The least time that each stage of a step can take on a device, and what share of it a run reaches."""

from __future__ import annotations

import torch

from varfast.perf.cost import FLOAT32_BYTES, Checkpointing, Count
from varfast.perf.devices import Ceilings, measure_here
from varfast.perf.memory import MemoryPlan
from varfast.perf.work import Work

STAGES = ("rollout", "decode", "reward", "reference", "update", "optimizer")


def speed_of_light_s(count: Count, ceilings: Ceilings) -> float:
    """Seconds below which no implementation can get: computing and moving overlap perfectly."""
    return max(count.flop / ceilings.flop_per_s, count.io_bytes / ceilings.byte_per_s)


def stage_counts(work: Work, plan: MemoryPlan, checkpointing: Checkpointing | None = None) -> dict[str, Count]:
    """Work of every stage of one step: of all of the process' images, and all their optimizer steps.

    Args:
        plan: its micro-batches are the number of passes, and with it how often weights are read.
        checkpointing: what the update recomputes, if not what the plan says.
    Returns: by the names in STAGES. decode is counted in the compute dtype.
    """
    cost, passes = work.cost, work.images // plan.rollout.micro_batch
    rollout = cost.rollout * (work.images * work.rows)
    rollout += Count(0.0, cost.weights.read_bytes) * (passes * cost.rollout_passes)
    decode = cost.decode * work.images + Count(0.0, cost.decoder_read_bytes) * passes
    reward = Count(0.0, cost.image_bytes * len(work.config.reward))
    for network in work.networks:
        reward += network.per_image
    update = _update(work, plan, checkpointing or plan.update.checkpointing)
    sampled = (rollout, decode, reward * work.images)
    if work.config.loss.saved_pairs is not None:
        sampled = (Count(0.0, 0.0),) * 3
    stages = (*sampled, _reference(work, plan), update, _optimizer(work))
    return dict(zip(STAGES, stages, strict=True))


def micro_batches(work: Work, plan: MemoryPlan) -> int:
    """Forward and backward passes of an optimizer step."""
    return work.minibatch // plan.update.micro_batch


def _update(work: Work, plan: MemoryPlan, checkpointing: Checkpointing) -> Count:
    """Forward and backward read the weights. The gradient, float32, is written by the first micro-batch, and read and
    written by each further one: for d30 with whole minibatches 16 x (8 + 8) GB a step, beside 1.95 TB of activations.
    """
    cost, images = work.cost, work.learned * work.rows * work.config.update.epochs
    passes = work.optimizer_steps * micro_batches(work, plan)
    again = cost.recomputed_share(checkpointing)
    count = cost.forward * images * (1.0 + again) + cost.backward * images
    count += Count(0.0, cost.weights.read_bytes) * passes * (2.0 + again)
    gradients = 2 * micro_batches(work, plan) - 1
    return count + Count(0.0, cost.weights.trained * FLOAT32_BYTES * gradients) * work.optimizer_steps


def _reference(work: Work, plan: MemoryPlan) -> Count:
    """A forward pass of the base model."""
    if not work.reads_reference:
        return Count(0.0, 0.0)
    base, passes = work.cost.base, work.learned // work.minibatch * micro_batches(work, plan)
    count = base.forward * (work.learned * work.rows)  # in the first epoch; others read its log-probabilities
    return count + Count(0.0, base.weights.read_bytes) * passes


def _optimizer(work: Work) -> Count:
    """AdamW reads weight, gradient and two moments, and writes weight, moments and, of trained matrices, the copy in 16
    bits. The norm for clipping is assumed to be summed up where the gradient is made. The average of the weights is a
    pass of its own: it reads weight and average and writes the average.
    """
    weights, config = work.cost.weights, work.config.update
    numbers = 3 if config.ema_decay is None else 6
    moments = weights.moment_bytes(config.optimizer)
    of_step = numbers * FLOAT32_BYTES * weights.trained + 2 * moments + weights.copy_bytes
    return Count(0.0, of_step) * work.optimizer_steps


class StageLimits:
    """What the stages of a step take against what they could: ms, share of the limit, MFU, images/s.

    The limit of a stage is what its FLOPs or its bytes take at least, at the rates that this device was measured to
    reach when the run began.

    Args:
        work, plan: of this process.
        images: of a step, of all processes.
    """

    def __init__(self, work: Work, plan: MemoryPlan, device: torch.device, images: int) -> None:
        self._images = images
        ceilings = measure_here(device, getattr(torch, work.cost.dtype))
        counts = stage_counts(work, plan)
        self._limit_ms = {name: speed_of_light_s(count, ceilings) * 1e3 for name, count in counts.items()}
        # Model FLOPs: what checkpointing computes again does not count.
        of_model = stage_counts(work, plan, "none").values()
        self._step_at_peak_s = sum(count.flop for count in of_model) / ceilings.flop_per_s

    def metrics(self, stages_ms: dict[str, float], step_s: float) -> dict[str, float]:
        """The numbers of a step, by the names of metrics.jsonl."""
        shares = {f"{n}_share": self._limit_ms[n] / ms for n, ms in stages_ms.items() if self._limit_ms.get(n)}
        return {
            **{f"{name}_ms": ms for name, ms in stages_ms.items()},
            **shares,
            "step_s": step_s,
            "mfu": self._step_at_peak_s / step_s,
            "images_per_s": self._images / step_s,
        }
