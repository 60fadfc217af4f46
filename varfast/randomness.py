"""Random choices that are a function of what they are for, not of what was drawn before; and sums of one order.

So a resumed run, and a run on another number of processes, draws the same numbers, and no generator state is saved.
Tokens are drawn by the same rule in `varfast.kernels.sample_tokens`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch


class Purpose(IntEnum):
    """What a random choice is for; its number is part of the key, so none of these may change."""

    LABEL_POOL = 1
    LABELS = 2
    MINIBATCHES = 3
    ADAPTER = 4
    REWARD = 5
    PROMPTS = 6
    PAIRS = 7


# Values of `step` in the key of token sampling that no training step has (steps are below 2^32 - 3).
EVAL_STEP = 2**32 - 1
GRID_STEP = 2**32 - 2
BASE_STEP = 2**32 - 3


@dataclass(frozen=True)
class Key:
    """What the tokens of a batch are a function of, beside weights, prompts and `Sampling`.

    Attributes:
        seed: of the run or of the call.
        step: of the training; GRID_STEP, EVAL_STEP and BASE_STEP for images that no training step samples.
        first_sample: index of the batch's first image within the step. A batch that is split into calls gives the same
            tokens when each call has the index of its first image.
    """

    seed: int
    step: int = 0
    first_sample: int = 0


def keyed_generator(seed: int, purpose: Purpose, *key: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone."""
    state = np.random.SeedSequence([seed, int(purpose), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, if `wanted`, PyTorch's operations give equal bits for equal inputs on one machine and number of threads.

    Raises: RuntimeError, by PyTorch, at an operation that cannot; it names the operation.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS: one workspace a stream
    settings: Any = torch.utils.deterministic  # whose attribute type checkers do not see
    filled = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False  # nothing here reads what it has not written
    try:
        with _algorithms(deterministic=True, warn_only=False):
            yield
    finally:
        settings.fill_uninitialized_memory = filled


@contextmanager
def order_may_vary() -> Iterator[None]:
    """Inside `deterministic`: an operation that cannot warns in place of raising."""
    with _algorithms(torch.are_deterministic_algorithms_enabled(), warn_only=True):
        yield


@contextmanager
def _algorithms(deterministic: bool, warn_only: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)
