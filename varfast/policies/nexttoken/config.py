"""Sizes of the models of the next-token families. No PyTorch."""

from __future__ import annotations

from pydantic import Field, model_validator

from varfast.settings.section import Section


class TransformerConfig(Section):
    """Sizes of a causal transformer over the tokens of an image."""

    depth: int = Field(12, ge=1, le=512, description="number of blocks")
    width: int = Field(768, ge=4, le=65536, description="channels of the residual stream")
    num_heads: int = Field(12, ge=1, le=1024, description="heads of the queries; each has width / num_heads channels")
    num_kv_heads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="heads of keys and values, each for as many adjacent query heads; null: num_heads",
    )
    mlp_width: int | None = Field(
        None, ge=1, le=2**18, description="hidden channels of the MLP; null: as the family computes it from the width"
    )
    vocab_size: int = Field(16384, ge=2, le=2**20, description="V, number of codes")
    num_classes: int = Field(1000, ge=1, le=1_000_000, description="labels")
    side: int = Field(16, ge=1, le=256, description="tokens a side of the image")
    norm_eps: float = Field(1e-5, ge=1e-12, le=1, description="added to the variance, or the mean square, in norms")

    @model_validator(mode="after")
    def _heads_fit(self) -> TransformerConfig:
        if self.width % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"width={self.width} with num_heads={self.num_heads}: want heads of an even whole number of channels"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads={self.kv_heads} does not divide num_heads={self.num_heads}")
        return self

    @property
    def head_dim(self) -> int:
        """D."""
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.num_kv_heads or self.num_heads

    @property
    def num_tokens(self) -> int:
        """N, of an image."""
        return self.side * self.side
