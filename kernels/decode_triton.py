"""The Triton kernels of decode_attention.py and their custom op.

The tiles of places of each (image, key head) are dealt round-robin to SPLITS programs, so that the work is balanced at
every position. A second kernel adds up their partial results in a fixed order. Neither grid depends on the position,
which stays on the device, so a captured CUDA graph can be replayed at the next position. Logits are multiplied by
log2(e), so that weights are computed by exp2.

Axes: B image, H query head, G key and value head, N place of the cache, D head dim, S split.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from varfast.kernels._triton import jit, tl
from varfast.kernels.attention_tiles import LOG2_E, readable
from varfast.kernels.settings import setting

# Query rows of a program: the fewest that the tensor cores take. A key head has only H / G query heads, and the other
# rows are padding. This waste does not matter: the 16 multiplications for each two-byte number of the cache take a
# tenth of the time of reading it.
ROWS = 16
# Target number of programs of a launch: four for each of Hopper's 132 multiprocessors. It is a constant, so that the
# sums are split in the same way on every device.
_PROGRAMS = 528
MAX_HEAD_DIM = 256


@jit
def _load_rows(pointer, row, row_stride, dim, rows, HEAD_DIM: tl.constexpr):
    inside = (row < rows)[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(pointer + row[:, None] * row_stride + dim[None, :], mask=inside, other=0.0)


@jit
def _part_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, sums_ptr, position_ptr, factor,
    q_image, q_head, k_image, k_head, k_row, v_image, v_head, v_row, position_stride, key_heads, times, places,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each program attends with up to ROWS query heads of one key head to every SPLITS-th tile of BLOCK_N places.

    With one split it writes the output, (B, H, D). With more it writes partial results in float32: the weighted sum of
    values, (B, H, S, BLOCK_D), and the largest logit and the sum of weights, (B, H, S, 2).
    """
    k_image, k_head, k_row = k_image * ALIGNED, k_head * ALIGNED, k_row * ALIGNED
    v_image, v_head, v_row = v_image * ALIGNED, v_head * ALIGNED, v_row * ALIGNED
    split = tl.program_id(0)
    image = (tl.program_id(1) // key_heads).to(tl.int64)
    key_head = tl.program_id(1) % key_heads
    member = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_D)
    head = key_head * times + member
    q = _load_rows(q_ptr + image * q_image + key_head * times * q_head, member, q_head, dim, times, HEAD_DIM)
    k_ptr += image * k_image + key_head * k_head
    v_ptr += image * v_image + key_head * v_head
    seen = tl.load(position_ptr + image * position_stride).to(tl.int32) + 1
    seen = tl.minimum(seen, places)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in tl.range(split * BLOCK_N, seen, SPLITS * BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, place, k_row, dim, seen, HEAD_DIM)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * (factor * LOG2_E)
        logit = tl.where((place < seen)[None, :], logit, -float("inf"))
        new_top = tl.maximum(top, tl.max(logit, axis=1))
        weight = tl.exp2(logit - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, axis=1)
        v = _load_rows(v_ptr, place, v_row, dim, seen, HEAD_DIM)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    here = (member < times)[:, None] & (dim < HEAD_DIM)[None, :]
    row = image * key_heads * times + head
    if SPLITS == 1:
        out = out_ptr + row[:, None] * HEAD_DIM + dim[None, :]
        tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=here)
    else:
        part = part_ptr + (row * SPLITS + split)[:, None] * BLOCK_D + dim[None, :]
        tl.store(part, acc, mask=(member < times)[:, None])
        sums = sums_ptr + (row * SPLITS + split) * 2
        tl.store(sums, top, mask=member < times)
        tl.store(sums + 1, total, mask=member < times)


@jit
def _join_kernel(
    part_ptr, sums_ptr, out_ptr,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one head of an image. A split that saw no place has the largest logit -inf and weight 0."""
    row = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    at = row * SPLITS + split
    top = tl.load(sums_ptr + 2 * at, mask=split < SPLITS, other=-float("inf"))
    share = tl.exp2(top - tl.max(top, axis=0))
    total = tl.sum(share * tl.load(sums_ptr + 2 * at + 1, mask=split < SPLITS, other=0.0), axis=0)
    acc = tl.load(part_ptr + at[:, None] * BLOCK_D + dim[None, :], mask=(split < SPLITS)[:, None], other=0.0)
    out = tl.sum(share[:, None] * acc, axis=0) / total
    tl.store(out_ptr + row * HEAD_DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@torch.library.custom_op("varfast::decode_attention", mutates_args=())
def decode_op(q_BHD: Tensor, k_cache_BGND: Tensor, v_cache_BGND: Tensor, position: Tensor, scale: float) -> Tensor:
    q, k, v = map(readable, (q_BHD, k_cache_BGND, v_cache_BGND))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    batch, key_heads, places, dim = k.shape
    if not out.numel():
        return out.to(q_BHD.dtype)
    times = q.shape[1] // key_heads
    block = max(16, _power_of_two(dim))
    bits = 8 * q_BHD.dtype.itemsize
    # Two warps have too few registers for rows of more than 64 numbers, or of a length that is not a power of two.
    rule = {"BLOCK_N": 64, "num_warps": 2 if dim == block <= 64 else 4, "num_stages": 3}
    if bits == 32:  # products without tensor cores; settings that do not spill registers
        rule = {"BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    chosen = setting("decode_attention", (bits, dim), q.device, **rule)
    programs = batch * key_heads * -(-times // ROWS)
    splits = max(1, min(_PROGRAMS // programs, -(-places // chosen["BLOCK_N"])))
    strides = (*k.stride()[:3], *v.stride()[:3])
    aligned = math.gcd(16, *strides)
    part, sums = (q.new_empty((*q.shape[:2], splits, n), dtype=torch.float32) for n in (block, 2))
    with torch.cuda.device_of(q):
        _part_kernel[(splits, batch * key_heads, -(-times // ROWS))](
            q,
            k,
            v,
            out,
            part,
            sums,
            position,
            scale,
            *q.stride()[:2],
            *(stride // aligned for stride in strides),
            position.expand(batch).stride(0),
            key_heads,
            times,
            places,
            SPLITS=splits,
            ROWS=ROWS,
            ALIGNED=aligned,
            HEAD_DIM=dim,
            BLOCK_D=block,
            **chosen,
        )
        if splits > 1:
            _join_kernel[(batch * q.shape[1],)](
                part,
                sums,
                out,
                SPLITS=splits,
                BLOCK_S=_power_of_two(splits),
                HEAD_DIM=dim,
                BLOCK_D=block,
                num_warps=1,
            )
    return out.to(q_BHD.dtype)


@decode_op.register_fake
def _(q_BHD, k_cache_BGND, v_cache_BGND, position, scale):
    return torch.empty_like(q_BHD, memory_format=torch.contiguous_format)
