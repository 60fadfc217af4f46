"""What one process does of a step: all of it, or its share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from varfast.config import Config
from varfast.perf.cost import Cost, Network
from varfast.rewards.cost import reward_networks


@dataclass(frozen=True)
class Work:
    """The part of each step that one process does, and what an image of it costs.

    Attributes:
        config: of the run.
        cost: of the policy.
        images: how many it samples and scores a step.
        learned: how many of a step's it learns from, once an epoch.
        minibatch: how many it trains on an optimizer step.
        reads_reference: whether the reference runs on every image, as the loss reads its log-probabilities.
        shards: how many processes weights, gradients, moments and average are spread over; 1: each holds them all.
    """

    config: Config
    cost: Cost
    images: int
    learned: int
    minibatch: int
    reads_reference: bool
    shards: int = 1

    @classmethod
    def whole(cls, config: Config, cost: Cost, reads_reference: bool | None = None) -> Work:
        """A step on one process. reads_reference: as the loss needs it; None: as the config's does."""
        if reads_reference is None:
            reads_reference = config.loss.reads_reference
        return cls(config, cost, config.rollout.images, config.learned_images, config.update.minibatch, reads_reference)

    def share(self, images: int, processes: int) -> Work:
        """Of one of several processes.

        Args:
            images: its part of the step's images.
            processes: how many share a step. Of a minibatch, what counts is the share of the process with the most.
        """
        sharded = self.config.run.parallel == "fsdp"
        unit = self.unit
        learned, minibatch = (-(-rows // unit // processes) * unit for rows in (self.learned, self.minibatch))
        learned = images if unit == 1 else learned  # pairs are dealt out whole, whoever has sampled them
        return replace(self, images=images, learned=learned, minibatch=minibatch, shards=processes if sharded else 1)

    @property
    def optimizer_steps(self) -> int:
        return self.config.update.epochs * self.learned // self.minibatch

    @property
    def unit(self) -> int:
        """Images that stay together in a micro-batch."""
        return self.config.loss.unit

    @property
    def rows(self) -> int:
        """Of the policy's model an image: 2 with guidance, in rollout, reference and update."""
        return self.config.rollout.rows

    @property
    def networks(self) -> list[Network]:
        """Of the rewards."""
        return reward_networks(self.config.reward)

    @property
    def holds_reference(self) -> bool:
        """Whether a frozen copy of the base is held: for the loss, or to measure the KL."""
        return self.reads_reference or self.config.holds_reference
