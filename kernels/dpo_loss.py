"""The loss of direct preference optimisation (DPO) of pairs of images, from the log-probabilities of their tokens.

The kernels are in csrc/. All tokens of an image have the same gradient. So the forward pass returns one number for each
image, and the backward pass writes no (B, L) array.

Axes: B image, L token, P = B / 2 pair.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.extension import NO_EXTENSION, cannot_run_cpp, cannot_run_cuda
from varfast.kernels.selection import Implementation, implementations, run

DPO_STATS = ("reward_chosen", "reward_rejected", "reward_margin", "pair_accuracy", "logp_chosen", "logp_rejected")
LOSS_TYPES = ("sigmoid", "hinge", "ipo")


# Registered by csrc/ops.cpp: dpo_loss(logp_BL, logp_ref_BL, beta, label_smoothing, loss_type) -> loss, stats, slope_B.


def _fake(
    logp_BL: Tensor, logp_ref_BL: Tensor, beta: float, label_smoothing: float, loss_type: int
) -> tuple[Tensor, Tensor, Tensor]:
    return logp_BL.new_empty(()), logp_BL.new_empty(len(DPO_STATS)), logp_BL.new_empty(len(logp_BL))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, stats, slope_B = output
    ctx.shape = inputs[0].shape
    ctx.mark_non_differentiable(stats, slope_B)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(slope_B)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    (slope_B,) = ctx.saved_tensors
    grad_BL = None if grad_loss is None else (slope_B * grad_loss).unsqueeze(1).expand(ctx.shape)
    return grad_BL, None, None, None, None


def _run_extension(
    logp_BL: Tensor, logp_ref_BL: Tensor, beta: float, label_smoothing: float, loss_type: str
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logp_BL.dtype, torch.float32)
    tensors = (logp_BL.to(dtype), logp_ref_BL.to(dtype))
    loss, stats, _ = torch.ops.varfast.dpo_loss(*tensors, beta, label_smoothing, LOSS_TYPES.index(loss_type))
    return loss, stats


if NO_EXTENSION is None:
    torch.library.register_fake("varfast::dpo_loss", _fake)
    torch.library.register_autograd("varfast::dpo_loss", _backward, setup_context=_setup_context)

implementations(
    "dpo_loss",
    Implementation("cuda", _run_extension, cannot_run_cuda, auto_on=("cuda",)),
    Implementation("cpp", _run_extension, cannot_run_cpp, auto_on=("cpu",)),
    Implementation("reference", reference.dpo_loss),
)


def dpo_loss(
    logp_BL: Tensor,
    logp_ref_BL: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean over pairs of -log sigma(z), z = beta ((logp_w - ref_w) - (logp_l - ref_l)), logp summed over the tokens.

    Row 2 i is the chosen (w) image of pair i, row 2 i + 1 the rejected one (l).

    Args:
        logp_BL: (B, L) log-probabilities under the policy, of any strides. Differentiable once. Sums over tokens and
            everything after them are in float64.
        logp_ref_BL: (B, L) under the frozen reference; no gradient.
        beta: above 0. An image's implicit reward is beta (logp - ref).
        label_smoothing: eps in [0, 0.5), the assumed share of pairs in the wrong order. "sigmoid" only: the loss of a
            pair is -(1 - eps) log sigma(z) - eps log sigma(-z) (cDPO).
        loss_type: "sigmoid"; "hinge": max(0, 1 - z); "ipo": (h - 1 / (2 beta))^2 with h = z / beta, and logp and ref
            averaged over the tokens, not summed, here and in the statistics, as in TRL.
        impl: "auto", "cuda", "cpp" or "reference".
    Returns:
        loss: scalar, differentiable in logp_BL, float32 (float64 for float64). All tokens of an image have the same
            gradient.
        stats: (6,) without gradient, means over the pairs, named by DPO_STATS: implicit rewards of the chosen and the
            rejected image, their difference, the fraction of pairs where it is above 0 (not for a tie or NaN), and
            log-probabilities of the chosen and the rejected image. TRL calls them rewards/chosen, rewards/rejected,
            rewards/margins, rewards/accuracies, logps/chosen and logps/rejected.
    Raises: ValueError for shapes that differ, an odd number of rows or none, settings outside their range, or an impl
        that is unknown or cannot run here.
    Source: DPO, arXiv:2305.18290, eq. 7; cDPO: Mitchell, "A note on DPO with noisy preferences", 2023; hinge: SLiC,
        arXiv:2305.10425; IPO: arXiv:2310.12036, eq. 17.
    """
    if logp_BL.ndim != 2 or logp_BL.numel() == 0 or logp_BL.shape[0] % 2:
        raise ValueError(
            f"logp_BL is {tuple(logp_BL.shape)}: want (B, L), B even: row 2 i chosen, row 2 i + 1 rejected; at least "
            "one pair of one token"
        )
    if logp_ref_BL.shape != logp_BL.shape:
        raise ValueError(f"logp_ref_BL is {tuple(logp_ref_BL.shape)}, logp_BL {tuple(logp_BL.shape)}: want one shape")
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r}: want one of {', '.join(LOSS_TYPES)}")
    if not 0.0 < beta < math.inf:
        raise ValueError(f"beta={beta}: want a number above 0")
    if not 0.0 <= label_smoothing < 0.5 or (label_smoothing and loss_type != "sigmoid"):
        raise ValueError(
            f"label_smoothing={label_smoothing} with loss_type={loss_type!r}: want 0 to below 0.5, and 0 unless the "
            "loss_type is sigmoid"
        )
    loss, stats = run("dpo_loss", impl, logp_BL, logp_ref_BL.detach(), beta, label_smoothing, loss_type)
    return loss, stats
