"""How CUDA's allocator is told to behave, before PyTorch is imported."""

from __future__ import annotations

import os

# torch 2.11 and 2.14 read both; the first has been used on a GPU.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def expand_segments() -> None:
    """Let CUDA's allocator grow its segments, unless the user has set the allocator. Before the first use of CUDA.

    Rollout and update want blocks of other sizes. With segments of fixed size d30 ran out of an H100's 80 GB in its 4th
    step, 27.7 GiB of them reserved and not allocated; with these it went on. Where the platform has none, torch warns.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
