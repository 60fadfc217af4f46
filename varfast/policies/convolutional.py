"""The convolutional encoder and decoder that the image tokenizers of all families share.

They differ in the names of their parts (`Names`), in how the attention stores its projections, and in the width of the
latents. Parameter names and shapes are those of each family's public checkpoints.

Axes: B image, C channel, H and W sides of the image, h and w sides of the latents.
Source: Esser et al., arXiv:2012.09841.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn


class Sizes(Protocol):
    """What a tokenizer's config says about its convolutions."""

    @property
    def base_channels(self) -> int:
        """Channels at full resolution."""

    @property
    def channel_multipliers(self) -> tuple[int, ...]:
        """Channels of each level over base_channels, full resolution first."""

    @property
    def num_res_blocks(self) -> int:
        """Residual blocks a level of the encoder; the decoder has one more."""


@dataclass(frozen=True)
class Names:
    """What a family's checkpoints call the parts.

    Attributes:
        encoder_levels, decoder_levels: the levels of each.
        blocks: the residual blocks of a level.
        middle: block, attention and block between the levels and the latents.
        first_is_lowest: the decoder's levels are numbered as they run, from the lowest resolution up. False: they are
            numbered as the encoder's, from full resolution down.
    """

    encoder_levels: str
    decoder_levels: str
    blocks: str
    middle: tuple[str, str, str]
    first_is_lowest: bool


# Of VAR's VQ-VAE and of taming-transformers' VQGAN.
VQGAN_NAMES = Names("down", "up", "block", ("block_1", "attn_1", "block_2"), first_is_lowest=False)
# Of LlamaGen's VQ tokenizers.
LLAMAGEN_NAMES = Names("conv_blocks", "conv_blocks", "res", ("0", "1", "2"), first_is_lowest=True)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1)


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice, beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = conv3x3(channels_in, channels_out)
        self.norm2 = group_norm(channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        same = channels_in == channels_out
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Single-head attention over all positions; subclasses hold the projections."""

    norm: nn.GroupNorm
    proj_out: nn.Conv2d

    def projections(self) -> tuple[nn.Conv2d, ...]:
        """The 1x1 convolutions whose outputs, one after the other, are queries, keys and values."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        rows = [projection(normed).flatten(2).transpose(1, 2) for projection in self.projections()]
        q, k, v = rows[0].chunk(3, dim=-1) if len(rows) == 1 else rows
        h = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class JointAttention(Attention):
    """One projection for queries, keys and values."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def projections(self) -> tuple[nn.Conv2d, ...]:
        return (self.qkv,)


class SeparateAttention(Attention):
    """A projection each for queries, keys and values."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, kernel_size=1) for _ in range(4))

    def projections(self) -> tuple[nn.Conv2d, ...]:
        return (self.q, self.k, self.v)


class Downsample(nn.Module):
    """Halve the side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, each followed by an attention where `attention` names its class."""

    def __init__(
        self, channels_in: int, channels_out: int, num_blocks: int, attention: type[Attention] | None, blocks: str
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * num_blocks
        self._blocks = blocks
        self.add_module(blocks, nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(widths)))
        self.attn = nn.ModuleList([attention(channels_out) for _ in range(num_blocks)] if attention else [])

    def steps(self) -> Iterator[nn.Module]:
        """Its parts in the order in which they run: blocks, attentions, and the change of resolution, if any."""
        blocks = self.get_submodule(self._blocks)
        assert isinstance(blocks, nn.ModuleList)
        for index, block in enumerate(blocks):
            yield block
            yield from self.attn[index : index + 1]
        yield from (child for name, child in self.named_children() if name in ("downsample", "upsample"))


class Middle(nn.Module):
    """Block, attention, block, between encoder or decoder levels and latents."""

    def __init__(self, channels: int, attention: type[Attention], names: tuple[str, str, str]) -> None:
        super().__init__()
        parts = (ResnetBlock(channels, channels), attention(channels), ResnetBlock(channels, channels))
        for name, part in zip(names, parts, strict=True):
            self.add_module(name, part)

    def steps(self) -> Iterator[nn.Module]:
        return self.children()


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, latent width, H / downsampling, W / downsampling). Attention stands at the lowest level."""

    def __init__(self, sizes: Sizes, latent_width: int, names: Names, attention: type[Attention]) -> None:
        super().__init__()
        widths = [sizes.base_channels * m for m in (1, *sizes.channel_multipliers)]
        last = len(widths) - 2
        self._levels = names.encoder_levels
        self.conv_in = conv3x3(3, widths[0])
        levels = nn.ModuleList()
        for index, (channels_in, channels_out) in enumerate(pairwise(widths)):
            level = Level(
                channels_in, channels_out, sizes.num_res_blocks, attention if index == last else None, names.blocks
            )
            if index != last:
                level.downsample = Downsample(channels_out)
            levels.append(level)
        self.add_module(names.encoder_levels, levels)
        self.mid = Middle(widths[-1], attention, names.middle)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], latent_width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in (*self.get_submodule(self._levels).children(), self.mid):
            assert isinstance(part, Level | Middle)
            for step in part.steps():
                x = step(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, latent width, h, w) -> (B, 3, h * downsampling, w * downsampling). Attention stands at the lowest level."""

    def __init__(self, sizes: Sizes, latent_width: int, names: Names, attention: type[Attention]) -> None:
        super().__init__()
        widths = [sizes.base_channels * m for m in (*sizes.channel_multipliers, sizes.channel_multipliers[-1])]
        last = len(widths) - 2
        self._levels, self._first_is_lowest = names.decoder_levels, names.first_is_lowest
        self.conv_in = conv3x3(latent_width, widths[-1])
        self.mid = Middle(widths[-1], attention, names.middle)
        levels = []
        for index, (channels_out, channels_in) in enumerate(pairwise(widths)):
            level = Level(
                channels_in, channels_out, sizes.num_res_blocks + 1, attention if index == last else None, names.blocks
            )
            if index != 0:
                level.upsample = Upsample(channels_out)
            levels.append(level)
        self.add_module(names.decoder_levels, nn.ModuleList(levels[::-1] if names.first_is_lowest else levels))
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv3x3(widths[0], 3)

    def steps(self) -> Iterator[nn.Module]:
        """What lies between conv_in and norm_out, in the order in which it runs: blocks, attentions, upsamplings."""
        levels = list(self.get_submodule(self._levels).children())
        for part in (self.mid, *(levels if self._first_is_lowest else levels[::-1])):
            assert isinstance(part, Level | Middle)
            yield from part.steps()

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for step in self.steps():
            x = step(x)
        return self.conv_out(F.silu(self.norm_out(x)))
