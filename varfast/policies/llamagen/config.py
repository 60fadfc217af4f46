"""The section of the config that describes LlamaGen: sizes, weights and adapter. No PyTorch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from varfast.policies.config import LoRAConfig
from varfast.policies.nexttoken.config import NextTokenPolicyConfig, TransformerConfig
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig
from varfast.settings.section import Source


class GPTConfig(TransformerConfig):
    """Sizes of LlamaGen's transformer. The defaults are those of c2i_B_256.pt."""

    num_classes: int = Field(1000, ge=1, le=1_000_000, description="labels; one more embedding stands for 'no label'")
    mlp_width: int | None = Field(
        None, ge=1, le=2**18, description="hidden channels of SwiGLU; null: 8/3 of the width, rounded up to 256s"
    )

    @model_validator(mode="after")
    def _rotary_fits(self) -> GPTConfig:
        if self.head_dim % 4:
            raise ValueError(
                f"heads of {self.head_dim} channels: want a multiple of 4, half for rows, half for columns"
            )
        return self

    @property
    def hidden(self) -> int:
        """F."""
        return self.mlp_width or self.usual_hidden

    @property
    def usual_hidden(self) -> int:
        """F of the public models of this width."""
        return -(-int(2 * 4 * self.width / 3) // 256) * 256


# Class-conditional, published for 16 x 16 tokens (256 px; B and L) and 24 x 24 (384 px; all).
PRESETS: dict[str, GPTConfig] = {
    "B": GPTConfig(depth=12, width=768, num_heads=12),
    "L": GPTConfig(depth=24, width=1024, num_heads=16),
    "XL": GPTConfig(depth=36, width=1280, num_heads=20),
    "XXL": GPTConfig(depth=48, width=1536, num_heads=24),
    "3B": GPTConfig(depth=24, width=3200, num_heads=32),
}


class LlamaGenLoRAConfig(LoRAConfig):
    """Low-rank matrices that are trained beside the frozen ones, by the package peft: y = W x + alpha / rank B A x.

    There is no dropout: a log-probability must describe the policy that was sampled.
    """

    targets: tuple[Literal["wqkv", "wo", "w1", "w3", "w2"], ...] = Field(
        ("wqkv", "wo", "w1", "w3", "w2"),
        min_length=1,
        strict=False,
        description="matrices with an adapter: attention's two and the MLP's three of every block",
    )


class LlamaGenPolicyConfig(NextTokenPolicyConfig):
    """LlamaGen's class-conditional transformer, and the frozen VQ tokenizer that turns its tokens into images."""

    parts: ClassVar = ("gpt", "vq")
    sizes_key: ClassVar = "policy.gpt"
    unguided_cfg: ClassVar = 1.0
    presets: ClassVar = PRESETS
    public_tokenizer: ClassVar = "hf://FoundationVision/LlamaGen/vq_ds16_c2i.pt"

    family: Literal["llamagen"] = Field("llamagen", description="LlamaGen: next-token prediction, arXiv:2406.06525")
    preset: Literal["B", "L", "XL", "XXL", "3B"] | None = Field(None, description="a public model's sizes")
    gpt: GPTConfig | None = Field(None, description="sizes of the transformer, where no preset is named")
    vq: TokenizerConfig = Field(
        default_factory=TokenizerConfig,
        description="sizes of the tokenizer; vocab_size defaults to that of the transformer; channel_multipliers "
        "[1, 2, 2, 4] for vq_ds8_c2i.pt",
    )
    vq_checkpoint: Source | None = Field(
        None,
        description="weights of the tokenizer: a path or hf:// address; default: the run folder's; not with 'random' "
        "and 'pretrain'",
    )
    lora: LlamaGenLoRAConfig | None = Field(
        None, description="train an adapter beside the frozen weights; {} for its defaults; null: train all weights"
    )

    @property
    def frozen_checkpoint(self) -> Source | None:
        return self.vq_checkpoint
