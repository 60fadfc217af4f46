"""RMSNorm: each token is divided by its root mean square, then multiplied by a weight for each channel. Alone, or fused
with the addition of a residual branch before it.

The fused op reads and writes 4 * B * L * C numbers instead of 5 * B * L * C in the forward pass, and 4 instead of 6 in
the backward pass. In a decoding step it is one launch instead of two.

Axes: B image, L token, C channel; N row, a token of any image.
"""

from __future__ import annotations

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

MAX_WIDTH = 8192
_STAGES = 3


@jit
def _forward_kernel(
    x_ptr, branch_ptr, weight_ptr, new_ptr, out_ptr, rstd_ptr, width, eps,
    RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program processes one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        branch = tl.load(branch_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        stored = (x + branch).to(new_ptr.dtype.element_ty)
        tl.store(new_ptr + row * width + column, stored, mask=inside)
        x = stored.to(tl.float32)  # normalise the rounded values that were stored
    mean_square = tl.div_rn(tl.sum(x * x, axis=0), width * 1.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
    normed = (x * rstd).to(out_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, (normed * weight).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd)


@jit
def _backward_kernel(
    d_new_ptr, d_out_ptr, new_ptr, weight_ptr, rstd_ptr, d_x_ptr, partial_ptr, num_rows, width,
    NEW_HAS_GRADIENT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program processes ROWS rows, TILE at a time, while the next STAGES - 1 tiles are loading.

    Sums for the weight's gradient stay in registers as TILE parallel chains, added in a fixed order. They are written
    as (chunks, C).
    """
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    share = tl.div_rn(1.0, width * 1.0)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros((TILE, BLOCK), tl.float32)
    for first in tl.range(0, ROWS, TILE, num_stages=STAGES):
        row = chunk * ROWS + first + tl.arange(0, TILE)
        here = (row < num_rows)[:, None] & inside[None, :]
        at = row[:, None] * width + column[None, :]
        d_out = tl.load(d_out_ptr + at, mask=here, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None]
        normed = tl.load(new_ptr + at, mask=here, other=0.0).to(tl.float32) * rstd
        d_weight += d_out * normed.to(d_x_ptr.dtype.element_ty).to(tl.float32)
        d_normed = d_out * weight[None, :]
        along = tl.sum(d_normed * normed, axis=1)
        d_x = (d_normed - normed * (along * share)[:, None]) * rstd
        if NEW_HAS_GRADIENT:
            d_x += tl.load(d_new_ptr + at, mask=here, other=0.0).to(tl.float32)
        tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=here)
    tl.store(partial_ptr + chunk * width + column, tl.sum(d_weight, axis=0), mask=inside)


def _launch_settings(direction: str, width: int, device: torch.device | None = None) -> dict[str, int]:
    """Forward: each thread holds 8 numbers of a row, one 128-bit load in bfloat16. Backward: as adaLN's kernel."""
    block = max(128, 1 << (width - 1).bit_length())
    if direction == "forward":
        return {"BLOCK": block} | setting("rms_norm_forward", width, device, num_warps=min(16, max(1, block // 256)))
    tile, warps = (2 if block <= 2048 else 1), (4 if block <= 1024 else 8 if block <= 2048 else 16)
    rule = {"ROWS": 16 * tile, "TILE": tile, "STAGES": _STAGES, "num_warps": warps}
    return {"BLOCK": block} | setting("rms_norm_backward", width, device, **rule)


def _outputs(x_NC: Tensor, branch_NC: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    new = x_NC.new_empty(0 if branch_NC is None else x_NC.shape)
    return new, x_NC.new_empty(x_NC.shape), x_NC.new_empty(len(x_NC), dtype=torch.float32)


@torch.library.custom_op("varfast::rms_norm", mutates_args=())
def _rms_norm_op(x_NC: Tensor, branch_NC: Tensor | None, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + branch, empty without a branch; the normalised sum times the weight; 1 / root mean square, (N,) float32."""
    new, out, rstd = _outputs(x_NC, branch_NC)
    if x_NC.numel():
        x = x_NC.contiguous()
        rows, width = x.shape
        with torch.cuda.device_of(x):
            _forward_kernel[(rows,)](
                x,
                x if branch_NC is None else branch_NC.contiguous(),
                weight_C.contiguous(),
                new,
                out,
                rstd,
                width,
                eps,
                RESIDUAL=branch_NC is not None,
                **_launch_settings("forward", width, x.device),
            )
    return new, out, rstd


@_rms_norm_op.register_fake
def _fake(x_NC, branch_NC, weight_C, eps):
    return _outputs(x_NC, branch_NC)


@torch.library.custom_op("varfast::rms_norm_backward", mutates_args=())
def _rms_norm_backward_op(
    d_new_NC: Tensor | None, d_out_NC: Tensor, new_NC: Tensor, weight_C: Tensor, rstd_N: Tensor
) -> tuple[Tensor, Tensor]:
    """d x, which also is d branch; and d weight in float32."""
    new = new_NC.contiguous()
    d_x = torch.empty_like(new)
    rows, width = new.shape
    if not new.numel():
        return d_x, new.new_zeros(width, dtype=torch.float32)
    chosen = _launch_settings("backward", width, new.device)
    chunks = -(-rows // chosen["ROWS"])
    partial = new.new_empty((chunks, width), dtype=torch.float32)
    with torch.cuda.device_of(new):
        _backward_kernel[(chunks,)](
            new if d_new_NC is None else d_new_NC.contiguous(),
            d_out_NC.contiguous(),
            new,
            weight_C.contiguous(),
            rstd_N,
            d_x,
            partial,
            rows,
            width,
            NEW_HAS_GRADIENT=d_new_NC is not None,
            **chosen,
        )
    return d_x, partial.sum(dim=0)


@_rms_norm_backward_op.register_fake
def _fake_backward(d_new_NC, d_out_NC, new_NC, weight_C, rstd_N):
    d_x = torch.empty_like(new_NC, memory_format=torch.contiguous_format)
    return d_x, new_NC.new_empty(new_NC.shape[1], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_NC, branch_NC, weight_C, _ = inputs
    new_NC, _, rstd_N = output
    ctx.residual = branch_NC is not None
    ctx.save_for_backward(new_NC if ctx.residual else x_NC, weight_C, rstd_N)
    ctx.mark_non_differentiable(rstd_N)
    ctx.set_materialize_grads(False)


def _backward(op: Any, ctx: Any, d_new: Tensor | None, d_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    new_NC, weight_C, rstd_N = ctx.saved_tensors
    d_new = d_new if ctx.residual else None
    if d_out is None:
        return d_new, d_new, None, None
    d_x, d_weight = op(d_new, d_out, new_NC, weight_C, rstd_N)
    return d_x, d_x if ctx.residual else None, d_weight.to(weight_C.dtype), None


_rms_norm_op.register_autograd(partial(_backward, _rms_norm_backward_op), setup_context=_setup_context)

# The same op in C++ (csrc/rms_norm_cpu.cpp). The weight is passed in float32.
if NO_EXTENSION is None:
    torch.library.register_fake("varfast::rms_norm_cpp", _fake)
    torch.library.register_fake("varfast::rms_norm_backward_cpp", _fake_backward)
    torch.library.register_autograd(
        "varfast::rms_norm_cpp",
        partial(_backward, torch.ops.varfast.rms_norm_backward_cpp),
        setup_context=_setup_context,
    )


def _norm_triton(x_BLC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    return _rms_norm_op(x_BLC.flatten(0, -2), None, weight_C, eps)[1].view(x_BLC.shape)


def _residual_norm_triton(x_BLC: Tensor, branch_BLC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    new, out, _ = _rms_norm_op(x_BLC.flatten(0, -2), branch_BLC.flatten(0, -2), weight_C, eps)
    return new.view(x_BLC.shape), out.view(x_BLC.shape)


def _norm_cpp(x_BLC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    if x_BLC.dtype == torch.float64:  # used only as a reference in tests
        return reference.rms_norm(x_BLC, weight_C, eps)
    out: Tensor = torch.ops.varfast.rms_norm_cpp(x_BLC.flatten(0, -2), None, weight_C.float(), eps)[1]
    return out.view(x_BLC.shape)


def _residual_norm_cpp(x_BLC: Tensor, branch_BLC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x_BLC.dtype == torch.float64:
        return reference.residual_rms_norm(x_BLC, branch_BLC, weight_C, eps)
    x_NC, branch_NC = x_BLC.flatten(0, -2), branch_BLC.flatten(0, -2)
    new, out, _ = torch.ops.varfast.rms_norm_cpp(x_NC, branch_NC, weight_C.float(), eps)
    return new.view(x_BLC.shape), out.view(x_BLC.shape)


def _refuses(x_BLC: Tensor, *_: Any) -> str | None:
    if x_BLC.shape[-1] > MAX_WIDTH:
        return f"up to {MAX_WIDTH} channels, got {x_BLC.shape[-1]}"
    return refused_dtype(x_BLC)


implementations(
    "rms_norm",
    Implementation("triton", _norm_triton, cannot_run_triton, ("cuda",), _refuses),
    Implementation("cpp", _norm_cpp, cannot_run_cpp, ("cpu",), refused_by_cpp),
    Implementation("reference", reference.rms_norm),
)
implementations(
    "residual_rms_norm",
    Implementation("triton", _residual_norm_triton, cannot_run_triton, ("cuda",), _refuses),
    Implementation("cpp", _residual_norm_cpp, cannot_run_cpp, ("cpu",), refused_by_cpp),
    Implementation("reference", reference.residual_rms_norm),
)


def _check(x_BLC: Tensor, weight_C: Tensor) -> None:
    if x_BLC.ndim < 2:
        raise ValueError(f"x is {tuple(x_BLC.shape)}: want two axes or more, the last of them channels")
    if weight_C.shape != x_BLC.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight_C.shape)}: want ({x_BLC.shape[-1]},), one a channel of x")


def rms_norm(x_BLC: Tensor, weight_C: Tensor, eps: float, impl: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) along C in at least float32, rounded to the dtype of x, times the weight.

    Args:
        x_BLC: (..., C), two axes or more. Differentiable.
        weight_C: (C,). Differentiable.
        eps: added to the mean square.
        impl: "auto", "triton" (float32 or 16 bits, up to 8192 channels), "cpp" (CPU) or "reference".
    Returns: the shape and dtype of x.
    Raises: ValueError for a weight of another size, or an impl that is unknown or cannot run.
    """
    _check(x_BLC, weight_C)
    out: Tensor = run("rms_norm", impl, x_BLC, weight_C, eps)
    return out


def residual_rms_norm(
    x_BLC: Tensor, branch_BLC: Tensor, weight_C: Tensor, eps: float, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The residual stream x + branch, rounded to its dtype, and rms_norm of it.

    Args:
        x_BLC, branch_BLC: (..., C), two axes or more, one shape and dtype. Differentiable.
        weight_C, eps, impl: as in rms_norm.
    Returns: the new stream and rms_norm of it, both in the shape and dtype of x.
    Raises: ValueError as rms_norm, and for a branch of another shape or dtype.
    """
    _check(x_BLC, weight_C)
    if branch_BLC.shape != x_BLC.shape or branch_BLC.dtype != x_BLC.dtype:
        raise ValueError(
            f"branch is {tuple(branch_BLC.shape)} of {branch_BLC.dtype}: want {tuple(x_BLC.shape)} of {x_BLC.dtype}, "
            "as the stream"
        )
    new, out = run("residual_rms_norm", impl, x_BLC, branch_BLC, weight_C, eps)
    return new, out


def ahead_of_time() -> list[AheadOfTime]:
    """Both directions at the widths of LlamaGen-L, XXL and 3B; also one row and channel, and an odd width."""
    from varfast.kernels.aot import recorded

    def call(dtype: torch.dtype, shape: tuple[int, int], residual: bool = True) -> None:
        x, branch = (torch.empty(shape, dtype=dtype, requires_grad=True) for _ in range(2))
        weight = torch.empty(shape[1], dtype=dtype, requires_grad=True)
        if residual:
            new, out = residual_rms_norm(x, branch, weight, 1e-5, impl="triton")
            (new.sum() + out.sum()).backward()
        else:
            rms_norm(x, weight, 1e-5, impl="triton").sum().backward()

    items = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for width in (1024, 1536, 3200):
            main = (dtype, width) == (torch.bfloat16, 1536)
            for residual in (False, True):
                what = f"{'residual_' if residual else ''}rms_norm {name} C={width}"
                items += recorded(what, partial(call, dtype, (1024, width), residual), also_blackwell=main)
    for shape in ((1, 1), (17, 73)):
        items += recorded(f"rms_norm {shape}", partial(call, torch.float32, shape), fast=False)
    return items
