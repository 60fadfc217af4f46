"""Human Preference Score v2.1: the cosine of image and text under a CLIP ViT-H/14 that was tuned to people's choices.

Source: arXiv:2306.09341; weights HPS_v2.1_compressed.pt, hub repository xswu/HPSv2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from varfast.rewards.building import Building, Reward, reads_or_fetches
from varfast.rewards.clip import TextReward
from varfast.settings.section import Source

if TYPE_CHECKING:
    from varfast.rewards.backbone import BackboneSpec

CLIP_MODEL = "ViT-H-14"


class HPSv2Reward(TextReward):
    """Human Preference Score v2.1: cosine of image and text under a ViT-H-14 tuned to people's choices."""

    type: Literal["hpsv2"] = Field(description="the kind of reward")
    pretrained: Source = Field(
        "hf://xswu/HPSv2/HPS_v2.1_compressed.pt", description="the tuned weights: a path or hf://owner/repo/file"
    )

    @property
    def network(self) -> tuple[str, str]:
        return CLIP_MODEL, self.pretrained

    def build(self, building: Building) -> Reward:
        return self.similarity(building, hpsv2_spec(self.pretrained, self.dtype))

    def reaches_outside(self) -> str:
        return reads_or_fetches(self.pretrained, self.names)


def hpsv2_spec(pretrained: str, dtype: Literal["float32", "bfloat16"]) -> BackboneSpec:
    """The CLIP model: with GELU, and images that are padded rather than cropped to a square.

    Args:
        pretrained: a path or hf:// address; a file with the weights under the key state_dict.
        dtype: of activations and matrices.
    """
    from varfast.rewards.backbone import BackboneSpec

    return BackboneSpec(CLIP_MODEL, False, pretrained, dtype, resize_mode="longest")
