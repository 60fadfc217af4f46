"""Adaptive LayerNorm of VAR's block: add a gated branch to the residual stream, then normalise and modulate the sum.

There are three ops: the gated residual alone, the normalisation alone, and both fused in one pass over x, which reads
and writes 4 * B * L * C numbers instead of 5 * B * L * C. One forward and one backward kernel serve all three. The
Triton kernels are in adaln_triton.py. This file has the gradient, the choice of an implementation and the public
functions.

Axes: B image, L token, C channel.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.adaln_triton import MAX_WIDTH, adaln_backward_op, adaln_op, fake_backward, fake_forward
from varfast.kernels.extension import NO_EXTENSION, cannot_run_cpp, refused_by_cpp
from varfast.kernels.selection import Implementation, cannot_run_triton, implementations, refused_dtype, run

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime


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


adaln_op.register_autograd(functools.partial(_backward, adaln_backward_op), setup_context=_setup_context)

# The same ops in C++ (csrc/adaln_cpu.cpp), in float64 too, but only those with the norm: the C++ residual alone reached
# only 0.9 times the speed of PyTorch's at 960 x 128. Bias, gate, scale and shift are passed in the arithmetic's dtype.
if NO_EXTENSION is None:
    torch.library.register_fake("varfast::adaln_cpp", fake_forward)
    torch.library.register_fake("varfast::adaln_backward_cpp", fake_backward)
    torch.library.register_autograd(
        "varfast::adaln_cpp",
        functools.partial(_backward, torch.ops.varfast.adaln_backward_cpp),
        setup_context=_setup_context,
    )


def _refuses(x_BLC: Tensor, *_: Any) -> str | None:
    if x_BLC.shape[-1] > MAX_WIDTH:
        return f"up to {MAX_WIDTH} channels, got {x_BLC.shape[-1]}"
    return refused_dtype(x_BLC)


def _norm_triton(x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor, eps: float) -> Tensor:
    return adaln_op(x_BLC, None, None, None, scale_BC, shift_BC, eps)[1]


def _residual_triton(x_BLC: Tensor, branch_BLC: Tensor, gate_BC: Tensor, bias_C: Tensor | None) -> Tensor:
    return adaln_op(x_BLC, branch_BLC, bias_C, gate_BC, None, None, 0.0)[0]


def _residual_norm_triton(
    x_BLC: Tensor,
    branch_BLC: Tensor,
    gate_BC: Tensor,
    scale_BC: Tensor,
    shift_BC: Tensor,
    eps: float,
    bias_C: Tensor | None,
) -> tuple[Tensor, Tensor]:
    new_BLC, out_BLC, _, _ = adaln_op(x_BLC, branch_BLC, bias_C, gate_BC, scale_BC, shift_BC, eps)
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
    """The three ops, forward and backward, at the widths of VAR-d16 and d30; also the degenerate shapes of one image,
    one token and one channel, and odd strides."""
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
    """LayerNorm without affine parameters, then * (1 + scale) + shift, with a scale and shift for each image.

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
    """x + gate * (branch + bias), with a gate for each image and channel.

    Args:
        x_BLC, branch_BLC: (B, L, C).
        gate_BC: (B, C).
        bias_C: (C,), the bias of the linear layer that computed the branch, or None. It is added in float32, and its
            gradient is summed by the kernel that computes the branch's gradient, which saves a separate pass.
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
    """gated_residual followed by layer_norm_modulate of its result, fused in one pass.

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
