"""PickScore v1: which of two images people preferred for a prompt, learned by a CLIP ViT-H/14.

The score is the model's scaled cosine, exp(logit_scale) * cos(image, text). Its published weights are those of
transformers' CLIPModel; open_clip's ViT-H-14, the same network, computes with them.

Source: arXiv:2305.01569; weights model.safetensors, hub repository yuvalkirstain/PickScore_v1.
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


class PickScoreReward(TextReward):
    """PickScore v1: scaled cosine of image and text under a ViT-H-14 tuned to people's choices; about 15 to 25."""

    type: Literal["pickscore"] = Field(description="the kind of reward")
    pretrained: Source = Field(
        "hf://yuvalkirstain/PickScore_v1/model.safetensors",
        description="the tuned weights, of transformers' CLIPModel: a path or hf://owner/repo/file",
    )

    @property
    def network(self) -> tuple[str, str]:
        return CLIP_MODEL, self.pretrained

    def build(self, building: Building) -> Reward:
        return self.similarity(building, pickscore_spec(self.pretrained, self.dtype), scaled=True)

    def reaches_outside(self) -> str:
        return reads_or_fetches(self.pretrained, self.names)


def pickscore_spec(pretrained: str, dtype: Literal["float32", "bfloat16"]) -> BackboneSpec:
    """The CLIP model: with GELU, and images whose shorter side is resized and whose centre is cropped.

    Args:
        pretrained: a path or hf:// address; a file of transformers' CLIPModel.
        dtype: of activations and matrices.
    """
    from varfast.rewards.backbone import BackboneSpec

    return BackboneSpec(CLIP_MODEL, False, pretrained, dtype, names="transformers")
