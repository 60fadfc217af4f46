"""The Triton kernel of rotary.py, for forward, backward and the cache, and its custom ops.

Axes: B image, L token, H query head, G key and value head, D head dim, P = D / 2 pairs of channels, N place of the
cache, X = (H + 2 G) D column of the product, in the order q, k, v.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from varfast.kernels._triton import jit, tl
from varfast.kernels.settings import AS_WRITTEN, setting

# A program processes some tokens of at most 4 adjacent heads, all of q, all of k or all of v: 4096 numbers, 32 per
# thread. The heads of a token share one read of its row of the rotary table. If each head had its own program, reading
# the float32 table for bfloat16 heads would double the traffic from L2. A decoding step has few tokens, so it uses 1024
# numbers per program.
_HEADS = 4


@jit
def _turn(a, b, cos, sin, BACKWARD: tl.constexpr):
    if BACKWARD:
        sin = -sin
    return a * cos - b * sin, b * cos + a * sin


@jit
def _copy_halves(
    source, target, table, here, read, written,
    ROTARY: tl.constexpr, BACKWARD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy rows of heads, rotating channel j with channel j + D / 2."""
    pair = tl.arange(0, BLOCK // 2)[None, :]
    inside = pair < HEAD_DIM // 2
    a = tl.load(source + pair, mask=here & inside, other=0.0).to(tl.float32)
    b = tl.load(source + pair + HEAD_DIM // 2, mask=here & inside, other=0.0).to(tl.float32)
    if ROTARY:
        cos = tl.load(table + 2 * pair, mask=read & inside, other=0.0).to(tl.float32)
        sin = tl.load(table + 2 * pair + 1, mask=read & inside, other=0.0).to(tl.float32)
        a, b = _turn(a, b, cos, sin, BACKWARD)
    tl.store(target + pair, a.to(target.dtype.element_ty), mask=written & inside)
    tl.store(target + pair + HEAD_DIM // 2, b.to(target.dtype.element_ty), mask=written & inside)


@jit
def _copy_adjacent(
    source, target, table, here, read, written,
    ROTARY: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy rows of heads, rotating channel 2 j with channel 2 j + 1. One load reads both channels, and one load reads
    cosine and sine."""
    dim = tl.arange(0, BLOCK)[None, :]
    inside = dim < HEAD_DIM
    x = tl.load(source + dim, mask=here & inside, other=0.0).to(tl.float32)
    if ROTARY:
        pairs = tl.load(table + dim, mask=read & inside, other=0.0).to(tl.float32)
        cos, sin = tl.split(tl.reshape(pairs, (ROWS, BLOCK // 2, 2)))
        a, b = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
        a, b = _turn(a, b, cos, sin, BACKWARD)
        x = tl.reshape(tl.join(a, b), (ROWS, BLOCK))
    tl.store(target + dim, x.to(target.dtype.element_ty), mask=written & inside)


@jit
def _copy(
    product, heads, table, here, read, written,
    ROTARY: tl.constexpr, HALVES: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy between rows of the qkv layer's output and rows of heads. read: rows whose place is in the table."""
    source = heads if BACKWARD else product
    target = product if BACKWARD else heads
    if HALVES:
        _copy_halves(source, target, table, here, read, written, ROTARY, BACKWARD, HEAD_DIM, BLOCK)
    else:
        _copy_adjacent(source, target, table, here, read, written, ROTARY, BACKWARD, ROWS, HEAD_DIM, BLOCK)


@jit
def _rotary_kernel(
    product_ptr, q_ptr, k_ptr, v_ptr, rotary_ptr, position_ptr,
    num_tokens, length, query_heads, key_heads, q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    position_stride, places,
    ROTARY: tl.constexpr, HALVES: tl.constexpr, POSITION: tl.constexpr, BACKWARD: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, ALIGNED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Forward: from the qkv layer's output to heads. BACKWARD: from the gradients of heads to that of the output.

    A row of a tile is one head of one token; the heads of a token are adjacent. BLOCK: HEAD_DIM rounded up to a power
    of two. POSITION: each image has one token, at its position, which is read from the device; outside the cache, k and
    v are not written. q, k and v each have their own call of _copy: if one call used a pointer selected before, the
    compiler would not see that the rows it stores are aligned. The strides of heads are passed divided by ALIGNED and
    multiplied here, so that the compiler knows they are divisible by it.
    """
    q_image, q_head, q_row = q_image * ALIGNED, q_head * ALIGNED, q_row * ALIGNED
    k_image, k_head, k_row = k_image * ALIGNED, k_head * ALIGNED, k_row * ALIGNED
    v_image, v_head, v_row = v_image * ALIGNED, v_head * ALIGNED, v_row * ALIGNED
    heads = query_heads + 2 * key_heads
    groups = heads // HEADS
    first = (tl.program_id(0) % groups) * HEADS
    flat = tl.arange(0, TOKENS * HEADS)
    index = (tl.program_id(0) // groups) * TOKENS + flat // HEADS
    head = (first + flat % HEADS).to(tl.int64)
    token, image, row = index.to(tl.int64), (index // length).to(tl.int64), (index % length).to(tl.int64)
    here = index < num_tokens
    place = row
    read = here
    if POSITION:
        place = tl.load(position_ptr + image * position_stride, mask=here, other=0).to(tl.int64)
        read = here & (place >= 0) & (place < places)
    product = (product_ptr + (token * heads + head) * HEAD_DIM)[:, None]
    table = rotary_ptr + (place * HEAD_DIM)[:, None]
    ROWS: tl.constexpr = TOKENS * HEADS
    if first < query_heads:
        q = (q_ptr + image * q_image + head * q_head + row * q_row)[:, None]
        _copy(product, q, table, here[:, None], read[:, None], here[:, None],
              ROTARY, HALVES, BACKWARD, ROWS, HEAD_DIM, BLOCK)  # fmt: skip
    elif first < query_heads + key_heads:
        k = (k_ptr + image * k_image + (head - query_heads) * k_head + place * k_row)[:, None]
        _copy(product, k, table, here[:, None], read[:, None], read[:, None],
              ROTARY, HALVES, BACKWARD, ROWS, HEAD_DIM, BLOCK)  # fmt: skip
    else:
        v = (v_ptr + image * v_image + (head - query_heads - key_heads) * v_head + place * v_row)[:, None]
        _copy(product, v, table, here[:, None], read[:, None], read[:, None],
              False, False, BACKWARD, ROWS, HEAD_DIM, BLOCK)  # fmt: skip


def _launch(
    product: Tensor,
    heads: tuple[Tensor, Tensor, Tensor],
    rotary: Tensor | None,
    pairs: str,
    backward: bool = False,
    position: Tensor | None = None,
) -> None:
    """product: (B, L, X), contiguous; heads: q (B, H, L, D), and k and v (B, G, L or N, D), unit stride in D."""
    q, k, v = heads
    batch, num_heads, length, dim = q.shape
    if not product.numel():
        return
    together = math.gcd(num_heads, k.shape[1], _HEADS)
    block = 1 << (dim - 1).bit_length()
    kernel = "split_heads_rotary" if position is None else "split_heads_rotary_to_cache"
    numbers, num_warps = (4096, 4) if position is None else (1024, 2)
    rule = {"TOKENS": max(1, numbers // (together * block)), "num_warps": num_warps}
    chosen = setting(kernel, dim, q.device, **rule)
    total = num_heads + 2 * k.shape[1]
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    aligned = math.gcd(16, *strides)
    grid = (-(-batch * length // chosen["TOKENS"]) * (total // together),)
    with torch.cuda.device_of(q):
        _rotary_kernel[grid](
            product,
            q,
            k,
            v,
            product if rotary is None else rotary.contiguous(),
            product if position is None else position,
            batch * length,
            length,
            num_heads,
            k.shape[1],
            *(stride // aligned for stride in strides),
            0 if position is None else position.expand(batch).stride(0),
            k.shape[2],
            ROTARY=rotary is not None,
            HALVES=pairs == "halves",
            POSITION=position is not None,
            BACKWARD=backward,
            HEADS=together,
            ALIGNED=aligned,
            HEAD_DIM=dim,
            BLOCK=block,
            **chosen,
            **AS_WRITTEN,  # strict mode: a token's bits must not depend on the number of tokens
        )


def empty_heads(qkv_BLX: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = qkv_BLX.shape
    dim = width // (num_heads + 2 * num_kv_heads)
    q, k, v = (qkv_BLX.new_empty((batch, n, length, dim)) for n in (num_heads, num_kv_heads, num_kv_heads))
    return q, k, v


@torch.library.custom_op("varfast::split_heads_rotary", mutates_args=())
def split_op(
    qkv_BLX: Tensor, rotary_LP2: Tensor | None, num_heads: int, num_kv_heads: int, pairs: str
) -> tuple[Tensor, Tensor, Tensor]:
    heads = empty_heads(qkv_BLX, num_heads, num_kv_heads)
    _launch(qkv_BLX.contiguous(), heads, rotary_LP2, pairs)
    return heads


@split_op.register_fake
def _(qkv_BLX, rotary_LP2, num_heads, num_kv_heads, pairs):
    return empty_heads(qkv_BLX, num_heads, num_kv_heads)


def empty_product(d_q_BHLD: Tensor, d_k_BGLD: Tensor) -> Tensor:
    batch, heads, length, dim = d_q_BHLD.shape
    return d_q_BHLD.new_empty((batch, length, (heads + 2 * d_k_BGLD.shape[1]) * dim))


@torch.library.custom_op("varfast::split_heads_rotary_backward", mutates_args=())
def backward_op(d_q_BHLD: Tensor, d_k_BGLD: Tensor, d_v_BGLD: Tensor, rotary_LP2: Tensor | None, pairs: str) -> Tensor:
    """d qkv (B, L, X)."""
    d_q, d_k, d_v = (x if x.stride(-1) == 1 else x.contiguous() for x in (d_q_BHLD, d_k_BGLD, d_v_BGLD))
    d_qkv = empty_product(d_q, d_k)
    _launch(d_qkv, (d_q, d_k, d_v), rotary_LP2, pairs, backward=True)
    return d_qkv


@backward_op.register_fake
def _(d_q_BHLD, d_k_BGLD, d_v_BGLD, rotary_LP2, pairs):
    return empty_product(d_q_BHLD, d_k_BGLD)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, rotary_LP2, _, _, ctx.pairs = inputs  # pairs: its name, or for C++ whether it is "halves"
    ctx.save_for_backward(rotary_LP2)


def backward(op: Any, ctx: Any, *d_heads: Tensor) -> tuple[Tensor | None, ...]:
    (rotary_LP2,) = ctx.saved_tensors
    return op(*d_heads, rotary_LP2, ctx.pairs), None, None, None, None


split_op.register_autograd(functools.partial(backward, backward_op), setup_context=setup_context)


@torch.library.custom_op("varfast::split_heads_rotary_into", mutates_args=("k_cache_BGND", "v_cache_BGND"))
def split_into_op(
    qkv_BX: Tensor,
    rotary_NP2: Tensor | None,
    position: Tensor,
    k_cache_BGND: Tensor,
    v_cache_BGND: Tensor,
    num_heads: int,
    pairs: str,
) -> Tensor:
    q_BHD = empty_q(qkv_BX, k_cache_BGND, num_heads)
    heads = (q_BHD.unsqueeze(2), k_cache_BGND, v_cache_BGND)
    _launch(qkv_BX.contiguous(), heads, rotary_NP2, pairs, position=position)
    return q_BHD


def empty_q(qkv_BX: Tensor, k_cache_BGND: Tensor, num_heads: int) -> Tensor:
    return qkv_BX.new_empty((len(qkv_BX), num_heads, k_cache_BGND.shape[3]))


@split_into_op.register_fake
def _(qkv_BX, rotary_NP2, position, k_cache_BGND, v_cache_BGND, num_heads, pairs):
    return empty_q(qkv_BX, k_cache_BGND, num_heads)
