"""How near the pixels are to the colours that a prompt names: a cheap reward that can be fooled.

It does not see figures: a blank sheet of the right paper earns all of it. It is here to be compared with
rewards/composition.py, which is harder to please.

Axes: B image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from varfast.data.captions import WORLDS, World
from varfast.rewards.building import Building, PerImage, Reward, RewardSection, Scored
from varfast.rewards.composition import Scenes, asked_of

if TYPE_CHECKING:
    from torch import Tensor


class ColourMatchReward(RewardSection):
    """Mean over the pixels of 1 minus the distance to the nearest colour of the prompt; can be fooled."""

    type: Literal["colour_match"] = Field(description="the kind of reward")
    scenes: Scenes = Field("digits", description="which colours have names: those of digits, or of shapes")

    def build(self, building: Building) -> Reward:
        world = WORLDS[self.scenes]

        def score(scored: Scored) -> Tensor:
            asked = asked_of(world, scored.batch.prompts, scored.batch.metadata, building.key)
            return colour_match(world, scored.images, asked)

        return PerImage(building, score)

    def reaches_outside(self) -> str | None:
        return None


def colour_match(world: World, images: Tensor, asked: Sequence[Mapping[str, Any]]) -> Tensor:
    """(B,) in [0, 1] of (B, 3, H, W) images in [0, 1]; 1 where a prompt names neither ink nor paper."""
    import torch

    scores = []
    for image, wanted in zip(images.float(), asked, strict=True):
        named = [world.shades[wanted[name]] for name in ("ink", "paper") if name in wanted]
        if not named:
            scores.append(image.new_ones(()))
            continue
        distance_CHW = (image - image.new_tensor(named)[:, :, None, None]).norm(dim=1)
        scores.append((1.0 - distance_CHW.amin(dim=0)).clamp_min(0.0).mean())
    return torch.stack(scores)
