"""The GRPO loss, with clipped ratio and k3 KL for each token, reduced to its mean.

The kernels are in csrc/.

Axes: B image, L token over all scales.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.extension import NO_EXTENSION, cannot_run_cpp, cannot_run_cuda
from varfast.kernels.selection import Implementation, implementations, run

GRPO_STATS = ("kl", "clip_fraction", "ratio_mean", "ratio_gap_mean", "ratio_gap_max")


# ---------------------------------------------------------------------------------------------------------------------
# Custom op, fake and autograd. Registered by csrc/ops.cpp:
# grpo_token_loss(logp_BL, logp_old_BL, logp_ref_BL?, advantages_BL, clip_eps, kl_beta, sequence_ratio, unbiased_kl)
#     -> loss, stats, grad_BL
# grpo_token_loss_backward(grad_BL, grad_loss) -> grad_BL * grad_loss


def _fake_forward(
    logp_BL: Tensor,
    logp_old_BL: Tensor,
    logp_ref_BL: Tensor | None,
    advantages_BL: Tensor,
    clip_eps: float,
    kl_beta: float,
    sequence_ratio: bool = False,
    unbiased_kl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return logp_BL.new_empty(()), logp_BL.new_empty(5), logp_BL.new_empty(logp_BL.shape)


def _fake_backward(grad_BL: Tensor, grad_loss: Tensor) -> Tensor:
    return grad_BL.new_empty(grad_BL.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, stats, grad_BL = output
    ctx.mark_non_differentiable(stats, grad_BL)
    ctx.set_materialize_grads(False)  # do not allocate (B, L) zeros as the gradient of grad_BL
    ctx.save_for_backward(grad_BL)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    (grad_BL,) = ctx.saved_tensors
    grad_logp_BL = None if grad_loss is None else torch.ops.varfast.grpo_token_loss_backward(grad_BL, grad_loss)
    return grad_logp_BL, *(None,) * 7


def _run_extension(
    logp_BL: Tensor,
    logp_old_BL: Tensor,
    logp_ref_BL: Tensor | None,
    advantages_BL: Tensor,
    clip_eps: float,
    kl_beta: float,
    sequence_ratio: bool = False,
    unbiased_kl: bool = False,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logp_BL.dtype, torch.float32)
    loss, stats, _ = torch.ops.varfast.grpo_token_loss(
        logp_BL.to(dtype),
        logp_old_BL.to(dtype),
        None if logp_ref_BL is None else logp_ref_BL.to(dtype),
        advantages_BL.to(dtype),
        clip_eps,
        kl_beta,
        sequence_ratio,
        unbiased_kl,
    )
    return loss, stats


if NO_EXTENSION is None:
    torch.library.register_fake("varfast::grpo_token_loss", _fake_forward)
    torch.library.register_fake("varfast::grpo_token_loss_backward", _fake_backward)
    torch.library.register_autograd("varfast::grpo_token_loss", _backward, setup_context=_setup_context)

implementations(
    "grpo_token_loss",
    Implementation("cuda", _run_extension, cannot_run_cuda, auto_on=("cuda",)),
    Implementation("cpp", _run_extension, cannot_run_cpp, auto_on=("cpu",)),
    Implementation("reference", reference.grpo_token_loss),
)


def grpo_token_loss(
    logp_BL: Tensor,
    logp_old_BL: Tensor,
    logp_ref_BL: Tensor | None,
    advantages_BL: Tensor,
    clip_eps: float = 0.2,
    kl_beta: float = 0.2,
    ratio: Literal["token", "sequence"] = "token",
    kl_gradient: Literal["k3", "unbiased"] = "k3",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean over tokens, then over images, of -(min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta KL).

    rho = exp(logp - logp_old), of each token; KL = k3 = exp(q) - q - 1 with q = logp_ref - logp.

    Args:
        logp_BL: (B, L) log-probabilities under the policy. Differentiable once. Arithmetic in float32 (float64 for
            float64).
        logp_old_BL: (B, L) under the policy that sampled the tokens; no gradient.
        logp_ref_BL: (B, L) under the frozen reference, or None: no KL term; no gradient.
        advantages_BL: (B, L) of any strides, or (B,) with one advantage for each image; no gradient.
        clip_eps, kl_beta: eps and beta.
        ratio: with "sequence", an image has a single ratio rho = exp(mean over its tokens of logp - logp_old), and the
            clip applies to that. With one advantage for each image this is GSPO (arXiv:2507.18071, eq. 5 and 7); with
            an advantage for each token it is GSPO-token (eq. 13 and 14).
        kl_gradient: with "unbiased", each token's KL = exp(logp - logp_old) k3. Its expectation is that of k3 under the
            policy, so its gradient is that of the KL: for a token, exp(logp - logp_old) (logp - logp_ref)
            (arXiv:2510.01555; arXiv:2506.09477). The gradient of k3 itself, 1 - exp(q), is a different one.
        impl: "auto", "cuda", "cpp" or "reference".
    Returns:
        loss: scalar, differentiable in logp_BL. "cuda" and "cpp" pass the gradient where the ratio equals a bound of
            the clip, and give gradient 0 where the clip cuts off a ratio that overflows (csrc/grpo_math.h).
            "reference" follows the installed torch's clamp at the bounds, and gives NaN for such an overflow.
        stats: (5,) without gradient, named by GRPO_STATS: mean k3; fraction of tokens whose gradient the clip cuts off;
            mean rho; mean and maximum over the tokens of |exp(logp - logp_old) - 1|, with either `ratio`.
    Raises: ValueError for shapes that differ, no token at all, an unknown ratio or kl_gradient, or an impl that is
        unknown or cannot run here.
    Source: GRPO, arXiv:2402.03300, eq. 3 and 4; k3: Schulman, "Approximating KL divergence", 2020.
    """
    if logp_BL.ndim != 2 or logp_BL.numel() == 0:
        raise ValueError(f"logp_BL is {tuple(logp_BL.shape)}: want (B, L) with at least one token to average over")
    for name, other in (("logp_old_BL", logp_old_BL), ("logp_ref_BL", logp_ref_BL)):
        if other is not None and other.shape != logp_BL.shape:
            raise ValueError(f"{name} is {tuple(other.shape)}, logp_BL {tuple(logp_BL.shape)}: want one shape")
    if advantages_BL.shape not in (logp_BL.shape, logp_BL.shape[:1]):
        raise ValueError(
            f"advantages_BL is {tuple(advantages_BL.shape)}, logp_BL {tuple(logp_BL.shape)}: want one a token, (B, L), "
            "or one an image, (B,)"
        )
    if ratio not in ("token", "sequence"):
        raise ValueError(f"ratio={ratio!r}: want token or sequence")
    if kl_gradient not in ("k3", "unbiased"):
        raise ValueError(f"kl_gradient={kl_gradient!r}: want k3 or unbiased")
    if advantages_BL.ndim == 1:  # convert, then expand: the other order would write (B, L) numbers
        wide = advantages_BL.to(torch.promote_types(logp_BL.dtype, torch.float32))
        advantages_BL = wide.unsqueeze(1).expand(logp_BL.shape)
    tensors = (logp_BL, logp_old_BL, logp_ref_BL, advantages_BL)
    how = (ratio == "sequence", kl_gradient == "unbiased")
    return run("grpo_token_loss", impl, *tensors, clip_eps, kl_beta, *how)
