"""From images to what a pretrained network was trained on: resized as Pillow resizes, cropped or padded, normalised.

Pillow works on 8-bit levels and rounds and clips after each of its two passes. A plain antialiased resize of floats is
up to 20 levels away from that on noise (256 px to 224, bicubic), and 1.4 on smooth images; this is 0 levels away.

Axes: B image; H, W pixels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation = Literal["bicubic", "bilinear"]

_WEIGHT_BITS = 22  # Pillow's fixed point: 32 bits less 8 of the level and 2 of overshoot


@dataclass(frozen=True)
class Preprocessing:
    """Images in [0, 1] -> input of a pretrained network.

    Attributes:
        resize: side in pixels that `mode` is about.
        crop: side of the result in pixels, <= resize.
        mode: "shortest" side is resized, then the centre cropped; "longest" side, then zeros round it; "squash": both.
        interpolation: of the resize, antialiased.
        mean, std: of each channel, for values in [0, 1].
    """

    resize: int
    crop: int
    mode: Literal["shortest", "longest", "squash"]
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, crop, crop) float32, normalised, on the same device."""
        levels = images.float().clamp(0.0, 1.0).mul(255.0).round()
        levels = resize_levels(levels, *self._resized(*images.shape[2:]), self.interpolation)
        levels = _centre(levels, self.crop)
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (levels / 255.0 - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.mode == "squash":
            return self.resize, self.resize
        if self.mode == "longest":
            ratio = max(height, width) / self.resize
            return round(height / ratio), round(width / ratio)
        shortest = min(height, width)
        return int(self.resize * height / shortest), int(self.resize * width / shortest)


def resize_levels(levels: Tensor, height: int, width: int, interpolation: Interpolation) -> Tensor:
    """Resize as Pillow's Image.resize does, level by level the same: along the rows first, then along the columns.

    Pillow 13 takes the other order for some tall images (131 x 90 pixels to 56 x 56, not 126 x 100): on noise
    single pixels differ by several levels there.

    Args:
        levels: (B, C, H, W) whole numbers in 0..255, of any floating dtype.
    Returns: (B, C, height, width) float32, whole numbers in 0..255.
    """
    columns = _weights(levels.shape[3], width, interpolation, levels.device)
    rows = _weights(levels.shape[2], height, interpolation, levels.device)
    # float64 holds every sum exactly (below 2^53), so the order of summation, and with it the device, has no influence.
    levels = _round(levels.double() @ columns.T)
    return _round(rows @ levels).float()


@functools.lru_cache(maxsize=32)
def _weights(size: int, resized: int, interpolation: Interpolation, device: torch.device) -> Tensor:
    """(resized, size) float64: the share of each input pixel in each output pixel, in units of 2^-22."""
    scale = size / resized
    stretch = max(scale, 1.0)
    centre = (torch.arange(resized, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(size, dtype=torch.float64) + 0.5 - centre.unsqueeze(1)).abs() / stretch
    if interpolation == "bilinear":
        share = (1.0 - distance).clamp_min(0.0)
    else:  # cubic convolution with a = -0.5
        near = (1.5 * distance - 2.5) * distance * distance + 1.0
        far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
        share = torch.where(distance < 1.0, near, torch.where(distance < 2.0, far, 0.0))
    share = share / share.sum(dim=1, keepdim=True) * 2**_WEIGHT_BITS
    return (share.sign() * (share.abs() + 0.5).floor()).to(device)


def _round(sums: Tensor) -> Tensor:
    return ((sums + 2 ** (_WEIGHT_BITS - 1)) / 2**_WEIGHT_BITS).floor().clamp(0.0, 255.0)


def _centre(levels: Tensor, side: int) -> Tensor:
    """Crop to the centre, or pad with zeros round it."""
    height, width = levels.shape[2:]
    left, top = max(0, side - width) // 2, max(0, side - height) // 2
    right, bottom = max(0, side - width - left), max(0, side - height - top)
    levels = F.pad(levels, (left, right, top, bottom))
    y, x = (round(max(0, extent - side) / 2) for extent in (height, width))
    return levels[:, :, y : y + side, x : x + side]
