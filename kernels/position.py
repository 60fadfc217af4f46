"""Checks of positions in a key-value cache that are tensors on the device.

Next-token models decode one token per step. A CUDA graph that captured such a step must use the next row of the cache
at each replay, so the row cannot be a constant launch argument: the kernels read it from device memory, and the caller
adds 1 to it on the device. VAR knows its positions on the host and passes them as launch arguments.

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
    """Raises: ValueError where a position is outside a cache of `places` rows. Checked only for CPU tensors: reading a
    tensor on a GPU would wait for the device."""
    if position.device.type == "cpu" and not (int(position.min()) >= 0 and int(position.max()) < places):
        raise ValueError(f"position is {position.tolist()}: want places of the cache, 0 to {places - 1}")


def host_positions(position: Tensor | None, batch: int) -> list[tuple[slice, int]]:
    """Slices of images with their common position as an integer, for CPU implementations that take host integers."""
    if position is None:
        return [(slice(None), 0)]
    if position.ndim == 0:
        return [(slice(None), int(position))]
    return [(slice(image, image + 1), first) for image, first in enumerate(position.tolist())]


def on_host_only(arguments: int, refuses: Callable[..., str | None]) -> Callable[..., str | None]:
    """Wrap `refuses` for an implementation without support for a position on the device, which is the op's argument
    after the first `arguments`."""

    def refuses_position(*given: Any) -> str | None:
        if len(given) > arguments:
            return "positions that are integers of the host, got a tensor"
        return refuses(*given)

    return refuses_position
