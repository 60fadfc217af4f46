"""The section of the config that describes taming-transformers' minGPT: sizes and weights. No PyTorch."""

from __future__ import annotations

from pydantic import Field, model_validator

from varfast.policies.nexttoken.config import TransformerConfig


class MinGPTConfig(TransformerConfig):
    """Sizes of the transformer. The defaults are those of cin_transformer."""

    depth: int = Field(48, ge=1, le=512, description="number of blocks")
    width: int = Field(1536, ge=4, le=65536, description="channels of the residual stream")
    num_heads: int = Field(24, ge=1, le=1024, description="heads; each has width / num_heads channels")
    mlp_width: int | None = Field(None, ge=1, le=2**18, description="hidden channels of the MLP; null: 4 of the width")
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
                f"num_classes={self.num_classes} is more than vocab_size={self.vocab_size}: labels and codes share a table"
            )
        if self.kv_heads != self.num_heads:
            raise ValueError("num_kv_heads: minGPT has as many heads of keys as of queries")
        return self

    @property
    def hidden(self) -> int:
        """F."""
        return self.mlp_width or 4 * self.width

    @property
    def num_places(self) -> int:
        """Rows of the table of positions."""
        return self.block_size or self.num_tokens


PRESETS: dict[str, MinGPTConfig] = {"cin": MinGPTConfig()}
