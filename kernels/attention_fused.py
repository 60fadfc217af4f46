"""The backward pass of attention as one Triton kernel, with five matrix products; the two kernels need seven.

Each program computes the gradients of one (image, head) at a time. It visits the tiles of keys in order, and for each
tile loops over the queries that see it, with d k and d v in registers. d q is a sum over the tiles of keys: the program
adds each tile's part to its own (L, D) float32 buffer, which no other program touches. So there are no atomics, the
order of every sum is fixed, and two runs give the same bits.

The buffer lives in global memory. For different tiles of keys, the tiles of queries begin at different rows, so a row
may be read by another thread than the one that wrote it last. Therefore a barrier separates the tiles of keys, and one
precedes the final read. Within one tile of keys every row is read and written once, so the compiler may load rows of
later iterations early. There are as many programs as the GPU runs at once, and each reuses its buffer for all its
heads: at 680 tokens 132 x 174 KB = 23 MB, of an H100's 50 MB of L2. This memory does not grow with the batch.

Axes: B image, H head, L token over all scales, D head dim, T tile, P program.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from varfast.kernels._triton import jit, tl
from varfast.kernels.attention_tiles import (
    LOG2_E,
    D,
    key_tiles,
    launch_setting,
    load_rows,
    store_rows,
    strides_of,
    table,
    visible_keys,
)


@jit
def _prepare(grad_ptr, out_ptr, delta_ptr, sum_ptr, grad_row, out_row, length, BLOCK_M: tl.constexpr):
    """Write delta = sum_D(grad * out) of every row, and set the buffer of d q to 0."""
    for start in tl.range(0, length, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        grad = load_rows(grad_ptr, row, grad_row, length, True).to(tl.float32)
        out = load_rows(out_ptr, row, out_row, length, True).to(tl.float32)
        tl.store(delta_ptr + row, tl.sum(grad * out, axis=1), mask=row < length)
        store_rows(sum_ptr, tl.zeros((BLOCK_M, D), tl.float32), row, D, length)


@jit
def add_queries(
    dk, dv, k, v, key, grad_ptr, q_ptr, top_ptr, share_ptr, delta_ptr, visible_ptr, sum_ptr, grad_row, q_row, factor,
    first, last, length, end, MASKED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add what the queries [first, last) contribute to d k and d v. Logits are transposed: (keys, queries).

    sum_ptr: d q of those queries, to which the keys up to `end` are added; None: d q is another kernel's.
    """
    for start in tl.range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = row < length  # rows past it load as 0 and contribute 0
        q = load_rows(q_ptr, row, q_row, length, True)
        top = tl.load(top_ptr + row, mask=inside, other=0.0)
        log_weight = tl.dot(k, tl.trans(q), input_precision="ieee") * factor - top[None, :]
        if MASKED:
            visible = tl.load(visible_ptr + row, mask=inside, other=0)
            if sum_ptr is not None:
                visible = tl.minimum(visible, end)
            log_weight = tl.where(key[:, None] < visible[None, :], log_weight, -float("inf"))
        weight = tl.exp2(log_weight) * tl.load(share_ptr + row, mask=inside, other=0.0)[None, :]
        grad = load_rows(grad_ptr, row, grad_row, length, True)
        if sum_ptr is not None:
            # Loaded before the products, to hide the latency; 64 x 128 tiles leave enough registers for it.
            before = load_rows(sum_ptr, row, D, length, True)
        dv = tl.dot(weight.to(grad.dtype), grad, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
        d_logit = weight * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :])
        d_logit = d_logit.to(q.dtype)
        dk = tl.dot(d_logit, q, dk, input_precision="ieee")
        if sum_ptr is not None:
            dq = tl.dot(tl.trans(d_logit), k, input_precision="ieee")
            store_rows(sum_ptr, before + dq, row, D, length)
    return dk, dv


@jit
def _finish(q_ptr, sum_ptr, d_scale_ptr, dq_ptr, scale, q_row, out_row, length, BLOCK_M: tl.constexpr):
    """Write d q in its dtype, and each row's part of d logit_scale: sum_j d_logit_ij (q_i . k_j) = q_i . sum_i."""
    for start in tl.range(0, length, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        dq = load_rows(sum_ptr, row, D, length, True)
        q = load_rows(q_ptr, row, q_row, length, True).to(tl.float32)
        tl.store(d_scale_ptr + row, tl.sum(dq * q, axis=1), mask=row < length)
        store_rows(dq_ptr, dq * scale, row, out_row, length)


@jit
def fused_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, scale_ptr, out_ptr, top_ptr, share_ptr, delta_ptr, d_scale_ptr, sum_ptr, dq_ptr,
    dk_ptr, dv_ptr, tiles_ptr, visible_ptr,
    grad_batch, grad_head, grad_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, length, num_heads, num_batch_heads, num_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All gradients of every (image, head) that this program takes: program, program + number of programs, ..."""
    program = tl.program_id(0)
    sum_ptr += program.to(tl.int64) * length * D
    for skipped in tl.range(0, num_batch_heads - program, tl.num_programs(0)):
        batch_head = program + skipped
        batch, head = (batch_head // num_heads).to(tl.int64), batch_head % num_heads
        rows = batch_head.to(tl.int64) * length
        grads = grad_ptr + batch * grad_batch + head * grad_head
        queries = q_ptr + batch * q_batch + head * q_head
        keys = k_ptr + batch * k_batch + head * k_head
        values = v_ptr + batch * v_batch + head * v_head
        offset = batch * out_batch + head * out_head  # of out, dq, dk, dv
        scale = tl.load(scale_ptr + head)
        _prepare(grads, out_ptr + offset, delta_ptr + rows, sum_ptr, grad_row, out_row, length, BLOCK_M)
        tl.debug_barrier()
        for index in tl.range(0, num_tiles):
            start, end = tl.load(tiles_ptr + 4 * index), tl.load(tiles_ptr + 4 * index + 1)
            first, full = tl.load(tiles_ptr + 4 * index + 2), tl.load(tiles_ptr + 4 * index + 3)
            key = start + tl.arange(0, BLOCK_N)
            k = load_rows(keys, key, k_row, end, True)
            v = load_rows(values, key, v_row, end, True)
            dk = tl.zeros((BLOCK_N, D), tl.float32)
            dv = tl.zeros((BLOCK_N, D), tl.float32)
            dk, dv = add_queries(
                dk, dv, k, v, key, grads, queries, top_ptr + rows, share_ptr + rows, delta_ptr + rows, visible_ptr,
                sum_ptr, grad_row, q_row, scale * LOG2_E, first, full, length, end, True, BLOCK_M,
            )  # fmt: skip
            dk, dv = add_queries(
                dk, dv, k, v, key, grads, queries, top_ptr + rows, share_ptr + rows, delta_ptr + rows, visible_ptr,
                sum_ptr, grad_row, q_row, scale * LOG2_E, full, length, length, end, False, BLOCK_M,
            )  # fmt: skip
            store_rows(dk_ptr + offset, dk * scale, key, out_row, end)
            store_rows(dv_ptr + offset, dv, key, out_row, end)
            tl.debug_barrier()
        _finish(
            queries, sum_ptr, d_scale_ptr + rows, dq_ptr + offset, scale, q_row, out_row, length, BLOCK_M
        )  # fmt: skip
        tl.debug_barrier()  # finish reading before the next head resets the buffer to 0


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def fused_backward(
    given: tuple[Tensor, ...],
    gradients: tuple[Tensor, Tensor, Tensor],
    d_scale_BHL: Tensor,
    scale_ends: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Write dq, dk, dv and each row's part of d logit_scale; arguments as of attention_backward._two_kernels."""
    grad, q, k, v, _, _, top_BHL, _ = given
    batch, heads, length, _ = q.shape
    chosen = launch_setting("fused", dtype, q.device)
    # Short tiles are masked: the weights of nonexistent keys may be infinite, and inf * 0 would put NaN into d q.
    tiles = table(key_tiles, scale_ends, (chosen["BLOCK_N"], chosen["BLOCK_M"], True), q.device)
    # 8 warps of up to 255 registers fill a multiprocessor.
    programs = min(batch * heads, _multiprocessors(q.device) * max(1, 8 // chosen["num_warps"]))
    sum_PLD = q.new_empty((programs, *q.shape[2:]), dtype=torch.float32)
    visible_L = table(visible_keys, scale_ends, (), q.device)
    fused_kernel[(programs,)](
        *given,
        torch.empty_like(top_BHL),
        d_scale_BHL,
        sum_PLD,
        *gradients,
        tiles,
        visible_L,
        *strides_of(grad, q, k, v, gradients[0]),
        length,
        heads,
        batch * heads,
        len(tiles),
        **chosen,
    )
