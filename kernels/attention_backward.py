"""The backward pass of attention as two Triton kernels: one for d q and d logit_scale, one for d k and d v.

Each kernel recomputes the attention weights, so together they do seven matrix products; a single kernel would do five
(attention_fused.py). attention_tiles.py decides which keys and queries each tile covers. Each output is written by one
program, which adds up its terms in a fixed order, so two runs give the same bits.

Axes: B image, H head, L token over all scales, D head dim, T tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from varfast.kernels._triton import jit, tl
from varfast.kernels.attention_fused import add_queries, fused_backward
from varfast.kernels.attention_tiles import (
    LOG2_E,
    D,
    empty_BHLD,
    key_tiles,
    launch_setting,
    load_rows,
    query_tiles,
    readable,
    store_rows,
    strides_of,
    table,
    tile_of_program,
    visible_keys,
)


@jit
def _dq_part(
    acc,
    q,
    grad,
    top,
    delta,
    visible,
    k_ptr,
    v_ptr,
    k_row,
    v_row,
    factor,
    first,
    last,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add d_logit @ k over the keys [first, last) to acc. The caller then multiplies each row by its `share`, which is
    1 / sum of weights."""
    for start in tl.range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, key, k_row, last, MASKED)
        v = load_rows(v_ptr, key, v_row, last, MASKED)
        log_weight = tl.dot(q, tl.trans(k), input_precision="ieee") * factor - top[:, None]
        if MASKED:
            log_weight = tl.where(key[None, :] < visible[:, None], log_weight, -float("inf"))
        weight = tl.exp2(log_weight)
        d_logit = weight * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
        acc = tl.dot(d_logit.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@jit
def _dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, scale_ptr, out_ptr, top_ptr, share_ptr, delta_ptr, d_scale_ptr, dq_ptr, tiles_ptr,
    visible_ptr,
    grad_batch, grad_head, grad_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, length, num_heads, num_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Computes d q, each row's part of d logit_scale, and delta = sum_D(grad * out), which _dkv_kernel reads."""
    batch_head, batch, head, start, end, full, keys = tile_of_program(tiles_ptr, num_tiles, num_heads)
    row = start + tl.arange(0, BLOCK_M)
    inside = row < end
    q_ptr += batch * q_batch + head * q_head
    q = load_rows(q_ptr, row, q_row, end, True)
    grad = load_rows(grad_ptr + batch * grad_batch + head * grad_head, row, grad_row, end, True)
    out = load_rows(out_ptr + batch * out_batch + head * out_head, row, out_row, end, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + batch_head * length + row, delta, mask=inside)
    top = tl.load(top_ptr + batch_head * length + row, mask=inside, other=0.0)
    visible = tl.load(visible_ptr + row, mask=inside, other=1)
    scale = tl.load(scale_ptr + head)
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    factor = scale * LOG2_E
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    acc = _dq_part(acc, q, grad, top, delta, visible, k_ptr, v_ptr, k_row, v_row, factor, 0, full, False, BLOCK_N)
    acc = _dq_part(acc, q, grad, top, delta, visible, k_ptr, v_ptr, k_row, v_row, factor, full, keys, True, BLOCK_N)
    acc = acc * tl.load(share_ptr + batch_head * length + row, mask=inside, other=0.0)[:, None]
    # d logit_scale of a row: sum_j d_logit_ij (q_i . k_j) = q_i . acc_i; rows past the end have q = 0. q is loaded
    # again here, because keeping it through the loop would cost every thread 16 registers.
    q = load_rows(q_ptr, row, q_row, end, True)
    # One number per row, summed outside the kernel: for sm_100, triton 3.6 fails to compile the sum over rows.
    tl.store(d_scale_ptr + batch_head * length + row, tl.sum(acc * q.to(tl.float32), axis=1), mask=inside)
    store_rows(dq_ptr + batch * out_batch + head * out_head, acc * scale, row, out_row, end)


@jit
def _dkv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, scale_ptr, top_ptr, share_ptr, delta_ptr, dk_ptr, dv_ptr, tiles_ptr, visible_ptr,
    grad_batch, grad_head, grad_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, length, num_heads, num_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d k and d v of one tile of keys."""
    batch_head, batch, head, start, end, first, full = tile_of_program(tiles_ptr, num_tiles, num_heads)
    key = start + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr + batch * k_batch + head * k_head, key, k_row, end, True)
    v = load_rows(v_ptr + batch * v_batch + head * v_head, key, v_row, end, True)
    q_ptr += batch * q_batch + head * q_head
    grad_ptr += batch * grad_batch + head * grad_head
    top_ptr += batch_head * length
    share_ptr += batch_head * length
    delta_ptr += batch_head * length
    scale = tl.load(scale_ptr + head)
    factor = scale * LOG2_E
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    dk, dv = add_queries(
        dk, dv, k, v, key, grad_ptr, q_ptr, top_ptr, share_ptr, delta_ptr, visible_ptr, None,
        grad_row, q_row, factor, first, full, length, end, True, BLOCK_M,
    )  # fmt: skip
    dk, dv = add_queries(
        dk, dv, k, v, key, grad_ptr, q_ptr, top_ptr, share_ptr, delta_ptr, visible_ptr, None,
        grad_row, q_row, factor, full, length, length, end, False, BLOCK_M,
    )  # fmt: skip
    store_rows(dk_ptr + batch * out_batch + head * out_head, dk * scale, key, out_row, end)
    store_rows(dv_ptr + batch * out_batch + head * out_head, dv, key, out_row, end)


@torch.library.custom_op("varfast::block_causal_attention_backward", mutates_args=())
def backward_op(
    grad_BHLD: Tensor,
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    logit_scale_H: Tensor,
    out_BHLD: Tensor,
    top_BHL: Tensor,
    share_BHL: Tensor,
    scale_ends: Sequence[int],
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, each (B, H, L, D), and d logit_scale, (H,) float32. fused: use the single kernel."""
    grad, q, k, v, out = map(readable, (grad_BHLD, q_BHLD, k_BHLD, v_BHLD, out_BHLD))
    gradients = (empty_BHLD(q), empty_BHLD(q), empty_BHLD(q))
    if out.stride() != gradients[0].stride():  # a saved-tensor hook may change strides; the kernels assume d q's
        out = torch.empty_like(gradients[0]).copy_(out)
    d_scale_BHL = torch.empty_like(top_BHL)
    if q.numel():
        given = (grad, q, k, v, logit_scale_H.contiguous(), out, top_BHL, share_BHL)
        launch = fused_backward if fused else _two_kernels
        with torch.cuda.device_of(q):
            launch(given, gradients, d_scale_BHL, tuple(scale_ends), q_BHLD.dtype)
    dq, dk, dv = (gradient.to(q_BHLD.dtype) for gradient in gradients)
    return dq, dk, dv, d_scale_BHL.sum(dim=(0, 2))


def _two_kernels(
    given: tuple[Tensor, ...],
    gradients: tuple[Tensor, Tensor, Tensor],
    d_scale_BHL: Tensor,
    scale_ends: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Write dq, dk, dv and each row's part of d logit_scale.

    Args:
        given: the first eight arguments of backward_op, each passed through `readable`; out, dq, dk and dv have the
            same strides.
        dtype: dtype of the caller's tensors, which determines the launch settings.
    """
    grad, q, k, v, scale_H, _, top_BHL, share_BHL = given
    dq, dk, dv = gradients
    batch, heads, length, _ = q.shape
    for_dq, for_dkv = (launch_setting(kernel, dtype, q.device) for kernel in ("dq", "dkv"))
    dq_tiles = table(query_tiles, scale_ends, (for_dq["BLOCK_M"], for_dq["BLOCK_N"]), q.device)
    dkv_tiles = table(key_tiles, scale_ends, (for_dkv["BLOCK_N"], for_dkv["BLOCK_M"]), q.device)
    visible_L = table(visible_keys, scale_ends, (), q.device)
    delta_BHL = torch.empty_like(top_BHL)
    strides = strides_of(grad, q, k, v, dq)
    _dq_kernel[(batch * heads * len(dq_tiles),)](
        *given, delta_BHL, d_scale_BHL, dq, dq_tiles, visible_L, *strides, length, heads, len(dq_tiles), **for_dq
    )
    _dkv_kernel[(batch * heads * len(dkv_tiles),)](
        *(grad, q, k, v, scale_H, top_BHL, share_BHL, delta_BHL, dk, dv, dkv_tiles, visible_L),
        *strides,
        length,
        heads,
        len(dkv_tiles),
        **for_dkv,
    )


@backward_op.register_fake
def _(grad_BHLD, q_BHLD, k_BHLD, v_BHLD, logit_scale_H, *_):
    d_scale = torch.empty_like(logit_scale_H, memory_format=torch.contiguous_format)
    return empty_BHLD(q_BHLD), empty_BHLD(q_BHLD), empty_BHLD(q_BHLD), d_scale
