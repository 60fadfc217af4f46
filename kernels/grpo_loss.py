"""The GRPO loss of every token, reduced: clipped ratio and k3 KL.

Axes: B image, L token over all scales.
"""

from __future__ import annotations

from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.selection import Implementation, implementations, select

implementations("grpo_token_loss", Implementation("reference", reference.grpo_token_loss))

GRPO_STATS = ("kl", "clip_fraction", "ratio_mean", "ratio_gap_mean", "ratio_gap_max")


def grpo_token_loss(
    logp_BL: Tensor,
    logp_old_BL: Tensor,
    logp_ref_BL: Tensor | None,
    advantages_B: Tensor,
    clip_eps: float = 0.2,
    kl_beta: float = 0.2,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean over tokens, then over images, of -(min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta k3).

    rho = exp(logp - logp_old); k3 = exp(q) - q - 1 with q = logp_ref - logp.

    Args:
        logp_BL: (B, L) log-probabilities under the policy, differentiable; float32 (float64) arithmetic.
        logp_old_BL: (B, L) under the policy that drew the tokens.
        logp_ref_BL: (B, L) under the frozen reference, or None: no KL term.
        advantages_B: (B,) one advantage an image.
        clip_eps, kl_beta: eps and beta.
        impl: "auto" or "reference".
    Returns:
        loss: scalar, differentiable in logp_BL.
        stats: (5,) without gradient, named by GRPO_STATS: mean k3; share of tokens whose gradient the clip cuts off;
            mean ratio; mean and maximum of |ratio - 1|.
    Raises: ValueError for shapes that differ or an unknown impl.
    Source: GRPO, arXiv:2402.03300, eq. 3 and 4; k3: Schulman, "Approximating KL divergence", 2020.
    """
    for name, other in (("logp_old_BL", logp_old_BL), ("logp_ref_BL", logp_ref_BL)):
        if other is not None and other.shape != logp_BL.shape:
            raise ValueError(f"{name} is {tuple(other.shape)}, logp_BL {tuple(logp_BL.shape)}: want one shape")
    if advantages_B.shape != logp_BL.shape[:1]:
        raise ValueError(
            f"advantages_B is {tuple(advantages_B.shape)}, logp_BL {tuple(logp_BL.shape)}: want one an image"
        )
    return select("grpo_token_loss", impl, logp_BL.device)(
        logp_BL, logp_old_BL, logp_ref_BL, advantages_B, clip_eps, kl_beta
    )
