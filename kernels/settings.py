"""Launch settings of the Triton kernels: block shapes, warps, pipeline stages. Nothing is tuned at run time.

Each kernel's own file has a default rule for any size. Exceptions for a device are pinned here by compute capability,
kernel and size. `bench/tune.py` measures candidates, and docs/measured.md has the results.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch

HOPPER = (9, 0)  # compute capability of H100 and H200

# (compute capability, kernel, size): the settings that differ from the kernel's own rule, which was chosen for Hopper.
PINNED: dict[tuple[tuple[int, int], str, Hashable], dict[str, int]] = {
    ((10, 0), "attention_fused", 16): {"BLOCK_N": 64},  # BLOCK_N = 128 spills registers there; not measured
}

# Compiles a kernel without fused multiply-add, so every multiplication and addition is rounded by itself. Otherwise
# the compiler may fuse a pair in one loop or variant of a kernel and not in another, and their results would differ in
# the last bits, which strict mode does not allow.
AS_WRITTEN = {"enable_fp_fusion": False}

_TRIED: dict[str, dict[str, int]] = {}
_without_gpu = HOPPER  # settings of this GPU are used for kernels that are interpreted or compiled without one


def setting(kernel: str, size: Hashable, device: torch.device | None = None, **rule: int) -> dict[str, int]:
    """The settings of a launch, to be passed to it as keyword arguments.

    Args:
        kernel: such as "attention_forward".
        size: what the best setting depends on, such as the width.
        device: where the kernel runs. None or a CPU: the settings for Hopper, or for the GPU of `compiling_for`.
        rule: the default settings, used where nothing is pinned.
    """
    found = PINNED.get((_capability(device), kernel, size), {})
    return rule | found | _TRIED.get(kernel, {})


@contextmanager
def trying(kernel: str, **values: int) -> Iterator[None]:
    """Within the context, launch the kernel with these settings at every size. Used to measure candidates."""
    _TRIED[kernel] = values
    try:
        yield
    finally:
        del _TRIED[kernel]


@contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[None]:
    """Within the context, launches on CPU tensors use the settings for a GPU of this compute capability."""
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
