"""The Triton kernels of adaln.py (forward and backward), their launches, and their custom ops with fakes.

Axes: B image, L token, C channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varfast.kernels._triton import jit, tl
from varfast.kernels.settings import setting

# A program of the backward pass sums rows of one image as two chains of 16 rows. With only one such chain, the partial
# sums of gate, bias, scale and shift, written and read, took 17 % of the bytes of the op's large tensors. With one
# chain of 32 rows the error was 6.2e-6, where PyTorch's is 2.4e-6.
_STAGES = 3
_FINISH = {"CHUNKS": 32, "COLUMNS": 64}
MAX_WIDTH = 8192


@jit
def _forward_kernel(
    x_ptr, branch_ptr, bias_ptr, gate_ptr, scale_ptr, shift_ptr, new_ptr, out_ptr, mean_ptr, rstd_ptr,
    length, width, gate_stride, scale_stride, shift_stride, eps,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program processes one token."""
    row = tl.program_id(0).to(tl.int64)
    image = row // length
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        branch = tl.load(branch_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            branch += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + image * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        stored = (x + branch * gate).to(new_ptr.dtype.element_ty)
        tl.store(new_ptr + row * width + column, stored, mask=inside)
        x = stored.to(tl.float32)  # normalise the rounded values that were stored
    if NORM:
        count = width * 1.0  # / and sqrt are approximate on a GPU: div_rn and sqrt_rn round correctly
        mean = tl.div_rn(tl.sum(x, axis=0), count)
        centred = tl.where(inside, x - mean, 0.0)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(centred * centred, axis=0), count) + eps))
        scale = tl.load(scale_ptr + image * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + image * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
        out = centred * rstd * (1.0 + scale) + shift
        tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@jit
def _through_norm(d_normed, normed, rstd, share):
    """Gradient of x from that of normed = (x - mean) * rstd; share = 1 / C."""
    # One reduction computes both sums, so the threads synchronise once per tile instead of twice.
    along, average = tl.reduce((d_normed * normed, d_normed), 1, _add_pairs)
    return (d_normed - (average * share)[:, None] - normed * (along * share)[:, None]) * rstd


@jit
def _backward_kernel(
    d_new_ptr, d_out_ptr, new_ptr, branch_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, d_x_ptr, d_branch_ptr,
    partial_ptr,
    length, width, gate_stride, scale_stride, plane,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, NEW_HAS_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program processes ROWS tokens of one image, TILE at a time, while the next STAGES - 1 tiles are loading.

    Sums over the tokens stay in registers as TILE parallel chains, added in a fixed order. They are written as planes
    of (B, chunks, C): the sum of d_x * branch, the sum of d_x (with a bias), and the gradients of scale and shift.
    """
    chunk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    share = tl.div_rn(1.0, width * 1.0)  # outside the loop: div_rn inside took 114 registers, not 80, at C = 1920
    d_gate = tl.zeros((TILE, BLOCK), tl.float32)
    d_sum = tl.zeros((TILE, BLOCK), tl.float32)
    d_scale = tl.zeros((TILE, BLOCK), tl.float32)
    d_shift = tl.zeros((TILE, BLOCK), tl.float32)
    if RESIDUAL:
        gate = tl.load(gate_ptr + image * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.load(scale_ptr + image * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    for first in tl.range(0, ROWS, TILE, num_stages=STAGES):
        token = chunk * ROWS + first + tl.arange(0, TILE)
        row = image * length + token
        here = (token < length)[:, None] & inside[None, :]
        at = row[:, None] * width + column[None, :]
        d_x = tl.zeros((TILE, BLOCK), tl.float32)
        if NEW_HAS_GRADIENT:
            d_x += tl.load(d_new_ptr + at, mask=here, other=0.0).to(tl.float32)
        if NORM:
            d_out = tl.load(d_out_ptr + at, mask=here, other=0.0).to(tl.float32)
            new = tl.load(new_ptr + at, mask=here, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + row, mask=token < length, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + row, mask=token < length, other=0.0)[:, None]
            normed = tl.where(here, (new - mean) * rstd, 0.0)
            d_scale += d_out * normed
            d_shift += d_out
            d_normed = d_out * (1.0 + scale)[None, :]
            d_x += _through_norm(d_normed, normed, rstd, share)
        tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=here)
        if RESIDUAL:
            branch = tl.load(branch_ptr + at, mask=here, other=0.0).to(tl.float32)
            d_x = tl.where(here, d_x, 0.0)
            d_gate += d_x * branch
            if BIAS:
                d_sum += d_x
            tl.store(d_branch_ptr + at, (d_x * gate[None, :]).to(d_branch_ptr.dtype.element_ty), mask=here)
    partial = partial_ptr + (image * tl.num_programs(0) + chunk) * width + column
    if RESIDUAL:
        tl.store(partial, tl.sum(d_gate, axis=0), mask=inside)
        partial += plane
        if BIAS:
            tl.store(partial, tl.sum(d_sum, axis=0), mask=inside)
            partial += plane
    if NORM:
        tl.store(partial, tl.sum(d_scale, axis=0), mask=inside)
        tl.store(partial + plane, tl.sum(d_shift, axis=0), mask=inside)


@jit
def _sum_of_chunks(partial_ptr, chunks, width, column, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr):
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        here = (chunk < chunks)[:, None] & (column < width)[None, :]
        total += tl.sum(tl.load(partial_ptr + chunk[:, None] * width + column[None, :], mask=here, other=0.0), axis=0)
    return total


@jit
def _finish_kernel(
    partial_ptr, bias_ptr, gate_ptr, d_gate_ptr, d_scale_ptr, d_shift_ptr, d_bias_ptr,
    chunks, width, gate_stride, plane,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of gate, scale and shift for COLUMNS channels of one image, and the image's part of d bias (float32).

    The residual adds gate * (branch + bias), so d gate = sum d_x * branch + bias * sum d_x and d bias = gate * sum d_x.
    """
    image = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    at = image * width + column
    partial = partial_ptr + image * chunks * width
    if RESIDUAL:
        d_gate = _sum_of_chunks(partial, chunks, width, column, CHUNKS, COLUMNS)
        partial += plane
        if BIAS:
            d_sum = _sum_of_chunks(partial, chunks, width, column, CHUNKS, COLUMNS)
            partial += plane
            d_gate += d_sum * tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
            gate = tl.load(gate_ptr + image * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_bias_ptr + at, d_sum * gate, mask=inside)
        tl.store(d_gate_ptr + at, d_gate.to(d_gate_ptr.dtype.element_ty), mask=inside)
    if NORM:
        d_scale = _sum_of_chunks(partial, chunks, width, column, CHUNKS, COLUMNS)
        d_shift = _sum_of_chunks(partial + plane, chunks, width, column, CHUNKS, COLUMNS)
        tl.store(d_scale_ptr + at, d_scale.to(d_scale_ptr.dtype.element_ty), mask=inside)
        tl.store(d_shift_ptr + at, d_shift.to(d_shift_ptr.dtype.element_ty), mask=inside)


def _launch_settings(direction: str, width: int, device: torch.device | None = None) -> dict[str, int]:
    """Each thread holds 8 numbers of a row, which is one 128-bit load in bfloat16."""
    block = max(128, 1 << (width - 1).bit_length())
    num_warps = min(16, max(4, block // 256))
    if direction == "forward":
        return {"BLOCK": block} | setting("adaln_forward", width, device, num_warps=num_warps)
    # Registers limit how many programs fit on an SM. At C = 1024 three programs of 4 warps fit (168 registers a thread
    # with triton 3.6); at C = 1920 one of 16 warps (119 registers), or one of 8 warps. Their loads in flight, 98 and
    # 66 KB, are 3 times what an SM needs to sustain its share of 3 TB/s at a latency of 800 ns.
    tile, warps = (2 if block <= 2048 else 1), (4 if block <= 1024 else 16)
    rule = {"ROWS": 16 * tile, "TILE": tile, "STAGES": _STAGES, "num_warps": warps}
    return {"BLOCK": block} | setting("adaln_backward", width, device, **rule)


def _rows_of(vector_BC: Tensor) -> Tensor:
    return vector_BC if vector_BC.stride(-1) == 1 else vector_BC.contiguous()


@torch.library.custom_op("varfast::adaln", mutates_args=())
def adaln_op(
    x_BLC: Tensor,
    branch_BLC: Tensor | None,
    bias_C: Tensor | None,
    gate_BC: Tensor | None,
    scale_BC: Tensor | None,
    shift_BC: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The new residual stream; the stream normalised and modulated; mean and 1 / standard deviation, (B, L) each.
    Outputs that were not requested are empty."""
    new, out, mean, rstd = _outputs(x_BLC, branch_BLC, scale_BC)
    if x_BLC.numel():
        batch, length, width = x_BLC.shape
        x = x_BLC.contiguous()
        branch = x if branch_BLC is None else branch_BLC.contiguous()
        gate, scale, shift = (x[:, 0] if v is None else _rows_of(v) for v in (gate_BC, scale_BC, shift_BC))
        with torch.cuda.device_of(x):
            _forward_kernel[(batch * length,)](
                x,
                branch,
                x if bias_C is None else bias_C.contiguous(),
                gate,
                scale,
                shift,
                new,
                out,
                mean,
                rstd,
                length,
                width,
                gate.stride(0),
                scale.stride(0),
                shift.stride(0),
                eps,
                RESIDUAL=branch_BLC is not None,
                BIAS=bias_C is not None,
                NORM=scale_BC is not None,
                **_launch_settings("forward", width, x.device),
            )
    return new, out, mean, rstd


def _outputs(
    x_BLC: Tensor, branch_BLC: Tensor | None, scale_BC: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = x_BLC.new_empty(0 if branch_BLC is None else x_BLC.shape)
    normed = scale_BC is not None
    out = x_BLC.new_empty(x_BLC.shape if normed else 0)
    wide = torch.promote_types(x_BLC.dtype, torch.float32)
    mean, rstd = (x_BLC.new_empty(x_BLC.shape[:2] if normed else 0, dtype=wide) for _ in range(2))
    return new, out, mean, rstd


@adaln_op.register_fake
def fake_forward(x_BLC, branch_BLC, bias_C, gate_BC, scale_BC, shift_BC, eps):
    return _outputs(x_BLC, branch_BLC, scale_BC)


@torch.library.custom_op("varfast::adaln_backward", mutates_args=())
def adaln_backward_op(
    d_new_BLC: Tensor | None,
    d_out_BLC: Tensor | None,
    new_BLC: Tensor,
    branch_BLC: Tensor | None,
    bias_C: Tensor | None,
    gate_BC: Tensor | None,
    scale_BC: Tensor | None,
    mean_BL: Tensor,
    rstd_BL: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, bias, gate, scale and shift; those that were not requested are empty."""
    found = _gradients(new_BLC, branch_BLC, bias_C, gate_BC, scale_BC)
    _, _, d_bias, d_gate, d_scale, d_shift = found
    if d_out_BLC is None or not new_BLC.numel():  # no normalisation, or no gradient arrived for its output
        d_scale.zero_()
        d_shift.zero_()
    if not new_BLC.numel():
        d_bias.zero_()
        d_gate.zero_()
        return found
    given = (d_new_BLC, d_out_BLC, new_BLC, branch_BLC, gate_BC, scale_BC, mean_BL, rstd_BL)
    with torch.cuda.device_of(new_BLC):
        partial = _launch_backward(given, bias_C is not None, found)
        d_bias_BC = _launch_finish(partial, bias_C, gate_BC, found, d_out_BLC is not None)
    if bias_C is not None:
        d_bias = d_bias_BC.sum(dim=0).to(d_bias.dtype)
    return *found[:2], d_bias, *found[3:]


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _launch_backward(given: tuple[Any, ...], bias: bool, found: Gradients) -> Tensor:
    """Write d x and d branch; return the partial sums for _launch_finish, (planes, B, chunks, C) float32.

    Args:
        given: d_new, d_out, new, branch, gate, scale, mean and rstd; None for those that this op does not have.
    """
    d_new, d_out, new, branch, gate, scale, mean, rstd = given
    batch, length, width = new.shape
    chosen = _launch_settings("backward", width, new.device)
    chunks = -(-length // chosen["ROWS"])
    residual, norm = branch is not None, d_out is not None
    planes = residual + (residual and bias) + 2 * norm
    partial: Tensor = new.new_empty((planes, batch, chunks, width), dtype=torch.float32)
    new = new.contiguous()
    gate, scale = (new[:, 0] if v is None else _rows_of(v) for v in (gate, scale))
    _backward_kernel[(chunks, batch)](
        new if d_new is None else d_new.contiguous(),
        new if d_out is None else d_out.contiguous(),
        new,
        new if branch is None else branch.contiguous(),
        gate,
        scale,
        mean,
        rstd,
        *found[:2],
        partial,
        length,
        width,
        gate.stride(0),
        scale.stride(0),
        partial.stride(0),
        RESIDUAL=residual,
        BIAS=bias,
        NORM=norm,
        NEW_HAS_GRADIENT=d_new is not None,
        **chosen,
    )
    return partial


def _launch_finish(
    partial: Tensor, bias_C: Tensor | None, gate_BC: Tensor | None, found: Gradients, norm: bool
) -> Tensor:
    """Write d gate, d scale and d shift; return each image's part of d bias, (B, C) float32, empty without a bias."""
    _, batch, chunks, width = partial.shape
    d_bias_BC = partial.new_empty((batch, width) if bias_C is not None else 0)
    gate = partial[0, :, 0] if gate_BC is None else _rows_of(gate_BC)
    _finish_kernel[(-(-width // _FINISH["COLUMNS"]), batch)](
        partial,
        partial if bias_C is None else bias_C.contiguous(),
        gate,
        *found[3:],
        d_bias_BC,
        chunks,
        width,
        gate.stride(0),
        partial.stride(0),
        RESIDUAL=gate_BC is not None,
        BIAS=bias_C is not None,
        NORM=norm,
        **_FINISH,
    )
    return d_bias_BC


def _gradients(
    new_BLC: Tensor, branch_BLC: Tensor | None, bias_C: Tensor | None, gate_BC: Tensor | None, scale_BC: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_x = new_BLC.new_empty(new_BLC.shape)
    d_branch = new_BLC.new_empty(0) if branch_BLC is None else branch_BLC.new_empty(branch_BLC.shape)
    wide = torch.promote_types(new_BLC.dtype, torch.float32)
    d_bias, d_gate, d_scale, d_shift = (
        new_BLC.new_empty(0, dtype=wide) if v is None else v.new_empty(v.shape)
        for v in (bias_C, gate_BC, scale_BC, scale_BC)
    )
    return d_x, d_branch, d_bias, d_gate, d_scale, d_shift


@adaln_backward_op.register_fake
def fake_backward(d_new_BLC, d_out_BLC, new_BLC, branch_BLC, bias_C, gate_BC, scale_BC, mean_BL, rstd_BL):
    return _gradients(new_BLC, branch_BLC, bias_C, gate_BC, scale_BC)
