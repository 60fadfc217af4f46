"""3x3 convolutions of the VQ-VAE's decoder, fused with the residual sum and the GroupNorm statistics. Forward only.

In the decoder a convolution is followed by a GroupNorm, in some places after adding the residual block's input. As
separate ops, each of these reads the image again. The Triton kernel adds the block's input to its float32 accumulators,
and also writes the statistics of what it stores.

The kernel is an implicit matrix product: the left matrix is never stored. For each of the nine taps, the tensor memory
accelerator (TMA) loads a tile of neighbouring pixels, and its bounds checks fill in zeros outside the image. 160 output
channels are computed as 128 + 32, by two products of the same tile of pixels. So no work is spent on padding, where a
library pads 160 to 192 or more.

Axes: B image, C channel in, O channel out, H and W sides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels._triton import jit, tl
from varfast.kernels.group_norm import ChannelMoments, channel_moments
from varfast.kernels.selection import INTERPRETED, Implementation, cannot_run_triton, implementations, run
from varfast.kernels.settings import setting

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime


@jit
def _finish(
    acc,
    residual_ptr,
    out_ptr,
    mean_ptr,
    squares_ptr,
    row,
    tile,
    channel,
    O: tl.constexpr,  # noqa: E741 - the axis
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Add the residual and store; write each channel's mean and sum of squared deviations of what was stored."""
    at = row[:, None] * O + channel[None, :]
    if RESIDUAL:
        acc += tl.load(residual_ptr + at).to(tl.float32)
    stored = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, stored)
    stored = stored.to(tl.float32)
    mean = tl.sum(stored, axis=0) / BLOCK_M
    centred = stored - mean[None, :]
    of_tile = tile * O + channel
    tl.store(mean_ptr + of_tile, mean)
    tl.store(squares_ptr + of_tile, tl.sum(centred * centred, axis=0))


@jit
def _conv3x3_kernel(
    x_desc,
    weight_desc,
    rest_desc,
    residual_ptr,
    out_ptr,
    mean_ptr,
    squares_ptr,
    height,
    width,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741 - the axis
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REST_N: tl.constexpr,
):
    """Each program computes BLOCK_M pixels, as lines of COLUMNS, by BLOCK_N + REST_N output channels. Programs of the
    same pixels have adjacent ids, so that they read the pixels from the L2 cache.

    weight_desc and rest_desc: descriptors of the (O, 9 * C) weight, in blocks of BLOCK_N and REST_N output channels.
    """
    groups: tl.constexpr = O // (BLOCK_N + REST_N)
    lines: tl.constexpr = BLOCK_M // COLUMNS
    steps: tl.constexpr = C // BLOCK_K
    program = tl.program_id(0)
    tile = program // groups
    first = (program % groups) * (BLOCK_N + REST_N)
    across = width // COLUMNS
    line = tile // across * lines  # counted over all images
    image = line // height
    y = line % height
    x = (tile % across) * COLUMNS
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if REST_N > 0:
        rest = tl.zeros((BLOCK_M, REST_N), tl.float32)
    for step in tl.range(9 * steps):
        tap = step // steps
        pixels = x_desc.load([image, y + tap // 3 - 1, x + tap % 3 - 1, step % steps * BLOCK_K])
        pixels = pixels.reshape(BLOCK_M, BLOCK_K)
        weight = weight_desc.load([first, step * BLOCK_K])
        acc = tl.dot(pixels, weight.T, acc, input_precision="ieee")
        if REST_N > 0:
            more = rest_desc.load([first + BLOCK_N, step * BLOCK_K])
            rest = tl.dot(pixels, more.T, rest, input_precision="ieee")
    pixel = tl.arange(0, BLOCK_M)
    row = (line + pixel // COLUMNS) * width + x + pixel % COLUMNS
    row = tl.zeros((BLOCK_M,), tl.int64) + row  # O * row needs 64 bits; `row` is a Python int if all sizes are 1
    tile = tl.zeros((1,), tl.int64) + tile
    channel = first + tl.arange(0, BLOCK_N)
    _finish(acc, residual_ptr, out_ptr, mean_ptr, squares_ptr, row, tile, channel, O, RESIDUAL, BLOCK_M)
    if REST_N > 0:
        channel = first + BLOCK_N + tl.arange(0, REST_N)
        _finish(rest, residual_ptr, out_ptr, mean_ptr, squares_ptr, row, tile, channel, O, RESIDUAL, BLOCK_M)


def _output_block(channels: int) -> tuple[int, int]:
    """(BLOCK_N, REST_N): output channels of a program, whose sum divides `channels`; (0, 0) if no block does."""
    if channels % 160 == 0:
        return 128, 32
    return next(((block, 0) for block in (128, 64, 32) if channels % block == 0), (0, 0))


def _launch_settings(
    channels: int, out_channels: int, width: int, device: torch.device | None = None
) -> dict[str, int]:
    """128 pixels and 160 channels on 8 warps take 127 registers, so two programs share a multiprocessor; with 4 warps
    or 256 pixels the sums spill (triton 3.6, sm_90)."""
    block_n, rest_n = _output_block(out_channels)
    block_k = 64 if channels % 64 == 0 else 32
    rule = {"BLOCK_M": 128, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 4 if block_k == 32 else 3}
    chosen = {"BLOCK_N": block_n, "REST_N": rest_n} | setting("conv3x3", channels, device, **rule)
    return chosen | {"COLUMNS": min(width, chosen["BLOCK_M"])}


@torch.library.custom_op("varfast::conv3x3", mutates_args=())
def _conv3x3(
    x_BHWC: Tensor, weight_OC: Tensor, residual_BHWO: Tensor | None, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Image (B, H, W, O); mean and sum of squared deviations (B, chunks of `rows` pixels, O) float32.

    weight_OC: (O, 9 * C), ordered by tap, then by channel. rows: BLOCK_M of the settings.
    """
    out, mean, squares = _outputs(x_BHWC, weight_OC, residual_BHWO, rows)
    batch, height, width, channels = x_BHWC.shape
    if out.numel():
        from triton.tools.tensor_descriptor import TensorDescriptor

        chosen = _launch_settings(channels, out.shape[-1], width, x_BHWC.device)
        block_m, columns, block_k = (chosen[name] for name in ("BLOCK_M", "COLUMNS", "BLOCK_K"))
        x, weight = _readable(x_BHWC), _readable(weight_OC)
        residual = x if residual_BHWO is None else _readable(residual_BHWO)
        target = out.float() if out.dtype != x.dtype else out
        pixels = TensorDescriptor.from_tensor(x, [1, block_m // columns, columns, block_k])
        weights = TensorDescriptor.from_tensor(weight, [chosen["BLOCK_N"], block_k])
        rest = TensorDescriptor.from_tensor(weight, [chosen["REST_N"] or chosen["BLOCK_N"], block_k])
        groups = out.shape[-1] // (chosen["BLOCK_N"] + chosen["REST_N"])
        with torch.cuda.device_of(x):
            _conv3x3_kernel[(batch * height * width // block_m * groups,)](
                pixels,
                weights,
                rest,
                residual,
                target,
                mean,
                squares,
                height,
                width,
                C=channels,
                O=out.shape[-1],
                RESIDUAL=residual_BHWO is not None,
                **chosen,
            )
        if target is not out:
            out.copy_(target)
    return out, mean, squares


def _outputs(
    x_BHWC: Tensor, weight_OC: Tensor, residual_BHWO: Tensor | None, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, height, width, _ = x_BHWC.shape
    out_channels, chunks = weight_OC.shape[0], height * width // rows
    mean, squares = (x_BHWC.new_empty((batch, chunks, out_channels), dtype=torch.float32) for _ in range(2))
    return x_BHWC.new_empty((batch, height, width, out_channels)), mean, squares


_conv3x3.register_fake(_outputs)


def _readable(x: Tensor) -> Tensor:
    """Under Triton's interpreter, bfloat16 becomes float32: the interpreter computes wrong results in bfloat16."""
    return (x.float() if INTERPRETED and x.dtype == torch.bfloat16 else x).contiguous()


def _rows(x_BCHW: Tensor) -> Tensor:
    """(B, H, W, C), a view of a channels_last image."""
    return x_BCHW.permute(0, 2, 3, 1).contiguous()


def _run_triton(
    x_BCHW: Tensor, weight_OCHW: Tensor, residual_BOHW: Tensor | None
) -> tuple[Tensor, ChannelMoments | None]:
    residual = None if residual_BOHW is None else _rows(residual_BOHW)
    rows = _launch_settings(x_BCHW.shape[1], len(weight_OCHW), x_BCHW.shape[3], x_BCHW.device)["BLOCK_M"]
    out, mean, squares = _conv3x3(_rows(x_BCHW), _rows(weight_OCHW).flatten(1), residual, rows)
    return out.permute(0, 3, 1, 2), ChannelMoments(mean, squares, rows)


def _run_library(
    x_BCHW: Tensor, weight_OCHW: Tensor, residual_BOHW: Tensor | None
) -> tuple[Tensor, ChannelMoments | None]:
    """cuDNN's convolution, followed by one kernel for the residual sum and the statistics."""
    return channel_moments(F.conv2d(x_BCHW, weight_OCHW, padding=1), residual_BOHW)


def _refuses_triton(x_BCHW: Tensor, weight_OCHW: Tensor, residual_BOHW: Tensor | None) -> str | None:
    _, channels, height, width = x_BCHW.shape
    block_m = _launch_settings(channels, weight_OCHW.shape[0], width, x_BCHW.device)["BLOCK_M"]
    if x_BCHW.dtype not in (torch.bfloat16, torch.float16) and not (INTERPRETED and x_BCHW.dtype == torch.float32):
        return f"bfloat16 or float16, got {x_BCHW.dtype}"
    if channels % 32 or weight_OCHW.shape[0] % 32:
        return f"multiples of 32 channels, got {channels} and {weight_OCHW.shape[0]}"
    lines = max(1, block_m // width)
    if (width % block_m and block_m % width) or height % lines:
        return f"images that tiles of {block_m} pixels fill, got {height} x {width}"
    return None


def _cannot_run_library(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "on a CPU the reference is the library's convolution"


implementations(
    "conv3x3",
    # Not picked by "auto", because it has not run on a GPU. By count it saves 75 ms for 512 images (docs/measured.md).
    Implementation("triton", _run_triton, cannot_run_triton, (), _refuses_triton),
    Implementation("library", _run_library, _cannot_run_library, ("cuda",)),
    Implementation("reference", reference.conv3x3),
)


def conv3x3(
    x_BCHW: Tensor, weight_OCHW: Tensor, residual_BOHW: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, ChannelMoments | None]:
    """3x3 convolution with padding 1 and no bias, plus `residual`; and the statistics for the GroupNorm that follows.

    Args:
        x_BCHW: (B, C, H, W). A channels_last image is read without a copy.
        weight_OCHW: (O, C, 3, 3), likewise.
        residual_BOHW: (B, O, H, W), or None for 0.
        impl: "auto"; "triton" (CUDA, 16 bits, C and O multiples of 32, whole tiles of 128 pixels); "library" (CUDA:
            cuDNN, then one kernel for sum and statistics); "reference". Only "reference" has a gradient.
    Returns: (B, O, H, W), channels_last; and the `moments` argument for `group_norm_silu`, or None if the
        implementation does not compute it.
    Raises: ValueError for other shapes or dtypes, or for an impl that is unknown or cannot run.
    """
    if x_BCHW.ndim != 4 or weight_OCHW.ndim != 4 or weight_OCHW.shape[1:] != (x_BCHW.shape[1], 3, 3):
        raise ValueError(
            f"x is {tuple(x_BCHW.shape)}, weight {tuple(weight_OCHW.shape)}: want (B, C, H, W), (O, C, 3, 3)"
        )
    shape = (x_BCHW.shape[0], weight_OCHW.shape[0], *x_BCHW.shape[2:])
    if residual_BOHW is not None and residual_BOHW.shape != shape:
        raise ValueError(f"residual is {tuple(residual_BOHW.shape)}, want {shape}, as the output")
    tensors = [t for t in (x_BCHW, weight_OCHW, residual_BOHW) if t is not None]
    if len({t.dtype for t in tensors}) > 1:
        raise ValueError(f"x, weight and residual: got {[t.dtype for t in tensors]}, want one dtype")
    out: tuple[Tensor, ChannelMoments | None] = run("conv3x3", impl, x_BCHW, weight_OCHW, residual_BOHW)
    return out


def ahead_of_time() -> list[AheadOfTime]:
    """The convolutions of the public decoders' blocks: VAR's of 160 channels, LlamaGen's and taming's of 128."""
    from varfast.kernels.aot import AheadOfTime

    items = []
    sizes = ((160, 160, 256), (320, 160, 128), (320, 320, 64), (640, 640, 16))
    for channels, out_channels, width in (*sizes, (128, 128, 256), (256, 128, 128), (512, 512, 16)):
        for residual in (False, True):
            chosen: dict[str, Any] = dict(_launch_settings(channels, out_channels, width))
            num_warps, num_stages = chosen.pop("num_warps"), chosen.pop("num_stages")
            constants = chosen | {"C": channels, "O": out_channels, "RESIDUAL": residual}
            lines, columns, block_k = chosen["BLOCK_M"] // chosen["COLUMNS"], chosen["COLUMNS"], chosen["BLOCK_K"]
            signature = {
                "x_desc": f"tensordesc<bf16[1, {lines}, {columns}, {block_k}]>",
                "weight_desc": f"tensordesc<bf16[{chosen['BLOCK_N']}, {block_k}]>",
                "rest_desc": f"tensordesc<bf16[{chosen['REST_N'] or chosen['BLOCK_N']}, {block_k}]>",
                **dict.fromkeys(("residual_ptr", "out_ptr"), "*bf16"),
                **dict.fromkeys(("mean_ptr", "squares_ptr"), "*fp32"),
                **dict.fromkeys(("height", "width"), "i32"),
                **dict.fromkeys(constants, "constexpr"),
            }
            items.append(
                AheadOfTime(
                    f"conv3x3 bf16 {channels} to {out_channels}, {width} wide{', residual' if residual else ''}",
                    _conv3x3_kernel,
                    signature,
                    constants,
                    num_warps=num_warps,
                    num_stages=num_stages,
                    matrix=True,
                    attributes=dict.fromkeys(("height", "width"), 16),
                )
            )
    return items
