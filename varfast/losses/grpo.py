"""Group-relative policy optimisation: the clipped ratio of new to old probability, and the KL to a frozen reference.

Axes: B image, L token over all scales.
Source: arXiv:2402.03300; for VAR arXiv:2505.23331.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from varfast import kernels
from varfast.advantages import groups_without_signal, step_advantages
from varfast.kernels.reference import k3
from varfast.losses import Stat
from varfast.losses.config import GRPOConfig
from varfast.losses.entropy import EntropyBonus
from varfast.perf.stages import stage
from varfast.policies.protocol import Policy
from varfast.rewards import WeightedSum
from varfast.types import Batch, Rewards, Rollout, TokenLogp

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
# In the order of EntropyBonus.now. One number for a whole step.
_OF_ENTROPY = (
    Stat("entropy_coef", over_images="max", over_minibatches="first"),
    Stat("entropy_norm", over_images="max", over_minibatches="first"),
)


class GRPO:
    """Loss of arXiv:2402.03300, eq. 3 and 4: `kernels.grpo_token_loss`, and a bonus for entropy where one is asked for.

    The rollout's log-probabilities stand for the old policy's. Without a KL term (kl_beta = 0) there is no reference.
    Without that and without a bonus, an image whose advantages are all 0 has no gradient.

    Args:
        vocab_size: V, of the bonus.
        scale_sides: of an image's token maps, for scale_alpha; empty: the family has no scales.
    """

    unit, mean_of_kept = 1, False

    def __init__(self, config: GRPOConfig, vocab_size: int | None = None, scale_sides: Sequence[int] = ()) -> None:
        self._config = config
        self._weights_L = scale_weights(scale_sides, config.scale_alpha) if config.scale_alpha and scale_sides else None
        self._bonus: EntropyBonus | None = None
        if config.entropy is not None:
            assert vocab_size is not None
            self._bonus = EntropyBonus(config.entropy, vocab_size)
        self.needs_reference, self.needs_entropy = config.kl_beta > 0.0, self._bonus is not None
        self._of_kernel = _STATS if self.needs_reference else _STATS[1:]  # without a reference the KL is not measured
        self.stats = self._of_kernel if self._bonus is None else self._of_kernel + _OF_ENTROPY

    def batch(self, rollout: Rollout, rewards: Rewards, reward: WeightedSum, group_size: int) -> Batch:
        """All images, and how much better each was than the others of its prompt."""
        advantages_B = step_advantages(rewards, reward, group_size, self._config)
        if self._weights_L is not None:
            self._weights_L = self._weights_L.to(advantages_B.device)
        numbers = {
            "advantage_mean": advantages_B.mean(),
            "advantage_std": advantages_B.std(correction=0),
            "groups_without_signal": groups_without_signal(advantages_B, group_size),
        }
        return replace(Batch.of(rollout, advantages_B, self._weights_L), numbers=numbers)

    def begin(self, batch: Batch, step: int, total_steps: int) -> None:
        if self._bonus is not None:
            self._bonus.begin(batch.rollout.entropy_BL, step, total_steps)

    def keep(self, batch: Batch) -> Tensor | None:
        if self.needs_reference or self.needs_entropy:
            return None
        return (batch.advantages_BL != 0).any(dim=1).cpu()

    def __call__(self, logp: TokenLogp, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, stats = kernels.grpo_token_loss(
            logp.logp_BL,
            batch.rollout.logp_BL,
            batch.logp_ref_BL,
            batch.advantages_BL,
            clip_eps=self._config.clip_eps,
            kl_beta=self._config.kl_beta,
            ratio=self._config.ratio,
            kl_gradient=self._config.kl_gradient,
        )
        stats = stats[-len(self._of_kernel) :]
        if self._bonus is None:
            return loss, stats
        assert logp.entropy_BL is not None
        return loss - self._bonus(logp.entropy_BL), torch.cat([stats, self._bonus.now])


def scale_weights(sides: Sequence[int], alpha: float) -> Tensor:
    """(L,) float32: how much an advantage counts for each token of an image, by its scale: mean 1.

    Of a scale of side^2 tokens each has 1 / (side^2)^alpha, so that all of them together count the less than those of a
    small scale the larger alpha is; 1: all scales alike; 0: all tokens alike.

    Args:
        sides: of an image's square token maps, in the order in which they are sampled.
    Source: arXiv:2601.02256.
    """
    counts_K = torch.tensor([side * side for side in sides])
    weights_L = counts_K.double().pow(-alpha).repeat_interleave(counts_K)
    return (weights_L / weights_L.mean()).float()


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
