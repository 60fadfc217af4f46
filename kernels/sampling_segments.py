"""The second Triton kernel of sample_tokens, impl="triton_segments": few warps per row, and sampling in two levels.

A row is read once and held in the registers of few warps; 4096 codes fit in one warp, which needs no barriers. Each
code's weight becomes an integer. Integer sums are the same in any order, so tokens and log-probabilities do not depend
on the block shape or the batch split. Sampling has two levels: the sums of 8 segments of the row decide which segment
has the token, and only that segment is read again, from the cache, and scanned.

This kernel has run in Triton's interpreter and compiles for sm_90 and sm_100, but has not run on a GPU. Until it is
measured, impl="auto" picks it only above 8192 codes, where the first kernel spills registers. The table below is
counted, not measured: binaries for sm_90, triton 3.6, 131072 rows of 4096 float32 codes with a bias, on an H100, which
issues 528 instructions a cycle. The first kernel was measured at 1.77 ms, 40 % of the bandwidth.

    a row                     triton       triton_segments
    warps x instructions      8 x 1216     1 x 2656   issued in 1.38 ms and 0.38; the bytes take 0.71
    exponentials, 64-bit      4096 each    4608 each  16 a cycle and multiprocessor: 0.29 and 0.33 ms, during the issue
      conversions
    registers                 32768        5376       of 65536: 2 rows on a multiprocessor, and 12
    barriers                  19           0
    16384 codes               spills       4 x 2808   168 to 178 registers a thread, no spills, 18 barriers

Below about 1600 rows it may be slower: all rows then run at once, and the kernel takes as long as one warp for a row.

Axes: B image, l token of one scale, V vocabulary, N = B * l rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from varfast.kernels._triton import jit, tl
from varfast.kernels.settings import setting

_SUM_BITS = 52  # bits of the sum of a row's counts, which is then exact in float64 too
_SEGMENTS = 8  # 16 segments take as many instructions, 4 and 32 take more
_LOG2_E = math.log2(math.e)


@jit
def token_uniform(key_ptr, first_token_ptr, row, num_tokens, scale, FIRST_TOKEN: tl.constexpr):
    """The uniform number in (0, 1) for a row's token, float64 with 52 random bits, as reference.uniform_Bl."""
    image = row // num_tokens
    position = (row % num_tokens).to(tl.uint32)
    if FIRST_TOKEN:
        position += tl.load(first_token_ptr).to(tl.uint32)
    seed = tl.load(key_ptr)
    step = tl.load(key_ptr + 1).to(tl.uint32)
    sample = (tl.load(key_ptr + 2) + image).to(tl.uint32)
    word0, word1, _, _ = tl.philox(seed, position, sample, (position * 0 + scale).to(tl.uint32), step)
    bits = ((word0 >> 6).to(tl.int64) << 26) + (word1 >> 6).to(tl.int64)
    return (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16


@jit
def _scores(
    logits_ptr,
    uncond_ptr,
    bias_ptr,
    first,
    column,
    vocab,
    guidance,
    BIAS: tl.constexpr,
    GUIDED: tl.constexpr,
    READ_AGAIN: tl.constexpr = False,
):
    """Logits of the row that begins at `first`, after bias and guidance; -inf beyond the vocabulary."""
    inside = column < vocab
    other = -float("inf")
    KEEP: tl.constexpr = "evict_last" if READ_AGAIN else ""
    x = tl.load(logits_ptr + first + column, mask=inside, other=other, eviction_policy=KEEP).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0, eviction_policy=KEEP)
        x += bias
    if GUIDED:
        uncond = tl.load(uncond_ptr + first + column, mask=inside, other=0.0, eviction_policy=KEEP).to(tl.float32)
        if BIAS:
            uncond += bias
        # An explicit fma rounds in the same way at every call, so thresholds found in one pass are valid in the next.
        x = tl.fma(1.0 + guidance, x, -(guidance * uncond))
    return x


@jit
def _order(x):
    """Map float32 to int32 so that the order is kept; -0 is treated as 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _weigh(
    x,
    largest,
    inv_temperature_log2,
    least_order,
    least_weight,
    COUNT_BITS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
):
    """For each code, relative to the most probable one and after the filters: log2 of the weight, the weight, and the
    weight as an integer count.

    At 4096 codes the most probable token has 2^40 counts; tokens with less than 1e-12 of its probability have none and
    are never sampled. NaN passes the filters and stays NaN in the first two results, so that the row's sums show it.
    """
    if TOP_K:
        x = tl.where((_order(x) >= least_order) | (x != x), x, -float("inf"))
    # Subtract first, because the product of a large logit would overflow. The floor keeps the exponent finite: below
    # 2^-126 a weight is 0, and weight * exponent must be 0 too.
    exponent = tl.maximum((x - largest) * inv_temperature_log2, -200.0, propagate_nan=tl.PropagateNan.ALL)
    weight = tl.exp2(exponent)
    if TOP_P:
        weight = tl.where((weight >= least_weight) | (weight != weight), weight, 0.0)
    return exponent, weight, (weight * 2.0**COUNT_BITS).to(tl.int64)


@jit
def _least_order(x, top_k):
    """The largest value of _order(x) that keeps at least top_k numbers, found bit by bit from the highest bit. Equal
    numbers are kept or dropped together."""
    order = _order(x)
    lowest = tl.full((), -(1 << 31), tl.int64)
    for step in range(32):
        candidate = lowest + (tl.full((), 1 << 31, tl.int64) >> step)
        enough = tl.sum((order >= candidate.to(tl.int32)).to(tl.int32), axis=0) >= top_k
        lowest = tl.where(enough, candidate, lowest)
    return lowest.to(tl.int32)


@jit
def _least_weight(weight, count, drop_share, COUNT_BITS: tl.constexpr):
    """The largest threshold for which the weights below it sum to at most drop_share of the total; found bit by bit."""
    may_drop = (tl.sum(count, axis=0).to(tl.float64) * drop_share).to(tl.int64)
    lowest = tl.zeros((), tl.int32)  # the bits of floats in [0, 1], as integers, have the same order
    for step in range(30):
        candidate = lowest + (tl.full((), 1 << 29, tl.int32) >> step)
        below = tl.where(weight < candidate.to(tl.float32, bitcast=True), weight, 0.0)
        fits = tl.sum((below * 2.0**COUNT_BITS).to(tl.int64), axis=0) <= may_drop
        lowest = tl.where(fits, candidate, lowest)
    return tl.minimum(lowest.to(tl.float32, bitcast=True), 1.0)  # the most probable token stays


@jit
def _sample_kernel(
    logits_ptr, uncond_ptr, bias_ptr, key_ptr, first_token_ptr, tokens_ptr, logp_ptr, entropy_ptr,
    row_stride, num_tokens, vocab, scale, inv_temperature_log2, guidance, top_k, drop_share,
    BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, COUNT_BITS: tl.constexpr, BIAS: tl.constexpr, GUIDED: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, FIRST_TOKEN: tl.constexpr,
):  # fmt: skip
    """Each program samples one row."""
    row = tl.program_id(0)
    first = row.to(tl.int64) * row_stride
    column = tl.arange(0, BLOCK)
    # With a filter, the row is read again from the cache, because keeping it during the search would take registers.
    # The eviction hint also stops the compiler from merging the two loads into one.
    x = _scores(logits_ptr, uncond_ptr, bias_ptr, first, column, vocab, guidance, BIAS, GUIDED, TOP_K or TOP_P)
    largest = tl.max(x, axis=0)

    least_order = 0
    least_weight = 0.0
    if TOP_K:
        least_order = _least_order(x, top_k)
    if TOP_P:
        _, weight, count = _weigh(x, largest, inv_temperature_log2, least_order, 0.0, COUNT_BITS, TOP_K, False)
        least_weight = _least_weight(weight, count, drop_share, COUNT_BITS)
    if TOP_K or TOP_P:
        x = _scores(logits_ptr, uncond_ptr, bias_ptr, first, column, vocab, guidance, BIAS, GUIDED)

    exponent, weight, count = _weigh(
        x, largest, inv_temperature_log2, least_order, least_weight, COUNT_BITS, TOP_K, TOP_P
    )
    expected = tl.sum(weight * exponent, axis=0)
    in_segment = tl.sum(tl.reshape(count, (SEGMENTS, BLOCK // SEGMENTS)), axis=1)
    total = tl.sum(in_segment, axis=0)

    uniform = token_uniform(key_ptr, first_token_ptr, row, num_tokens, scale, FIRST_TOKEN)
    target = (uniform * total.to(tl.float64)).to(tl.int64)

    # Find the segment, then the token in it. The limits keep indices in range where NaN has made the counts undefined.
    ends = tl.cumsum(in_segment, axis=0)
    segment = tl.minimum(tl.sum((ends <= target).to(tl.int32), axis=0), SEGMENTS - 1)
    start = tl.max(tl.where(ends <= target, ends, 0), axis=0)
    column = segment * (BLOCK // SEGMENTS) + tl.arange(0, BLOCK // SEGMENTS)
    x = _scores(logits_ptr, uncond_ptr, bias_ptr, first, column, vocab, guidance, BIAS, GUIDED)
    exponent, _, count = _weigh(x, largest, inv_temperature_log2, least_order, least_weight, COUNT_BITS, TOP_K, TOP_P)
    below = start + tl.cumsum(count, axis=0)
    token = segment * (BLOCK // SEGMENTS) + tl.sum((below <= target).to(tl.int32), axis=0)
    token = tl.minimum(token, vocab - 1)
    log2_weight = tl.sum(tl.where(column == token, exponent, 0.0), axis=0)

    total_weight = total.to(tl.float32) * 2.0**-COUNT_BITS
    log2_total = tl.log2(total_weight)
    finite = expected == expected
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logp_ptr + row, tl.where(finite, (log2_weight - log2_total) * 0.6931471805599453, float("nan")))
    tl.store(entropy_ptr + row, (log2_total - expected / total_weight) * 0.6931471805599453)


def _block(vocab: int) -> int:
    return max(128, 1 << (vocab - 1).bit_length())


def _launch_settings(vocab: int, filtered: bool, device: torch.device | None = None) -> dict[str, int]:
    """128 numbers per thread, 64 at 32768 codes, and 32 with a filter; more would spill registers. 32768 codes with
    top_p spill in any case."""
    block = _block(vocab)
    if filtered:
        return setting("sample_tokens_segments", (vocab, "filtered"), device, num_warps=min(16, max(1, block // 1024)))
    return setting("sample_tokens_segments", vocab, device, num_warps=16 if block == 32768 else max(1, block // 4096))


def launch_of(
    vocab: int, temperature: float, filtered: bool, device: torch.device
) -> tuple[Any, tuple[float, ...], dict[str, int]]:
    """The kernel, the factor of its logits (log2(e) / temperature) as arguments, and its constants and settings."""
    block = _block(vocab)
    constants = {"BLOCK": block, "SEGMENTS": _SEGMENTS, "COUNT_BITS": _SUM_BITS - (block.bit_length() - 1)}
    return _sample_kernel, (_LOG2_E / temperature,), constants | _launch_settings(vocab, filtered, device)
