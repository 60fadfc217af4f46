"""What training minimises: one file a loss.

Axes: B image, b image of a micro-batch, L token over all scales, S statistic; () a scalar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from varfast.types import Batch, Rewards, Rollout, TokenLogp

if TYPE_CHECKING:  # losses/config.py is read before PyTorch is imported
    from torch import Tensor

    from varfast.rewards import WeightedSum


@dataclass(frozen=True)
class Stat:
    """A number that a loss measures, and how the parts of a step become one.

    Attributes:
        name: in metrics.jsonl.
        over_images: how the values of two sets of images become that of both. A mean counts by the number of images.
        over_minibatches: "mean", or "first": of the first minibatch, which was measured before any optimizer step.
        without: its value in a step in which no image has a gradient, so that nothing is measured.
    """

    name: str
    over_images: Literal["mean", "max"] = "mean"
    over_minibatches: Literal["mean", "first"] = "mean"
    without: float = 0.0


class Loss(Protocol):
    """A function of the policy's log-probabilities, and what it needs beside them.

    A step: `batch` makes of the scored rollout what is learned from; `begin` and `keep` look at it as a whole; the loss
    itself is called with each micro-batch of it.
    """

    @property
    def unit(self) -> int:
        """Rows of a batch that stay together in a minibatch and a micro-batch: 1, or 2 for pairs."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether it compares the policy with a frozen one: `Batch.logp_ref_BL` is there then."""
        ...

    @property
    def needs_entropy(self) -> bool:
        """Whether it reads `TokenLogp.entropy_BL`."""
        ...

    @property
    def stats(self) -> Sequence[Stat]:
        """What it measures."""
        ...

    @property
    def mean_of_kept(self) -> bool:
        """Whether the mean is over the images that `keep` keeps; False: over all, of which the others count as 0."""
        ...

    def batch(self, rollout: Rollout, rewards: Rewards, reward: WeightedSum, group_size: int) -> Batch:
        """What is learned from a scored step: with GRPO all of its images and their advantages, with DPO its pairs.

        Args:
            rollout: of all processes, its groups of `group_size` images adjacent.
            rewards: of those images; finite.
            reward: what gave them: the weights of its components.
        Returns: as many rows whatever the rewards are, and `Batch.numbers`, which go into metrics.jsonl.
        """
        ...

    def begin(self, batch: Batch, step: int, total_steps: int) -> None:
        """Before anything else of a step: the whole batch, in every process; steps count from 0.

        What the loss keeps for the step must be in tensors that stay where they are: a captured update reads them.
        """
        ...

    def keep(self, batch: Batch) -> Tensor | None:
        """(B,) bool on the CPU, False for images whose gradient is exactly 0, which are left out; None keeps all."""
        ...

    def __call__(self, logp: TokenLogp, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean over the images of a (micro-)batch, a scalar, and (S,) `stats` of them, without gradient."""
        ...
