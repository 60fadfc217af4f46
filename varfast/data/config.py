"""The section of the config that says which texts a text-conditioned model is trained on. No PyTorch."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from varfast.settings.section import Section, Source

HUB_DATASETS = "hf://datasets/"
# Worlds of varfast/data/captions.py, whose captions are prompts.
DRAWN = ("digits", "shapes")


class PromptsConfig(Section):
    """The texts that a run draws its prompts from, for a family that is conditioned on text.

    In a file of JSON lines, keys beside the text, the tag and "domain" are the prompt's metadata, which rewards may
    read. A row whose "domain" is "held_out" or "out_of_domain" is kept out of training, whatever held_out says.
    """

    source: Source = Field(
        description="a text file with a prompt a line; a .jsonl file; hf://datasets/owner/name, which the package "
        "datasets reads; or 'digits' or 'shapes', the captions of pretrain.dataset=captioned_digits or captioned_shapes"
    )
    column: str = Field("prompt", min_length=1, description="of JSON lines and data sets: the key of the text")
    tag_column: str = Field("tag", min_length=1, description="likewise, of the tag, such as colour or counting")
    split: str = Field("train", min_length=1, description="of a data set of the hub")
    tags: tuple[str, ...] | None = Field(
        None, min_length=1, strict=False, description="train on prompts with these tags; null: on all"
    )
    held_out: float = Field(
        0.0,
        ge=0,
        le=1e9,
        description="prompts that are kept for evaluation: their number, or below 1 their share. run.seed chooses "
        "them, the same ones whatever `share` is",
    )
    share: float = Field(
        1.0, gt=0, le=1, description="train on this share of the prompts that are left, chosen by run.seed"
    )
    out_of_domain: Source | None = Field(
        None, description="a second source, in the same columns and split, of prompts for evaluation alone"
    )

    @field_validator("held_out")
    @classmethod
    def _is_number_or_share(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"got {value:g}: want a whole number of prompts, or a share below 1")
        return value

    @field_validator("source", "out_of_domain")
    @classmethod
    def _can_be_read(cls, source: str | None) -> str | None:
        if source is not None and source.startswith("hf://"):
            name = source.removeprefix(HUB_DATASETS)
            if not source.startswith(HUB_DATASETS) or name.count("/") != 1 or not all(name.split("/")):
                raise ValueError(f"got {source!r}: a data set of the hub is hf://datasets/owner/name")
        return source

    @model_validator(mode="after")
    def _differ(self) -> PromptsConfig:
        if self.out_of_domain == self.source:
            raise ValueError(f"out_of_domain={self.out_of_domain} is the source itself; held_out keeps a part of it")
        return self
