"""How the Triton kernels are launched: block shapes, warps, stages. Pinned: nothing is tuned at run time.

Each kernel's own file has a rule for any size. Where a device was measured to want something else, that is pinned here,
by compute capability, kernel and size; `bench/tune.py` measures candidates, docs/measured.md says what was found.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch

HOPPER = (9, 0)  # of H100 and H200

# (compute capability, kernel, size): what differs from the kernel's rule, which holds for Hopper.
PINNED: dict[tuple[tuple[int, int], str, Hashable], dict[str, int]] = {
    ((10, 0), "attention_fused", 16): {"BLOCK_N": 64},  # 128 spill there; not measured
}

# A launch of which every multiplication and addition is rounded by itself. Else the compiler fuses pairs of them where
# it sees fit, in one loop or variant of a kernel and not in the next: strict mode wants the bits of both equal.
AS_WRITTEN = {"enable_fp_fusion": False}

_TRIED: dict[str, dict[str, int]] = {}
_without_gpu = HOPPER  # whose settings kernels take that are interpreted or compiled without a GPU


def setting(kernel: str, size: Hashable, device: torch.device | None = None, **rule: int) -> dict[str, int]:
    """The settings of a launch, as keywords of it.

    Args:
        kernel: such as "attention_forward".
        size: what the best setting depends on, such as the width.
        device: where it runs; None, as a CPU: Hopper's, or those of `compiling_for`.
        rule: what holds where nothing is pinned.
    """
    found = PINNED.get((_capability(device), kernel, size), {})
    return rule | found | _TRIED.get(kernel, {})


@contextmanager
def trying(kernel: str, **values: int) -> Iterator[None]:
    """Launch a kernel with other settings inside, whatever its size: for measuring them."""
    _TRIED[kernel] = values
    try:
        yield
    finally:
        del _TRIED[kernel]


@contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[None]:
    """Inside, launches on CPU tensors take the settings of a GPU of this compute capability."""
    global _without_gpu
    before, _without_gpu = _without_gpu, capability
    try:
        yield
    finally:
        _without_gpu = before


def _capability(device: torch.device | None) -> tuple[int, int]:
    return _without_gpu if device is None or device.type != "cuda" else _capability_of(device)


@functools.cache
def _capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
