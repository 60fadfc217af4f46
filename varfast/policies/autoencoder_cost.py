"""What the convolutional autoencoder of a tokenizer costs, layer by layer: one design for VAR, LlamaGen and taming.

Levels of residual blocks, each further one on a map of half the side; attention in the last level and between the two
halves of the middle. The decoder has one residual block more a level. No PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from varfast.policies.convolutional import Sizes


class Layer(NamedTuple):
    """One layer on a square map, of one image.

    parameters, flop; elements: numbers read and written; live: numbers that exist at once while its block runs.
    """

    parameters: int
    flop: float
    elements: int
    live: int


def conv(channels_in: int, channels_out: int, kernel: int, side: int, side_in: int | None = None) -> Layer:
    weights = channels_in * channels_out * kernel * kernel
    read, written = channels_in * (side_in or side) ** 2, channels_out * side * side
    return Layer(weights + channels_out, 2.0 * weights * side * side, read + written, read + written)


def encoder_layers(sizes: Sizes, side: int, latent_width: int) -> Iterator[Layer]:
    """From an image of `side` pixels to its latents."""
    widths = [sizes.base_channels * m for m in (1, *sizes.channel_multipliers)]
    last = len(widths) - 2
    yield conv(3, widths[0], 3, side)
    for index, (channels_in, channels_out) in enumerate(pairwise(widths)):
        yield from _level(channels_in, channels_out, sizes.num_res_blocks, side, index == last)
        if index != last:
            yield conv(channels_out, channels_out, 3, side // 2, side)
            side //= 2
    yield from _middle(widths[-1], side)
    yield _norm(widths[-1], side)
    yield conv(widths[-1], latent_width, 3, side)


def decoder_layers(sizes: Sizes, side: int, latent_width: int) -> Iterator[Layer]:
    """From latents, a map of `side` places, to pixels."""
    widths = [sizes.base_channels * m for m in (*sizes.channel_multipliers, sizes.channel_multipliers[-1])]
    levels = list(pairwise(widths))
    yield conv(latent_width, widths[-1], 3, side)
    yield from _middle(widths[-1], side)
    for index in reversed(range(len(levels))):
        channels_out, channels_in = levels[index]
        yield from _level(channels_in, channels_out, sizes.num_res_blocks + 1, side, index == len(levels) - 1)
        if index != 0:
            side *= 2  # the convolution reads the upsampled map
            yield conv(channels_out, channels_out, 3, side)
    yield _norm(widths[0], side)
    yield conv(widths[0], 3, 3, side)


def _norm(channels: int, side: int) -> Layer:
    # Map, normalised map and its SiLU exist together.
    return Layer(2 * channels, 0.0, 2 * channels * side * side, 3 * channels * side * side)


def _resnet(channels_in: int, channels_out: int, side: int) -> Iterator[Layer]:
    yield _norm(channels_in, side)
    yield conv(channels_in, channels_out, 3, side)
    # The block's input, its narrowed or widened form if there is one, the first half's result, its normalised form and
    # the second half's result exist together.
    narrowed = 0 if channels_in == channels_out else channels_out
    yield _norm(channels_out, side)._replace(live=(channels_in + narrowed + 3 * channels_out) * side * side)
    yield conv(channels_out, channels_out, 3, side)
    if narrowed:
        yield conv(channels_in, channels_out, 1, side)


def _attention(channels: int, side: int) -> Iterator[Layer]:
    positions = side * side
    yield _norm(channels, side)
    yield conv(channels, 3 * channels, 1, side)
    # Input, q, k, v, output, and the scores where no fused kernel takes a head of this width.
    yield Layer(0, 4.0 * positions**2 * channels, 0, 8 * channels * positions + 2 * positions**2)
    yield conv(channels, channels, 1, side)


def _middle(channels: int, side: int) -> Iterator[Layer]:
    yield from _resnet(channels, channels, side)
    yield from _attention(channels, side)
    yield from _resnet(channels, channels, side)


def _level(channels_in: int, channels_out: int, blocks: int, side: int, attention: bool) -> Iterator[Layer]:
    widths = [channels_in] + [channels_out] * blocks
    for narrow, wide in pairwise(widths):
        yield from _resnet(narrow, wide, side)
        if attention:
            yield from _attention(channels_out, side)
