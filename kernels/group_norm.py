"""GroupNorm and SiLU of images for the VQ-VAE's decoder. Forward only.

The image is read twice and written once. If its statistics are already known, from `channel_moments` (which also adds a
residual) or from `conv3x3`, it is read only once. The statistics are a mean and a sum of squared deviations for each
channel and chunk of pixels, which are then combined by group. They are accurate even if the mean is large, and the same
on every run. The kernels take (B, P, C), the memory layout of a channels_last image; other images are copied to that
layout and back.

Axes: B image, C channel, H and W sides, P pixel.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels._triton import jit, tl
from varfast.kernels.extension import NO_EXTENSION, cannot_run_cpp
from varfast.kernels.selection import Implementation, cannot_run_triton, implementations, refused_dtype, run
from varfast.kernels.settings import setting

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime


class ChannelMoments(NamedTuple):
    """The statistics of an image that a GroupNorm needs, for each channel and chunk of pixels.

    Attributes:
        mean_BNC: (B, N chunks, C) float32.
        squares_BNC: sum of squared deviations from that mean, likewise.
        rows: pixels of a chunk; the last chunk has the remaining pixels.
    """

    mean_BNC: Tensor
    squares_BNC: Tensor
    rows: int


# Numbers of a tile: 64 per thread, all in registers, so that the deviations from the mean need no second read.
_TILE = 8192
_NUM_WARPS = 4
_MAX_TILE_CHANNELS = 128


def _tile(channels: int) -> tuple[int, int]:
    """(pixels, channels) of a tile. The channels are a power of two that divides C (32 for 160), so no lane is idle."""
    divisor = channels & -channels
    if divisor < 16:  # odd widths: round C up and mask
        divisor = 1 << (channels - 1).bit_length()
    divisor = min(divisor, _MAX_TILE_CHANNELS)
    return _TILE // divisor, divisor


def _launch_settings(channels: int, device: torch.device | None = None) -> dict[str, int]:
    """Settings of the two kernels that pass over the image. They and _join_kernel must use the same tiles."""
    rows, tile = _tile(channels)
    return setting("group_norm_silu", channels, device, ROWS=rows, TILE=tile, num_warps=_NUM_WARPS)


@jit
def _tile_of_program(pixels, chunks, C: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """What a program works on: (image and chunk, image, chunk, its pixels, its channels, which of them exist).

    Programs of the same pixels are neighbours, so that they share DRAM pages.
    """
    tiles: tl.constexpr = (C + TILE - 1) // TILE
    program = tl.program_id(0)
    part = program // tiles  # image * chunks + chunk
    image, chunk = (part // chunks).to(tl.int64), part % chunks
    row = chunk * ROWS + tl.arange(0, ROWS)
    channel = (program % tiles) * TILE + tl.arange(0, TILE)
    return part, image, chunk, row, channel, (row < pixels)[:, None] & (channel < C)[None, :]


@jit
def _moments_kernel(
    x_ptr,
    residual_ptr,
    mean_ptr,
    squares_ptr,
    pixels,
    chunks,
    RESIDUAL: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """RESIDUAL: first add the residual to x in place; the moments are those of the stored (rounded) sum."""
    part, image, chunk, row, channel, inside = _tile_of_program(pixels, chunks, C, ROWS, TILE)
    at = (image * pixels + row)[:, None] * C + channel[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        stored = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at, stored, mask=inside)
        x = stored.to(tl.float32)
    mean = tl.sum(x, axis=0) / tl.minimum(pixels - chunk * ROWS, ROWS)
    centred = tl.where(inside, x - mean[None, :], 0.0)
    of_part = part.to(tl.int64) * C + channel
    tl.store(mean_ptr + of_part, mean, mask=channel < C)
    tl.store(squares_ptr + of_part, tl.sum(centred * centred, axis=0), mask=channel < C)


@jit
def _join_kernel(
    mean_ptr,
    squares_ptr,
    weight_ptr,
    bias_ptr,
    input_bias_ptr,
    factor_ptr,
    offset_ptr,
    pixels,
    chunks,
    eps,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program combines the moments of one group of an image, and writes each channel's factor and offset, so that
    the normalised value is x * factor + offset."""
    groups: tl.constexpr = C // WIDTH
    program = tl.program_id(0)
    image = (program // groups).to(tl.int64)
    column = tl.arange(0, BLOCK)
    channel = (program % groups) * WIDTH + column
    input_bias = tl.load(input_bias_ptr + channel, mask=column < WIDTH, other=0.0)
    count = pixels * (WIDTH * 1.0)  # not pixels.to(): Triton passes a 1 as a Python int
    # Sum the differences of the means from one of them, so that a large common offset costs no digits.
    origin = tl.load(mean_ptr + image * chunks * C + (program % groups) * WIDTH)
    sums = tl.zeros((CHUNKS, BLOCK), tl.float32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & (column < WIDTH)[None, :]
        rows = tl.minimum(pixels - chunk * ROWS, ROWS).to(tl.float32)
        at = (image * chunks + chunk)[:, None] * C + channel[None, :]
        mean = tl.load(mean_ptr + at, mask=inside, other=0.0) + input_bias[None, :]
        sums += tl.where(inside, (mean - origin) * rows[:, None], 0.0)
    average = origin + tl.sum(tl.sum(sums, axis=1), axis=0) / count
    sums = tl.zeros((CHUNKS, BLOCK), tl.float32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = (chunk < chunks)[:, None] & (column < WIDTH)[None, :]
        rows = tl.minimum(pixels - chunk * ROWS, ROWS).to(tl.float32)
        at = (image * chunks + chunk)[:, None] * C + channel[None, :]
        away = tl.load(mean_ptr + at, mask=inside, other=0.0) + input_bias[None, :] - average
        squares = tl.load(squares_ptr + at, mask=inside, other=0.0)
        sums += tl.where(inside, squares + away * away * rows[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(sums, axis=1), axis=0) / count + eps)
    factor = tl.load(weight_ptr + channel, mask=column < WIDTH, other=0.0) * rstd
    bias = tl.load(bias_ptr + channel, mask=column < WIDTH, other=0.0)
    tl.store(factor_ptr + image * C + channel, factor, mask=column < WIDTH)
    tl.store(offset_ptr + image * C + channel, bias + (input_bias - average) * factor, mask=column < WIDTH)


@jit
def _exp(x):
    """exp(x) to two units in the last place. tl.exp computes exp2(x * log2(e)), and the rounding of that product costs
    3e-6 at x = 80. So an integer power of two is split off, and |rest| is at most 0.35 (Cody and Waite)."""
    x = tl.minimum(tl.maximum(x, -150.0), 150.0)  # exp gives 0 and inf; this drops NaN, but the numerator keeps it
    power = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = x - power * 0.693359375 + power * 2.12194440e-4  # ln 2 in two parts: the first product is exact
    return tl.exp2(power) * tl.exp(rest)


@jit
def _normalise_kernel(
    x_ptr,
    factor_ptr,
    offset_ptr,
    out_ptr,
    pixels,
    chunks,
    SILU: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    _, image, _, row, channel, inside = _tile_of_program(pixels, chunks, C, ROWS, TILE)
    factor = tl.load(factor_ptr + image * C + channel, mask=channel < C, other=0.0)
    offset = tl.load(offset_ptr + image * C + channel, mask=channel < C, other=0.0)
    at = (image * pixels + row)[:, None] * C + channel[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = x * factor[None, :] + offset[None, :]
    if SILU:
        out = out / (1.0 + _exp(-out))
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Custom ops and fakes. The extension's op is defined in csrc/ops.cpp, with the same arguments.


@torch.library.custom_op("varfast::channel_moments", mutates_args=("x_BPC",))
def _channel_moments(x_BPC: Tensor, residual_BPC: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """Add the residual in place to x, which is contiguous; return mean and sum of squared deviations, (B, chunks, C)
    float32. rows: pixels of a chunk, ROWS of the settings.
    """
    mean, squares = _empty_moments(x_BPC, residual_BPC, rows)
    if x_BPC.numel():
        _, pixels, channels = x_BPC.shape
        chosen = _launch_settings(channels, x_BPC.device)
        chunks = mean.shape[1]
        residual = x_BPC if residual_BPC is None else residual_BPC.contiguous()
        with torch.cuda.device_of(x_BPC):
            _moments_kernel[(len(x_BPC) * chunks * -(-channels // chosen["TILE"]),)](
                x_BPC,
                residual,
                mean,
                squares,
                pixels,
                chunks,
                RESIDUAL=residual_BPC is not None,
                C=channels,
                **chosen,
            )
    return mean, squares


def _empty_moments(x_BPC: Tensor, residual_BPC: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    batch, pixels, channels = x_BPC.shape
    mean, squares = (x_BPC.new_empty((batch, -(-pixels // rows), channels), dtype=torch.float32) for _ in range(2))
    return mean, squares


_channel_moments.register_fake(_empty_moments)


@torch.library.custom_op("varfast::group_norm_silu", mutates_args=())
def _group_norm(
    x_BPC: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    input_bias_C: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    mean_BNC: Tensor,
    squares_BNC: Tensor,
    rows: int,
) -> Tensor:
    """The last three arguments are the ChannelMoments of x."""
    batch, pixels, channels = x_BPC.shape
    x, out = x_BPC.contiguous(), x_BPC.new_empty(x_BPC.shape)
    if not x.numel():
        return out
    weight, bias, input_bias = (vector.contiguous() for vector in (weight_C, bias_C, input_bias_C))
    factor, offset = (x.new_empty((batch, channels), dtype=torch.float32) for _ in range(2))
    width = channels // num_groups
    chosen = _launch_settings(channels, x.device)
    chunks, tiles = -(-pixels // chosen["ROWS"]), -(-channels // chosen["TILE"])
    with torch.cuda.device_of(x):
        _join_kernel[(batch * num_groups,)](
            mean_BNC.contiguous(),
            squares_BNC.contiguous(),
            weight,
            bias,
            input_bias,
            factor,
            offset,
            pixels,
            mean_BNC.shape[1],
            eps,
            C=channels,
            WIDTH=width,
            ROWS=rows,
            **_join_settings(width),
        )
        _normalise_kernel[(batch * chunks * tiles,)](
            x, factor, offset, out, pixels, chunks, SILU=silu, C=channels, **chosen
        )
    return out


def _join_settings(width: int) -> dict[str, int]:
    """4 numbers per thread; 8 spill registers at 640 channels (triton 3.6). Groups of the public model have 5 to 20
    channels."""
    block = 1 << (width - 1).bit_length()
    return {"CHUNKS": max(1, 512 // block), "BLOCK": block, "num_warps": 4}


def _fake(x_BPC: Tensor, *_: Any) -> Tensor:
    return x_BPC.new_empty(x_BPC.shape)


_group_norm.register_fake(_fake)
if NO_EXTENSION is None:
    torch.library.register_fake("varfast::group_norm_silu_cpu", _fake)


def _refuse_gradient(impl: str, *given: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        raise ValueError(f"impl={impl!r} of group_norm_silu has no gradient; use torch.no_grad() or impl='reference'")


def _vectors(weight_C: Tensor, bias_C: Tensor, input_bias_C: Tensor | None) -> list[Tensor]:
    input_bias_C = torch.zeros_like(bias_C) if input_bias_C is None else input_bias_C
    return [vector.float() for vector in (weight_C, bias_C, input_bias_C)]


def _image_like(out_BPC: Tensor, x_BCHW: Tensor) -> Tensor:
    batch, channels, height, width = x_BCHW.shape
    out_BCHW = out_BPC.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return out_BCHW.contiguous(memory_format=reference.memory_format(x_BCHW))


def _moments(x_BPC: Tensor, residual_BPC: Tensor | None) -> ChannelMoments:
    """Of x + residual, which x then holds."""
    rows = _launch_settings(x_BPC.shape[2], x_BPC.device)["ROWS"]
    mean, squares = _channel_moments(x_BPC, residual_BPC, rows)
    return ChannelMoments(mean, squares, rows)


def _run(
    impl: str,
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    input_bias_C: Tensor | None,
    moments: ChannelMoments | None,
) -> Tensor:
    _refuse_gradient(impl, x_BCHW, weight_C, bias_C, input_bias_C)
    x_BPC = x_BCHW.permute(0, 2, 3, 1).flatten(1, 2)
    how = (*_vectors(weight_C, bias_C, input_bias_C), num_groups, eps, silu)
    if impl == "cpp":  # it computes the moments in any case: a channel's pixels are in the cache then
        return _image_like(torch.ops.varfast.group_norm_silu_cpu(x_BPC, *how), x_BCHW)
    x_BPC = x_BPC.contiguous()
    moments = _moments(x_BPC, None) if moments is None else moments
    return _image_like(_group_norm(x_BPC, *how, *moments), x_BCHW)


def _refuses_triton(x_BCHW: Tensor, *_: Any) -> str | None:
    return refused_dtype(x_BCHW)


def _refuses_cpp(x_BCHW: Tensor, *_: Any) -> str | None:
    taken = x_BCHW.dtype in (torch.float32, torch.bfloat16)
    return None if taken else f"float32 or bfloat16, got {x_BCHW.dtype}"


implementations(
    "group_norm_silu",
    Implementation("triton", partial(_run, "triton"), cannot_run_triton, ("cuda",), _refuses_triton),
    Implementation("cpp", partial(_run, "cpp"), cannot_run_cpp, ("cpu",), _refuses_cpp),
    Implementation("reference", reference.group_norm_silu),
)


def _moments_triton(x_BCHW: Tensor, residual_BCHW: Tensor | None) -> tuple[Tensor, ChannelMoments]:
    _refuse_gradient("triton", x_BCHW, residual_BCHW)
    x_BHWC = x_BCHW.permute(0, 2, 3, 1).contiguous()
    residual = None if residual_BCHW is None else residual_BCHW.permute(0, 2, 3, 1).flatten(1, 2)
    return x_BHWC.permute(0, 3, 1, 2), _moments(x_BHWC.flatten(1, 2), residual)


implementations(
    "channel_moments",
    Implementation("triton", _moments_triton, cannot_run_triton, ("cuda",), _refuses_triton),
    Implementation("reference", reference.channel_moments),
)


def ahead_of_time() -> list[AheadOfTime]:
    """The public models' channels in 32 groups (VAR 160 to 640, LlamaGen and taming 128 to 512); also one image, group,
    pixel, channel and chunk."""
    from varfast.kernels.aot import recorded

    def call(dtype: torch.dtype, shape: tuple[int, ...], groups: int) -> None:
        image = torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        vector = torch.empty(shape[1])
        group_norm_silu(image, vector, vector, groups, impl="triton")
        channel_moments(image, torch.empty_like(image), impl="triton")

    items = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for channels in (160, 320, 640, 128, 512):
            what, image = f"group_norm_silu {name} C={channels}", (2, channels, 32, 32)
            main = dtype == torch.bfloat16 and channels == 160
            items += recorded(what, partial(call, dtype, image, 32), narrow=(_join_kernel,), also_blackwell=main)
    for shape, groups in (((1, 32, 1, 1), 32), ((1, 1, 1, 1), 1), ((1, 7, 3, 3), 1), ((3, 32, 5, 7), 8)):
        items += recorded(
            f"group_norm_silu {shape} G={groups}", partial(call, torch.float32, shape, groups), fast=False
        )
    return items


def _check_image(x_BCHW: Tensor) -> None:
    if x_BCHW.ndim != 4 or x_BCHW.shape[2] * x_BCHW.shape[3] == 0:
        raise ValueError(f"x_BCHW is {tuple(x_BCHW.shape)}: want (B, C, H, W) with a pixel to average over")


def group_norm_silu(
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float = 1e-6,
    silu: bool = True,
    input_bias_C: Tensor | None = None,
    moments: ChannelMoments | None = None,
    impl: str = "auto",
) -> Tensor:
    """GroupNorm of x + input_bias over a group's channels and all pixels, * weight + bias, then SiLU.

    Args:
        x_BCHW: (B, C, H, W), any strides; channels_last is read without a copy. Statistics in float32 (float64 for
            float64).
        weight_C, bias_C: (C,).
        num_groups: divides C.
        eps: added to the variance.
        silu: if False, return the normalised image without SiLU.
        input_bias_C: (C,), or None for 0: the bias of the preceding convolution, which then need not add it.
        moments: the statistics of x, if `channel_moments` or `conv3x3` has computed them; saves "triton" one pass.
        impl: "auto", "triton" (float32 or 16 bits), "cpp" (CPU, float32 or bfloat16), both without gradient, or
            "reference".
    Returns: (B, C, H, W) in the dtype of x_BCHW; channels_last if x_BCHW has its channels innermost, else contiguous.
    Raises: ValueError for other shapes or dtypes, for an impl that is unknown or cannot run, or if a gradient is
        required of "triton" or "cpp".
    """
    _check_image(x_BCHW)
    channels = x_BCHW.shape[1]
    if num_groups < 1 or channels < 1 or channels % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide {channels} channels")
    for name, vector in (("weight_C", weight_C), ("bias_C", bias_C), ("input_bias_C", input_bias_C)):
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"{name} is {tuple(vector.shape)}, want ({channels},): one a channel")
    given = (x_BCHW, weight_C, bias_C, num_groups, eps, silu, input_bias_C, moments)
    out_BCHW: Tensor = run("group_norm_silu", impl, *given)
    return out_BCHW


def channel_moments(
    x_BCHW: Tensor, residual_BCHW: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, ChannelMoments | None]:
    """x + residual, and the sum's `moments` for `group_norm_silu`, in one pass. Forward only.

    Args:
        x_BCHW: (B, C, H, W); channels_last is read without a copy. It may be overwritten: do not use it afterwards.
        residual_BCHW: of the same shape and dtype, or None for 0; never written.
        impl: "auto", "triton" (float32 or 16 bits) or "reference".
    Returns: the sum, channels_last from "triton"; and its moments, or None from "reference".
    Raises: ValueError for shapes or dtypes that differ, or for an impl that is unknown or cannot run.
    """
    _check_image(x_BCHW)
    if residual_BCHW is not None:
        for what in ("shape", "dtype"):
            ours, theirs = getattr(x_BCHW, what), getattr(residual_BCHW, what)
            if ours != theirs:
                raise ValueError(f"x_BCHW and residual_BCHW: got {what}s {ours} and {theirs}, want one")
    out: tuple[Tensor, ChannelMoments | None] = run("channel_moments", impl, x_BCHW, residual_BCHW)
    return out
