"""Brightness, as arXiv:2505.23331 uses it.

Axes: B image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from varfast.rewards.building import Building, Reward, RewardSection, on_images

if TYPE_CHECKING:
    from torch import Tensor

_LUMA = (0.2989, 0.5870, 0.1140)
_DEFAULT_THRESHOLD = {"bright": 0.8, "dark": 0.2, "raw": 0.0}


class BrightnessReward(RewardSection):
    """Mean luma of the image, in [0, 1]."""

    type: Literal["brightness"] = Field(description="the kind of reward")
    mode: Literal["bright", "dark", "raw"] = Field(
        "bright", description="1 if >= threshold; 1 if < it; the luma itself"
    )
    threshold: float | None = Field(None, ge=-1e6, le=1e6, description="default: 0.8 for bright, 0.2 for dark")

    def build(self, building: Building) -> Reward:
        return on_images(building, Brightness(self.mode, self.threshold))

    def reaches_outside(self) -> str | None:
        return None


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
