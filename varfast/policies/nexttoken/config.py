"""Sizes of the transformers of the next-token families, and what their sections `policy` share. No PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from varfast.policies.config import FamilyConfig, names_a_file
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig, check_fits
from varfast.settings.section import Section
from varfast.weights.hub import names_repository


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
    side: int = Field(
        16, ge=1, le=256, description="tokens a side of the image; default: of image_size and the tokenizer"
    )
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


class NextTokenPolicyConfig(FamilyConfig):
    """A causal transformer, and the frozen tokenizer that turns its tokens into images.

    The sizes of the two stand under the names of the two parts.

    Attributes:
        presets: sizes of public transformers by name; their side is that of the image.
        public_tokenizer: address of the public weights of the tokenizer, for an error; None where the transformer's
            checkpoint has them too.
    """

    presets: ClassVar[Mapping[str, TransformerConfig]]
    public_tokenizer: ClassVar[str | None]

    image_size: int = Field(256, ge=1, le=4096, description="pixels of a side: a whole number of tokens")

    @model_validator(mode="before")
    @classmethod
    def _resolve_sizes(cls, data: Any) -> Any:
        """What the two parts and the image have in common need be said once."""
        if not isinstance(data, dict):
            return data
        data, (trained, frozen) = dict(data), cls.parts
        preset, sizes = data.get("preset"), data.get(trained)
        if (preset is None) == (sizes is None):
            named = ", ".join(cls.presets)
            raise ValueError(f"name a preset ({named}) or give the sizes under {trained}, one of the two")
        known = cls.presets.get(preset) if isinstance(preset, str) else None
        sizes = sizes.model_dump() if isinstance(sizes, TransformerConfig) else sizes
        tokenizer = data.get(frozen)
        tokenizer = {} if tokenizer is None else tokenizer
        default = cls.model_fields[frozen].get_default(call_default_factory=True)
        multipliers = tokenizer.get("channel_multipliers") if isinstance(tokenizer, dict) else None
        levels = len(multipliers if isinstance(multipliers, (list, tuple)) else default.channel_multipliers)
        pixels = 2 ** max(0, levels - 1)
        if isinstance(sizes, dict):
            if isinstance(sizes.get("side"), int):
                data.setdefault("image_size", sizes["side"] * pixels)
            elif isinstance(data.setdefault("image_size", cls.model_fields["image_size"].default), int):
                sizes = sizes | {"side": data["image_size"] // pixels}
            data[trained] = sizes
        if isinstance(tokenizer, dict):
            vocab_size = sizes.get("vocab_size") if isinstance(sizes, dict) else known and known.vocab_size
            data[frozen] = ({} if vocab_size is None else {"vocab_size": vocab_size}) | tokenizer
        return data

    @model_validator(mode="after")
    def _agree(self) -> NextTokenPolicyConfig:
        _, frozen = self.parts
        check_fits(self.tokenizer, self.image_size, self.sizes.vocab_size, self.sizes.num_tokens)
        if self.checkpoint in ("random", "pretrain"):
            if self.frozen_checkpoint is not None:
                raise ValueError(f"checkpoint={self.checkpoint} makes its own tokenizer; remove {frozen}_checkpoint")
        elif (
            self.frozen_checkpoint is None
            and self.public_tokenizer is not None
            and names_a_file(self.checkpoint)
            and not names_repository(self.checkpoint)
        ):
            raise ValueError(f"{frozen}_checkpoint is missing; for the public models it is {self.public_tokenizer}")
        return self

    @property
    def sizes(self) -> TransformerConfig:
        """Of the transformer: those given, or of the preset with the side of the image."""
        given: TransformerConfig | None = getattr(self, self.parts[0])
        if given is not None:
            return given
        preset: str = getattr(self, "preset")  # noqa: B009 - each family has its own names
        side = max(1, self.image_size // self.tokenizer.downsampling)
        known = self.presets[preset]
        return type(known)(**known.model_dump() | {"side": side})

    @property
    def tokenizer(self) -> TokenizerConfig:
        """Sizes of the tokenizer."""
        tokenizer: TokenizerConfig = getattr(self, self.parts[1])
        return tokenizer

    @property
    def num_classes(self) -> int:
        return self.sizes.num_classes

    @property
    def vocab_size(self) -> int:
        return self.sizes.vocab_size
