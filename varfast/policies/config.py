"""The sections of the config that say what is trained and what is sampled, whatever the family. No PyTorch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from varfast.settings.section import AllOrLabels, Section, Source, check_divides

# Images that the captured decoder takes at a time. Its buffers stay from step to step: 3.4 GB in bfloat16 at 256 px.
# Its smallest maps, 16 x 16, are 8192 rows then, 2.4 waves of tiles on an H100 and 5 % of the arithmetic.
DECODE_GRAPH_IMAGES = 32


# The names that policy.family takes.
FamilyName = Literal["var", "llamagen", "taming", "janus"]


class LoRAConfig(Section):
    """Low-rank matrices that are trained beside the frozen ones; each family names the matrices that can have them."""

    rank: int = Field(16, ge=1, le=4096, description="rows of A and columns of B")
    alpha: float = Field(32.0, gt=0, le=1e6, description="B A is multiplied by alpha / rank")
    targets: tuple[str, ...] = Field(min_length=1, strict=False, description="matrices with an adapter")


class FamilyConfig(Section):
    """What all families of models have in their section `policy`: each family derives its own from this.

    A family is a folder beside this file. Its config.py has the section, and its build.py the functions of
    families.Family, which make a policy of it.

    Attributes:
        parts: names of the models of a policy, the trained one first; the rest is frozen.
        sizes_key: the key under which the trained model's sizes stand, for errors: policy.var.
        presets: sizes of public models, by name.
        unguided_cfg: rollout.cfg above this guides it; its policy then has `Driver._strengths`. None: nothing can, as
            it knows no prompt that stands for none.
        conditioned_on: "labels", or "text": ids of prompts are rows of the run's table of texts then, and the policy
            has `set_prompts`.
        as_transformers: `checkpoint` may be a folder, a repository of the hub, or an index, as the package transformers
            lays a model out (weights/shards.py); it has all parts.
    """

    parts: ClassVar[tuple[str, str]]
    sizes_key: ClassVar[str]
    presets: ClassVar[Mapping[str, Section]]
    unguided_cfg: ClassVar[float | None] = None
    conditioned_on: ClassVar[Literal["labels", "text"]] = "labels"
    as_transformers: ClassVar[bool] = False

    family: str = Field(description="of models")
    checkpoint: Source = Field(
        description="weights of the transformer: a path, hf://owner/repo/file, a run folder, a saved model (a folder, "
        "or hf://owner/name), 'random', or 'pretrain' for the model that the pretrain section describes (trained first "
        "if it is not in the cache)"
    )
    lora: LoRAConfig | None = Field(
        None, description="train an adapter beside the frozen weights; {} for its defaults; null: train all weights"
    )

    @property
    @abstractmethod
    def sizes(self) -> Section:
        """Of the trained model: those given, or of the preset."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Labels that the model has. Of a family that is conditioned on text 0: a run's prompts are in its table."""

    if TYPE_CHECKING:  # a field of some families: pydantic warns of one that shadows a property

        @property
        def image_size(self) -> int:
            """H and W, in pixels."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V, number of codes."""

    @property
    def scale_sides(self) -> tuple[int, ...]:
        """Sides of an image's square token maps, in the order in which they are sampled; empty: one token at a time."""
        return ()

    @property
    def tokenizer_address(self) -> str | None:
        """The file of the text tokenizer, of a family that is conditioned on text; None: it lies beside the weights."""
        return None

    @property
    @abstractmethod
    def frozen_checkpoint(self) -> Source | None:
        """Weights of the frozen part, a path or hf:// address; None where `checkpoint` has them too."""


def names_a_file(checkpoint: str) -> bool:
    """Whether it can be no run folder. What is on the disk does not count: a config is read elsewhere too."""
    suffixes = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
    return checkpoint.startswith("hf://") or Path(checkpoint).suffix in suffixes


class RolloutConfig(Section):
    """What is sampled in a step: labels_per_step * group_size images."""

    labels_per_step: int = Field(32, ge=1, le=1_000_000, description="P, labels, or prompts, drawn a step")
    replacement: bool = Field(
        True, description="false: every label, or prompt, is drawn once before any of them is drawn again"
    )
    group_size: int = Field(
        16,
        ge=2,
        le=1_000_000,
        description="G, images a label; the group within which advantages are relative, or of which "
        "DPO takes its pairs",
    )
    temperature: float = Field(0.7, ge=1e-3, le=1000, description="of the multinomial draw, which has no filters")
    cfg: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="classifier-free guidance as a part of the policy; 0: none. Ratio, KL, entropy and the table of "
        "before and after are then of the guided distribution, for policy and reference, and its gradient goes through "
        "both halves: rollout, reference and update cost twice. The model must have been trained with class dropout. "
        "VAR: scale k of K - 1 is guided by cfg * k / (K - 1). LlamaGen: the scale of its code, above 1. Janus: the "
        "weight w of its code, uncond + w (cond - uncond), where 1 is cond alone",
    )
    labels: AllOrLabels = Field(
        "all", description="labels to draw from, uniformly: numbers, or names of ImageNet's classes or of your folders"
    )
    label_share: float = Field(1.0, gt=0, le=1, description="train on this share of the labels, chosen by run.seed")
    micro_batch: int | None = Field(
        None, ge=1, description="images sampled and decoded at a time; default: chosen from free memory"
    )
    cuda_graph: bool | None = Field(
        None,
        description="on a GPU, replay a captured rollout, which holds on to its memory during the update; default: "
        "where that leaves the update its room",
    )

    @property
    def images(self) -> int:
        """B, images a step."""
        return self.labels_per_step * self.group_size

    @property
    def rows(self) -> int:
        """Of the model an image: one, and with guidance a second one without the label."""
        return 2 if self.cfg > 0.0 else 1

    @model_validator(mode="after")
    def _divides(self) -> RolloutConfig:
        check_divides("rollout.micro_batch", self.micro_batch, self.images, "images a step")
        return self
