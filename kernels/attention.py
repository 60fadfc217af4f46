"""Attention under VAR's scale mask: a token sees all tokens of its own scale and of every earlier one.

Axes: B image, H head, L token over all scales, l token of one scale, D head dim.
"""

from __future__ import annotations

from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.selection import Implementation, implementations, select

implementations("block_causal_attention", Implementation("reference", reference.block_causal_attention))
implementations("cached_attention", Implementation("reference", reference.cached_attention))


def block_causal_attention(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    scale_ends: tuple[int, ...],
    logit_scale_H: Tensor,
    impl: str = "auto",
) -> Tensor:
    """softmax(logit_scale * q k^T + mask) v over all scales at once; the mask is given by where the scales end.

    With scale_ends (1, 3, 6), that is scales of 1, 2 and 3 tokens, query i (row) sees key j (column) where 1::

        1 0 0 0 0 0
        1 1 1 0 0 0
        1 1 1 0 0 0
        1 1 1 1 1 1
        1 1 1 1 1 1
        1 1 1 1 1 1

    Args:
        q_BHLD, k_BHLD, v_BHLD: (B, H, L, D), one dtype, any strides. L2-normalised by the caller where the model
            does so: no further 1/sqrt(D) is applied.
        scale_ends: cumulated number of tokens after each scale; the last is L.
        logit_scale_H: (H,) factor of each head's logits, differentiable.
        impl: "auto" or "reference".
    Returns: (B, H, L, D).
    Raises: ValueError if scale_ends does not end at L, or for an unknown impl.
    """
    if scale_ends[-1] != q_BHLD.shape[2]:
        raise ValueError(f"scale_ends={scale_ends} ends at {scale_ends[-1]}, but q has {q_BHLD.shape[2]} tokens")
    return select("block_causal_attention", impl, q_BHLD.device)(q_BHLD, k_BHLD, v_BHLD, scale_ends, logit_scale_H)


def cached_attention(
    q_BHlD: Tensor,
    k_cache_BHLD: Tensor,
    v_cache_BHLD: Tensor,
    num_keys: int,
    logit_scale_H: Tensor,
    impl: str = "auto",
) -> Tensor:
    """softmax(logit_scale * q k^T) v for the tokens of the current scale against a static key-value cache.

    Args:
        q_BHlD: (B, H, l, D) queries of one scale. They see every valid key, so there is no mask.
        k_cache_BHLD, v_cache_BHLD: (B, H, L, D) buffers whose first `num_keys` rows are valid, the current scale's
            own keys and values among them.
        num_keys: number of valid rows, <= L.
        logit_scale_H: (H,) factor of each head's logits.
        impl: "auto" or "reference".
    Returns: (B, H, l, D).
    Raises: ValueError if num_keys is larger than the cache, or for an unknown impl.
    """
    if num_keys > k_cache_BHLD.shape[2]:
        raise ValueError(f"num_keys={num_keys}, but the cache holds {k_cache_BHLD.shape[2]} tokens")
    return select("cached_attention", impl, q_BHlD.device)(q_BHlD, k_cache_BHLD, v_cache_BHLD, num_keys, logit_scale_H)
