"""Sample the tokens of one scale; also return the log-probability and entropy of the distribution they come from.

Axes: B image, l token of one scale, V vocabulary, N = B * l rows.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varfast.kernels import reference, sampling_segments
from varfast.kernels._triton import jit, tl
from varfast.kernels.sampling_segments import token_uniform
from varfast.kernels.selection import Implementation, cannot_run_triton, implementations, refused_dtype, run
from varfast.kernels.settings import setting

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime

# A row is held in registers, and 32 numbers per thread at 1024 threads is the limit.
_MAX_VOCAB = 32768
_FIRST_KERNEL_VOCAB = 8192
_COUNT_BITS = 52


@jit
def _sortable(x):
    """Map float32 to int64 in [0, 2^32) so that the order is kept; -0 is treated as 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)


@jit
def _kth_largest(order, top_k):
    """The largest threshold that keeps at least top_k numbers, found bit by bit from the highest bit. Equal numbers are
    kept or dropped together."""
    threshold = tl.zeros((), tl.int64)
    for bit in tl.static_range(31, -1, -1):
        candidate = threshold + (1 << bit)
        enough = tl.sum((order >= candidate).to(tl.int32), axis=0) >= top_k
        threshold = tl.where(enough, candidate, threshold)
    return threshold


@jit
def _nucleus(order, count, drop_share):
    """The largest threshold for which the counts below it sum to at most drop_share of the total. The most probable
    token always stays."""
    total = tl.sum(count, axis=0)
    may_drop = (total.to(tl.float64) * drop_share).to(tl.int64)
    threshold = tl.zeros((), tl.int64)  # keys below it are dropped
    for bit in tl.static_range(31, -1, -1):
        candidate = threshold + (1 << bit)
        fits = tl.sum(tl.where(order < candidate, count, 0), axis=0) <= may_drop
        threshold = tl.where(fits, candidate, threshold)
    return tl.minimum(threshold, tl.max(order, axis=0))


@jit
def _sample_kernel(
    logits_ptr, uncond_ptr, bias_ptr, key_ptr, first_token_ptr, tokens_ptr, logp_ptr, entropy_ptr,
    row_stride, num_tokens, vocab, scale, inv_temperature, inv_temperature_rest, guidance, top_k, drop_share,
    BLOCK: tl.constexpr, COUNT_SCALE: tl.constexpr, BIAS: tl.constexpr, GUIDED: tl.constexpr, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr, FIRST_TOKEN: tl.constexpr,
):  # fmt: skip
    """Each program samples one row. It reads the logits once and keeps everything else in registers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < vocab
    x = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=-float("inf")).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0)
        x += bias
    if GUIDED:
        uncond = tl.load(uncond_ptr + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            uncond += bias
        x = (1.0 + guidance) * x - guidance * uncond
    x = tl.where(x == -float("inf"), x, x * inv_temperature + x * inv_temperature_rest)
    # Treat NaN as +inf: the filters keep it, the maximum becomes inf, and inf - inf makes logp and entropy NaN.
    x = tl.where(x == x, x, float("inf"))
    largest = tl.max(x, axis=0)

    if TOP_K:
        order = _sortable(x)
        x = tl.where(order >= _kth_largest(order, top_k), x, -float("inf"))
    # Probabilities as integer counts: integer sums are the same in any order, so tokens do not depend on the block
    # shape. At 4096 codes the most probable token has 2^40 counts; tokens with less than 1e-12 of its probability have
    # none and are never sampled.
    count = (tl.exp(x - largest) * COUNT_SCALE).to(tl.int64)
    if TOP_P:
        order = _sortable(x)
        threshold = _nucleus(order, count, drop_share)
        x = tl.where(order >= threshold, x, -float("inf"))
        count = tl.where(order >= threshold, count, 0)

    uniform = token_uniform(key_ptr, first_token_ptr, row, num_tokens, scale, FIRST_TOKEN)
    below = tl.cumsum(count, axis=0)
    target = (uniform * tl.sum(count, axis=0).to(tl.float64)).to(tl.int64)
    token = tl.sum((below <= target).to(tl.int32), axis=0)

    shifted = x - largest
    weight = tl.exp(shifted)
    total_weight = tl.sum(weight, axis=0)
    log_total = tl.log(total_weight)
    expected = tl.sum(weight * tl.where(weight > 0.0, shifted, 0.0), axis=0) / total_weight
    # The token is out of range only if the logits do not form a distribution, because the counts are undefined then.
    token = tl.minimum(tl.maximum(token, 0), vocab - 1)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logp_ptr + row, tl.sum(tl.where(column == token, shifted, 0.0), axis=0) - log_total)
    tl.store(entropy_ptr + row, log_total - expected)


def _block(vocab: int) -> tuple[int, float]:
    """Size of the block that holds a row, and the count of the most probable token."""
    block = max(128, 1 << (vocab - 1).bit_length())
    return block, float(2 ** (_COUNT_BITS - (block.bit_length() - 1)))


def _launch_of(
    vocab: int, temperature: float, filtered: bool, device: torch.device
) -> tuple[Any, tuple[float, ...], dict[str, Any]]:
    """The kernel, 1 / temperature as its arguments, and its constants and settings (16 numbers per thread at 4096
    codes)."""
    block, count_scale = _block(vocab)
    chosen = setting("sample_tokens", vocab, device, num_warps=min(16, max(4, block // 512)))
    constants = {"BLOCK": block, "COUNT_SCALE": count_scale}
    return _sample_kernel, reference.split_float32(1.0 / temperature), constants | chosen


@torch.library.custom_op("varfast::sample_tokens", mutates_args=())
def _sample_op(
    logits_BlV: Tensor,
    key: Tensor,
    scale: int,
    temperature: float,
    uncond_logits_BlV: Tensor | None,
    guidance: float,
    top_k: int,
    top_p: float,
    bias_V: Tensor | None = None,
    first_token: Tensor | None = None,
    segments: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """segments: use the kernel of sampling_segments.py."""
    batch, length, vocab = logits_BlV.shape
    logits = logits_BlV.contiguous()
    tokens, logp, entropy = empty_outputs(logits)
    if tokens.numel():
        top_k_on, top_p_on = 0 < top_k < vocab, 0.0 < top_p < 1.0
        launch_of = sampling_segments.launch_of if segments else _launch_of
        kernel, by_temperature, constants = launch_of(vocab, temperature, top_k_on or top_p_on, logits.device)
        with torch.cuda.device_of(logits):
            kernel[(batch * length,)](
                logits,
                logits if uncond_logits_BlV is None else uncond_logits_BlV.contiguous(),
                logits if bias_V is None else bias_V.float().contiguous(),
                key,
                key if first_token is None else first_token,
                tokens,
                logp,
                entropy,
                vocab,
                length,
                vocab,
                scale,
                *by_temperature,
                guidance,
                top_k,
                1.0 - top_p,
                BIAS=bias_V is not None,
                GUIDED=uncond_logits_BlV is not None,
                TOP_K=top_k_on,
                TOP_P=top_p_on,
                FIRST_TOKEN=first_token is not None,
                **constants,
            )
    return tokens, logp, entropy


def empty_outputs(logits_BlV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised tokens, log-probabilities and entropies."""
    shape = logits_BlV.shape[:2]
    logp, entropy = (logits_BlV.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return logits_BlV.new_empty(shape, dtype=torch.int64), logp, entropy


@_sample_op.register_fake
def _(logits_BlV, *_, **__):
    return empty_outputs(logits_BlV)


def _sample_by_vocab(logits_BlV: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Uses the first kernel up to 8192 codes. It holds a row's 64-bit counts in registers and spills at 16384 codes;
    the second kernel, of sampling_segments.py, does not."""
    return _sample_op(logits_BlV, *more, segments=logits_BlV.shape[-1] > _FIRST_KERNEL_VOCAB)


def _refuses(logits_BlV: Tensor, *_: Any) -> str | None:
    if logits_BlV.shape[-1] > _MAX_VOCAB:
        return f"up to {_MAX_VOCAB} codes, got {logits_BlV.shape[-1]}"
    return refused_dtype(logits_BlV)


implementations(
    "sample_tokens",
    Implementation("triton", _sample_by_vocab, cannot_run_triton, ("cuda",), _refuses),
    Implementation("triton_segments", partial(_sample_op, segments=True), cannot_run_triton, (), _refuses),
    Implementation("reference", reference.sample_tokens),
)


def ahead_of_time() -> list[AheadOfTime]:
    """As in training, and with every filter as at inference; vocabularies of VAR and of next-token models; odd shapes.

    The first kernel is not listed at 16384 codes, because it spills registers there.
    """
    from varfast.kernels.aot import recorded

    def call(
        impl: str, dtype: torch.dtype, length: int, vocab: int, filtered: bool, biased: bool = False, by_place=False
    ) -> None:
        bias = torch.empty(vocab) if biased else None
        logits, key = torch.empty(min(2, length), length, vocab, dtype=dtype), torch.zeros(3, dtype=torch.int64)
        first = torch.zeros((), dtype=torch.int64) if by_place else None
        uncond, guidance, top_k, top_p = (logits, 1.5, 900, 0.95) if filtered else (None, 0.0, 0, 0.0)
        sample_tokens(logits, key, 9, 0.7, uncond, guidance, top_k, top_p, bias, first, impl)

    items = []
    sizes = [("triton", 4096, True), ("triton_segments", 4096, True), ("triton_segments", 16384, True)]
    for impl, vocab, with_filters in [*sizes, ("triton_segments", 32768, False)]:
        of = ("" if impl == "triton" else ", segments") + ("" if vocab == 4096 else f" V={vocab}")
        for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            for filtered in (False, True) if with_filters else (False,):
                what = f"sample_tokens {name}{' guided, filtered' if filtered else ''}{of}"
                items += recorded(what, partial(call, impl, dtype, 256, vocab, filtered))
                if dtype == torch.float32:  # as the head writes them
                    biased = partial(call, impl, dtype, 256, vocab, filtered, True)
                    also = vocab == 4096 and not filtered
                    items += recorded(f"{what}, bias", biased, also_blackwell=also)
                    by_place = partial(call, impl, dtype, 1, vocab, filtered, by_place=True)
                    items += recorded(f"{what}, by place", by_place)
        if vocab == 4096:
            for odd in (1, 4097):
                for filtered in (False, True):
                    one = partial(call, impl, torch.float32, 1, odd, filtered)
                    items += recorded(f"sample_tokens one token V={odd}{of}", one, fast=False)
    return items


def sample_tokens(
    logits_BlV: Tensor,
    key: Tensor,
    scale: int,
    temperature: float = 1.0,
    uncond_logits_BlV: Tensor | None = None,
    guidance: float = 0.0,
    top_k: int = 0,
    top_p: float = 0.0,
    bias_V: Tensor | None = None,
    first_token: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample from the categorical distribution softmax(filter(((1 + g) * logits - g * uncond) / temperature)).

    Inverts the cumulative probabilities with one uniform number per token, which depends only on (seed, step, scale,
    sample index, position). So the tokens are the same for every batch split. A token of probability 0 is never
    sampled.

    Args:
        logits_BlV: (B, l, V) any floating dtype; arithmetic in float32 (float64 for float64).
        key: (3,) int64 on the logits' device: seed, step, index of the first image among the samples of the step.
        scale: index of the scale.
        temperature: > 0.
        uncond_logits_BlV: (B, l, V) logits without the class, for classifier-free guidance, or None.
        guidance: g >= 0; only used with uncond_logits_BlV.
        top_k: keep the k most probable tokens (ties with the k-th stay); 0 keeps all.
        top_p: keep the nucleus of this probability (ties stay); 0 or 1 keeps all.
        bias_V: (V,) added to both logits in float32 as they are read, so that the head's product need not add it.
        first_token: () int64 on the logits' device: position in the scale of the first of the l tokens; None: 0. It
            serves models that sample token by token: a captured CUDA graph reads its value at each replay.
        impl: "auto", "triton", "triton_segments" (sampling_segments.py; "triton" uses it too above 8192 codes) or
            "reference". All sample the same tokens, except where the uniform number falls within float32 rounding of
            the boundary between two tokens.
    Returns:
        tokens (B, l) int64; their log-probability (B, l) and the entropy in nats (B, l), float32 (float64 for
        float64), of the distribution sampled from, that is, after guidance, temperature and filters. No gradient.
        For logits that do not form a distribution (with NaN or +inf, or all -inf) the token is some number in [0, V),
        and log-probability and entropy are NaN, so that the caller can see it without an assert on the device.
    Raises: ValueError for a temperature that is not positive, a key of another shape or type, an impl that is unknown
        or cannot run.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be > 0; for greedy choice use top_k=1")
    if key.shape != (3,) or key.dtype != torch.int64:
        raise ValueError(f"key: got {key.dtype} {tuple(key.shape)}, want int64 (3,): seed, step, first sample")
    if bias_V is not None and bias_V.shape != logits_BlV.shape[-1:]:
        raise ValueError(f"bias_V is {tuple(bias_V.shape)}, want ({logits_BlV.shape[-1]},): one a code")
    if first_token is not None and (first_token.ndim or first_token.dtype != torch.int64):
        raise ValueError(f"first_token is {first_token.dtype} {tuple(first_token.shape)}, want one int64: ()")
    with torch.no_grad():
        given = (logits_BlV, key, scale, temperature, uncond_logits_BlV, guidance, top_k, top_p, bias_V, first_token)
        return run("sample_tokens", impl, *given)
