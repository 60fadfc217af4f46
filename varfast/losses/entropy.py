"""A bonus for the policy's entropy whose weight follows the entropy, so that a policy keeps its diversity.

Axes: B image, L token.
Source: arXiv:2603.23086.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from varfast.losses.config import EntropyConfig

_WARM_UP, _FLAT_UNTIL = 0.05, 0.85  # shares of a run
_TOLERANCE, _GAIN = 0.015, 3.0


def schedule(step: int, total_steps: int) -> float:
    """Factor of the weight in a step, from 0, of a run: linear warm-up over 5 %, 1 until 85 %, then cosine to 0."""
    warm_up = math.ceil(_WARM_UP * total_steps)
    if step < warm_up:
        return (step + 1) / warm_up
    left = (step / total_steps - _FLAT_UNTIL) / (1.0 - _FLAT_UNTIL)
    return 1.0 if left <= 0.0 else 0.5 * (1.0 + math.cos(math.pi * min(1.0, left)))


def adapted(coef: float, entropy_norm: Tensor, config: EntropyConfig) -> Tensor:
    """The weight for a policy of that entropy: smaller above the target, larger below, and clamped.

    Args:
        coef: after the schedule.
        entropy_norm: scalar, H / ln V. The result has its dtype and device.
    """
    missing = config.target - entropy_norm
    coef_now = torch.where(missing.abs() > _TOLERANCE, coef * torch.exp(_GAIN * missing), coef)
    return coef_now.clamp(*config.clamp)


class EntropyBonus:
    """What GRPO takes off its loss. The weight is computed once a step, from the entropies of the whole rollout.

    All processes have gathered those, so all find the same weight. It stays in one tensor on the device, which a
    captured update reads at each replay.

    Args:
        vocab_size: V.

    Attributes:
        now: (2,) float32 of this step: the weight c, and H / ln V of the rollout.
    """

    def __init__(self, config: EntropyConfig, vocab_size: int) -> None:
        self._config, self._most_entropy = config, math.log(vocab_size)
        self.now = torch.zeros(2)

    @torch.no_grad()
    def begin(self, entropy_BL: Tensor, step: int, total_steps: int) -> None:
        """Set the weight for a step. entropy_BL: of the rollout, nats."""
        if self.now.device != entropy_BL.device:
            self.now = self.now.to(entropy_BL.device)
        norm = entropy_BL.double().mean() / self._most_entropy
        coef = adapted(self._config.coef * schedule(step, total_steps), norm, self._config)
        self.now.copy_(torch.stack([coef, norm]))

    def __call__(self, entropy_BL: Tensor) -> Tensor:
        """c * mean H over tokens and images: a scalar, differentiable in the entropies."""
        return self.now[0] * entropy_BL.mean()
