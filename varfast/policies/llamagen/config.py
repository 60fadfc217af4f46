"""The section of the config that describes LlamaGen: sizes and weights. No PyTorch."""

from __future__ import annotations

from pydantic import Field, model_validator

from varfast.policies.nexttoken.config import TransformerConfig


class GPTConfig(TransformerConfig):
    """Sizes of LlamaGen's transformer. The defaults are those of c2i_B_256.pt."""

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
        return self.mlp_width or -(-int(2 * 4 * self.width / 3) // 256) * 256


# Class-conditional, published for 16 x 16 tokens (256 px; B and L) and 24 x 24 (384 px; all).
PRESETS: dict[str, GPTConfig] = {
    "B": GPTConfig(depth=12, width=768, num_heads=12),
    "L": GPTConfig(depth=24, width=1024, num_heads=16),
    "XL": GPTConfig(depth=36, width=1280, num_heads=20),
    "XXL": GPTConfig(depth=48, width=1536, num_heads=24),
    "3B": GPTConfig(depth=24, width=3200, num_heads=32),
}
