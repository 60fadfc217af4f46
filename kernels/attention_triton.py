"""The Triton kernels of attention.py: flash attention whose mask is where the scales end, forward and backward.

No (L, L) mask exists. The host cuts the queries into tiles of at most BLOCK_M rows, where it costs the fewest tiles of
keys (`query_tiles`), and says of each tile which keys all of its rows see and which only some do: only the latter are
masked, by the number of keys that each row sees. At 680 tokens, tiles of 128 x 64 cover 0.726 of the dense area, of
which the mask keeps 0.619; at 2240 tokens 0.674 of 0.652 (tests/kernels/test_attention.py).

Nothing is added with atomics: a program owns what it writes, and walks it in a fixed order, so two runs agree in every
bit. The backward pass is two kernels, for d q (and the logit scale) and for d k, d v; both compute the weights again.

Axes: B image, H head, L token over all scales, l token of one scale, D head dim, T tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varfast.kernels.selection import INTERPRETED
from varfast.kernels.settings import AS_WRITTEN, setting

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime

HEAD_DIM = 64

try:
    import triton.language as tl
    from triton import jit

    _D = tl.constexpr(HEAD_DIM)
    _LOG2_E = tl.constexpr(1.4426950408889634)
except ImportError:  # never launched then: cannot_run_triton says why

    def jit(function=None, **_):
        return function or jit


# ---------------------------------------------------------------------------------------------------------------------
# Which tile sees what


def visible_keys(scale_ends: Sequence[int]) -> list[int]:
    """How many keys each query sees: the end of its scale."""
    starts = (0, *scale_ends[:-1])
    return [end for start, end in zip(starts, scale_ends, strict=True) for _ in range(end - start)]


def _cheapest_cut(length: int, block: int, cost: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """Cut [0, length) into spans of at most `block`, at the least sum of cost(start, end)."""
    best = [(0.0, 0)]
    for end in range(1, length + 1):
        best.append(min((best[start][0] + cost(start, end), start) for start in range(max(0, end - block), end)))
    spans = []
    end = length
    while end:
        spans.append((best[end][1], end))
        end = best[end][1]
    return spans[::-1]


# Costs, in tiles of products: a masked one a quarter more (one compare and one select beside about eight operations on
# each logit), a program of its own one more. By count, not measured; twice as much gives the same forward cuts at 680
# tokens.
_MASKED, _PROGRAM = 0.25, 1.0


@lru_cache(maxsize=64)
def query_tiles(scale_ends: tuple[int, ...], block_m: int, block_n: int) -> list[tuple[int, int, int, int]]:
    """(start, end, full, keys) of each tile of queries, the longest first.

    Rows [start, end), at most block_m; all of them see the keys [0, full), some [full, keys), none more.
    """
    visible = visible_keys(scale_ends)

    def spans(start: int, end: int) -> tuple[int, int]:
        return visible[start] // block_n * block_n, visible[end - 1]

    def cost(start: int, end: int) -> float:
        full, keys = spans(start, end)
        return _PROGRAM + full // block_n + (1 + _MASKED) * -(-(keys - full) // block_n)

    tiles = [(*cut, *spans(*cut)) for cut in _cheapest_cut(scale_ends[-1], block_m, cost)]
    return sorted(tiles, key=lambda tile: -tile[3])


@lru_cache(maxsize=64)
def key_tiles(scale_ends: tuple[int, ...], block_n: int, block_m: int) -> list[tuple[int, int, int, int]]:
    """(start, end, first, full) of each tile of keys, the longest first.

    Rows [start, end), at most block_n; of the queries, those from `full` on see all of these keys, those in
    [first, full) some, those before `first` none. full - first is a multiple of block_m, so full may pass L.
    """
    visible = visible_keys(scale_ends)
    scale_start = [start for start, end in zip((0, *scale_ends), scale_ends, strict=False) for _ in range(end - start)]
    length = scale_ends[-1]

    def spans(start: int, end: int) -> tuple[int, int]:
        first = scale_start[start]
        sees_all = scale_start[end - 1]
        assert visible[sees_all] >= end
        return first, first + -(-(sees_all - first) // block_m) * block_m

    def cost(start: int, end: int) -> float:
        first, full = spans(start, end)
        return _PROGRAM + -(-(length - first) // block_m) + _MASKED * ((min(full, length) - first) // block_m)

    tiles = [(*cut, *spans(*cut)) for cut in _cheapest_cut(length, block_n, cost)]
    return sorted(tiles, key=lambda tile: tile[2])


@lru_cache(maxsize=128)
def _table(
    tiles: Callable[..., list[Any]], scale_ends: tuple[int, ...], blocks: tuple[int, ...], device: torch.device
) -> Tensor:
    """What `tiles` says, (T, 4), or (L,) of visible_keys, int32. On the device, made once: a CUDA graph may be captured
    after one call outside it."""
    return torch.tensor(tiles(scale_ends, *blocks), dtype=torch.int32, device=device)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Logits are in powers of two: exp2 is one instruction.


@jit
def _rows(pointer, row, row_stride, end, CHECKED: tl.constexpr):
    """(rows, D); rows from `end` on are not read, and 0."""
    where = pointer + row[:, None] * row_stride + tl.arange(0, _D)[None, :]
    return tl.load(where, mask=(row < end)[:, None], other=0.0) if CHECKED else tl.load(where)


@jit
def _store_rows(pointer, x, row, row_stride, end):
    where = pointer + row[:, None] * row_stride + tl.arange(0, _D)[None, :]
    tl.store(where, x.to(pointer.dtype.element_ty), mask=(row < end)[:, None])


@jit
def _tile(tiles_ptr, num_tiles, num_heads):
    """What a program works on: (batch and head, batch, head, the four numbers of its tile).

    Programs of one head are neighbours and share its keys and values in L2.
    """
    program = tl.program_id(0)
    batch_head = program // num_tiles
    tile_ptr = tiles_ptr + 4 * (program % num_tiles)
    return (
        batch_head.to(tl.int64),
        (batch_head // num_heads).to(tl.int64),
        batch_head % num_heads,
        tl.load(tile_ptr),
        tl.load(tile_ptr + 1),
        tl.load(tile_ptr + 2),
        tl.load(tile_ptr + 3),
    )


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
    """Softmax over the keys [first, last), continued: weighted values, largest logit and sum of weights of each row."""
    for start in tl.range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = _rows(k_ptr, key, k_row, last, MASKED)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        if MASKED:
            logit = tl.where(key[None, :] < visible[:, None], logit, -float("inf"))
        new_top = tl.maximum(top, tl.max(logit, axis=1))
        weight = tl.exp2(logit - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, axis=1)
        v = _rows(v_ptr, key, v_row, last, MASKED)
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
    """Output rows, and the largest logit and 1 / sum of weights of each. All see key 0, so the largest is finite."""
    q = _rows(q_ptr, row, q_row, row_end, True)
    factor = scale * _LOG2_E
    acc = tl.zeros((BLOCK_M, _D), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc, top, total = _attend(acc, top, total, q, visible, k_ptr, v_ptr, k_row, v_row, factor, 0, full, False, BLOCK_N)
    acc, top, total = _attend(
        acc, top, total, q, visible, k_ptr, v_ptr, k_row, v_row, factor, full, keys, True, BLOCK_N
    )
    return acc / total[:, None], top, 1.0 / total


@jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    scale_ptr,
    out_ptr,
    top_ptr,
    share_ptr,
    tiles_ptr,
    visible_ptr,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    length,
    num_heads,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch_head, batch, head, start, end, full, keys = _tile(tiles_ptr, num_tiles, num_heads)
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
    _store_rows(out_ptr + batch * out_batch + head * out_head, out, row, out_row, end)
    tl.store(top_ptr + batch_head * length + row, top, mask=row < end)
    tl.store(share_ptr + batch_head * length + row, share, mask=row < end)


@jit(do_not_specialize=["num_queries", "num_keys", "num_tiles"])
def _cached_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    scale_ptr,
    out_ptr,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    num_heads,
    num_queries,
    num_keys,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    batch_head = program // num_tiles
    batch, head = (batch_head // num_heads).to(tl.int64), batch_head % num_heads
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
    _store_rows(out_ptr + batch * out_batch + head * out_head, out, row, out_row, num_queries)


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
    """Add d logit k over the keys [first, last), but for the factor `share` of each row."""
    for start in tl.range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = _rows(k_ptr, key, k_row, last, MASKED)
        v = _rows(v_ptr, key, v_row, last, MASKED)
        log_weight = tl.dot(q, tl.trans(k), input_precision="ieee") * factor - top[:, None]
        if MASKED:
            log_weight = tl.where(key[None, :] < visible[:, None], log_weight, -float("inf"))
        weight = tl.exp2(log_weight)
        d_logit = weight * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
        acc = tl.dot(d_logit.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@jit
def _dq_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    scale_ptr,
    out_ptr,
    top_ptr,
    share_ptr,
    delta_ptr,
    d_scale_ptr,
    dq_ptr,
    tiles_ptr,
    visible_ptr,
    grad_batch,
    grad_head,
    grad_row,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    length,
    num_heads,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """d q, each row's part of d logit_scale, and delta = sum_D(grad * out), which _dkv_kernel reads."""
    batch_head, batch, head, start, end, full, keys = _tile(tiles_ptr, num_tiles, num_heads)
    row = start + tl.arange(0, BLOCK_M)
    inside = row < end
    q_ptr += batch * q_batch + head * q_head
    q = _rows(q_ptr, row, q_row, end, True)
    grad = _rows(grad_ptr + batch * grad_batch + head * grad_head, row, grad_row, end, True)
    out = _rows(out_ptr + batch * out_batch + head * out_head, row, out_row, end, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + batch_head * length + row, delta, mask=inside)
    top = tl.load(top_ptr + batch_head * length + row, mask=inside, other=0.0)
    visible = tl.load(visible_ptr + row, mask=inside, other=1)
    scale = tl.load(scale_ptr + head)
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    factor = scale * _LOG2_E
    acc = tl.zeros((BLOCK_M, _D), tl.float32)
    acc = _dq_part(acc, q, grad, top, delta, visible, k_ptr, v_ptr, k_row, v_row, factor, 0, full, False, BLOCK_N)
    acc = _dq_part(acc, q, grad, top, delta, visible, k_ptr, v_ptr, k_row, v_row, factor, full, keys, True, BLOCK_N)
    acc = acc * tl.load(share_ptr + batch_head * length + row, mask=inside, other=0.0)[:, None]
    # sum_j d_logit_ij (q_i . k_j) = q_i . acc_i; rows past the end have q = 0. Read again: kept in registers, q would
    # cost every thread 16 of them all along.
    q = _rows(q_ptr, row, q_row, end, True)
    # One number a row, added up outside: on sm_100 the compiler of triton 3.6 fails at the sum over rows.
    tl.store(d_scale_ptr + batch_head * length + row, tl.sum(acc * q.to(tl.float32), axis=1), mask=inside)
    _store_rows(dq_ptr + batch * out_batch + head * out_head, acc * scale, row, out_row, end)


@jit
def _dkv_part(
    dk,
    dv,
    k,
    v,
    key,
    grad_ptr,
    q_ptr,
    top_ptr,
    share_ptr,
    delta_ptr,
    visible_ptr,
    grad_row,
    q_row,
    factor,
    first,
    last,
    length,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Add what the queries [first, last) contribute. All is transposed: (keys, queries)."""
    for start in tl.range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = row < length  # rows past it load as 0 and contribute 0
        q = _rows(q_ptr, row, q_row, length, True)
        top = tl.load(top_ptr + row, mask=inside, other=0.0)
        log_weight = tl.dot(k, tl.trans(q), input_precision="ieee") * factor - top[None, :]
        if MASKED:
            visible = tl.load(visible_ptr + row, mask=inside, other=0)
            log_weight = tl.where(key[:, None] < visible[None, :], log_weight, -float("inf"))
        weight = tl.exp2(log_weight) * tl.load(share_ptr + row, mask=inside, other=0.0)[None, :]
        grad = _rows(grad_ptr, row, grad_row, length, True)
        dv = tl.dot(weight.to(grad.dtype), grad, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
        d_logit = weight * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :])
        dk = tl.dot(d_logit.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@jit
def _dkv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    scale_ptr,
    top_ptr,
    share_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
    visible_ptr,
    grad_batch,
    grad_head,
    grad_row,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    length,
    num_heads,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """d k and d v of one tile of keys."""
    batch_head, batch, head, start, end, first, full = _tile(tiles_ptr, num_tiles, num_heads)
    key = start + tl.arange(0, BLOCK_N)
    k = _rows(k_ptr + batch * k_batch + head * k_head, key, k_row, end, True)
    v = _rows(v_ptr + batch * v_batch + head * v_head, key, v_row, end, True)
    q_ptr += batch * q_batch + head * q_head
    grad_ptr += batch * grad_batch + head * grad_head
    top_ptr += batch_head * length
    share_ptr += batch_head * length
    delta_ptr += batch_head * length
    scale = tl.load(scale_ptr + head)
    factor = scale * _LOG2_E
    dk = tl.zeros((BLOCK_N, _D), tl.float32)
    dv = tl.zeros((BLOCK_N, _D), tl.float32)
    dk, dv = _dkv_part(
        dk, dv, k, v, key, grad_ptr, q_ptr, top_ptr, share_ptr, delta_ptr, visible_ptr,
        grad_row, q_row, factor, first, full, length, True, BLOCK_M,
    )  # fmt: skip
    dk, dv = _dkv_part(
        dk, dv, k, v, key, grad_ptr, q_ptr, top_ptr, share_ptr, delta_ptr, visible_ptr,
        grad_row, q_row, factor, full, length, length, False, BLOCK_M,
    )  # fmt: skip
    _store_rows(dk_ptr + batch * out_batch + head * out_head, dk * scale, key, out_row, end)
    _store_rows(dv_ptr + batch * out_batch + head * out_head, dv, key, out_row, end)


# ---------------------------------------------------------------------------------------------------------------------
# Shipped configurations, for Hopper


# Rows of queries and of keys of a tile, warps, stages of the pipeline of loads; by kernel and the bits of a number.
# In 16 bits forward, dq and dkv are the fastest of bench/tune.py on an H100 (2026-11-26, torch 2.11, triton 3.6, B 64,
# H 16, L 680; docs/measured.md). The others are chosen by what they compile to (`python -m varfast.kernels.aot`): tiles
# and warps at which two or more programs share a multiprocessor's 65536 registers and 227 KiB, so that one's
# exponentials hide behind another's products.
# float32 products run on the plain cores ("ieee"): tensor cores would round to 10 bits. The tiles are what fits without
# spills.
def _rule(block_m: int, block_n: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


_RULES = {
    ("forward", 16): _rule(64, 64, 4, 3),  # 0.275 ms; 128 x 64 on 8 warps 0.295
    ("dq", 16): _rule(64, 64, 4, 3),  # 64 x 32: 1.01 times as fast, within the spread
    ("dkv", 16): _rule(32, 64, 4, 3),  # the whole backward pass 0.951 ms; 64 x 64: 1.081
    # Fewer than 64 rows leave HGMMA for the older instruction, and do not pad 1 to 16 queries to 64.
    ("cached_16", 16): _rule(16, 64, 1, 2),
    ("cached_64", 16): _rule(64, 64, 4, 3),
    ("cached_128", 16): _rule(128, 64, 8, 3),
    ("forward", 32): _rule(64, 32, 8, 2),
    ("dq", 32): _rule(64, 32, 8, 2),
    ("dkv", 32): _rule(16, 64, 8, 2),
    ("cached_16", 32): _rule(16, 32, 2, 2),
    ("cached_64", 32): _rule(64, 32, 8, 2),
}


def _setting(kernel: str, dtype: torch.dtype, device: torch.device | None = None) -> dict[str, int]:
    bits = 8 * dtype.itemsize
    return setting(f"attention_{kernel}", bits, device, **_RULES[kernel, bits])


def _cached_kernel_for(dtype: torch.dtype, num_queries: int) -> str:
    """The largest block of queries that pads them no more than a smaller one would."""
    if num_queries <= 16:
        return "cached_16"
    return "cached_128" if dtype.itemsize == 2 and -(-num_queries // 64) % 2 == 0 else "cached_64"


# ---------------------------------------------------------------------------------------------------------------------
# Ops


def _readable(x: Tensor) -> Tensor:
    """What the kernels can read: unit stride in D; interpreted, no bf16, on which the interpreter computes garbage."""
    if INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_BHLD(like: Tensor) -> Tensor:
    """Heads beside each other in memory, so that the (B, L, H * D) which the output projection reads is a view."""
    batch, heads, length, dim = like.shape
    return like.new_empty((batch, length, heads, dim)).transpose(1, 2)


def _empty_rows(like: Tensor) -> Tensor:
    return like.new_empty(like.shape[:3], dtype=torch.float32)


@torch.library.custom_op("varfast::block_causal_attention", mutates_args=())
def attention_op(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    logit_scale_H: Tensor,
    scale_ends: Sequence[int],
    invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, (B, H, L, D); of each row the largest logit, in powers of two, and 1 / sum of weights, (B, H, L) float32.

    Not their sum, the log of the sum of weights: of a logit of 1000 float32 keeps 4 decimals, which the weights of the
    backward pass would inherit (tests/kernels/test_attention.py). logit_scale_H: float32. invariant: the bits of
    cached_attention_op's: see there.
    """
    q, k, v = map(_readable, (q_BHLD, k_BHLD, v_BHLD))
    out, top, share = _empty_BHLD(q), _empty_rows(q), _empty_rows(q)
    batch, heads, length, _ = q.shape
    ends = tuple(scale_ends)
    chosen = _setting("forward", q_BHLD.dtype, q.device) | (AS_WRITTEN if invariant else {})
    tiles = _table(query_tiles, ends, (chosen["BLOCK_M"], chosen["BLOCK_N"]), q.device)
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
                _table(visible_keys, ends, (), q.device),
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
                *out.stride()[:3],
                length,
                heads,
                num_tiles,
                **chosen,
            )
    return out.to(q_BHLD.dtype), top, share


@attention_op.register_fake
def _(q_BHLD, k_BHLD, v_BHLD, logit_scale_H, scale_ends, invariant=False):
    return _empty_BHLD(q_BHLD), _empty_rows(q_BHLD), _empty_rows(q_BHLD)


@torch.library.custom_op("varfast::block_causal_attention_backward", mutates_args=())
def _backward_op(
    grad_BHLD: Tensor,
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    logit_scale_H: Tensor,
    out_BHLD: Tensor,
    top_BHL: Tensor,
    share_BHL: Tensor,
    scale_ends: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, q, k, v, out = map(_readable, (grad_BHLD, q_BHLD, k_BHLD, v_BHLD, out_BHLD))
    dq, dk, dv = _empty_BHLD(q), _empty_BHLD(q), _empty_BHLD(q)
    if out.stride() != dq.stride():  # a saved-tensor hook may have changed its layout; the kernel reads it as d q's
        out = torch.empty_like(dq).copy_(out)
    batch, heads, length, _ = q.shape
    ends = tuple(scale_ends)
    for_dq, for_dkv = (_setting(kernel, q_BHLD.dtype, q.device) for kernel in ("dq", "dkv"))
    dq_tiles = _table(query_tiles, ends, (for_dq["BLOCK_M"], for_dq["BLOCK_N"]), q.device)
    dkv_tiles = _table(key_tiles, ends, (for_dkv["BLOCK_N"], for_dkv["BLOCK_M"]), q.device)
    visible_L = _table(visible_keys, ends, (), q.device)
    delta_BHL = torch.empty_like(top_BHL)
    d_scale_BHL = torch.empty_like(top_BHL)
    scale_H = logit_scale_H.contiguous()
    if q.numel():
        with torch.cuda.device_of(q):
            _dq_kernel[(batch * heads * len(dq_tiles),)](
                grad,
                q,
                k,
                v,
                scale_H,
                out,
                top_BHL,
                share_BHL,
                delta_BHL,
                d_scale_BHL,
                dq,
                dq_tiles,
                visible_L,
                *grad.stride()[:3],
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
                *dq.stride()[:3],
                length,
                heads,
                len(dq_tiles),
                **for_dq,
            )
            _dkv_kernel[(batch * heads * len(dkv_tiles),)](
                grad,
                q,
                k,
                v,
                scale_H,
                top_BHL,
                share_BHL,
                delta_BHL,
                dk,
                dv,
                dkv_tiles,
                visible_L,
                *grad.stride()[:3],
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
                *dq.stride()[:3],
                length,
                heads,
                len(dkv_tiles),
                **for_dkv,
            )
    dtype = q_BHLD.dtype
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), d_scale_BHL.sum(dim=(0, 2))


@_backward_op.register_fake
def _(grad_BHLD, q_BHLD, k_BHLD, v_BHLD, logit_scale_H, out_BHLD, top_BHL, share_BHL, scale_ends):
    d_scale = torch.empty_like(logit_scale_H, memory_format=torch.contiguous_format)
    return _empty_BHLD(q_BHLD), _empty_BHLD(q_BHLD), _empty_BHLD(q_BHLD), d_scale


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, logit_scale, ctx.scale_ends, _ = inputs
    ctx.save_for_backward(q, k, v, logit_scale, *output)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_BHLD: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_BHLD is None:
        return (None,) * 6
    return (*_backward_op(grad_BHLD, *ctx.saved_tensors, ctx.scale_ends), None, None)


attention_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("varfast::cached_attention", mutates_args=())
def cached_attention_op(
    q_BHlD: Tensor,
    k_cache_BHLD: Tensor,
    v_cache_BHLD: Tensor,
    logit_scale_H: Tensor,
    num_keys: int,
    invariant: bool = False,
) -> Tensor:
    """Output, (B, H, l, D). logit_scale_H: float32.

    invariant: each row has the bits that attention_op gives it among all scales. Both kernels walk the keys from 0 in
    tiles of BLOCK_N, by the same code (_attend_tile) and, here, in the same tile shape; only where the masked tiles
    begin and end differs. A masked tile that a row sees all of gives it the bits of an unmasked one only because
    nothing is fused (AS_WRITTEN): else the compiler fuses logit * factor - top in the unmasked loop alone (36 FFMA in
    each kernel for sm_90, 0 as written). A tile that a row sees nothing of leaves it as it is: weights exp2(-inf) = 0,
    shrink exp2(0) = 1.
    """
    q, k, v = map(_readable, (q_BHlD, k_cache_BHLD, v_cache_BHLD))
    out = _empty_BHLD(q)
    batch, heads, num_queries, _ = q.shape
    kernel = "forward" if invariant else _cached_kernel_for(q_BHlD.dtype, num_queries)
    chosen = _setting(kernel, q_BHlD.dtype, q.device) | (AS_WRITTEN if invariant else {})
    num_tiles = -(-num_queries // chosen["BLOCK_M"])
    if q.numel():
        with torch.cuda.device_of(q):
            _cached_kernel[(batch * heads * num_tiles,)](
                q,
                k,
                v,
                logit_scale_H.contiguous(),
                out,
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
                *out.stride()[:3],
                heads,
                num_queries,
                num_keys,
                num_tiles,
                **chosen,
            )
    return out.to(q_BHlD.dtype)


@cached_attention_op.register_fake
def _(q_BHlD, k_cache_BHLD, v_cache_BHLD, logit_scale_H, num_keys, invariant=False):
    return _empty_BHLD(q_BHlD)


def ahead_of_time() -> list[AheadOfTime]:
    """Every kernel at every shipped configuration, at the shapes of d16 and d30; one image, token and head."""
    from varfast.kernels.aot import recorded

    def call(dtype: torch.dtype, heads: int, ends: tuple[int, ...]) -> None:
        shape = (1, ends[-1], 3, heads, HEAD_DIM)
        qkv = torch.empty(shape, dtype=dtype, requires_grad=True).permute(2, 0, 3, 1, 4).unbind()
        attention_op(*qkv, torch.ones(heads), ends)[0].sum().backward()

    def call_forward(dtype: torch.dtype, ends: tuple[int, ...]) -> None:
        q, k, v = torch.empty(3, 1, 16, ends[-1], HEAD_DIM, dtype=dtype).unbind()
        attention_op(q, k, v, torch.ones(16), ends, True)

    def call_cached(dtype: torch.dtype, heads: int, num_queries: int, num_keys: int, invariant: bool = False) -> None:
        q = torch.empty(1, heads, num_queries, HEAD_DIM, dtype=dtype)
        k, v = torch.empty(2, 1, heads, num_keys, HEAD_DIM, dtype=dtype).unbind()
        cached_attention_op(q, k, v, torch.ones(heads), num_keys, invariant)

    items = []
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    ends = tuple(itertools.accumulate(side * side for side in sides))
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        half = dtype != torch.float32
        for heads in (16, 30) if dtype == torch.bfloat16 else (16,):
            main = dtype == torch.bfloat16 and heads == 16
            what = f"attention {name} H={heads}"
            items += recorded(what, partial(call, dtype, heads, ends), matrix=half, also_blackwell=main)
            for queries, keys in ((4, 5), (36, 91), (256, 680)):
                items += recorded(
                    f"{what} l={queries}",
                    partial(call_cached, dtype, heads, queries, keys),
                    matrix=half and queries > 16,
                    also_blackwell=main,
                )
        what = f"attention invariant {name}"
        items += recorded(f"{what} forward", partial(call_forward, dtype, ends), matrix=half)
        items += recorded(f"{what} cached", partial(call_cached, dtype, 16, 256, 680, True), matrix=half)
    for dtype in (torch.bfloat16, torch.float32):
        items += recorded(f"attention one token, one head {dtype}", partial(call, dtype, 1, (1,)), fast=False)
        items += recorded(f"attention one query, one key {dtype}", partial(call_cached, dtype, 1, 1, 1), fast=False)
    return items
