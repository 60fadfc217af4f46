"""Learning rates over the steps of a training."""

from __future__ import annotations

import math
from typing import Literal

from varfast.optim.config import UpdateConfig

Shape = Literal["constant", "linear", "cosine"]


def scheduled(peak: float, step: int, total_steps: int, warmup_steps: int, shape: Shape, floor: float = 0.0) -> float:
    """Linear warm-up to `peak`, then constant, or linear or cosine down to floor * peak after the last step.

    Args:
        step: from 0; the first step of a warm-up has peak / warmup_steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if shape == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    left = 1.0 - progress if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (floor + (1.0 - floor) * left)


def learning_rate(config: UpdateConfig, step: int, total_steps: int) -> float:
    """The learning rate of a step (a rollout) of a run, by the section `update` of its config."""
    warmup_steps = config.warmup_steps or math.ceil(config.warmup_share * total_steps - 1e-9)
    return scheduled(config.lr, step, total_steps, warmup_steps, config.lr_schedule)
