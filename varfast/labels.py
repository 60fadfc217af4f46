"""Which labels a run trains on, and which ones a step draws.

Axes: P labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varfast.config import RolloutConfig
from varfast.randomness import Purpose, keyed_generator


def label_pool(config: RolloutConfig, num_classes: int, seed: int) -> list[int]:
    """The labels of the run, ascending: all or those listed, of these the configured share, chosen by the seed."""
    pool = list(range(num_classes)) if config.labels == "all" else sorted(set(config.labels))
    if config.label_share < 1.0:
        kept = max(1, round(config.label_share * len(pool)))
        order = torch.randperm(len(pool), generator=keyed_generator(seed, Purpose.LABEL_POOL))
        pool = sorted(pool[i] for i in order[:kept].tolist())
    return pool


def draw_labels(pool: list[int], count: int, seed: int, step: int) -> Tensor:
    """(P,) int64 labels of a step, drawn uniformly and independently from the pool."""
    index_P = torch.randint(len(pool), (count,), generator=keyed_generator(seed, Purpose.LABELS, step))
    return torch.tensor(pool)[index_P]
