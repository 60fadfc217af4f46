"""Adaptive LayerNorm, as VAR's block uses it: gate a branch into the residual stream, normalise and modulate the next.

Three ops, one kernel a direction: the residual alone, the normalisation alone, and both in one pass over x, which reads
and writes 4 times B * L * C numbers instead of 5.

Axes: B image, L token, C channel.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels._triton import jit, tl
from varfast.kernels.extension import NO_EXTENSION, cannot_run_cpp, refused_by_cpp
from varfast.kernels.selection import Implementation, cannot_run_triton, implementations, refused_dtype, run
from varfast.kernels.settings import setting

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime

# A program of the backward pass adds up two chains of 16 rows of one image. With one, writing and reading the partial
# sums of gate, bias, scale and shift was 17 % of the bytes of the op's large tensors; a chain of 32 had an error of
# 6.2e-6 where PyTorch has 2.4e-6.
_STAGES = 3
_FINISH = {"CHUNKS": 32, "COLUMNS": 64}
_MAX_WIDTH = 8192


@jit
def _forward_kernel(
    x_ptr,
    branch_ptr,
    bias_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    new_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    length,
    width,
    gate_stride,
    scale_stride,
    shift_stride,
    eps,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token a program."""
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
        x = stored.to(tl.float32)  # the stream is normalised as it is stored
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
def _backward_kernel(
    d_new_ptr,
    d_out_ptr,
    new_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    d_x_ptr,
    d_branch_ptr,
    partial_ptr,
    length,
    width,
    gate_stride,
    scale_stride,
    plane,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    NEW_HAS_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens of one image a program, TILE at a time, with the loads of STAGES - 1 later tiles in flight.

    Sums over the tokens stay in registers, TILE chains side by side, in a fixed order. They are written as planes of
    (B, chunks, C): of d_x * branch, of d_x (with a bias), and those of scale and shift.
    """
    chunk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    share = tl.div_rn(1.0, width * 1.0)  # once: divided correctly in the loop, it took 114 registers for 80 at C = 1920
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
            # Both sums at once: their threads meet once a tile, not twice.
            along, average = tl.reduce((d_normed * normed, d_normed), 1, _add_pairs)
            d_x += (d_normed - (average * share)[:, None] - normed * (along * share)[:, None]) * rstd
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
    partial_ptr,
    bias_ptr,
    gate_ptr,
    d_gate_ptr,
    d_scale_ptr,
    d_shift_ptr,
    d_bias_ptr,
    chunks,
    width,
    gate_stride,
    plane,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradients of COLUMNS channels of one image's gate, scale and shift; its part of the bias's, in float32.

    With branch + bias in the place of branch, d gate = sum d_x * branch + bias * sum d_x, and d bias = gate * sum d_x.
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
    """8 numbers of a row a thread, one 128-bit load in bfloat16."""
    block = max(128, 1 << (width - 1).bit_length())
    num_warps = min(16, max(4, block // 256))
    if direction == "forward":
        return {"BLOCK": block} | setting("adaln_forward", width, device, num_warps=num_warps)
    # Registers allow, of C = 1024: 3 programs of 4 warps an SM (triton 3.6: 168), of 1920 one of 16 (119; with 8 warps
    # one of 8). Their loads in flight, 98 and 66 KB, are 3 times what 3 TB/s at 800 ns needs of an SM.
    tile, warps = (2 if block <= 2048 else 1), (4 if block <= 1024 else 16)
    rule = {"ROWS": 16 * tile, "TILE": tile, "STAGES": _STAGES, "num_warps": warps}
    return {"BLOCK": block} | setting("adaln_backward", width, device, **rule)


def _rows_of(vector_BC: Tensor) -> Tensor:
    return vector_BC if vector_BC.stride(-1) == 1 else vector_BC.contiguous()


@torch.library.custom_op("varfast::adaln", mutates_args=())
def _adaln(
    x_BLC: Tensor,
    branch_BLC: Tensor | None,
    bias_C: Tensor | None,
    gate_BC: Tensor | None,
    scale_BC: Tensor | None,
    shift_BC: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New stream, its normalised and modulated form, mean and 1 / deviation (B, L); empty where not asked for."""
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


@_adaln.register_fake
def _fake(x_BLC, branch_BLC, bias_C, gate_BC, scale_BC, shift_BC, eps):
    return _outputs(x_BLC, branch_BLC, scale_BC)


@torch.library.custom_op("varfast::adaln_backward", mutates_args=())
def _adaln_backward(
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
    """Gradients of x, branch, bias, gate, scale and shift; empty where not asked for."""
    batch, length, width = new_BLC.shape
    chosen = _launch_settings("backward", width, new_BLC.device)
    chunks = -(-length // chosen["ROWS"])
    d_x, d_branch, d_bias, d_gate, d_scale, d_shift = _gradients(new_BLC, branch_BLC, bias_C, gate_BC, scale_BC)
    residual, bias, norm = branch_BLC is not None, bias_C is not None, d_out_BLC is not None
    if not norm or not new_BLC.numel():  # not normalised, or that had no gradient
        for vector in (d_scale, d_shift):
            vector.zero_()
    if not new_BLC.numel():
        return d_x, d_branch, d_bias.zero_(), d_gate.zero_(), d_scale, d_shift
    planes = residual + (residual and bias) + 2 * norm
    partial = new_BLC.new_empty((planes, batch, chunks, width), dtype=torch.float32)
    d_bias_BC = new_BLC.new_empty((batch, width) if bias else 0, dtype=torch.float32)
    new = new_BLC.contiguous()
    d_new = new if d_new_BLC is None else d_new_BLC.contiguous()
    d_out = new if d_out_BLC is None else d_out_BLC.contiguous()
    branch = new if branch_BLC is None else branch_BLC.contiguous()
    gate, scale = (new[:, 0] if v is None else _rows_of(v) for v in (gate_BC, scale_BC))
    with torch.cuda.device_of(new):
        _backward_kernel[(chunks, batch)](
            d_new,
            d_out,
            new,
            branch,
            gate,
            scale,
            mean_BL,
            rstd_BL,
            d_x,
            d_branch,
            partial,
            length,
            width,
            gate.stride(0),
            scale.stride(0),
            partial.stride(0),
            RESIDUAL=residual,
            BIAS=bias,
            NORM=norm,
            NEW_HAS_GRADIENT=d_new_BLC is not None,
            **chosen,
        )
        _finish_kernel[(-(-width // _FINISH["COLUMNS"]), batch)](
            partial,
            partial if bias_C is None else bias_C.contiguous(),
            gate,
            d_gate,
            d_scale,
            d_shift,
            d_bias_BC,
            chunks,
            width,
            gate.stride(0),
            partial.stride(0),
            RESIDUAL=residual,
            BIAS=bias,
            NORM=norm,
            **_FINISH,
        )
    if bias:
        d_bias = d_bias_BC.sum(dim=0).to(d_bias.dtype)
    return d_x, d_branch, d_bias, d_gate, d_scale, d_shift


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


@_adaln_backward.register_fake
def _fake_backward(d_new_BLC, d_out_BLC, new_BLC, branch_BLC, bias_C, gate_BC, scale_BC, mean_BL, rstd_BL):
    return _gradients(new_BLC, branch_BLC, bias_C, gate_BC, scale_BC)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_BLC, branch_BLC, bias_C, gate_BC, scale_BC, _, _ = inputs
    new_BLC, _, mean_BL, rstd_BL = output
    stream_BLC = x_BLC if branch_BLC is None else new_BLC
    ctx.save_for_backward(stream_BLC, branch_BLC, bias_C, gate_BC, scale_BC, mean_BL, rstd_BL)
    ctx.mark_non_differentiable(mean_BL, rstd_BL)
    ctx.set_materialize_grads(False)


def _backward(op: Any, ctx: Any, d_new: Tensor | None, d_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    new_BLC, branch_BLC, bias_C, gate_BC, scale_BC, mean_BL, rstd_BL = ctx.saved_tensors
    if branch_BLC is None:
        d_new = None
    if scale_BC is None:
        d_out = None
    if d_new is None and d_out is None:
        return (None,) * 7
    d_x, *others = op(d_new, d_out, new_BLC, branch_BLC, bias_C, gate_BC, scale_BC, mean_BL, rstd_BL)
    given = (branch_BLC, bias_C, gate_BC, scale_BC, scale_BC)
    return d_x, *(d if x is not None else None for d, x in zip(others, given, strict=True)), None


_adaln.register_autograd(functools.partial(_backward, _adaln_backward), setup_context=_setup_context)

# The same in C++, csrc/adaln_cpu.cpp, but always with the norm: the residual alone is 0.9 times as fast as PyTorch's at
# 960 x 128. In float64 too; bias, gate, scale and shift come in the dtype of the arithmetic.
if NO_EXTENSION is None:
    torch.library.register_fake("varfast::adaln_cpp", _fake)
    torch.library.register_fake("varfast::adaln_backward_cpp", _fake_backward)
    torch.library.register_autograd(
        "varfast::adaln_cpp",
        functools.partial(_backward, torch.ops.varfast.adaln_backward_cpp),
        setup_context=_setup_context,
    )


def _refuses(x_BLC: Tensor, *_: Any) -> str | None:
    if x_BLC.shape[-1] > _MAX_WIDTH:
        return f"up to {_MAX_WIDTH} channels, got {x_BLC.shape[-1]}"
    return refused_dtype(x_BLC)


def _norm_triton(x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor, eps: float) -> Tensor:
    return _adaln(x_BLC, None, None, None, scale_BC, shift_BC, eps)[1]


def _residual_triton(x_BLC: Tensor, branch_BLC: Tensor, gate_BC: Tensor, bias_C: Tensor | None) -> Tensor:
    return _adaln(x_BLC, branch_BLC, bias_C, gate_BC, None, None, 0.0)[0]


def _residual_norm_triton(
    x_BLC: Tensor,
    branch_BLC: Tensor,
    gate_BC: Tensor,
    scale_BC: Tensor,
    shift_BC: Tensor,
    eps: float,
    bias_C: Tensor | None,
) -> tuple[Tensor, Tensor]:
    new_BLC, out_BLC, _, _ = _adaln(x_BLC, branch_BLC, bias_C, gate_BC, scale_BC, shift_BC, eps)
    return new_BLC, out_BLC


def _refuses_residual_cpp(x_BLC: Tensor, branch_BLC: Tensor, *_: Any) -> str | None:
    if branch_BLC.dtype != x_BLC.dtype:
        return f"stream and branch of one dtype, got {x_BLC.dtype} and {branch_BLC.dtype}"
    return refused_by_cpp(x_BLC)


def _norm_cpp(x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor, eps: float) -> Tensor:
    scale, shift = (v.to(torch.promote_types(x_BLC.dtype, torch.float32)) for v in (scale_BC, shift_BC))
    return torch.ops.varfast.adaln_cpp(x_BLC, None, None, None, scale, shift, eps)[1]


def _residual_norm_cpp(
    x_BLC: Tensor,
    branch_BLC: Tensor,
    gate_BC: Tensor,
    scale_BC: Tensor,
    shift_BC: Tensor,
    eps: float,
    bias_C: Tensor | None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x_BLC.dtype, torch.float32)
    vectors = (None if v is None else v.to(wide) for v in (bias_C, gate_BC, scale_BC, shift_BC))
    new_BLC, out_BLC, _, _ = torch.ops.varfast.adaln_cpp(x_BLC, branch_BLC, *vectors, eps)
    return new_BLC, out_BLC


implementations(
    "layer_norm_modulate",
    Implementation("triton", _norm_triton, cannot_run_triton, ("cuda",), _refuses),
    Implementation("cpp", _norm_cpp, cannot_run_cpp, ("cpu",), refused_by_cpp),
    Implementation("reference", reference.layer_norm_modulate),
)
implementations(
    "gated_residual",
    Implementation("triton", _residual_triton, cannot_run_triton, ("cuda",), _refuses),
    Implementation("reference", reference.gated_residual),
)
implementations(
    "gated_residual_norm",
    Implementation("triton", _residual_norm_triton, cannot_run_triton, ("cuda",), _refuses),
    Implementation("cpp", _residual_norm_cpp, cannot_run_cpp, ("cpu",), _refuses_residual_cpp),
    Implementation("reference", reference.gated_residual_norm),
)


def ahead_of_time() -> list[AheadOfTime]:
    """The three ops, forward and backward, at the widths of d16 and d30; one image, token and channel; odd strides."""
    from varfast.kernels.aot import recorded

    def call(dtype: torch.dtype, shape: tuple[int, ...], stride: int, op: str) -> None:
        batch, _, width = shape
        x, branch = torch.empty(2, *shape, dtype=dtype, requires_grad=True).unbind()
        six = torch.empty(batch, stride, dtype=dtype, requires_grad=True)
        gate, scale, shift = (six[:, start : start + width] for start in (0, stride - width, stride - width))
        bias = torch.empty(width, requires_grad=True)
        if op == "residual+norm":
            stream, normed = gated_residual_norm(x, branch, gate, scale, shift, bias_C=bias, impl="triton")
            (stream.sum() + normed.sum()).backward()
        elif op == "norm":
            layer_norm_modulate(x, scale, shift, impl="triton").sum().backward()
        else:
            gated_residual(x, branch, gate, bias, impl="triton").sum().backward()

    items = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for width in (1024, 1920):
            for op in ("residual+norm", "norm", "residual"):
                what = f"adaln {op} {name} C={width}"
                main = dtype == torch.bfloat16 and (width, op) == (1024, "residual+norm")
                items += recorded(what, partial(call, dtype, (2, 680, width), 6 * width, op), also_blackwell=main)
    for shape, stride in (((1, 1, 1), 1), ((1, 17, 24), 73)):
        what = f"adaln residual+norm {shape} stride={stride}"
        items += recorded(what, partial(call, torch.float32, shape, stride, "residual+norm"), fast=False)
    return items


def layer_norm_modulate(
    x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor, eps: float = 1e-6, impl: str = "auto"
) -> Tensor:
    """LayerNorm without affine parameters, then * (1 + scale) + shift, one scale and shift an image.

    Args:
        x_BLC: (B, L, C); statistics in float32 (float64 for float64).
        scale_BC, shift_BC: (B, C).
        eps: added to the variance.
        impl: "auto", "triton", "cpp" or "reference".
    Returns: (B, L, C) in the dtype of x_BLC.
    Raises: ValueError for an impl that is unknown or cannot run.
    """
    out: Tensor = run("layer_norm_modulate", impl, x_BLC, scale_BC, shift_BC, eps)
    return out


def gated_residual(
    x_BLC: Tensor, branch_BLC: Tensor, gate_BC: Tensor, bias_C: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """x + gate * (branch + bias), one gate an image and channel.

    Args:
        x_BLC, branch_BLC: (B, L, C).
        gate_BC: (B, C).
        bias_C: (C,), that of the product that made the branch, added in float32; its gradient is summed where the
            branch's is made.
        impl: "auto", "triton" or "reference".
    Returns: (B, L, C).
    Raises: ValueError for an impl that is unknown or cannot run.
    """
    out: Tensor = run("gated_residual", impl, x_BLC, branch_BLC, gate_BC, bias_C)
    return out


def gated_residual_norm(
    x_BLC: Tensor,
    branch_BLC: Tensor,
    gate_BC: Tensor,
    scale_BC: Tensor,
    shift_BC: Tensor,
    eps: float = 1e-6,
    bias_C: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """gated_residual, and layer_norm_modulate of its result, in one pass.

    Args:
        x_BLC, branch_BLC: (B, L, C).
        gate_BC, scale_BC, shift_BC: (B, C).
        eps: added to the variance.
        bias_C: (C,), added to the branch, or None.
        impl: "auto", "triton", "cpp" or "reference".
    Returns: the new residual stream and its normalised, modulated form, (B, L, C) each.
    Raises: ValueError for an impl that is unknown or cannot run.
    """
    new_BLC, out_BLC = run("gated_residual_norm", impl, x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps, bias_C)
    return new_BLC, out_BLC
