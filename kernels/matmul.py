"""A batch-invariant linear layer: the matrix product of strict mode (varfast/policies/strict.py).

cuBLAS and oneDNN choose the tile shape, and whether to split the sum over channels, by the number of rows. A scale of
the rollout and the update have different numbers of rows, so their results differ in the last bits. Here a row's result
depends on that row and on the weight alone: the tile shape is the same for any number of rows, and the sum is not split
and always in the same order. Rows are not padded in memory: rows past the end read the last row and are not stored.

Only the forward pass guarantees this. The backward pass uses ordinary products, because nothing compares its bits.

Axes: N row, C channel in, F feature out.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels._triton import jit, tl
from varfast.kernels.linear import weight_gradient
from varfast.kernels.selection import (
    INTERPRETED,
    Implementation,
    cannot_run_triton,
    implementations,
    refused_dtype,
    run,
)
from varfast.kernels.settings import AS_WRITTEN, setting

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime

# ---------------------------------------------------------------------------------------------------------------------
# Triton


@jit
def _gelu(x):
    """x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), computed as x / (1 + exp(-2 u)). This has no
    cancellation where tanh(u) is near -1, and Triton's interpreter has all functions that it uses."""
    inner = x * (1.5957691216057308 + 0.07135481627159393 * x * x)
    return x / (1.0 + tl.exp(-inner))


@jit
def _finish(
    acc,
    bias_ptr,
    out_ptr,
    before_ptr,
    row,
    feature,
    rows,
    features,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    KEEP_BEFORE: tl.constexpr,
):
    """Add the bias, apply GELU, and store in the dtypes of the results."""
    if BIAS:
        acc += tl.load(bias_ptr + feature, mask=feature < features, other=0.0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (feature < features)[None, :]
    at = row.to(tl.int64)[:, None] * features + feature[None, :]
    if KEEP_BEFORE:
        tl.store(before_ptr + at, acc.to(before_ptr.dtype.element_ty), mask=inside)
    if GELU:
        acc = _gelu(acc)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


# `rows` is not specialised, so that the same binary runs for every number of rows, also for 1 and multiples of 16.
@jit(do_not_specialize=["rows"])
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    before_ptr,
    rows,
    features,
    channels,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    KEEP_BEFORE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Each program computes one tile of the result. GROUP_M tiles of rows share their tiles of the weight in L2."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(features, BLOCK_N)
    in_group = GROUP_M * tiles_n
    first = (program // in_group) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    row = (first + (program % in_group) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_n = (program % in_group) // height
    feature = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_K)
    # Rows and features past the end read the last one, so that loads need no mask; their sums are not stored.
    x_at = x_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * channels + channel[None, :]
    weight_at = weight_ptr + tl.minimum(feature, features - 1).to(tl.int64)[:, None] * channels + channel[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, channels, BLOCK_K):
        if EVEN:
            x = tl.load(x_at)
            weight = tl.load(weight_at)
        else:
            x = tl.load(x_at, mask=(start + channel < channels)[None, :], other=0.0)
            weight = tl.load(weight_at, mask=(start + channel < channels)[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
        x_at += BLOCK_K
        weight_at += BLOCK_K
    # Finish the tile in two halves: in one piece, GELU with KEEP_BEFORE spills registers at 128 x 256.
    half: tl.constexpr = BLOCK_N // 2
    left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, half)), (0, 2, 1)))
    feature = tile_n * BLOCK_N + tl.arange(0, half)
    _finish(left, bias_ptr, out_ptr, before_ptr, row, feature, rows, features, BIAS, GELU, KEEP_BEFORE)
    _finish(right, bias_ptr, out_ptr, before_ptr, row, feature + half, rows, features, BIAS, GELU, KEEP_BEFORE)


# Chosen by count, not measured: 128 x 256 with 8 warps needs 128 accumulators per thread, does 85 FLOPs per byte of
# shared memory, and its 3 stages take 144 KiB. Tensor cores have no full-precision float32 product, so float32 uses the
# tiles that fit without register spills.
_WIDE = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3}
_NARROW = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 4}
_FLOAT32 = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 8, "num_warps": 8, "num_stages": 3}


def _launch_settings(dtype: torch.dtype, features: int, device: torch.device | None = None) -> dict[str, int]:
    """Must not depend on the number of rows, or results would not be batch-invariant. The wide tile is used if at most
    3 % of its features are padding."""
    bits = 8 * dtype.itemsize
    wasted = -features % _WIDE["BLOCK_N"]
    rule = _FLOAT32 if bits == 32 else _WIDE if wasted <= 0.03 * features else _NARROW
    return setting("invariant_linear", (bits, features), device, **rule)


def _readable(x: Tensor) -> Tensor:
    """x in a form that the kernel can read: contiguous. Under Triton's interpreter bfloat16 becomes float32, because
    the interpreter computes wrong results in bfloat16."""
    if INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()
    return x.contiguous()


def _by_triton(
    x_NC: Tensor, weight_FC: Tensor, bias_F: Tensor | None, gelu: bool, float32_out: bool, keep_before: bool
) -> tuple[Tensor, Tensor]:
    out, before = _outputs(x_NC, weight_FC, bias_F, gelu, float32_out, keep_before, "triton")
    rows, channels = x_NC.shape
    features = weight_FC.shape[0]
    if not out.numel():
        return out, before
    chosen = _launch_settings(x_NC.dtype, features, x_NC.device)
    x, weight = _readable(x_NC), _readable(weight_FC)
    target, kept = (_readable(y) for y in (out, before))
    tiles = -(-rows // chosen["BLOCK_M"]) * -(-features // chosen["BLOCK_N"])
    with torch.cuda.device_of(x):
        _linear_kernel[(tiles,)](
            x,
            weight,
            weight if bias_F is None else _readable(bias_F),
            target,
            kept,
            rows,
            features,
            channels,
            BIAS=bias_F is not None,
            GELU=gelu,
            KEEP_BEFORE=keep_before,
            EVEN=channels % chosen["BLOCK_K"] == 0,
            **AS_WRITTEN,
            **chosen,
        )
    return target.to(out.dtype), kept.to(before.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# CPU: PyTorch's product, always with the same number of rows, so that the library takes the same path


# Rows of a product. Measured with oneDNN and MKL on two CPUs (AVX2, AVX512-BF16): at a fixed shape, a row's bits do not
# depend on its index (tests/kernels/test_matmul.py). Strict mode checks this again at the start of a run.
_ROWS = 64
# PyTorch splits elementwise work into pieces of 32768 numbers for its threads, and computes the remainder of a piece
# that does not fill a vector by another function. Smaller tensors are one piece.
_ONE_PIECE = 16384


def _by_blocks(
    x_NC: Tensor, weight_FC: Tensor, bias_F: Tensor | None, gelu: bool, float32_out: bool, keep_before: bool
) -> tuple[Tensor, Tensor]:
    rows, features = len(x_NC), len(weight_FC)
    dtype = torch.promote_types(x_NC.dtype, torch.float32) if float32_out else x_NC.dtype
    x_NC, weight_FC, bias_F = x_NC.to(dtype), weight_FC.to(dtype), None if bias_F is None else bias_F.to(dtype)
    blocks = F.pad(x_NC, (0, 0, 0, -rows % _ROWS)).split(_ROWS)
    before = torch.cat([F.linear(block, weight_FC, bias_F) for block in blocks])[:rows]
    if not gelu:
        return before, before.new_empty(0)
    pieces = before.split(max(1, _ONE_PIECE // features))
    out = torch.cat([F.gelu(piece, approximate="tanh") for piece in pieces])
    return out, before if keep_before else before.new_empty(0)


# ---------------------------------------------------------------------------------------------------------------------


def _outputs(
    x_NC: Tensor,
    weight_FC: Tensor,
    bias_F: Tensor | None,
    gelu: bool,
    float32_out: bool,
    keep_before: bool,
    by: str,
) -> tuple[Tensor, Tensor]:
    shape = (x_NC.shape[0], weight_FC.shape[0])
    wide = torch.promote_types(x_NC.dtype, torch.float32)
    out = x_NC.new_empty(shape, dtype=wide if float32_out else x_NC.dtype)
    return out, x_NC.new_empty(shape if keep_before else (0,), dtype=x_NC.dtype)


@torch.library.custom_op("varfast::invariant_linear", mutates_args=())
def _linear_op(
    x_NC: Tensor,
    weight_FC: Tensor,
    original_FC: Tensor | None,
    bias_F: Tensor | None,
    gelu: bool,
    float32_out: bool,
    keep_before: bool,
    by: str,
) -> tuple[Tensor, Tensor]:
    """Result (N, F); and with keep_before GELU's input, (N, F) in x's dtype, for the backward pass, else empty.

    original_FC: the tensor that weight_FC is a copy of, which gets the gradient.
    """
    compute = _by_triton if by == "triton" else _by_blocks
    return compute(x_NC, weight_FC, bias_F, gelu, float32_out, keep_before)


@_linear_op.register_fake
def _(x_NC, weight_FC, original_FC, bias_F, gelu, float32_out, keep_before, by):
    return _outputs(x_NC, weight_FC, bias_F, gelu, float32_out, keep_before, by)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_NC, weight_FC, original_FC, bias_F, ctx.gelu, *_ = inputs
    assert output[1].numel() == output[0].numel() or not ctx.gelu
    ctx.original_dtype = None if original_FC is None else original_FC.dtype
    ctx.bias_dtype = None if bias_F is None else bias_F.dtype
    ctx.save_for_backward(x_NC, weight_FC, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_NF: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Ordinary products in x's dtype; the float32 gradient of a 16-bit layer with float32_out is rounded first."""
    if grad_NF is None:
        return (None,) * 8
    x_NC, weight_FC, before_NF = ctx.saved_tensors
    grad_NF = grad_NF.to(x_NC.dtype)
    if ctx.gelu:
        grad_NF = torch.ops.aten.gelu_backward(grad_NF, before_NF, approximate="tanh")
    needs_x, needs_weight, needs_original, needs_bias = ctx.needs_input_grad[:4]
    d_x = grad_NF @ weight_FC if needs_x else None
    d_weight = grad_NF.T @ x_NC if needs_weight else None
    d_original = weight_gradient(grad_NF, x_NC, ctx.original_dtype) if needs_original else None
    d_bias = grad_NF.sum(dim=0, dtype=ctx.bias_dtype) if needs_bias else None
    return d_x, d_weight, d_original, d_bias, None, None, None, None


_linear_op.register_autograd(_backward, setup_context=_setup_context)


def _run_by(
    by: str,
    x: Tensor,
    weight_FC: Tensor,
    bias_F: Tensor | None,
    gelu: bool,
    float32_out: bool,
    original_FC: Tensor | None,
) -> Tensor:
    leaves = (x, weight_FC, bias_F, original_FC)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    x_NC = x.reshape(-1, x.shape[-1])
    out_NF, _ = _linear_op(x_NC, weight_FC, original_FC, bias_F, gelu, float32_out, gelu and differentiated, by)
    return out_NF.view(*x.shape[:-1], len(weight_FC))


def _run_triton(*arguments: Any) -> Tensor:
    return _run_by("triton", *arguments)


def _run_blocks(*arguments: Any) -> Tensor:
    return _run_by("blocks", *arguments)


def _refuses(x: Tensor, *_: Any) -> str | None:
    return refused_dtype(x)


def _cannot_run_blocks(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "cuBLAS does not promise that a row's place does not matter"


implementations(
    "invariant_linear",
    Implementation("triton", _run_triton, cannot_run_triton, ("cuda",), _refuses),
    Implementation("blocks", _run_blocks, _cannot_run_blocks, ("cpu",)),
    Implementation("reference", reference.invariant_linear),
)


def invariant_linear(
    x: Tensor,
    weight_FC: Tensor,
    bias_F: Tensor | None = None,
    gelu: bool = False,
    float32_out: bool = False,
    original_FC: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """x weight^T + bias, then tanh GELU if requested. Batch-invariant: a row's bits do not depend on the other rows.

    Sums are float32; bias and GELU are applied to them before they are rounded.

    Args:
        x: (..., C) float32, bfloat16 or float16 ("blocks": any floating dtype).
        weight_FC: (F, C), x's dtype.
        bias_F: (F,) any floating dtype, or None.
        gelu: apply GELU with the tanh approximation; its input is saved for the backward pass, rounded to x's dtype.
        float32_out: return float32 whatever the dtype of x; the gradient is rounded to x's dtype.
        original_FC: the tensor that weight_FC is a low-precision copy of; it gets the gradient, in its own dtype.
        impl: "auto", "triton", "blocks" (CPU; the library's product of 64 rows at a time) or "reference", which is not
            batch-invariant.
    Returns: (..., F), differentiable.
    Raises: ValueError for shapes or dtypes that do not fit, or an impl that is unknown or cannot run.
    """
    if weight_FC.ndim != 2 or x.shape[-1:] != weight_FC.shape[1:]:
        raise ValueError(f"x is {tuple(x.shape)}, weight {tuple(weight_FC.shape)}: want (..., C), (F, C)")
    if x.dtype != weight_FC.dtype:
        raise ValueError(f"x is {x.dtype}, weight {weight_FC.dtype}: want one dtype")
    if bias_F is not None and bias_F.shape != weight_FC.shape[:1]:
        raise ValueError(f"bias is {tuple(bias_F.shape)}, want ({len(weight_FC)},)")
    out: Tensor = run("invariant_linear", impl, x, weight_FC, bias_F, gelu, float32_out, original_FC)
    return out


def ahead_of_time() -> list[AheadOfTime]:
    """The products of VAR-d16 and d30 with their epilogues, and those in float32; also one row, feature and channel."""
    from varfast.kernels.aot import recorded

    def call(dtype: torch.dtype, features: int, channels: int, gelu: bool, head: bool, rows: int = 680) -> None:
        x, weight = torch.empty(rows, channels, dtype=dtype), torch.empty(features, channels, dtype=dtype)
        bias = torch.empty(features, dtype=torch.float32 if head else dtype)
        invariant_linear(x, weight.requires_grad_(), bias, gelu, float32_out=head, impl="triton")

    half, single = torch.bfloat16, torch.float32
    items = []
    for name, dtype, features, channels, gelu, head in (
        ("qkv bf16", half, 3072, 1024, False, False),
        ("fc1 + GELU bf16", half, 4096, 1024, True, False),
        ("fc1 + GELU fp16", torch.float16, 4096, 1024, True, False),
        ("fc2 of d30 bf16", half, 1920, 7680, False, False),
        ("head bf16", half, 4096, 1920, False, True),
        ("word_embed fp32", single, 1024, 32, False, False),
        ("fc1 + GELU fp32", single, 4096, 1024, True, False),
    ):
        products = partial(call, dtype, features, channels, gelu, head)
        what = f"invariant_linear {name}"
        items += recorded(what, products, matrix=dtype != single, also_blackwell=dtype == half)
    small = partial(call, single, 1, 1, True, False, 1)
    items += recorded("invariant_linear one row, feature, channel", small, fast=False)
    return items
