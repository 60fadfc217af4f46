"""GELU (tanh form) of the sum of a matrix product and its bias; and a linear layer with GELU in its epilogue.

The kernel that computes the product's gradient also sums the bias's gradient. A separate pass over the (B L, 4 C)
gradient took 0.084 ms on an H100 at 21760 x 4096; all such passes together took 77 ms of a VAR-d16 step.

tanh is not computed: 0.5 x (1 + tanh u) = x * sigmoid(2 u), which has no cancellation where tanh u is near -1.

Axes: B image, L token over all scales; N row, C channel in, M channel of the hidden layer.
"""

from __future__ import annotations

import functools
import importlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels._triton import jit, tl
from varfast.kernels.extension import NO_EXTENSION, cannot_run_cpp, refused_by_cpp
from varfast.kernels.linear import LowPrecisionLinear, weight_gradient
from varfast.kernels.selection import Implementation, cannot_run_triton, implementations, refused_dtype, run
from varfast.kernels.settings import setting

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime

# A tile of 8 rows and 256 columns gives each thread of 4 warps 16 numbers: two 128-bit loads per tensor in bfloat16.
# A program of the backward pass processes 8 vertically adjacent tiles, so that writing and reading its partial sums is
# only 2 % of the op's bytes.
_RULE = {"ROWS": 8, "COLUMNS": 256, "TILES": 8, "num_warps": 4}


@jit
def _sigmoid_of_gelu(y):
    """sigmoid(2 u) with u = sqrt(2 / pi) (y + 0.044715 y^3), and its derivative with respect to 2 u.

    Both are computed from exp(-|2 u|). sigmoid * (1 - sigmoid) would lose all digits to cancellation at y = 5.
    """
    z = y * (1.5957691216057308 + 0.07135481282052303 * y * y)
    e = tl.exp(-tl.abs(z))
    inverse = 1.0 / (1.0 + e)
    return tl.where(z < 0.0, e, 1.0) * inverse, e * inverse * inverse


@jit
def _forward_kernel(x_ptr, bias_ptr, out_ptr, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each program processes one tile; programs of the same rows have adjacent ids."""
    across = tl.cdiv(width, COLUMNS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = (row < num_rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    y = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    sigmoid, _ = _sigmoid_of_gelu(y)
    tl.store(out_ptr + at, (y * sigmoid).to(out_ptr.dtype.element_ty), mask=here)


@jit
def _backward_kernel(
    d_out_ptr,
    x_ptr,
    bias_ptr,
    d_x_ptr,
    partial_ptr,
    num_rows,
    width,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Each program processes TILES vertically adjacent tiles and sums their rows in registers, in a fixed order."""
    across = tl.cdiv(width, COLUMNS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    chunk = (tl.program_id(0) // across).to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    for tile in range(TILES):
        row = (chunk * TILES + tile) * ROWS + tl.arange(0, ROWS)
        here = (row < num_rows)[:, None] & inside[None, :]
        at = row[:, None] * width + column[None, :]
        d_out = tl.load(d_out_ptr + at, mask=here, other=0.0).to(tl.float32)
        y = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
        if BIAS:
            y += bias[None, :]
        sigmoid, derivative = _sigmoid_of_gelu(y)
        d_x = d_out * (sigmoid + y * derivative * (1.5957691216057308 + 3.0 * 0.07135481282052303 * y * y))
        tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=here)
        total += d_x
    tl.store(partial_ptr + chunk * width + column, tl.sum(total, axis=0), mask=inside)


@torch.library.custom_op("varfast::gelu_bias", mutates_args=())
def _gelu_op(x_NC: Tensor, bias_C: Tensor) -> Tensor:
    x, out = x_NC.contiguous(), torch.empty_like(x_NC, memory_format=torch.contiguous_format)
    if x.numel():
        rows, width = x.shape
        chosen = setting("gelu_bias_forward", width, x.device, **{k: v for k, v in _RULE.items() if k != "TILES"})
        grid = (-(-width // chosen["COLUMNS"]) * -(-rows // chosen["ROWS"]),)
        with torch.cuda.device_of(x):
            _forward_kernel[grid](x, bias_C.contiguous(), out, rows, width, **chosen)
    return out


@_gelu_op.register_fake
def _fake(x_NC, bias_C):
    return torch.empty_like(x_NC, memory_format=torch.contiguous_format)


@torch.library.custom_op("varfast::gelu_bias_backward", mutates_args=())
def _gelu_backward_op(d_out_NC: Tensor, x_NC: Tensor, bias_C: Tensor | None) -> tuple[Tensor, Tensor]:
    """d x, and d bias in float32. bias_C is None if x already includes the bias; d bias is computed all the same."""
    d_out, x = d_out_NC.contiguous(), x_NC.contiguous()
    rows, width = x.shape
    d_x = torch.empty_like(x)
    if not x.numel():
        return d_x, x.new_zeros(width, dtype=torch.float32)
    chosen = setting("gelu_bias_backward", width, x.device, **_RULE)
    chunks = -(-rows // (chosen["ROWS"] * chosen["TILES"]))
    partial = x.new_empty((chunks, width), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward_kernel[(-(-width // chosen["COLUMNS"]) * chunks,)](
            d_out,
            x,
            x if bias_C is None else bias_C.contiguous(),
            d_x,
            partial,
            rows,
            width,
            BIAS=bias_C is not None,
            **chosen,
        )
    return d_x, partial.sum(dim=0)


@_gelu_backward_op.register_fake
def _fake_backward(d_out_NC, x_NC, bias_C):
    d_x = torch.empty_like(x_NC, memory_format=torch.contiguous_format)
    return d_x, x_NC.new_empty(x_NC.shape[1], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(op: Any, ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
    x_NC, bias_C = ctx.saved_tensors
    d_x, d_bias = op(d_out, x_NC, bias_C)
    return d_x, d_bias.to(bias_C.dtype)


_gelu_op.register_autograd(functools.partial(_backward, _gelu_backward_op), setup_context=_setup_context)

# The same op in C++ (csrc/gelu_cpu.cpp).
if NO_EXTENSION is None:
    torch.library.register_fake("varfast::gelu_cpp", _fake)
    torch.library.register_fake("varfast::gelu_backward_cpp", _fake_backward)
    torch.library.register_autograd(
        "varfast::gelu_cpp",
        functools.partial(_backward, torch.ops.varfast.gelu_backward_cpp),
        setup_context=_setup_context,
    )


def _gelu_triton(x_BLC: Tensor, bias_C: Tensor) -> Tensor:
    return _gelu_op(x_BLC.flatten(0, -2), bias_C).view(x_BLC.shape)


def _gelu_cpp(x_BLC: Tensor, bias_C: Tensor) -> Tensor:
    if x_BLC.dtype == torch.float64:  # float64 models serve only as a reference in tests
        return reference.gelu_bias(x_BLC, bias_C)
    out: Tensor = torch.ops.varfast.gelu_cpp(x_BLC.flatten(0, -2), bias_C.float())
    return out.view(x_BLC.shape)


implementations(
    "gelu_bias",
    Implementation("triton", _gelu_triton, cannot_run_triton, ("cuda",), lambda x, _: refused_dtype(x)),
    Implementation("cpp", _gelu_cpp, cannot_run_cpp, ("cpu",), refused_by_cpp),
    Implementation("reference", reference.gelu_bias),
)


def gelu_bias(x_BLC: Tensor, bias_C: Tensor, impl: str = "auto") -> Tensor:
    """GELU of x + bias in the tanh form. Sum and GELU are computed in at least float32 and rounded once.

    Args:
        x_BLC: (..., C), two axes or more, the result of a matrix product. Differentiable.
        bias_C: (C,). Differentiable.
        impl: "auto"; "triton" (float32 or 16 bits), "cpp" (float32, bfloat16; float64 by PyTorch), "reference".
    Returns: the shape and dtype of x.
    Raises: ValueError for a bias of another size, or an impl that is unknown or cannot run.
    """
    if bias_C.shape != x_BLC.shape[-1:]:
        raise ValueError(f"bias is {tuple(bias_C.shape)}: want ({x_BLC.shape[-1]},), one a channel of x")
    out: Tensor = run("gelu_bias", impl, x_BLC, bias_C)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The linear layer with GELU


def _product_then_gelu(x_BLC: Tensor, weight_MC: Tensor, low_MC: Tensor, bias_M: Tensor) -> Tensor:
    return gelu_bias(LowPrecisionLinear.apply(x_BLC, weight_MC, low_MC, None, None), bias_M)


def _epilogue(x_BLC: Tensor, weight_MC: Tensor, low_MC: Tensor, bias_M: Tensor) -> Tensor:
    """cuBLASLt's GELU epilogue: 0.279 ms, where product and then GELU take 0.370 ms (21760 x 1024 -> 4096, H100)."""
    bias = bias_M.to(x_BLC.dtype)
    out = torch._addmm_activation(bias, x_BLC.flatten(0, -2), low_MC.T, use_gelu=True)
    return out.view(*x_BLC.shape[:-1], -1)


def _cannot_epilogue(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "on a CPU it is GELU by erf, not the model's tanh form"


def _refuses_epilogue(x_BLC: Tensor, weight_MC: Tensor, low_MC: Tensor, bias_M: Tensor) -> str | None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x_BLC, weight_MC, bias_M)):
        return (
            "no gradient: it keeps no pre-activation, and an update by another implementation would not repeat the "
            "rollout's arithmetic; for training impl='library' or 'quack'"
        )
    return None


def _quack() -> Any:
    return importlib.import_module("quack.gemm_interface")


@functools.cache
def _cannot_quack(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it needs a CUDA device"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] < 9:
        return "it needs a GPU of compute capability 9.0 or later"
    try:
        _quack().gemm_act  # noqa: B018 - the module may exist without this function
    except (ImportError, AttributeError) as error:
        return f"quack.gemm_interface.gemm_act cannot be imported ({error}); pip install quack-kernels"
    return None


class _QuackLinearGelu(torch.autograd.Function):
    """quack-kernels' product, which writes both the pre-activation and the activation; the backward pass is ours.

    Its gemm_dact computes the next layer's input gradient with GELU's derivative in the epilogue. It is not used,
    because the bias's gradient would then need a separate pass.
    """

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_MC: Tensor, low_MC: Tensor, bias_M: Tensor) -> Tensor:
        keeps = any(ctx.needs_input_grad)
        before, out = _quack().gemm_act(
            x_NC, low_MC.T, bias=bias_M, activation="gelu_tanh_approx", store_preact=keeps, tuned=False
        )
        if keeps:
            ctx.save_for_backward(x_NC, low_MC, before)
        ctx.dtypes = weight_MC.dtype, bias_M.dtype
        return out

    @staticmethod
    def backward(ctx: Any, d_out_NM: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
        x_NC, low_MC, before_NM = ctx.saved_tensors
        wants_x, wants_weight, _, wants_bias = ctx.needs_input_grad
        d_before, d_bias = _gelu_backward_op(d_out_NM, before_NM, None)
        d_weight = weight_gradient(d_before, x_NC, ctx.dtypes[0]) if wants_weight else None
        return d_before @ low_MC if wants_x else None, d_weight, None, d_bias.to(ctx.dtypes[1]) if wants_bias else None


def _by_quack(x_BLC: Tensor, weight_MC: Tensor, low_MC: Tensor, bias_M: Tensor) -> Tensor:
    out: Tensor = _QuackLinearGelu.apply(x_BLC.flatten(0, -2), weight_MC, low_MC, bias_M)
    return out.view(*x_BLC.shape[:-1], -1)


def _refuses_quack(x_BLC: Tensor, *_: Any) -> str | None:
    return None if x_BLC.dtype in (torch.bfloat16, torch.float16) else f"bfloat16 or float16, got {x_BLC.dtype}"


implementations(
    "linear_gelu",
    Implementation("library", _product_then_gelu),
    Implementation("epilogue", _epilogue, _cannot_epilogue, (), _refuses_epilogue),
    # Not picked by "auto": we have not run it on a GPU. bench/bench_kernels.py measures it against ours.
    Implementation("quack", _by_quack, _cannot_quack, (), _refuses_quack),
    Implementation("reference", reference.linear_gelu),
)


def linear_gelu(
    x_BLC: Tensor, weight_MC: Tensor, bias_M: Tensor, low_MC: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """gelu(x @ weight^T + bias), the first layer of an MLP.

    Rollout, reference model and update must use the same implementation, so that the update reproduces the rollout's
    log-probabilities. Therefore only the config chooses the implementation, for all three, and "epilogue", which has no
    backward pass, raises if a gradient is required.

    Args:
        x_BLC: (..., C). Differentiable, as weight and bias are.
        weight_MC: (M, C), in the dtype of x or in float32.
        bias_M: (M,).
        low_MC: low-precision copy of the weight, in the dtype of x, which the product reads; default: weight_MC cast.
        impl: "auto"; "library": the product, then gelu_bias; "epilogue" (CUDA, no gradient): cuBLASLt's; "quack":
            quack-kernels' for 16 bits on Hopper or later; "reference".
    Returns: (..., M) in the dtype of x.
    Raises: ValueError for sizes that do not fit, or for an impl that is unknown, cannot run, or has no gradient
        although one is required.
    """
    if weight_MC.shape != (*bias_M.shape, x_BLC.shape[-1]):
        raise ValueError(
            f"x {tuple(x_BLC.shape)}, weight {tuple(weight_MC.shape)} and bias {tuple(bias_M.shape)} do not fit; want "
            "(..., C), (M, C) and (M,)"
        )
    low_MC = weight_MC.detach().to(x_BLC.dtype) if low_MC is None else low_MC
    out: Tensor = run("linear_gelu", impl, x_BLC, weight_MC, low_MC, bias_M)
    return out


def ahead_of_time() -> list[AheadOfTime]:
    """Both directions at the hidden widths of VAR-d16 and d30; also one row and channel, and an odd width."""
    from varfast.kernels.aot import recorded

    def call(dtype: torch.dtype, shape: tuple[int, int]) -> None:
        x, bias = torch.empty(shape, dtype=dtype, requires_grad=True), torch.empty(shape[1], requires_grad=True)
        gelu_bias(x, bias, impl="triton").sum().backward()

    items = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for width in (4096, 7680):
            what = partial(call, dtype, (1360, width))
            main = (dtype, width) == (torch.bfloat16, 4096)
            items += recorded(f"gelu_bias {name} C={width}", what, also_blackwell=main)
    for shape in ((1, 1), (17, 73)):
        items += recorded(f"gelu_bias {shape}", partial(call, torch.float32, shape), fast=False)
    return items
