"""Shared by the Triton kernels of attention: the tiles of queries and keys, the launch settings, loads and stores.

No (L, L) mask exists. The host cuts the queries into tiles of at most BLOCK_M rows, at the cuts that need the fewest
tiles of keys (`query_tiles`). For each tile it stores which keys all of its rows see and which only some rows see. Only
the latter are masked, by the number of keys that each row sees. At 680 tokens, tiles of 64 x 64 compute 0.682 of the
dense (L, L) area, and 0.619 of it is visible; at 2240 tokens 0.658 and 0.652 (tests/kernels/test_attention.py).

Axes: B image, H head, L token over all scales, l token of one scale, D head dim, T tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from varfast.kernels._triton import constexpr, jit, tl
from varfast.kernels.selection import INTERPRETED
from varfast.kernels.settings import setting

HEAD_DIM = 64

D = constexpr(HEAD_DIM)
LOG2_E = constexpr(1.4426950408889634)

# ---------------------------------------------------------------------------------------------------------------------
# Tiles and what they see


def visible_keys(scale_ends: Sequence[int]) -> list[int]:
    """Number of keys that each query sees: the end of its scale."""
    starts = (0, *scale_ends[:-1])
    return [end for start, end in zip(starts, scale_ends, strict=True) for _ in range(end - start)]


def _cheapest_cut(length: int, block: int, cost: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """Cut [0, length) into ranges of at most `block` so that the sum of cost(start, end) is smallest."""
    best = [(0.0, 0)]
    for end in range(1, length + 1):
        best.append(min((best[start][0] + cost(start, end), start) for start in range(max(0, end - block), end)))
    spans = []
    end = length
    while end:
        spans.append((best[end][1], end))
        end = best[end][1]
    return spans[::-1]


# Extra costs, in units of the products of one tile. A masked tile costs a quarter more (one compare and one select
# added to about eight operations on each logit); each program costs one. Counted, not measured; doubling them gives the
# same forward cuts at 680 tokens.
_MASKED, _PROGRAM = 0.25, 1.0


@lru_cache(maxsize=64)
def query_tiles(scale_ends: tuple[int, ...], block_m: int, block_n: int) -> list[tuple[int, int, int, int]]:
    """(start, end, full, keys) of each tile of queries, those with the most keys first.

    The tile has the rows [start, end), at most block_m. All rows see the keys [0, full), only some see those in
    [full, keys), and none sees later keys.
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
def key_tiles(
    scale_ends: tuple[int, ...], block_n: int, block_m: int, short_masked: bool = False
) -> list[tuple[int, int, int, int]]:
    """(start, end, first, full) of each tile of keys, those with the most queries first.

    The tile has the keys [start, end), at most block_n. Queries from `full` on see all of these keys, queries in
    [first, full) may see only some, and earlier queries see none. full - first is a multiple of block_m, so `full` may
    exceed L. short_masked: mask all queries of a tile with fewer than block_n keys, because its last rows are not keys.
    """
    visible = visible_keys(scale_ends)
    scale_start = [start for start, end in zip((0, *scale_ends), scale_ends, strict=False) for _ in range(end - start)]
    length = scale_ends[-1]

    def spans(start: int, end: int) -> tuple[int, int]:
        first = scale_start[start]
        sees_all = scale_start[end - 1]
        assert visible[sees_all] >= end
        if short_masked and end - start < block_n:
            sees_all = length
        return first, first + -(-(sees_all - first) // block_m) * block_m

    def cost(start: int, end: int) -> float:
        first, full = spans(start, end)
        return _PROGRAM + -(-(length - first) // block_m) + _MASKED * ((min(full, length) - first) // block_m)

    tiles = [(*cut, *spans(*cut)) for cut in _cheapest_cut(length, block_n, cost)]
    return sorted(tiles, key=lambda tile: tile[2])


@lru_cache(maxsize=128)
def table(
    tiles: Callable[..., list[Any]], scale_ends: tuple[int, ...], blocks: tuple[int | bool, ...], device: torch.device
) -> Tensor:
    """The result of `tiles` as an int32 tensor on the device: (T, 4), or (L,) for visible_keys. Cached, so a CUDA graph
    can be captured after one call outside of the capture."""
    return torch.tensor(tiles(scale_ends, *blocks), dtype=torch.int32, device=device)


# ---------------------------------------------------------------------------------------------------------------------
# Shipped configurations, for Hopper


# Query rows and key rows of a tile, warps, and pipeline stages of the loads; by kernel and bits per number.
# The 16-bit settings of forward, dq and dkv were the fastest of bench/tune.py on an H100 (2026-11-26, torch 2.11,
# triton 3.6, B 64, H 16, L 680; docs/measured.md). The others were chosen from the compiled code
# (`python -m varfast.kernels.aot`): tiles and warps at which two or more programs share a multiprocessor's 65536
# registers and 227 KiB of shared memory, so that the exponentials of one overlap with the products of another.
# float32 products run without the tensor cores ("ieee"), which would round the inputs to 10 bits. Their tiles are the
# ones that fit without register spills.
def _rule(block_m: int, block_n: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


RULES = {
    ("forward", 16): _rule(64, 64, 4, 3),  # 0.275 ms; 128 x 64 with 8 warps took 0.295 ms
    ("dq", 16): _rule(64, 64, 4, 3),  # 64 x 32 was 1.01 times as fast, which is within the noise
    ("dkv", 16): _rule(32, 64, 4, 3),  # whole backward pass 0.951 ms; with 64 x 64 1.081 ms
    ("fused", 16): _rule(64, 128, 8, 2),  # as many keys as fit in registers: each tile of keys reads all queries
    # HGMMA needs 64 rows. Tiles of 16 rows use the older instruction, but need not pad 1 to 16 queries to 64.
    ("cached_16", 16): _rule(16, 64, 1, 2),
    ("cached_64", 16): _rule(64, 64, 4, 3),
    ("cached_128", 16): _rule(128, 64, 8, 3),
    ("forward", 32): _rule(64, 32, 8, 2),
    ("dq", 32): _rule(64, 32, 8, 2),
    ("dkv", 32): _rule(16, 64, 8, 2),
    ("fused", 32): _rule(16, 32, 8, 1),
    ("cached_16", 32): _rule(16, 32, 2, 2),
    ("cached_64", 32): _rule(64, 32, 8, 2),
}


def launch_setting(kernel: str, dtype: torch.dtype, device: torch.device | None = None) -> dict[str, int]:
    bits = 8 * dtype.itemsize
    return setting(f"attention_{kernel}", bits, device, **RULES[kernel, bits])


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def readable(x: Tensor) -> Tensor:
    """x in a form that the kernels can read: unit stride in D. Under Triton's interpreter bfloat16 becomes float32,
    because the interpreter computes wrong results in bfloat16."""
    if INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_BHLD(like: Tensor) -> Tensor:
    """An empty (B, H, L, D) stored as (B, L, H, D), so that the output projection can view it as (B, L, H * D)."""
    batch, heads, length, dim = like.shape
    return like.new_empty((batch, length, heads, dim)).transpose(1, 2)


def strides_of(*tensors: Tensor) -> list[int]:
    """What the kernels take beside each (B, H, L, D): its strides but for that of D, which is 1."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def empty_rows(like: Tensor) -> Tensor:
    return like.new_empty(like.shape[:3], dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Functions called inside kernels


@jit
def load_rows(pointer, row, row_stride, end, CHECKED: tl.constexpr):
    """Load (rows, D). With CHECKED, rows from `end` on are not read and are 0."""
    where = pointer + row[:, None] * row_stride + tl.arange(0, D)[None, :]
    return tl.load(where, mask=(row < end)[:, None], other=0.0) if CHECKED else tl.load(where)


@jit
def store_rows(pointer, x, row, row_stride, end):
    where = pointer + row[:, None] * row_stride + tl.arange(0, D)[None, :]
    tl.store(where, x.to(pointer.dtype.element_ty), mask=(row < end)[:, None])


@jit
def tile_of_program(tiles_ptr, num_tiles, num_heads):
    """The work of this program: (batch * num_heads + head, batch, head, the four numbers of its tile).

    Programs of one head have adjacent ids, so they share its keys and values in the L2 cache.
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
