"""Human Preference Score v2.1: the cosine of image and text under a CLIP ViT-H/14 that was tuned to people's choices.

Source: arXiv:2306.09341; weights HPS_v2.1_compressed.pt, hub repository xswu/HPSv2.
"""

from __future__ import annotations

from typing import Literal

from varfast.rewards.backbone import BackboneSpec

CLIP_MODEL = "ViT-H-14"


def hpsv2_spec(pretrained: str, dtype: Literal["float32", "bfloat16"]) -> BackboneSpec:
    """The CLIP model: with GELU, and images that are padded rather than cropped to a square.

    Args:
        pretrained: a path or hf:// address; a file with the weights under the key state_dict.
        dtype: of activations and matrices.
    """
    return BackboneSpec(CLIP_MODEL, False, pretrained, dtype, resize_mode="longest")
