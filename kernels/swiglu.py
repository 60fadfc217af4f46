"""SwiGLU of an MLP: silu(gate) * up, between its two matrix products.

Axes: B image, L token, F hidden channel; N row, a token of any image.
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

# Each thread of 4 warps has 16 numbers, two 128-bit loads of each tensor in bfloat16, as in kernels/gelu.py.
_RULE = {"ROWS": 8, "COLUMNS": 256, "num_warps": 4}


@jit
def _tile(num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows, columns and mask of a program's tile. Programs of the same rows have adjacent ids."""
    across = tl.cdiv(width, COLUMNS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row[:, None], column[None, :], (row < num_rows)[:, None] & (column < width)[None, :]


@jit
def _sigmoid(x):
    """Sigmoid, computed from exp(-|x|), which does not overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@jit
def _forward_kernel(
    gate_ptr, up_ptr, out_ptr, num_rows, width, gate_stride, up_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column, here = _tile(num_rows, width, ROWS, COLUMNS)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=here, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=here, other=0.0).to(tl.float32)
    out = gate * _sigmoid(gate) * up
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=here)


@jit
def _backward_kernel(
    d_out_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, num_rows, width, gate_stride, up_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, here = _tile(num_rows, width, ROWS, COLUMNS)
    at = row * width + column
    d_out = tl.load(d_out_ptr + at, mask=here, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=here, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=here, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(gate)
    d_up = d_out * gate * sigmoid
    d_gate = d_out * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(d_gate_ptr + at, d_gate.to(d_gate_ptr.dtype.element_ty), mask=here)
    tl.store(d_up_ptr + at, d_up.to(d_up_ptr.dtype.element_ty), mask=here)


def _with_rows(x_NF: Tensor) -> Tensor:
    """x with unit stride along F and any row stride: gate and up may be the two halves of one product's columns."""
    return x_NF if x_NF.stride(1) == 1 else x_NF.contiguous()


def _grid(x_NF: Tensor, chosen: dict[str, int]) -> tuple[int]:
    return (-(-x_NF.shape[1] // chosen["COLUMNS"]) * -(-x_NF.shape[0] // chosen["ROWS"]),)


@torch.library.custom_op("varfast::swiglu", mutates_args=())
def _swiglu_op(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    gate, up = _with_rows(gate_NF), _with_rows(up_NF)
    out = gate.new_empty(gate.shape)
    if gate.numel():
        chosen = setting("swiglu_forward", gate.shape[1], gate.device, **_RULE)
        with torch.cuda.device_of(gate):
            _forward_kernel[_grid(gate, chosen)](gate, up, out, *gate.shape, gate.stride(0), up.stride(0), **chosen)
    return out


@_swiglu_op.register_fake
def _fake(gate_NF, up_NF):
    return gate_NF.new_empty(gate_NF.shape)


@torch.library.custom_op("varfast::swiglu_backward", mutates_args=())
def _swiglu_backward_op(d_out_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = _with_rows(gate_NF), _with_rows(up_NF)
    d_gate, d_up = (gate.new_empty(gate.shape) for _ in range(2))
    if gate.numel():
        chosen = setting("swiglu_backward", gate.shape[1], gate.device, **_RULE)
        with torch.cuda.device_of(gate):
            _backward_kernel[_grid(gate, chosen)](
                d_out_NF.contiguous(),
                gate,
                up,
                d_gate,
                d_up,
                *gate.shape,
                gate.stride(0),
                up.stride(0),
                **chosen,
            )
    return d_gate, d_up


@_swiglu_backward_op.register_fake
def _fake_backward(d_out_NF, gate_NF, up_NF):
    return gate_NF.new_empty(gate_NF.shape), up_NF.new_empty(up_NF.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(op: Any, ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = op(d_out, *ctx.saved_tensors)
    return d_gate, d_up


_swiglu_op.register_autograd(partial(_backward, _swiglu_backward_op), setup_context=_setup_context)

# The same op in C++ (csrc/rms_norm_cpu.cpp).
if NO_EXTENSION is None:
    torch.library.register_fake("varfast::swiglu_cpp", _fake)
    torch.library.register_fake("varfast::swiglu_backward_cpp", _fake_backward)
    torch.library.register_autograd(
        "varfast::swiglu_cpp",
        partial(_backward, torch.ops.varfast.swiglu_backward_cpp),
        setup_context=_setup_context,
    )


def _swiglu_triton(gate_BLF: Tensor, up_BLF: Tensor) -> Tensor:
    return _swiglu_op(gate_BLF.flatten(0, -2), up_BLF.flatten(0, -2)).view(gate_BLF.shape)


def _swiglu_cpp(gate_BLF: Tensor, up_BLF: Tensor) -> Tensor:
    if gate_BLF.dtype == torch.float64:  # used only as a reference in tests
        return reference.swiglu(gate_BLF, up_BLF)
    out: Tensor = torch.ops.varfast.swiglu_cpp(gate_BLF.flatten(0, -2), up_BLF.flatten(0, -2))
    return out.view(gate_BLF.shape)


implementations(
    "swiglu",
    Implementation("triton", _swiglu_triton, cannot_run_triton, ("cuda",), lambda gate, _: refused_dtype(gate)),
    Implementation("cpp", _swiglu_cpp, cannot_run_cpp, ("cpu",), refused_by_cpp),
    Implementation("reference", reference.swiglu),
)


def swiglu(gate_BLF: Tensor, up_BLF: Tensor, impl: str = "auto") -> Tensor:
    """silu(gate) * up in at least float32, rounded once.

    Args:
        gate_BLF, up_BLF: (..., F), two axes or more, of one shape and dtype. The two halves of one product's columns
            are read without a copy. Differentiable.
        impl: "auto", "triton" (float32 or 16 bits), "cpp" (CPU) or "reference".
    Returns: the shape and dtype of gate, contiguous.
    Raises: ValueError for different shapes or dtypes, or an impl that is unknown or cannot run.
    """
    if gate_BLF.ndim < 2 or gate_BLF.shape != up_BLF.shape or gate_BLF.dtype != up_BLF.dtype:
        raise ValueError(
            f"gate is {tuple(gate_BLF.shape)} of {gate_BLF.dtype}, up {tuple(up_BLF.shape)} of {up_BLF.dtype}: want "
            "(..., F), one shape and dtype"
        )
    out: Tensor = run("swiglu", impl, gate_BLF, up_BLF)
    return out


def ahead_of_time() -> list[AheadOfTime]:
    """Both directions at the widths of LlamaGen-L and 3B, also as halves of one product; one row and channel; odd
    sizes."""
    from varfast.kernels.aot import recorded

    def call(dtype: torch.dtype, rows: int, width: int, halves: bool = False) -> None:
        if halves:
            gate, up = torch.empty(rows, 2 * width, dtype=dtype, requires_grad=True).chunk(2, dim=-1)
        else:
            gate, up = (torch.empty(rows, width, dtype=dtype, requires_grad=True) for _ in range(2))
        swiglu(gate, up, impl="triton").sum().backward()

    items = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for width in (2816, 8704):
            main = (dtype, width) == (torch.bfloat16, 2816)
            for halves in (False, True):
                what = f"swiglu {name} F={width}{', halves' if halves else ''}"
                items += recorded(what, partial(call, dtype, 256, width, halves), also_blackwell=main)
    for rows, width in ((1, 1), (17, 73)):
        items += recorded(f"swiglu {rows} x {width}", partial(call, torch.float32, rows, width), fast=False)
    return items
