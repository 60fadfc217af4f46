"""Draw the tokens of one scale, with the log-probability and the entropy of the distribution they were drawn from.

Axes: B image, l token of one scale, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.selection import Implementation, implementations, select

implementations("sample_tokens", Implementation("reference", reference.sample_tokens))


def sample_tokens(
    logits_BlV: Tensor,
    key: Tensor,
    scale: int,
    temperature: float = 1.0,
    uncond_logits_BlV: Tensor | None = None,
    guidance: float = 0.0,
    top_k: int = 0,
    top_p: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Multinomial draw from softmax(filter(((1 + g) * logits - g * uncond) / temperature)).

    By inversion of the cumulated probabilities with one uniform number a token, a function of (seed, step, scale,
    sample index, position) alone: the same tokens whatever the batch split. A token of probability 0 is never drawn.

    Args:
        logits_BlV: (B, l, V) any floating dtype; arithmetic in float32 (float64 for float64).
        key: (3,) int64 on the logits' device: seed, step, index of the first image among the samples of the step.
        scale: index of the scale.
        temperature: > 0.
        uncond_logits_BlV: (B, l, V) logits without the class, for classifier-free guidance, or None.
        guidance: g >= 0; only used with uncond_logits_BlV.
        top_k: keep the k most probable tokens (ties with the k-th stay); 0 keeps all.
        top_p: keep the nucleus of this probability; 0 or 1 keeps all.
        impl: "auto" or "reference".
    Returns:
        tokens (B, l) int64; their log-probability (B, l) and the entropy in nats (B, l), float32 (float64 for
        float64), of the distribution drawn from, that is after guidance, temperature and filters. No gradient.
    Raises: ValueError for a temperature that is not positive, a key of another shape or type, an unknown impl.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be > 0; for greedy choice use top_k=1")
    if key.shape != (3,) or key.dtype != torch.int64:
        raise ValueError(f"key: got {key.dtype} {tuple(key.shape)}, want int64 (3,): seed, step, first sample")
    with torch.no_grad():
        return select("sample_tokens", impl, logits_BlV.device)(
            logits_BlV, key, scale, temperature, uncond_logits_BlV, guidance, top_k, top_p
        )
