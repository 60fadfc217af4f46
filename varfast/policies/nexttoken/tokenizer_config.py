"""The sections of the config that describe the tokenizers of next-token models. No PyTorch."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from varfast.settings.schema import Wanted
from varfast.settings.section import Section
from varfast.types import InputError


class TokenizerConfig(Section):
    """Sizes of LlamaGen's VQ tokenizer. The defaults are those of vq_ds16_c2i.pt.

    Attributes:
        title: of the tokenizer, for errors.
        l2_norm: codes and latents are compared, and codes decoded, after L2 normalisation.
    """

    title: ClassVar[str] = "LlamaGen's VQ tokenizer"
    l2_norm: ClassVar[bool] = True

    vocab_size: int = Field(16384, ge=2, le=2**20, description="V, number of codes")
    code_width: int = Field(8, ge=1, le=4096, description="channels of a code")
    latent_width: int = Field(256, ge=1, le=4096, description="channels between the convolutions and the codes")
    base_channels: int = Field(128, ge=32, le=4096, multiple_of=32, description="channels at full resolution")
    channel_multipliers: Annotated[
        tuple[Annotated[int, Field(ge=1, le=64)], ...], Wanted("a list of 1 to 8 whole numbers from 1 to 64")
    ] = Field(
        (1, 1, 2, 2, 4),
        min_length=1,
        max_length=8,
        strict=False,
        description="channels over base_channels; each further level halves the side",
    )
    num_res_blocks: int = Field(
        2, ge=1, le=64, description="residual blocks a level of the encoder; the decoder has one more"
    )
    commitment: float = Field(0.25, ge=0, le=1e6, description="weight of the commitment loss")

    @property
    def downsampling(self) -> int:
        """Pixels of a side over tokens of a side."""
        return int(2 ** (len(self.channel_multipliers) - 1))


class VQGANConfig(TokenizerConfig):
    """Sizes of taming-transformers' VQGAN. The defaults are those of the one in cin_transformer."""

    title: ClassVar[str] = "taming-transformers' VQGAN"
    l2_norm: ClassVar[bool] = False

    code_width: int = Field(256, ge=1, le=4096, description="channels of a code")


# Public tokenizers by the names of their files.
TOKENIZERS: dict[str, TokenizerConfig] = {
    "vq_ds16": TokenizerConfig(),
    "vq_ds8": TokenizerConfig(channel_multipliers=(1, 2, 2, 4)),
    "vqgan_f16": VQGANConfig(),
}


def grid_side(tokenizer: TokenizerConfig, image_size: int) -> int:
    """Tokens of a side of an image. Raises: InputError unless the image is a whole number of tokens."""
    pixels = tokenizer.downsampling
    side, left = divmod(image_size, pixels)
    if left or not side:
        raise InputError(
            f"image_size={image_size} is no multiple of {pixels}, the pixels of a side that a token of "
            f"{tokenizer.title} stands for; use {max(1, round(image_size / pixels)) * pixels}"
        )
    return side


def check_fits(tokenizer: TokenizerConfig, image_size: int, vocab_size: int, num_tokens: int) -> None:
    """Whether a tokenizer belongs to a transformer.

    Args:
        image_size: pixels of a side.
        vocab_size, num_tokens: of the transformer: codes, and tokens an image.
    Raises: InputError that says in what they differ.
    """
    if vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"vocab_size is {vocab_size} in the transformer and {tokenizer.vocab_size} in {tokenizer.title}; they must "
            "be equal"
        )
    side = grid_side(tokenizer, image_size)
    if num_tokens != side * side:
        raise InputError(
            f"the transformer has {num_tokens} tokens an image, and {tokenizer.title} makes {side} x {side} of "
            f"{image_size} pixels ({tokenizer.downsampling} pixels a token); they must be equal"
        )
