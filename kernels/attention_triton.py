"""The Triton kernels of attention.py and their custom ops: flash attention, masked by the ends of the scales.

attention_tiles.py decides which keys each tile of queries covers. The backward pass is in attention_backward.py and
attention_fused.py. Logits are multiplied by log2(e), so that weights are computed by exp2, which is one instruction.
There are no atomics: each output is written by one program, which adds up its terms in a fixed order, so two runs give
the same bits.

Axes: B image, H head, L token over all scales, l token of one scale, D head dim, T tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varfast.kernels._triton import jit, tl
from varfast.kernels.attention_backward import backward_op
from varfast.kernels.attention_tiles import (
    HEAD_DIM,
    LOG2_E,
    D,
    empty_BHLD,
    empty_rows,
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
from varfast.kernels.settings import AS_WRITTEN

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime


@jit
def _attend(
    acc,
    top,
    total,
    q,
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
    """Continue the online softmax over the keys [first, last). Returns, for each row, the weighted sum of values, the
    largest logit and the sum of weights."""
    for start in tl.range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, key, k_row, last, MASKED)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        if MASKED:
            logit = tl.where(key[None, :] < visible[:, None], logit, -float("inf"))
        new_top = tl.maximum(top, tl.max(logit, axis=1))
        weight = tl.exp2(logit - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, axis=1)
        v = load_rows(v_ptr, key, v_row, last, MASKED)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@jit
def _attend_tile(
    q_ptr,
    k_ptr,
    v_ptr,
    scale,
    row,
    row_end,
    visible,
    full,
    keys,
    q_row,
    k_row,
    v_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows of the output, and for each row the largest logit (finite, because every row sees key 0) and 1 / sum of
    weights."""
    q = load_rows(q_ptr, row, q_row, row_end, True)
    factor = scale * LOG2_E
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc, top, total = _attend(acc, top, total, q, visible, k_ptr, v_ptr, k_row, v_row, factor, 0, full, False, BLOCK_N)
    acc, top, total = _attend(
        acc, top, total, q, visible, k_ptr, v_ptr, k_row, v_row, factor, full, keys, True, BLOCK_N
    )
    return acc / total[:, None], top, 1.0 / total


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, scale_ptr, out_ptr, top_ptr, share_ptr, tiles_ptr, visible_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row, length,
    num_heads, num_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch_head, batch, head, start, end, full, keys = tile_of_program(tiles_ptr, num_tiles, num_heads)
    row = start + tl.arange(0, BLOCK_M)
    out, top, share = _attend_tile(
        q_ptr + batch * q_batch + head * q_head,
        k_ptr + batch * k_batch + head * k_head,
        v_ptr + batch * v_batch + head * v_head,
        tl.load(scale_ptr + head),
        row,
        end,
        tl.load(visible_ptr + row, mask=row < end, other=1),
        full,
        keys,
        q_row,
        k_row,
        v_row,
        BLOCK_M,
        BLOCK_N,
    )
    store_rows(out_ptr + batch * out_batch + head * out_head, out, row, out_row, end)
    tl.store(top_ptr + batch_head * length + row, top, mask=row < end)
    tl.store(share_ptr + batch_head * length + row, share, mask=row < end)


@jit(do_not_specialize=["num_queries", "num_keys", "num_tiles", "cache_rows"])
def _cached_kernel(
    q_ptr, k_ptr, v_ptr, scale_ptr, out_ptr, position_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row, num_heads,
    num_queries, num_keys, num_tiles, position_stride, cache_rows,
    POSITION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch_head = program // num_tiles
    batch, head = (batch_head // num_heads).to(tl.int64), batch_head % num_heads
    if POSITION:
        before = tl.load(position_ptr + batch * position_stride).to(tl.int32)
        num_keys = tl.minimum(num_keys + before, cache_rows)
    row = (program % num_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    out, _, _ = _attend_tile(
        q_ptr + batch * q_batch + head * q_head,
        k_ptr + batch * k_batch + head * k_head,
        v_ptr + batch * v_batch + head * v_head,
        tl.load(scale_ptr + head),
        row,
        num_queries,
        tl.zeros((BLOCK_M,), tl.int32) + num_keys,
        num_keys // BLOCK_N * BLOCK_N,
        num_keys,
        q_row,
        k_row,
        v_row,
        BLOCK_M,
        BLOCK_N,
    )
    store_rows(out_ptr + batch * out_batch + head * out_head, out, row, out_row, num_queries)


# ---------------------------------------------------------------------------------------------------------------------
# Ops


def _cached_kernel_for(dtype: torch.dtype, num_queries: int) -> str:
    """The kernel with the largest block of queries that adds no more padding than a smaller block would."""
    if num_queries <= 16:
        return "cached_16"
    return "cached_128" if dtype.itemsize == 2 and -(-num_queries // 64) % 2 == 0 else "cached_64"


@torch.library.custom_op("varfast::block_causal_attention", mutates_args=())
def attention_op(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    logit_scale_H: Tensor,
    scale_ends: Sequence[int],
    invariant: bool = False,
    fused_backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, (B, H, L, D); for each row the largest logit times log2(e), and 1 / sum of weights, (B, H, L) float32.

    These two are not merged into the usual log-sum-exp: near a logit of 1000 float32 resolves only 4 decimals, and the
    weights that the backward pass recomputes would have that error (tests/kernels/test_attention.py).
    logit_scale_H: float32. invariant: bitwise equal to cached_attention_op, see there. fused_backward: compute the
    gradients by one kernel.
    """
    q, k, v = map(readable, (q_BHLD, k_BHLD, v_BHLD))
    out, top, share = empty_BHLD(q), empty_rows(q), empty_rows(q)
    batch, heads, length, _ = q.shape
    ends = tuple(scale_ends)
    chosen = launch_setting("forward", q_BHLD.dtype, q.device) | (AS_WRITTEN if invariant else {})
    tiles = table(query_tiles, ends, (chosen["BLOCK_M"], chosen["BLOCK_N"]), q.device)
    num_tiles = len(tiles)
    if q.numel():
        with torch.cuda.device_of(q):
            _forward_kernel[(batch * heads * num_tiles,)](
                q,
                k,
                v,
                logit_scale_H.contiguous(),
                out,
                top,
                share,
                tiles,
                table(visible_keys, ends, (), q.device),
                *strides_of(q, k, v, out),
                length,
                heads,
                num_tiles,
                **chosen,
            )
    return out.to(q_BHLD.dtype), top, share


@attention_op.register_fake
def _(q_BHLD, *_):
    return empty_BHLD(q_BHLD), empty_rows(q_BHLD), empty_rows(q_BHLD)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, logit_scale, ctx.scale_ends, _, ctx.fused = inputs
    ctx.save_for_backward(q, k, v, logit_scale, *output)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_BHLD: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_BHLD is None:
        return (None,) * 7
    return (*backward_op(grad_BHLD, *ctx.saved_tensors, ctx.scale_ends, ctx.fused), None, None, None)


attention_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("varfast::cached_attention", mutates_args=())
def cached_attention_op(
    q_BHlD: Tensor,
    k_cache_BHLD: Tensor,
    v_cache_BHLD: Tensor,
    logit_scale_H: Tensor,
    num_keys: int,
    invariant: bool = False,
    position: Tensor | None = None,
) -> Tensor:
    """Output, (B, H, l, D). logit_scale_H: float32. position: () or (B,), number of keys before these num_keys.

    invariant: each row is bitwise equal to the row that attention_op computes over all scales at once. Both kernels
    visit the keys from 0 in tiles of BLOCK_N with the same code (_attend_tile) and, here, the same tile shape. They
    differ only in where the masked tiles begin and end. For a row that sees a whole tile, masked and unmasked code give
    the same bits only because multiply-add fusion is off (AS_WRITTEN). Otherwise the compiler fuses
    logit * factor - top in the unmasked loop alone (36 FFMA in each kernel for sm_90; 0 with AS_WRITTEN). A tile of
    which a row sees nothing leaves that row unchanged: the weights are exp2(-inf) = 0 and shrink is exp2(0) = 1.
    """
    q, k, v = map(readable, (q_BHlD, k_cache_BHLD, v_cache_BHLD))
    out = empty_BHLD(q)
    batch, heads, num_queries, _ = q.shape
    kernel = "forward" if invariant else _cached_kernel_for(q_BHlD.dtype, num_queries)
    chosen = launch_setting(kernel, q_BHlD.dtype, q.device) | (AS_WRITTEN if invariant else {})
    num_tiles = -(-num_queries // chosen["BLOCK_M"])
    if q.numel():
        with torch.cuda.device_of(q):
            _cached_kernel[(batch * heads * num_tiles,)](
                q,
                k,
                v,
                logit_scale_H.contiguous(),
                out,
                q if position is None else position,
                *strides_of(q, k, v, out),
                heads,
                num_queries,
                num_keys,
                num_tiles,
                0 if position is None else position.expand(batch).stride(0),
                k.shape[2],
                POSITION=position is not None,
                **chosen,
            )
    return out.to(q_BHlD.dtype)


@cached_attention_op.register_fake
def _(q_BHlD, *_):
    return empty_BHLD(q_BHlD)


def ahead_of_time() -> list[AheadOfTime]:
    """Every kernel in every shipped configuration, at the shapes of VAR-d16 and d30; also one image, token and head."""
    from varfast.kernels.aot import recorded

    def call(dtype: torch.dtype, heads: int, ends: tuple[int, ...], fused: bool = False) -> None:
        shape = (1, ends[-1], 3, heads, HEAD_DIM)
        qkv = torch.empty(shape, dtype=dtype, requires_grad=True).permute(2, 0, 3, 1, 4).unbind()
        attention_op(*qkv, torch.ones(heads), ends, fused_backward=fused)[0].sum().backward()

    def call_forward(dtype: torch.dtype, ends: tuple[int, ...]) -> None:
        q, k, v = torch.empty(3, 1, 16, ends[-1], HEAD_DIM, dtype=dtype).unbind()
        attention_op(q, k, v, torch.ones(16), ends, True)

    def call_cached(
        dtype: torch.dtype,
        heads: int,
        num_queries: int,
        num_keys: int,
        invariant: bool = False,
        position: Tensor | None = None,
    ) -> None:
        q = torch.empty(1, heads, num_queries, HEAD_DIM, dtype=dtype)
        k, v = torch.empty(2, 1, heads, num_keys, HEAD_DIM, dtype=dtype).unbind()
        cached_attention_op(q, k, v, torch.ones(heads), num_keys, invariant, position)

    items = []
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    ends = tuple(itertools.accumulate(side * side for side in sides))
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        half, main = dtype != torch.float32, dtype == torch.bfloat16
        what = f"attention {name}"
        items += recorded(what, partial(call, dtype, 16, ends), matrix=half, also_blackwell=main)
        if dtype != torch.float16:
            items += recorded(f"{what} fused", partial(call, dtype, 30, ends, True), matrix=half, also_blackwell=main)
        for queries, keys in ((4, 5), (36, 91), (256, 680)):
            items += recorded(
                f"{what} l={queries}",
                partial(call_cached, dtype, 16, queries, keys),
                matrix=half and queries > 16,
                also_blackwell=main,
            )
        for position in (torch.zeros((), dtype=torch.int32), torch.zeros(1, dtype=torch.int64)):
            at = partial(call_cached, dtype, 16, 1, 680, position=position)
            items += recorded(f"{what} l=1, position {tuple(position.shape)}", at, also_blackwell=main)
        what = f"attention invariant {name}"
        items += recorded(f"{what} forward", partial(call_forward, dtype, ends), matrix=half)
        items += recorded(f"{what} cached", partial(call_cached, dtype, 16, 256, 680, True), matrix=half)
    for dtype in (torch.bfloat16, torch.float32):
        items += recorded(f"attention one token, one head {dtype}", partial(call, dtype, 1, (1,)), fast=False)
        items += recorded(f"attention one query, one key {dtype}", partial(call_cached, dtype, 1, 1, 1), fast=False)
    return items
