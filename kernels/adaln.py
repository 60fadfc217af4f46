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
from varfast.kernels.extension import NO_EXTENSION, cannot_run_cpp, refused_by_cpp
from varfast.kernels.selection import Implementation, cannot_run_triton, implementations, refused_dtype, run
from varfast.kernels.settings import setting

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # never launched then: cannot_run_triton says why

    def jit(function):
        return function


# Rows of one image that a program of the backward pass adds up: its partial sums are 1/16 of a tensor that it reads.
_ROWS = 16
_MAX_WIDTH = 8192


@jit
def _forward_kernel(
    x_ptr,
    branch_ptr,
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
    d_gate_ptr,
    d_scale_ptr,
    d_shift_ptr,
    length,
    width,
    gate_stride,
    scale_stride,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    NEW_HAS_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens of one image a program, one after the other; sums over them stay in registers, in a fixed order."""
    chunk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    share = tl.div_rn(1.0, width * 1.0)  # once: divided correctly in the loop, it took 114 registers for 80 at C = 1920
    d_gate = tl.zeros((BLOCK,), tl.float32)
    d_scale = tl.zeros((BLOCK,), tl.float32)
    d_shift = tl.zeros((BLOCK,), tl.float32)
    if RESIDUAL:
        gate = tl.load(gate_ptr + image * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.load(scale_ptr + image * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    for index in range(ROWS):
        token = chunk * ROWS + index
        row = image * length + token
        here = inside & (token + column * 0 < length)  # the interpreter wants a mask of one shape
        at = row * width + column
        d_x = tl.zeros((BLOCK,), tl.float32)
        if NEW_HAS_GRADIENT:
            d_x += tl.load(d_new_ptr + at, mask=here, other=0.0).to(tl.float32)
        if NORM:
            d_out = tl.load(d_out_ptr + at, mask=here, other=0.0).to(tl.float32)
            new = tl.load(new_ptr + at, mask=here, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + row, mask=token < length, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=token < length, other=0.0)
            normed = tl.where(here, (new - mean) * rstd, 0.0)
            d_scale += d_out * normed
            d_shift += d_out
            d_normed = d_out * (1.0 + scale)
            along = tl.sum(d_normed * normed, axis=0) * share
            average = tl.sum(d_normed, axis=0) * share
            d_x += (d_normed - average - normed * along) * rstd
        tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=here)
        if RESIDUAL:
            branch = tl.load(branch_ptr + at, mask=here, other=0.0).to(tl.float32)
            d_gate += d_x * branch
            tl.store(d_branch_ptr + at, (d_x * gate).to(d_branch_ptr.dtype.element_ty), mask=here)
    partial = (image * tl.num_programs(0) + chunk) * width + column
    if RESIDUAL:
        tl.store(d_gate_ptr + partial, d_gate, mask=inside)
    if NORM:
        tl.store(d_scale_ptr + partial, d_scale, mask=inside)
        tl.store(d_shift_ptr + partial, d_shift, mask=inside)


def _launch_settings(direction: str, width: int, device: torch.device | None = None) -> dict[str, int]:
    """8 numbers a thread, one 128-bit load in bfloat16."""
    block = max(128, 1 << (width - 1).bit_length())
    rows = {"ROWS": _ROWS} if direction == "backward" else {}
    num_warps = min(16, max(4, block // 256))
    return {"BLOCK": block} | setting(f"adaln_{direction}", width, device, num_warps=num_warps, **rows)


def _rows_of(vector_BC: Tensor) -> Tensor:
    return vector_BC if vector_BC.stride(-1) == 1 else vector_BC.contiguous()


@torch.library.custom_op("varfast::adaln", mutates_args=())
def _adaln(
    x_BLC: Tensor,
    branch_BLC: Tensor | None,
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
def _fake(x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps):
    return _outputs(x_BLC, branch_BLC, scale_BC)


@torch.library.custom_op("varfast::adaln_backward", mutates_args=())
def _adaln_backward(
    d_new_BLC: Tensor | None,
    d_out_BLC: Tensor | None,
    new_BLC: Tensor,
    branch_BLC: Tensor | None,
    gate_BC: Tensor | None,
    scale_BC: Tensor | None,
    mean_BL: Tensor,
    rstd_BL: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, gate, scale and shift; empty where not asked for."""
    batch, length, width = new_BLC.shape
    chosen = _launch_settings("backward", width, new_BLC.device)
    chunks = -(-length // chosen["ROWS"])
    d_x, d_branch, _, _, _ = _gradients(new_BLC, branch_BLC, gate_BC, scale_BC)
    partials = [
        new_BLC.new_empty((batch, chunks, width) if vector is not None else 0, dtype=torch.float32)
        for vector in (gate_BC, scale_BC, scale_BC)
    ]
    if new_BLC.numel():
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
                *partials,
                length,
                width,
                gate.stride(0),
                scale.stride(0),
                RESIDUAL=branch_BLC is not None,
                NORM=d_out_BLC is not None,
                NEW_HAS_GRADIENT=d_new_BLC is not None,
                **chosen,
            )
    sums = [
        partial.sum(dim=1).to(vector.dtype) if vector is not None else partial
        for partial, vector in zip(partials, (gate_BC, scale_BC, scale_BC), strict=True)
    ]
    if d_out_BLC is None and scale_BC is not None:  # the normalised stream had no gradient
        sums[1], sums[2] = torch.zeros_like(scale_BC), torch.zeros_like(scale_BC)
    return d_x, d_branch, sums[0], sums[1], sums[2]


def _gradients(
    new_BLC: Tensor, branch_BLC: Tensor | None, gate_BC: Tensor | None, scale_BC: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_x = new_BLC.new_empty(new_BLC.shape)
    d_branch = new_BLC.new_empty(0) if branch_BLC is None else branch_BLC.new_empty(branch_BLC.shape)
    wide = torch.promote_types(new_BLC.dtype, torch.float32)
    d_gate, d_scale, d_shift = (
        new_BLC.new_empty(0, dtype=wide) if v is None else v.new_empty(v.shape) for v in (gate_BC, scale_BC, scale_BC)
    )
    return d_x, d_branch, d_gate, d_scale, d_shift


@_adaln_backward.register_fake
def _fake_backward(d_new_BLC, d_out_BLC, new_BLC, branch_BLC, gate_BC, scale_BC, mean_BL, rstd_BL):
    return _gradients(new_BLC, branch_BLC, gate_BC, scale_BC)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_BLC, branch_BLC, gate_BC, scale_BC, _, _ = inputs
    new_BLC, _, mean_BL, rstd_BL = output
    ctx.save_for_backward(x_BLC if branch_BLC is None else new_BLC, branch_BLC, gate_BC, scale_BC, mean_BL, rstd_BL)
    ctx.mark_non_differentiable(mean_BL, rstd_BL)
    ctx.set_materialize_grads(False)


def _backward(op: Any, ctx: Any, d_new: Tensor | None, d_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    new_BLC, branch_BLC, gate_BC, scale_BC, mean_BL, rstd_BL = ctx.saved_tensors
    if branch_BLC is None:
        d_new = None
    if scale_BC is None:
        d_out = None
    if d_new is None and d_out is None:
        return None, None, None, None, None, None
    d_x, d_branch, d_gate, d_scale, d_shift = op(d_new, d_out, new_BLC, branch_BLC, gate_BC, scale_BC, mean_BL, rstd_BL)
    with_branch, with_norm = branch_BLC is not None, scale_BC is not None
    return (
        d_x,
        d_branch if with_branch else None,
        d_gate if with_branch else None,
        d_scale if with_norm else None,
        d_shift if with_norm else None,
        None,
    )


_adaln.register_autograd(functools.partial(_backward, _adaln_backward), setup_context=_setup_context)

# The same in C++, csrc/adaln_cpu.cpp, but always with the norm: the residual alone is 0.9 times as fast as PyTorch's at
# 960 x 128. In float64 too; gate, scale and shift come in the dtype of the arithmetic.
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
    return _adaln(x_BLC, None, None, scale_BC, shift_BC, eps)[1]


def _residual_triton(x_BLC: Tensor, branch_BLC: Tensor, gate_BC: Tensor) -> Tensor:
    return _adaln(x_BLC, branch_BLC, gate_BC, None, None, 0.0)[0]


def _residual_norm_triton(
    x_BLC: Tensor, branch_BLC: Tensor, gate_BC: Tensor, scale_BC: Tensor, shift_BC: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    new_BLC, out_BLC, _, _ = _adaln(x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps)
    return new_BLC, out_BLC


def _refuses_residual_cpp(x_BLC: Tensor, branch_BLC: Tensor, *_: Any) -> str | None:
    if branch_BLC.dtype != x_BLC.dtype:
        return f"stream and branch of one dtype, got {x_BLC.dtype} and {branch_BLC.dtype}"
    return refused_by_cpp(x_BLC)


def _norm_cpp(x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor, eps: float) -> Tensor:
    scale, shift = (v.to(torch.promote_types(x_BLC.dtype, torch.float32)) for v in (scale_BC, shift_BC))
    return torch.ops.varfast.adaln_cpp(x_BLC, None, None, scale, shift, eps)[1]


def _residual_norm_cpp(
    x_BLC: Tensor, branch_BLC: Tensor, gate_BC: Tensor, scale_BC: Tensor, shift_BC: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    vectors = (v.to(torch.promote_types(x_BLC.dtype, torch.float32)) for v in (gate_BC, scale_BC, shift_BC))
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
        if op == "residual+norm":
            stream, normed = gated_residual_norm(x, branch, gate, scale, shift, impl="triton")
            (stream.sum() + normed.sum()).backward()
        elif op == "norm":
            layer_norm_modulate(x, scale, shift, impl="triton").sum().backward()
        else:
            gated_residual(x, branch, gate, impl="triton").sum().backward()

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


def gated_residual(x_BLC: Tensor, branch_BLC: Tensor, gate_BC: Tensor, impl: str = "auto") -> Tensor:
    """x + gate * branch, one gate an image and channel.

    Args:
        x_BLC, branch_BLC: (B, L, C).
        gate_BC: (B, C).
        impl: "auto", "triton" or "reference".
    Returns: (B, L, C).
    Raises: ValueError for an impl that is unknown or cannot run.
    """
    out: Tensor = run("gated_residual", impl, x_BLC, branch_BLC, gate_BC)
    return out


def gated_residual_norm(
    x_BLC: Tensor,
    branch_BLC: Tensor,
    gate_BC: Tensor,
    scale_BC: Tensor,
    shift_BC: Tensor,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """gated_residual, and layer_norm_modulate of its result, in one pass.

    Args:
        x_BLC, branch_BLC: (B, L, C).
        gate_BC, scale_BC, shift_BC: (B, C).
        eps: added to the variance.
        impl: "auto", "triton", "cpp" or "reference".
    Returns: the new residual stream and its normalised, modulated form, (B, L, C) each.
    Raises: ValueError for an impl that is unknown or cannot run.
    """
    new_BLC, out_BLC = run("gated_residual_norm", impl, x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps)
    return new_BLC, out_BLC
