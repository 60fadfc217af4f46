"""The section of the config that describes taming-transformers' models: sizes, weights and adapter. No PyTorch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from varfast.policies.config import LoRAConfig, names_a_file
from varfast.policies.nexttoken.config import NextTokenPolicyConfig, TransformerConfig
from varfast.policies.nexttoken.tokenizer_config import VQGANConfig
from varfast.settings.section import Source


class MinGPTConfig(TransformerConfig):
    """Sizes of the transformer. The defaults are those of cin_transformer."""

    depth: int = Field(48, ge=1, le=512, description="number of blocks")
    width: int = Field(1536, ge=4, le=65536, description="channels of the residual stream")
    num_heads: int = Field(24, ge=1, le=1024, description="heads; each has width / num_heads channels")
    num_kv_heads: None = Field(None, description="there are as many heads of keys and values as of queries")
    mlp_width: int | None = Field(None, ge=1, le=2**18, description="hidden channels of the MLP; null: 4 of the width")
    num_classes: int = Field(
        1000, ge=1, le=1_000_000, description="labels, up to vocab_size: they are looked up in the table of the codes"
    )
    block_size: int | None = Field(
        None, ge=1, le=2**17, description="places with a learned position; null: as many as an image has tokens"
    )

    @model_validator(mode="after")
    def _has_its_places(self) -> MinGPTConfig:
        if self.num_places < self.num_tokens:
            raise ValueError(f"block_size={self.block_size}: an image of {self.side} x {self.side} tokens needs "
                             f"{self.num_tokens} places")  # fmt: skip
        if self.num_classes > self.vocab_size:
            raise ValueError(
                f"num_classes={self.num_classes} is more than vocab_size={self.vocab_size}: labels and codes share a "
                "table"
            )
        return self

    @property
    def hidden(self) -> int:
        """F."""
        return self.mlp_width or 4 * self.width

    @property
    def num_places(self) -> int:
        """Rows of the table of positions."""
        return self.block_size or self.num_tokens


# block_size is that of the published 256 px; the sizes agree with the stated 1.4 billion parameters.
PRESETS: dict[str, MinGPTConfig] = {"cin": MinGPTConfig(block_size=256)}


class TamingLoRAConfig(LoRAConfig):
    """Low-rank matrices that are trained beside the frozen ones, by the package peft: y = W x + alpha / rank B A x.

    There is no dropout: a log-probability must describe the policy that was sampled.
    """

    targets: tuple[Literal["query", "key", "value", "proj", "fc1", "fc2"], ...] = Field(
        ("query", "key", "value", "proj", "fc1", "fc2"),
        min_length=1,
        strict=False,
        description="matrices with an adapter: attention's four and the MLP's two (mlp.0 and mlp.2) of every block",
    )


class TamingPolicyConfig(NextTokenPolicyConfig):
    """A class-conditional minGPT, and the frozen VQGAN that turns its tokens into images."""

    parts: ClassVar = ("transformer", "vqgan")
    sizes_key: ClassVar = "policy.transformer"
    presets: ClassVar = PRESETS
    public_tokenizer: ClassVar = None

    family: Literal["taming"] = Field("taming", description="taming-transformers' minGPT and VQGAN, arXiv:2012.09841")
    preset: Literal["cin"] | None = Field(None, description="a public model's sizes")
    transformer: MinGPTConfig | None = Field(None, description="sizes of the transformer, where no preset is named")
    vqgan: VQGANConfig = Field(
        default_factory=VQGANConfig,
        description="sizes of the VQGAN; vocab_size defaults to that of the transformer",
    )
    vqgan_checkpoint: Source | None = Field(
        None,
        description="weights of the VQGAN: a path or hf:// address; default: those in the checkpoint of the whole "
        "model, or the run folder's; not with 'random' and 'pretrain'",
    )
    lora: TamingLoRAConfig | None = Field(
        None, description="train an adapter beside the frozen weights; {} for its defaults; null: train all weights"
    )

    @property
    def frozen_checkpoint(self) -> Source | None:
        """A checkpoint of the whole model has the VQGAN too."""
        whole = self.checkpoint if names_a_file(self.checkpoint) else None
        return self.vqgan_checkpoint or whole
