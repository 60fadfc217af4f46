"""Causal attention over a whole sequence: the teacher-forced pass of a next-token model.

Axes: B image, L token, H query head, G key and value head, D head dim.
"""

from __future__ import annotations

from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.selection import Implementation, implementations, run

implementations("causal_attention", Implementation("reference", reference.causal_attention))


def causal_attention(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, scale: float, impl: str = "auto") -> Tensor:
    """softmax(scale * q k^T) v where a token sees itself and all tokens before it.

    Args:
        q_BHLD: (B, H, L, D). Differentiable, as k and v are.
        k_BGLD, v_BGLD: (B, G, L, D), of the dtype of q; each key head serves H / G adjacent query heads.
        scale: factor of the logits, 1 / sqrt(D) usually.
        impl: "auto" or "reference".
    Returns: (B, L, H, D): a token's heads beside each other, as the output projection reads them.
    Raises: ValueError for other shapes or dtypes, or for an impl that is unknown or cannot run.
    """
    q, k, v = q_BHLD, k_BGLD, v_BGLD
    fits = q.ndim == 4 == k.ndim and k.shape == v.shape and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
    if not fits or q.shape[1] % max(1, k.shape[1]):
        raise ValueError(
            f"q, k, v: got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, want (B, H, L, D) and twice "
            "(B, G, L, D), H a multiple of G"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: got {q.dtype}, {k.dtype}, {v.dtype}, want one dtype")
    out: Tensor = run("causal_attention", impl, q, k, v, scale)
    return out
