"""Random choices that are a function of what they are for, not of what was drawn before.

So a resumed run, and a run on another number of processes, draws the same numbers, and no generator state is saved.
Tokens are drawn by the same rule in `varfast.kernels.sample_tokens`.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a random choice is for; its number is part of the key, so none of these may change."""

    LABEL_POOL = 1
    LABELS = 2
    MINIBATCHES = 3
    ADAPTER = 4


# Values of `step` in the key of token sampling that no training step has (steps are below 2^32 - 2).
EVAL_STEP = 2**32 - 1
GRID_STEP = 2**32 - 2


def keyed_generator(seed: int, purpose: Purpose, *key: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone."""
    state = np.random.SeedSequence([seed, int(purpose), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)
