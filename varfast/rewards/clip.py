"""Cosine of image and text under a CLIP model: a fixed text, or one a label.

Axes: B image, N text, D embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from varfast.rewards.building import (
    Building,
    PerImage,
    Reward,
    RewardSection,
    Scored,
    check_prompts,
    on_embeddings,
    reads_or_fetches,
)
from varfast.rewards.files import read_names
from varfast.settings.section import Source
from varfast.types import InputError, RewardBatch

if TYPE_CHECKING:
    from torch import Tensor

    from varfast.rewards.backbone import BackboneSpec


class ClipModel(RewardSection):
    """How a CLIP runs; rewards that name the same one share its pass over the images."""

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the CLIP model; scores are float32")
    batch_size: int = Field(
        64, ge=1, le=1_000_000, description="images at a time; the smallest counts where rewards share a model"
    )

    @property
    def network(self) -> tuple[str, str]:
        """Name of the model in open_clip, without -quickgelu, and its weights; what it costs is in cost.py."""
        raise NotImplementedError


class Text(RewardSection):
    """What images are compared with: one text, one a label, or the prompt of each."""

    prompt: str | None = Field(
        None,
        min_length=1,
        description="one text for all images, as 'a painting'. Default, of a run on prompts: that of each image",
    )
    label_prompt: str | None = Field(
        None, description="a text a label, as 'a photo of a {name}'; of a run on prompts {name} is the prompt"
    )
    names: list[str] | Source | None = Field(
        None,
        description="what stands for {name}: a list in the order of the labels, or a file with one a line. Default: "
        "what the labels are called, as in the run's labels.json, or ImageNet's classes",
    )

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if self.prompt is not None and self.label_prompt is not None:
            raise ValueError("give prompt or label_prompt, one of the two")
        if self.label_prompt is not None and "{name}" not in self.label_prompt:
            raise ValueError(f"label_prompt {self.label_prompt!r} has no {{name}}; as in 'a photo of a {{name}}'")
        if self.label_prompt is None and self.names is not None:
            raise ValueError("names stand for {name} in label_prompt, which is not given")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt is blank; describe what images should look like, as 'a painting'")
        return self

    def check_prompts(self, key: str, on_prompts: bool) -> None:
        if on_prompts and self.names is not None:
            raise ValueError(f"{key}.names are of labels, and the run is on prompts, which are texts; leave names out")
        if not on_prompts and self.prompt is None and self.label_prompt is None:
            raise ValueError(f"{key}: give prompt or label_prompt, one of the two")

    def texts(self, building: Building) -> list[str] | None:
        """One for all images, or one a label; None: each image's own, which comes with it.

        Raises: InputError if the names cannot be read, are not one a label, or one of them is blank; or if none are
            given and the labels have none.
        """
        check_prompts(self, building)
        if self.prompt is not None:
            return [self.prompt]
        return None if building.prompts is not None else _of_labels(self, building)

    def of_batch(self, batch: RewardBatch) -> list[str]:
        """The text of each image of a run on prompts, where `texts` returns None."""
        template = self.label_prompt
        return batch.prompts if template is None else [template.replace("{name}", text) for text in batch.prompts]


class TextReward(ClipModel, Text):
    """What the rewards of images and texts have in common."""

    def similarity(self, building: Building, spec: BackboneSpec, scaled: bool = False) -> Reward:
        """The reward under the CLIP model that `spec` describes.

        Args:
            scaled: multiply the cosine by the model's own scale, exp(logit_scale).
        Raises: InputError if names cannot be read, weights cannot be had, or a text is too long for the model; of a
            run on prompts it is cut off.
        """
        from varfast.rewards.backbone import shared_backbone

        texts = self.texts(building)
        backbone = shared_backbone(building, spec, self.batch_size)
        scale = backbone.logit_scale if scaled else 1.0
        if texts is None:
            backbone.reads_texts_of_batches()

            def similarity(scored: Scored) -> Tensor:
                texts_BD = backbone.embed_texts_of_batch(self.of_batch(scored.batch), building.key)
                return scale * (scored.embeddings(backbone) * texts_BD).sum(dim=1)

            return PerImage(building, similarity)
        texts_ND = backbone.embed_texts(texts, building.key)
        return on_embeddings(building, backbone, TextSimilarity(texts_ND, self.label_prompt is not None, scale))


class ClipReward(TextReward):
    """Cosine of image and text under a CLIP of open_clip."""

    type: Literal["clip"] = Field(description="the kind of reward")
    model: str = Field("ViT-L-14", description="a name of open_clip.list_models()")
    pretrained: Source = Field(
        "openai",
        description="a tag of open_clip.list_pretrained(), a path or hf://owner/repo/file; for a file whose model was "
        "trained with QuickGELU (OpenAI, DFN, MetaCLIP) the model's name ends with -quickgelu",
    )

    @property
    def network(self) -> tuple[str, str]:
        return self.model.removesuffix("-quickgelu"), self.pretrained

    def build(self, building: Building) -> Reward:
        from varfast.rewards.backbone import backbone_spec

        return self.similarity(building, backbone_spec(self.model, self.pretrained, self.dtype, building.key))

    def reaches_outside(self) -> str:
        return reads_or_fetches(self.pretrained, self.names)


class TextSimilarity:
    """Cosine of an image's embedding with that of the text, or of its label's text.

    Args:
        texts_ND: (N, D) of norm 1: one, or one a label.
        per_label: whether there is one a label.
        scale: factor of the cosine.
    """

    def __init__(self, texts_ND: Tensor, per_label: bool, scale: float = 1.0) -> None:
        self._texts_ND = texts_ND
        self._per_label = per_label
        self._scale = scale

    def __call__(self, embeddings_BD: Tensor, labels_B: Tensor) -> Tensor:
        """(B, D) of norm 1, (B,) labels -> (B,) in [-scale, scale]."""
        texts = self._texts_ND[labels_B.to(self._texts_ND.device)] if self._per_label else self._texts_ND
        return self._scale * (embeddings_BD * texts).sum(dim=1)


def _of_labels(text: Text, building: Building) -> list[str]:
    """One text a label. Raises: see Text.texts."""
    label_prompt, num_classes, key = text.label_prompt, building.num_classes, building.key
    assert label_prompt is not None
    names = read_names(text.names, f"{key}.names") if isinstance(text.names, str) else text.names or building.names
    if names is None:
        raise InputError(f"{key}.label_prompt: what the labels of this model are called is not known; give {key}.names")
    blank = [label for label, name in enumerate(names) if not name.strip()]
    if blank:
        raise InputError(f"{key}.names: the name of label {blank[0]} is blank")
    if num_classes is not None and len(names) != num_classes:
        raise InputError(f"{key}.names: got {len(names)} names, the model has {num_classes} labels; give one a label")
    return [label_prompt.replace("{name}", name.strip()) for name in names]
