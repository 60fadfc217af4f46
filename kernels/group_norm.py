"""GroupNorm and SiLU of images, as the VQ-VAE's decoder uses them: forward only.

The image is read twice and written once. Statistics are a mean and a sum of squared deviations a channel and chunk of
pixels, joined by group: exact where the mean is large, and the same on every run. The kernels take (B, P, C), which is
what a channels_last image is; another image is copied there and back.

Axes: B image, C channel, H and W sides, P pixel.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.extension import NO_EXTENSION, cannot_run_cpp
from varfast.kernels.selection import Implementation, cannot_run_triton, implementations, run
from varfast.kernels.settings import setting

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # never launched then: cannot_run_triton says why

    def jit(function):
        return function


# Numbers of a tile: 64 a thread, all in registers, so that the deviations need no second read.
_TILE = 8192
_NUM_WARPS = 4
_MAX_TILE_CHANNELS = 128


def _tile(channels: int) -> tuple[int, int]:
    """(pixels, channels) of a tile: a power of two of channels that divides C, as 160 = 5 * 32, wastes no lane."""
    divisor = channels & -channels
    if divisor < 16:  # odd widths: masked
        divisor = 1 << (channels - 1).bit_length()
    divisor = min(divisor, _MAX_TILE_CHANNELS)
    return _TILE // divisor, divisor


def _launch_settings(channels: int, device: torch.device | None = None) -> dict[str, int]:
    """Of the two kernels that pass over the image; both, and what joins them, share the tiles."""
    rows, tile = _tile(channels)
    return setting("group_norm_silu", channels, device, ROWS=rows, TILE=tile, num_warps=_NUM_WARPS)


@jit
def _moments_kernel(
    x_ptr,
    mean_ptr,
    squares_ptr,
    pixels,
    chunks,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile a program; those of the same pixels are neighbours, so that they share DRAM pages."""
    tiles: tl.constexpr = (C + TILE - 1) // TILE
    program = tl.program_id(0)
    part = program // tiles  # image * chunks + chunk
    chunk = part % chunks
    row = chunk * ROWS + tl.arange(0, ROWS)
    channel = (program % tiles) * TILE + tl.arange(0, TILE)
    inside = (row < pixels)[:, None] & (channel < C)[None, :]
    pixel = (part // chunks).to(tl.int64) * pixels + row
    x = tl.load(x_ptr + pixel[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / tl.minimum(pixels - chunk * ROWS, ROWS)
    centred = tl.where(inside, x - mean[None, :], 0.0)
    at = part.to(tl.int64) * C + channel
    tl.store(mean_ptr + at, mean, mask=channel < C)
    tl.store(squares_ptr + at, tl.sum(centred * centred, axis=0), mask=channel < C)


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
    """One group of an image a program: its moments, and what they make of each channel: x * factor + offset."""
    groups: tl.constexpr = C // WIDTH
    program = tl.program_id(0)
    image = (program // groups).to(tl.int64)
    column = tl.arange(0, BLOCK)
    channel = (program % groups) * WIDTH + column
    input_bias = tl.load(input_bias_ptr + channel, mask=column < WIDTH, other=0.0)
    count = pixels * (WIDTH * 1.0)  # not pixels.to(): of one pixel a launch makes a Python int
    # Means are summed as they differ from one of them: a large common offset costs no digits.
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
    """The tiles of _moments_kernel."""
    tiles: tl.constexpr = (C + TILE - 1) // TILE
    program = tl.program_id(0)
    part = program // tiles
    image = (part // chunks).to(tl.int64)
    row = part % chunks * ROWS + tl.arange(0, ROWS)
    channel = (program % tiles) * TILE + tl.arange(0, TILE)
    inside = (row < pixels)[:, None] & (channel < C)[None, :]
    factor = tl.load(factor_ptr + image * C + channel, mask=channel < C, other=0.0)
    offset = tl.load(offset_ptr + image * C + channel, mask=channel < C, other=0.0)
    at = (image * pixels + row)[:, None] * C + channel[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = x * factor[None, :] + offset[None, :]
    if SILU:
        out = out / (1.0 + tl.exp(-out))
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Custom op and fake. That of the extension is defined in csrc/ops.cpp, with the same arguments.


@torch.library.custom_op("varfast::group_norm_silu", mutates_args=())
def _group_norm(
    x_BPC: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    input_bias_C: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    batch, pixels, channels = x_BPC.shape
    x, out = x_BPC.contiguous(), x_BPC.new_empty(x_BPC.shape)
    if not x.numel():
        return out
    weight, bias, input_bias = (vector.contiguous() for vector in (weight_C, bias_C, input_bias_C))
    chosen = _launch_settings(channels, x.device)
    chunks, tiles = -(-pixels // chosen["ROWS"]), -(-channels // chosen["TILE"])
    mean, squares = (x.new_empty((batch, chunks, channels), dtype=torch.float32) for _ in range(2))
    factor, offset = (x.new_empty((batch, channels), dtype=torch.float32) for _ in range(2))
    width = channels // num_groups
    with torch.cuda.device_of(x):
        grid = (batch * chunks * tiles,)
        _moments_kernel[grid](x, mean, squares, pixels, chunks, C=channels, **chosen)
        _join_kernel[(batch * num_groups,)](
            mean,
            squares,
            weight,
            bias,
            input_bias,
            factor,
            offset,
            pixels,
            chunks,
            eps,
            C=channels,
            WIDTH=width,
            ROWS=chosen["ROWS"],
            **_join_settings(width),
        )
        _normalise_kernel[grid](x, factor, offset, out, pixels, chunks, SILU=silu, C=channels, **chosen)
    return out


def _join_settings(width: int) -> dict[str, int]:
    """4 numbers a thread: 8 spill at 640 channels (triton 3.6). The public model's groups are 5 to 20 channels wide."""
    block = 1 << (width - 1).bit_length()
    return {"CHUNKS": max(1, 512 // block), "BLOCK": block, "num_warps": 4}


def _fake(
    x_BPC: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    input_bias_C: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    return x_BPC.new_empty(x_BPC.shape)


_group_norm.register_fake(_fake)
if NO_EXTENSION is None:
    torch.library.register_fake("varfast::group_norm_silu_cpu", _fake)


def _run(
    impl: str,
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    input_bias_C: Tensor | None,
) -> Tensor:
    given = (x_BCHW, weight_C, bias_C, input_bias_C)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        raise ValueError(f"impl={impl!r} of group_norm_silu has no gradient; use torch.no_grad() or impl='reference'")
    input_bias_C = torch.zeros_like(bias_C) if input_bias_C is None else input_bias_C
    vectors = [vector.float() for vector in (weight_C, bias_C, input_bias_C)]
    op = _group_norm if impl == "triton" else torch.ops.varfast.group_norm_silu_cpu
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    out_BPC = op(x_BHWC.flatten(1, 2), *vectors, num_groups, eps, silu)
    out_BCHW: Tensor = out_BPC.view(x_BHWC.shape).permute(0, 3, 1, 2)
    return out_BCHW.contiguous(memory_format=reference.memory_format(x_BCHW))


def _run_triton(*arguments) -> Tensor:
    return _run("triton", *arguments)


def _run_cpp(*arguments) -> Tensor:
    return _run("cpp", *arguments)


def _refuses_triton(x_BCHW: Tensor, *_: Any) -> str | None:
    taken = x_BCHW.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return None if taken else f"float32, bfloat16 or float16, got {x_BCHW.dtype}"


def _refuses_cpp(x_BCHW: Tensor, *_: Any) -> str | None:
    taken = x_BCHW.dtype in (torch.float32, torch.bfloat16)
    return None if taken else f"float32 or bfloat16, got {x_BCHW.dtype}"


implementations(
    "group_norm_silu",
    Implementation("triton", _run_triton, cannot_run_triton, ("cuda",), _refuses_triton),
    Implementation("cpp", _run_cpp, cannot_run_cpp, ("cpu",), _refuses_cpp),
    Implementation("reference", reference.group_norm_silu),
)


def ahead_of_time() -> list[AheadOfTime]:
    """The public model's 160, 320 and 640 channels in 32 groups; one image, group, pixel, channel, chunk."""
    from varfast.kernels.aot import recorded

    def call(dtype: torch.dtype, shape: tuple[int, ...], groups: int) -> None:
        image = torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        vector = torch.empty(shape[1])
        group_norm_silu(image, vector, vector, groups, impl="triton")

    items = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for channels in (160, 320, 640):
            what, image = f"group_norm_silu {name} C={channels}", (2, channels, 32, 32)
            main = dtype == torch.bfloat16 and channels == 160
            items += recorded(what, partial(call, dtype, image, 32), narrow=(_join_kernel,), also_blackwell=main)
    for shape, groups in (((1, 32, 1, 1), 32), ((1, 1, 1, 1), 1), ((1, 7, 3, 3), 1), ((3, 32, 5, 7), 8)):
        items += recorded(
            f"group_norm_silu {shape} G={groups}", partial(call, torch.float32, shape, groups), fast=False
        )
    return items


def group_norm_silu(
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float = 1e-6,
    silu: bool = True,
    input_bias_C: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """GroupNorm of x + input_bias over a group's channels and all pixels, * weight + bias, then SiLU.

    Args:
        x_BCHW: (B, C, H, W), any strides; channels_last is read as it is. Statistics in float32 (float64 for float64).
        weight_C, bias_C: (C,).
        num_groups: divides C.
        eps: added to the variance.
        silu: False: the normalised image itself.
        input_bias_C: (C,), or None for 0: the bias of the convolution before, which then need not add it.
        impl: "auto", "triton" (float32 or 16 bits), "cpp" (CPU, float32 or bfloat16), both without gradient, or
            "reference".
    Returns: (B, C, H, W) in the dtype of x_BCHW; channels_last where x_BCHW has its channels innermost, else
        contiguous.
    Raises: ValueError for other shapes or dtypes, for an impl that is unknown or cannot run, or if "triton" or "cpp" is
        to be differentiated.
    """
    if x_BCHW.ndim != 4 or x_BCHW.shape[2] * x_BCHW.shape[3] == 0:
        raise ValueError(f"x_BCHW is {tuple(x_BCHW.shape)}: want (B, C, H, W) with a pixel to average over")
    channels = x_BCHW.shape[1]
    if num_groups < 1 or channels < 1 or channels % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide {channels} channels")
    for name, vector in (("weight_C", weight_C), ("bias_C", bias_C), ("input_bias_C", input_bias_C)):
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"{name} is {tuple(vector.shape)}, want ({channels},): one a channel")
    out_BCHW: Tensor = run("group_norm_silu", impl, x_BCHW, weight_C, bias_C, num_groups, eps, silu, input_bias_C)
    return out_BCHW
