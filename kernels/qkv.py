"""Turns the qkv layer's output into heads in one kernel: split, L2-normalise queries and keys, lay out for attention.

The Triton kernels are in qkv_triton.py. This file has the gradient, the choice of an implementation and the public
functions.

The kernel reads and writes each number once: 12 bytes per channel and token in bfloat16, where PyTorch runs a dozen
kernels over float32 copies. The backward pass reads the inverse norms and the normalised q and k, which attention saves
anyway, so the qkv layer's output need not be saved.

Axes: B image, L token over all scales, l token of one scale, C channel = H * D, H head, D head dim; C3 = 3 * C in the
order q, k, v.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.attention_tiles import HEAD_DIM
from varfast.kernels.extension import NO_EXTENSION, cannot_run_cpp, refused_by_cpp
from varfast.kernels.position import check_position, host_positions
from varfast.kernels.qkv_triton import fake_backward, fake_into, outputs, split_backward_op, split_into_op, split_op
from varfast.kernels.selection import Implementation, cannot_run_triton, implementations, refused_dtype, run

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _, q_inverse, k_inverse = output
    _, bias_C3, _, ctx.l2_norm = inputs
    ctx.bias_dtype = None if bias_C3 is None else bias_C3.dtype
    ctx.save_for_backward(*((q, k, q_inverse, k_inverse) if ctx.l2_norm else ()))
    ctx.mark_non_differentiable(q_inverse, k_inverse)
    ctx.set_materialize_grads(False)  # do not allocate zero gradients for the inverse norms
    ctx.shape = q.shape


def _backward(op: Any, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
    given = next((d for d in gradients[:3] if d is not None), None)
    if given is None:
        return None, None, None, None
    d_heads = (given.new_zeros(ctx.shape) if d is None else d for d in gradients[:3])
    with_bias = ctx.bias_dtype is not None
    d_qkv, d_bias = op(*d_heads, *(ctx.saved_tensors if ctx.l2_norm else (None,) * 4), with_bias)
    return d_qkv, d_bias.to(ctx.bias_dtype) if with_bias else None, None, None


split_op.register_autograd(functools.partial(_backward, split_backward_op), setup_context=_setup_context)

# The same ops in C++ (csrc/split_heads_cpu.cpp), in float64 too.
if NO_EXTENSION is None:
    torch.library.register_fake("varfast::split_heads_cpp", outputs)
    torch.library.register_fake("varfast::split_heads_into_cpp", fake_into)
    torch.library.register_fake("varfast::split_heads_backward_cpp", fake_backward)
    torch.library.register_autograd(
        "varfast::split_heads_cpp",
        functools.partial(_backward, torch.ops.varfast.split_heads_backward_cpp),
        setup_context=_setup_context,
    )


def _refused_head_dim(qkv_BLC3: Tensor, num_heads: int) -> str | None:
    dim = qkv_BLC3.shape[-1] // 3 // num_heads
    return None if dim == HEAD_DIM else f"a head dim of {HEAD_DIM}, VAR's, got {dim}"


def _refuses(qkv_BLC3: Tensor, num_heads: int, *_: Any) -> str | None:
    return _refused_head_dim(qkv_BLC3, num_heads) or refused_dtype(qkv_BLC3)


def _refuses_cpp(qkv_BLC3: Tensor, num_heads: int, *_: Any) -> str | None:
    return _refused_head_dim(qkv_BLC3, num_heads) or refused_by_cpp(qkv_BLC3)


Heads = tuple[Tensor, Tensor, Tensor]


def _split_triton(qkv_BLC3: Tensor, num_heads: int, l2_norm: bool, bias_C3: Tensor | None) -> Heads:
    q, k, v, _, _ = split_op(qkv_BLC3, bias_C3, num_heads, l2_norm)
    return q, k, v


def _split_cpp(qkv_BLC3: Tensor, num_heads: int, l2_norm: bool, bias_C3: Tensor | None) -> Heads:
    q, k, v, _, _ = torch.ops.varfast.split_heads_cpp(qkv_BLC3, _wide_bias(qkv_BLC3, bias_C3), num_heads, l2_norm)
    return q, k, v


def _wide_bias(qkv: Tensor, bias_C3: Tensor | None) -> Tensor | None:
    return None if bias_C3 is None else bias_C3.to(torch.promote_types(qkv.dtype, torch.float32))


def _to_cache_triton(
    qkv_BlC3: Tensor,
    num_heads: int,
    l2_norm: bool,
    k_cache_BHLD: Tensor,
    v_cache_BHLD: Tensor,
    start: int,
    bias_C3: Tensor | None,
    position: Tensor | None,
) -> Tensor:
    end = start + qkv_BlC3.shape[1] if position is None else k_cache_BHLD.shape[2]
    k, v = (cache[:, :, start:end] for cache in (k_cache_BHLD, v_cache_BHLD))
    return split_into_op(qkv_BlC3, bias_C3, num_heads, l2_norm, k, v, position)


def _to_cache_cpp(
    qkv_BlC3: Tensor,
    num_heads: int,
    l2_norm: bool,
    k_cache_BHLD: Tensor,
    v_cache_BHLD: Tensor,
    start: int,
    bias_C3: Tensor | None,
    position: Tensor | None,
) -> Tensor:
    bias, length, caches = _wide_bias(qkv_BlC3, bias_C3), qkv_BlC3.shape[1], (k_cache_BHLD, v_cache_BHLD)
    parts = []
    for images, offset in host_positions(position, len(qkv_BlC3)):
        first = start + offset
        _check_rows(first, length, "the cache", min(caches, key=lambda cache: cache.shape[2]))
        k, v = (cache[images, :, first : first + length] for cache in caches)
        parts.append(torch.ops.varfast.split_heads_into_cpp(qkv_BlC3[images], bias, num_heads, l2_norm, k, v))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


implementations(
    "split_heads",
    Implementation("triton", _split_triton, cannot_run_triton, ("cuda",), _refuses),
    Implementation("cpp", _split_cpp, cannot_run_cpp, ("cpu",), _refuses_cpp),
    Implementation("reference", reference.split_heads),
)
implementations(
    "split_heads_to_cache",
    Implementation("triton", _to_cache_triton, cannot_run_triton, ("cuda",), _refuses),
    Implementation("cpp", _to_cache_cpp, cannot_run_cpp, ("cpu",), _refuses_cpp),
    Implementation("reference", reference.split_heads_to_cache),
)


def ahead_of_time() -> list[AheadOfTime]:
    """Forward, backward, and into a cache, with the heads of VAR-d16 and d30; also one image, token and head."""
    from varfast.kernels.aot import recorded

    def call(
        dtype: torch.dtype, length: int, heads: int, cached: bool, l2_norm: bool, position: Tensor | None = None
    ) -> None:
        product = torch.empty(1, length, 3 * heads * HEAD_DIM, dtype=dtype)
        bias = torch.empty(product.shape[-1], requires_grad=not cached)
        if cached:
            k, v = torch.empty(2, 1, heads, length + 37, HEAD_DIM, dtype=dtype).unbind()
            split_heads_to_cache(product, heads, l2_norm, k, v, 37, bias, impl="triton", position=position)
        else:
            q, k, v = split_heads(product.requires_grad_(), heads, l2_norm, bias, impl="triton")
            (q.sum() + k.sum() + v.sum()).backward()

    items = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for heads in (16, 30):
            for cached in (False, True):
                what = f"split_heads{' to cache' if cached else ''} {name} H={heads}"
                main = dtype == torch.bfloat16 and heads == 16
                items += recorded(what, partial(call, dtype, 680, heads, cached, True), also_blackwell=main)
        for position in (torch.zeros((), dtype=torch.int32), torch.zeros(1, dtype=torch.int64)):
            what = f"split_heads to cache {name} H=16, position {tuple(position.shape)}"
            items += recorded(what, partial(call, dtype, 1, 16, True, True, position))
    for cached in (False, True):
        for l2_norm in (False, True):
            what = f"split_heads{' to cache' if cached else ''} one token, one head"
            items += recorded(what, partial(call, torch.float32, 1, 1, cached, l2_norm), fast=False)
    return items


def _check_product(qkv_BLC3: Tensor, num_heads: int, bias_C3: Tensor | None) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}: there must be a head")
    if qkv_BLC3.ndim != 3 or qkv_BLC3.shape[-1] % (3 * num_heads):
        raise ValueError(f"qkv is {tuple(qkv_BLC3.shape)}: want (B, L, 3 * C), C a multiple of the {num_heads} heads")
    if bias_C3 is not None and bias_C3.shape != qkv_BLC3.shape[-1:]:
        raise ValueError(f"bias is {tuple(bias_C3.shape)}: want ({qkv_BLC3.shape[-1]},), one a column of the product")


def split_heads(
    qkv_BLC3: Tensor, num_heads: int, l2_norm: bool, bias_C3: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of each head from the qkv layer's output, with q and k L2-normalised on request.

    Normalisation is x / max(|x|, 1e-12) along D, in at least float32, rounded once.

    Args:
        qkv_BLC3: (B, L, 3 * H * D): q, then k, then v, each with its heads one after the other. Differentiable.
        num_heads: H.
        l2_norm: normalise q and k.
        bias_C3: (3 * H * D,), the bias of the qkv layer, added in at least float32, or None. Differentiable; its
            gradient is summed by the kernel that computes d qkv.
        impl: "auto"; "triton" (float32 or 16 bits) and "cpp" (float32, float64, bfloat16), both D = 64; "reference".
    Returns: q, k and v, (B, H, L, D) each, in the dtype of qkv; contiguous except from "reference".
    Raises: ValueError for a shape that does not divide into heads, or for an impl that is unknown or cannot run.
    """
    _check_product(qkv_BLC3, num_heads, bias_C3)
    q_BHLD, k_BHLD, v_BHLD = run("split_heads", impl, qkv_BLC3, num_heads, l2_norm, bias_C3)
    return q_BHLD, k_BHLD, v_BHLD


def _check_rows(start: int, length: int, name: str, cache: Tensor) -> None:
    if not 0 <= start <= cache.shape[2] - length:
        raise ValueError(f"rows {start} to {start + length} are outside {name}, which has {cache.shape[2]}")


def _check_cache(qkv_BlC3: Tensor, num_heads: int, name: str, cache: Tensor) -> None:
    batch, _, width = qkv_BlC3.shape
    dim = width // (3 * num_heads)
    if cache.ndim != 4 or (*cache.shape[:2], cache.shape[3]) != (batch, num_heads, dim):
        raise ValueError(
            f"{name} is {tuple(cache.shape)}: want ({batch}, {num_heads}, L, {dim}) for {num_heads} heads of "
            f"qkv {tuple(qkv_BlC3.shape)}"
        )
    if cache.dtype != qkv_BlC3.dtype:
        raise ValueError(f"{name} is {cache.dtype}, qkv {qkv_BlC3.dtype}: want one dtype")
    if cache.stride(-1) != 1:
        raise ValueError(f"{name} has a stride of {cache.stride(-1)} along its last axis: want 1")


def split_heads_to_cache(
    qkv_BlC3: Tensor,
    num_heads: int,
    l2_norm: bool,
    k_cache_BHLD: Tensor,
    v_cache_BHLD: Tensor,
    start: int,
    bias_C3: Tensor | None = None,
    impl: str = "auto",
    position: Tensor | None = None,
) -> Tensor:
    """split_heads of l new tokens; writes their keys and values into rows [start, start + l) of a static cache.

    Args:
        qkv_BlC3: (B, l, 3 * H * D).
        num_heads: H.
        l2_norm: normalise q and k.
        k_cache_BHLD, v_cache_BHLD: (B, H, L, D) of the dtype of qkv, unit stride in D; written in place.
        start: number of tokens before these.
        bias_C3: (3 * H * D,) or None.
        impl: "auto"; "triton" (float32 or 16 bits) and "cpp" (float32, float64, bfloat16), both D = 64; "reference".
        position: int32 or int64 on the device, () or (B,), added to `start`. A captured CUDA graph reads its value at
            each replay. On a GPU the value is not checked, because that would wait for the device; "triton" does not
            write rows outside the cache.
    Returns: q, (B, H, l, D).
    Raises: ValueError for shapes or dtypes that do not fit, rows outside the cache, an impl that is unknown or cannot
        run, or if a gradient is required: there is none.
    """
    _check_product(qkv_BlC3, num_heads, bias_C3)
    caches = (k_cache_BHLD, v_cache_BHLD)
    for name, cache in zip(("k_cache", "v_cache"), caches, strict=True):
        _check_cache(qkv_BlC3, num_heads, name, cache)
        _check_rows(start, qkv_BlC3.shape[1], name, cache)
    check_position(position, len(qkv_BlC3), qkv_BlC3.device)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (qkv_BlC3, *caches)):
        raise ValueError("split_heads_to_cache has no gradient; use torch.no_grad(), or split_heads")
    given = (qkv_BlC3, num_heads, l2_norm, *caches, start, bias_C3, position)
    q_BHlD: Tensor = run("split_heads_to_cache", impl, *given)
    return q_BHlD
