"""The keys that choose a network of features. No PyTorch.

Axes: D feature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from varfast.settings.section import Device, LocalPath, Section, Source, ends_with

if TYPE_CHECKING:
    import torch

    from varfast.features.networks import Network
    from varfast.rewards.backbone import BackboneSpec

FeaturesName = Literal["inception", "inception_torchvision", "clip", "dino", "digits"]
CLIP_MODEL, CLIP_TAG = "ViT-L-14", "openai"
DINO_MODEL = "vit_large_patch14_dinov2.lvd142m"


class FeaturesSection(Section):
    """What images are described by."""

    features: FeaturesName = Field(
        "inception",
        description="inception: FID's Inception-v3 with torch-fidelity's weights; inception_torchvision: torchvision's "
        "(arXiv:2603.23086); clip: an image embedding of open_clip, of norm 1; dino: the class token of a model of "
        "timm; digits: 8 x 8 grey levels",
    )
    model: str | None = Field(
        None,
        description=f"of clip: a name of open_clip.list_models(), default {CLIP_MODEL}; of dino: a name of "
        f"timm.list_models(), default {DINO_MODEL}",
    )
    pretrained: Source | None = Field(
        None,
        description="weights of the network: path, hf:// or https address, or of clip a tag of open_clip; default: the "
        f"public ones, of clip the tag {CLIP_TAG}",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of clip and dino; the others are float32")
    batch_size: int = Field(64, ge=1, le=1_000_000, description="images at a time")

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.model is not None and self.features not in ("clip", "dino"):
            raise ValueError(f"features={self.features} has one model only; leave model={self.model} out")
        if self.pretrained is not None and self.features == "digits":
            raise ValueError(f"features=digits has no weights; leave pretrained={self.pretrained} out")
        if self.features == "clip" and self.model is not None and self.pretrained is None:
            raise ValueError(
                f"features=clip with model={self.model}: name its weights too, a tag or a file: pretrained"
            )
        return self

    @property
    def chosen(self) -> FeaturesSection:
        """These keys alone: sections with equal ones share a network."""
        return FeaturesSection(**{name: getattr(self, name) for name in FeaturesSection.model_fields})

    @property
    def clip_network(self) -> tuple[str, str]:
        """Of features=clip: name of the model in open_clip, without -quickgelu, and its weights."""
        return (self.model or CLIP_MODEL).removesuffix("-quickgelu"), self.pretrained or CLIP_TAG

    def clip_spec(self, key: str) -> BackboneSpec:
        """Of features=clip. Raises: InputError for a name or a tag that open_clip does not have."""
        from varfast.rewards.backbone import backbone_spec

        return backbone_spec(self.model or CLIP_MODEL, self.pretrained or CLIP_TAG, self.dtype, key)

    def load(self, device: torch.device, key: str) -> Network:
        """The network. key: where this section stands, for errors. Raises: InputError as the networks."""
        from varfast.features.networks import load_network

        if self.features == "clip":
            from varfast.features.embedders import ClipFeatures
            from varfast.rewards.backbone import Backbone

            spec = self.clip_spec(key)
            backbone = Backbone(spec, device, self.batch_size, key)
            backbone.texts_are_read()
            return ClipFeatures(backbone, spec)
        if self.features == "dino":
            from varfast.features.embedders import DinoFeatures

            return DinoFeatures(self.model or DINO_MODEL, self.pretrained, device, self.dtype, key)
        return load_network(self.features, self.pretrained, device, f"{key}.pretrained")

    def loads(self) -> str | None:
        """What is read or fetched for it, in words; None: nothing."""
        if self.features == "digits":
            return None
        return self.pretrained or f"the weights of {self.model or self.features}"


class StatisticsConfig(FeaturesSection):
    """Arguments of `python -m varfast.statistics`."""

    images: Source = Field(
        description="a folder of images, at any depth; 'digits'; or an .npz with arr_0, uint8 (N, H, W, 3)"
    )
    out: Annotated[LocalPath, ends_with(".npz")] = Field(
        description="the .npz to write: mu and sigma, and what they are of"
    )
    image_size: int = Field(
        256,
        ge=1,
        le=4096,
        description="side of the policy's images in pixels: images of a folder are resized to it (shorter side, "
        "Lanczos) and cropped at the centre before the network's own resize",
    )
    device: Device = Field("auto", description="auto: cuda if there is one")
    overwrite: bool = Field(False, description="replace a file that exists")
