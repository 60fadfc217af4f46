"""Brightness, as arXiv:2505.23331 uses it.

Axes: B image.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

_LUMA = (0.2989, 0.5870, 0.1140)
_DEFAULT_THRESHOLD = {"bright": 0.8, "dark": 0.2, "raw": 0.0}


def brightness(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B,) mean over the pixels of 0.2989 R + 0.5870 G + 0.1140 B."""
    red_B, green_B, blue_B = images.float().mean(dim=(2, 3)).unbind(1)
    return _LUMA[0] * red_B + _LUMA[1] * green_B + _LUMA[2] * blue_B


class Brightness:
    """1 for a bright image, or for a dark one, else 0; or the brightness itself.

    Args:
        mode: "bright" (>= threshold), "dark" (< threshold) or "raw".
        threshold: default 0.8 for bright, 0.2 for dark.
    """

    def __init__(self, mode: Literal["bright", "dark", "raw"] = "bright", threshold: float | None = None) -> None:
        self.mode = mode
        self.threshold = _DEFAULT_THRESHOLD[mode] if threshold is None else threshold

    def __call__(self, images: Tensor, labels_B: Tensor) -> Tensor:
        value_B = brightness(images)
        if self.mode == "raw":
            return value_B
        return (value_B >= self.threshold if self.mode == "bright" else value_B < self.threshold).float()
