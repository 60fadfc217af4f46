"""Direct preference optimisation: of two images of a prompt the better one becomes more likely, against a reference.

Axes: B image, B = 2 N of N pairs: row 2 i the preferred image, row 2 i + 1 the rejected one; L token.
Source: arXiv:2305.18290; for image tokens arXiv:2505.17017.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from varfast import kernels
from varfast.advantages import groups_without_signal
from varfast.losses import Stat
from varfast.losses.config import DPOConfig
from varfast.losses.pairs import pair_numbers, pairs_of, preferences
from varfast.rewards import WeightedSum
from varfast.types import Batch, Rewards, Rollout, TokenLogp

# In the order of kernels.DPO_STATS. The kernel's rewards are those that policy and reference imply, beta (logp - ref):
# reward_chosen and reward_rejected of metrics.jsonl are what the run's reward has given. NaN: a step without a pair.
_STATS = tuple(
    Stat(name.replace("reward_", "implicit_"), without=float("nan")) for name in kernels.DPO_STATS
)  # fmt: skip
# As of GRPO: what separates the rollout's log-probabilities from the update's, before any optimizer step.
_OF_ROLLOUT = (
    Stat("ratio_gap_mean", over_minibatches="first"),
    Stat("ratio_gap_max", over_images="max", over_minibatches="first"),
)


class DPO:
    """-log sigma(beta [(logp_w - ref_w) - (logp_l - ref_l)]), mean over the pairs that are used: `kernels.dpo_loss`.

    While policy and reference are the same, it is ln 2 exactly.

    Statistics: implicit_chosen, implicit_rejected and implicit_margin, the rewards beta (logp - ref) that policy and
    reference imply, in nats; pair_accuracy, the share of pairs of which they prefer the right image; logp_chosen and
    logp_rejected, nats an image; ratio_gap_mean and ratio_gap_max, the health sign that GRPO has too.
    """

    unit, mean_of_kept = 2, True
    needs_reference, needs_entropy = True, False

    def __init__(self, config: DPOConfig) -> None:
        self._config = config
        # Saved pairs have no log-probabilities of the model that sampled them.
        self.stats = _STATS if config.pairs else _STATS + _OF_ROLLOUT

    def batch(self, rollout: Rollout, rewards: Rewards, reward: WeightedSum, group_size: int) -> Batch:
        """The best and the worst images of each prompt, by the total reward."""
        pairs = pairs_of(rewards, group_size, self._config)
        numbers = pair_numbers(rewards.total_B[pairs.rows_N2], pairs.used_N)
        numbers["groups_without_signal"] = groups_without_signal(rewards.total_B, group_size)
        return replace(preferences(rollout.rows(pairs.rows_N2.flatten()), pairs.used_N), numbers=numbers)

    def begin(self, batch: Batch, step: int, total_steps: int) -> None:
        pass

    def keep(self, batch: Batch) -> Tensor | None:
        return (batch.advantages_BL[:, 0] != 0).cpu()

    def __call__(self, logp: TokenLogp, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.logp_ref_BL is not None
        loss, stats = kernels.dpo_loss(
            logp.logp_BL,
            batch.logp_ref_BL,
            beta=self._config.beta,
            label_smoothing=self._config.label_smoothing,
            loss_type=self._config.loss_type,
        )
        if self._config.pairs:
            return loss, stats
        sampler_BL = batch.logp_ref_BL if self._config.samples == "reference" else logp.logp_BL.detach()
        gap_BL = (sampler_BL - batch.rollout.logp_BL).expm1().abs()
        return loss, torch.cat([stats, torch.stack([gap_BL.mean(), gap_BL.max()]).to(stats.dtype)])
