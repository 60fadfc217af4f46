"""Log-probability of given tokens: the teacher-forced side of `sample_tokens`.

Axes: B image, L token over all scales, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.selection import Implementation, implementations, select

implementations("selective_log_softmax", Implementation("reference", reference.selective_log_softmax))


def selective_log_softmax(
    logits_BLV: Tensor, tokens_BL: Tensor, temperature: float = 1.0, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the given tokens, and the entropy of that distribution.

    Args:
        logits_BLV: (B, L, V) any floating dtype; arithmetic in float32 (float64 for float64).
        tokens_BL: (B, L) int64 in [0, V).
        temperature: > 0.
        impl: "auto" or "reference".
    Returns: logp (B, L), differentiable, and entropy in nats (B, L), without gradient.
    Raises: ValueError for a temperature that is not positive, shapes that differ, an unknown impl.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be > 0")
    if logits_BLV.shape[:-1] != tokens_BL.shape:
        raise ValueError(
            f"tokens are {tuple(tokens_BL.shape)}, logits {tuple(logits_BLV.shape)}: want (B, L), (B, L, V)"
        )
    return select("selective_log_softmax", impl, logits_BLV.device)(logits_BLV, tokens_BL, temperature)
