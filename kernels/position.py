"""Positions of cached ops as tensors on the device.

Next-token models decode one token a step. A CUDA graph that holds such a step must write and read one row further at
each replay, so the row cannot be a number in the launch: the kernels read it from memory, and the caller adds 1 to it
on the device. VAR knows its positions on the host, and its launches are as they were.

Axes: B image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def check_position(position: Tensor | None, batch: int, device: torch.device) -> None:
    """Raises: ValueError unless `position` is None, or int32 or int64, () or (B,), on this device."""
    if position is None:
        return
    if position.dtype not in (torch.int32, torch.int64) or position.shape not in ((), (batch,)):
        raise ValueError(
            f"position is {tuple(position.shape)} of {position.dtype}: want int32 or int64, () for all images or "
            f"({batch},), one an image"
        )
    if position.device != device:
        raise ValueError(f"position is on {position.device}, the other tensors on {device}: want one device")


def check_place(position: Tensor, places: int) -> None:
    """Raises: ValueError where a position is outside a cache of so many places. Of a CPU's alone: others would wait."""
    if position.device.type == "cpu" and not (int(position.min()) >= 0 and int(position.max()) < places):
        raise ValueError(f"position is {position.tolist()}: want places of the cache, 0 to {places - 1}")


def host_positions(position: Tensor | None, batch: int) -> list[tuple[slice, int]]:
    """Which images have which position, for implementations that take host integers: on the CPU nothing waits."""
    if position is None:
        return [(slice(None), 0)]
    if position.ndim == 0:
        return [(slice(None), int(position))]
    return [(slice(image, image + 1), first) for image, first in enumerate(position.tolist())]


def on_host_only(arguments: int, refuses: Callable[..., str | None]) -> Callable[..., str | None]:
    """`refuses` of an implementation that takes no position: one comes behind the op's other `arguments`."""

    def refuses_position(*given: Any) -> str | None:
        if len(given) > arguments:
            return "positions that are integers of the host, got a tensor"
        return refuses(*given)

    return refuses_position
