"""Group-relative policy optimisation: the clipped ratio of new to old probability, and the KL to a frozen reference.

Axes: B image, L token over all scales.
Source: arXiv:2402.03300; for VAR arXiv:2505.23331.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varfast import kernels
from varfast.kernels.reference import k3
from varfast.losses import Stat
from varfast.losses.config import GRPOConfig
from varfast.perf.stages import stage
from varfast.policies.protocol import Policy
from varfast.types import Batch, Rollout, TokenLogp

# In the order of kernels.GRPO_STATS.
_STATS = (
    Stat("kl"),
    Stat("clip_fraction"),
    Stat("ratio_mean", without=1.0),
    # What separates the rollout's log-probabilities from the update's, before any optimizer step: the health sign of
    # the whole system.
    Stat("ratio_gap_mean", over_minibatches="first"),
    Stat("ratio_gap_max", over_images="max", over_minibatches="first"),
)
assert tuple(stat.name for stat in _STATS) == kernels.GRPO_STATS


class GRPO:
    """Loss of arXiv:2402.03300, eq. 3 and 4, with one ratio a token: `kernels.grpo_token_loss`.

    The rollout's log-probabilities stand for the old policy's. Without a KL term (kl_beta = 0) there is no reference,
    and an image whose advantages are all 0 has no gradient.
    """

    unit = 1
    needs_entropy = False

    def __init__(self, config: GRPOConfig) -> None:
        self._clip_eps, self._kl_beta = config.clip_eps, config.kl_beta
        self.needs_reference = config.kl_beta > 0.0
        self.stats = _STATS if self.needs_reference else _STATS[1:]  # without a reference the KL is not measured

    def keep(self, batch: Batch) -> Tensor | None:
        return None if self.needs_reference else (batch.advantages_BL != 0).any(dim=1).cpu()

    def __call__(self, logp: TokenLogp, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, stats = kernels.grpo_token_loss(
            logp.logp_BL,
            batch.rollout.logp_BL,
            batch.logp_ref_BL,
            batch.advantages_BL,
            clip_eps=self._clip_eps,
            kl_beta=self._kl_beta,
        )
        return loss, stats[-len(self.stats) :]


@torch.no_grad()
def kl_to_reference(reference: Policy, rollout: Rollout, micro_batch: int | None = None) -> Tensor:
    """KL(policy || reference) of each image of a rollout, for a run whose loss has no KL term: k3, nats a token.

    One forward pass of the reference. The policy's log-probabilities are the rollout's, so equal weights give the
    difference between sampling and teacher forcing: 1e-10 in float32, about 1e-4 in bfloat16.

    Args:
        reference: a frozen copy of the base.
        micro_batch: images at a time; default all.
    Returns: (B,) float32.
    """
    parts = []
    with stage("reference"):
        for rows in torch.arange(len(rollout.prompts)).split(micro_batch or len(rollout.prompts)):
            part = rollout.rows(slice(int(rows[0]), int(rows[-1]) + 1))
            parts.append(k3(part.logp_BL, reference.teacher_forced(part).logp_BL).mean(dim=1))
    return torch.cat(parts)
