"""The tokenizers' decoder for the rollout: post_quant_conv and decoder, without gradient, on prepared weights.

What differs from the modules of convolutional.py, which are the specification:

- One dtype throughout, bfloat16 or float32, and channels_last, the layout of the convolution kernels.
- Nearest upsampling and the 3x3 convolution after it are one transposed convolution: a pixel of the larger image sees
  2x2 pixels of the smaller one, through sums of the 3x3 taps. That takes 4/9 of the arithmetic (it saves 42 of 394
  GFLOP an image of VAR's public model at 256 px), and the upsampled image is not stored.
- The last convolution computes 64 channels on a GPU, of which 3 are read. For 16 or fewer, cuDNN takes a kernel without
  tensor cores (an H100, 64 images of 256 px: 24.1 ms for 3, 1.80 ms for 32, 1.54 ms for 64, although it writes more).
  Reading 3 channels of a pixel moves 32 bytes, whether it has 32 or 64. A CPU takes as long for 16 as for 3, and twice
  as long for 32.
- The 3x3 convolutions add no bias, which would be a pass of its own over the image on a GPU. Biases are kept as a
  vector beside the image, and the next GroupNorm adds it to what it reads, at no cost.
- GroupNorm and SiLU are one op. On a GPU the op before it measures the statistics that GroupNorm needs and adds the
  block's residual in the same pass: that saves two of the five passes over an image at the end of a block.

Axes: B image, C channel, HW side of the latents, N position (of all B images).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varfast.kernels import ChannelMoments, channel_moments, conv3x3, group_norm_silu
from varfast.policies.convolutional import Attention, Decoder, ResnetBlock, Upsample
from varfast.types import InputError

# On a CPU, images that together are larger than this are decoded in parts: glibc returns larger blocks to the system
# and maps them again each time, which was 5 % of the decode (docs/measured.md).
_CPU_BYTES = 2**25
# Channels of the last convolution on a GPU, in bfloat16.
_CUDA_CHANNELS = 64


class Decodable(Protocol):
    """A tokenizer, as far as its decoder goes."""

    @property
    def post_quant_conv(self) -> nn.Conv2d:
        """From codes to the decoder's input, of the same size."""

    @property
    def decoder(self) -> Decoder:
        """From there to pixels."""


class FastDecoder:
    """Decoder of a frozen tokenizer. It holds copies of the weights: build it again when they have changed.

    No host synchronisation and no control flow that depends on data: it can be captured in a CUDA graph.
    """

    def __init__(self, tokenizer: Decodable, dtype: torch.dtype = torch.bfloat16) -> None:
        """
        Args:
            tokenizer: on the device where the decoder is to run; not changed.
            dtype: bfloat16 or float32, of weights and activations.
        Raises: InputError for another dtype.
        """
        if dtype not in (torch.bfloat16, torch.float32):
            raise InputError(f"dtype is {dtype}; the decoder runs in torch.bfloat16 or torch.float32")
        decoder = tokenizer.decoder
        self.dtype = dtype
        self._post_quant_conv = _Conv(tokenizer.post_quant_conv, dtype, with_bias=True)
        self._conv_in = _Conv(decoder.conv_in, dtype)
        bias_C = _wide(decoder.conv_in.bias)
        self._steps: list[_Block | _Attention | _Upsample] = []
        for module in decoder.steps():
            step = _step(module, bias_C, dtype)
            bias_C = step.bias_C
            self._steps.append(step)
        self._norm_out = _Norm(decoder.norm_out, bias_C)
        padded = dtype == torch.bfloat16 and decoder.conv_out.weight.device.type == "cuda"
        self._conv_out = _Conv(decoder.conv_out, dtype, with_bias=True, channels=_CUDA_CHANNELS if padded else None)

    @torch.no_grad()
    def __call__(self, latent: Tensor) -> Tensor:
        """Codes -> image.

        Args:
            latent: (B, C, HW, HW), any floating dtype: the code of each position, or VAR's sum of quantized scales.
        Returns: (B, 3, H, W) in the decoder's dtype, channels innermost (on a GPU a view of 3 of 64). Not clamped: the
            model may leave [-1, 1] a little.
        """
        x = latent.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self._run(_measured(self._conv_in(self._post_quant_conv(x))), 0)

    def _run(self, image: _Image, first: int) -> Tensor:
        """The steps from `first` on."""
        for index in range(first, len(self._steps)):
            image = self._steps[index](image)
            x = image[0]
            if x.device.type == "cpu" and x.nbytes > _CPU_BYTES and len(x) > 1:
                parts = x.split(max(1, _CPU_BYTES * len(x) // x.nbytes))
                return torch.cat([self._run((part, None), index + 1) for part in parts])
        return self._conv_out(self._norm_out(image))[:, :3]


# An image, and the statistics for the GroupNorm that reads it next, if they have been measured already.
_Image = tuple[Tensor, ChannelMoments | None]


def _measured(x: Tensor, residual: Tensor | None = None) -> _Image:
    """x + residual, with its statistics if GroupNorm can use them. x may be overwritten."""
    return channel_moments(x, residual)


def _wide(parameter: Tensor | None) -> Tensor:
    """A parameter in float64: weights are combined in it and then rounded once."""
    assert parameter is not None
    return parameter.detach().double()


class _Conv:
    """A convolution that keeps the image's size. It adds its bias only if no op after it can do so."""

    def __init__(
        self, conv: nn.Conv2d, dtype: torch.dtype, with_bias: bool = False, channels: int | None = None
    ) -> None:
        """channels: of the output, padded with zeros; default: those of the convolution."""
        more = max(0, (channels or 0) - conv.out_channels)
        weight = F.pad(_wide(conv.weight), (0, 0, 0, 0, 0, 0, 0, more))
        self.weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        self.bias = F.pad(_wide(conv.bias), (0, more)).to(dtype) if with_bias else None
        self.padding = conv.kernel_size[0] // 2

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)


class _Norm:
    """GroupNorm of x plus the bias that is kept beside it; with or without SiLU."""

    def __init__(self, norm: nn.GroupNorm, bias_C: Tensor, silu: bool = True) -> None:
        self.num_groups, self.eps, self.silu = norm.num_groups, norm.eps, silu
        self.weight, self.bias = _wide(norm.weight).float(), _wide(norm.bias).float()
        self.input_bias = bias_C.float()

    def __call__(self, image: _Image) -> Tensor:
        x, moments = image
        return group_norm_silu(
            x, self.weight, self.bias, self.num_groups, self.eps, self.silu, self.input_bias, moments
        )


# The steps between conv_in and norm_out. Each takes an image to which a bias is still to be added, and says in `bias_C`
# which bias its own result still lacks. The result is a new tensor, so the next step may overwrite it.


class _Block:
    """ResnetBlock. The biases of its shortcut and its second convolution are left to the next step."""

    def __init__(self, block: ResnetBlock, bias_C: Tensor, dtype: torch.dtype) -> None:
        self.norm1, self.conv1 = _Norm(block.norm1, bias_C), _Conv(block.conv1, dtype)
        self.norm2, self.conv2 = _Norm(block.norm2, _wide(block.conv1.bias)), _Conv(block.conv2, dtype)
        self.shortcut = None
        if isinstance(block.nin_shortcut, nn.Conv2d):
            self.shortcut = _Conv(block.nin_shortcut, dtype)
            weight = _wide(block.nin_shortcut.weight).flatten(1)
            bias_C = weight @ bias_C + _wide(block.nin_shortcut.bias)
        self.bias_C = bias_C + _wide(block.conv2.bias)

    def __call__(self, image: _Image) -> _Image:
        h = conv3x3(self.norm1(image), self.conv1.weight)
        x = image[0] if self.shortcut is None else self.shortcut(image[0])
        return conv3x3(self.norm2(h), self.conv2.weight, x)


class _Attention:
    """Attention. Its 1x1 convolutions are matrix products, whose bias is free: the bias of the step before joins it."""

    def __init__(self, attn: Attention, bias_C: Tensor, dtype: torch.dtype) -> None:
        self.norm = _Norm(attn.norm, bias_C, silu=False)
        qkv, out = attn.projections(), attn.proj_out
        weights = [torch.cat([_wide(conv.weight) for conv in qkv]), _wide(out.weight)]
        self.weights = [weight.flatten(1).to(dtype) for weight in weights]
        self.biases = [torch.cat([_wide(conv.bias) for conv in qkv]).to(dtype), (_wide(out.bias) + bias_C).to(dtype)]
        self.bias_C = torch.zeros_like(bias_C)

    def __call__(self, image: _Image) -> _Image:
        x = image[0]
        batch, channels, height, width = x.shape
        h_BNC = self.norm(image).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        q, k, v = F.linear(h_BNC, self.weights[0], self.biases[0]).unsqueeze(1).chunk(3, dim=-1)
        h_BNC = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        h_BNC = F.linear(h_BNC, self.weights[1], self.biases[1])
        return _measured(h_BNC.view(batch, height, width, channels).permute(0, 3, 1, 2), x)


class _Upsample:
    """Nearest upsampling by 2 and a 3x3 convolution, as one transposed 4x4 convolution of stride 2."""

    def __init__(self, upsample: Upsample, bias_C: Tensor, dtype: torch.dtype) -> None:
        conv = upsample.conv
        self.input_bias = bias_C.to(dtype)[:, None, None]  # added here: a pad of zeros follows, which has no bias
        weight = _merged_taps(_merged_taps(_wide(conv.weight), dim=2), dim=3).transpose(0, 1)
        self.weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        self.bias_C = _wide(conv.bias)

    def __call__(self, image: _Image) -> _Image:
        x = image[0].add_(self.input_bias)
        return _measured(F.conv_transpose2d(x, self.weight, stride=2, padding=1))


def _merged_taps(weight: Tensor, dim: int) -> Tensor:
    """Taps (a, b, c) of a convolution after upsampling -> (c, b + c, a + b, a) of the transposed convolution.

    Of the pixels 2i and 2i + 1, the first sees the small pixels i - 1 (through a) and i (b + c), the second i (a + b)
    and i + 1 (c). A transposed convolution of stride 2 and padding 1 puts tap k of the small pixel i on 2i + k - 1.
    """
    a, b, c = weight.unbind(dim)
    return torch.stack([c, b + c, a + b, a], dim)


def _step(module: nn.Module, bias_C: Tensor, dtype: torch.dtype) -> _Block | _Attention | _Upsample:
    if isinstance(module, ResnetBlock):
        return _Block(module, bias_C, dtype)
    if isinstance(module, Attention):
        return _Attention(module, bias_C, dtype)
    assert isinstance(module, Upsample)
    return _Upsample(module, bias_C, dtype)
