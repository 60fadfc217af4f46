"""What a reward's config builds its reward from, and what the built reward is called with. No PyTorch.

Axes: B image, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

from pydantic import Field

from varfast.types import RewardBatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from varfast.rewards.backbone import Backbone, BackboneSpec

Weight = Annotated[float, Field(ge=-1e6, le=1e6)]


@dataclass(frozen=True)
class Building:
    """Where a reward is built.

    Attributes:
        key: of the reward in the config, as reward.mine; for errors.
        device: of the images.
        num_classes: number of labels, to check texts and classifiers against; None: not checked.
        seed: of the run.
        beside: folder of the config file, where a user's reward is looked for too.
        backbones: the CLIP models that were loaded: each one once, however many rewards name it.
    """

    key: str
    device: torch.device
    num_classes: int | None = None
    seed: int = 0
    beside: Path | None = None
    backbones: dict[BackboneSpec, Backbone] = field(default_factory=dict)

    def backbone(self, spec: BackboneSpec, batch_size: int) -> Backbone:
        """A CLIP model, which works in the smallest of the batch sizes that it is asked for with."""
        from varfast.rewards.backbone import Backbone

        if spec not in self.backbones:
            self.backbones[spec] = Backbone(spec, self.device, batch_size, self.key)
        backbone = self.backbones[spec]
        backbone.batch_size = min(backbone.batch_size, batch_size)
        return backbone


@dataclass(frozen=True)
class Scored:
    """Images that are to be scored.

    Attributes:
        images: (B, 3, H, W) float32 in [0, 1].
        batch: what else a reward may ask for.
        first_sample: number of the first image among those of the step.
    """

    images: Tensor
    batch: RewardBatch
    first_sample: int = 0
    _embeddings: dict[Backbone, Tensor] = field(default_factory=dict, init=False)

    def embeddings(self, backbone: Backbone) -> Tensor:
        """(B, D) of norm 1, computed once for all rewards on this backbone."""
        if backbone not in self._embeddings:
            self._embeddings[backbone] = backbone.embed_images(self.images)
        return self._embeddings[backbone]


# What `build` returns: from images to (B,) numbers, which are checked by whoever calls it (scores.py); or a StepReward.
Score = Callable[[Scored], Any]


@runtime_checkable
class StepReward(Protocol):
    """A reward of each image among all images of a step, such as a distance between distributions.

    Each process measures its own images; what was measured is gathered, and every process scores the whole step.
    """

    def measure(self, scored: Scored) -> Tensor:
        """(b, ...) of finite numbers about this process's images."""
        ...

    def score(self, measured: Tensor, labels_B: Tensor, learn: bool) -> Tensor:
        """(B,) from what all processes measured.

        learn: the step counts for the reward's state, if it has one. Equal on all processes, and so is the state then.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name; a run that goes on loads it in place. {} without a state."""
        ...


def on_images(reward: Callable[[Tensor, Tensor], Any]) -> Score:
    """A reward of images (B, 3, H, W) and labels (B,)."""
    return lambda scored: reward(scored.images, scored.batch.labels)


def on_embeddings(backbone: Backbone, reward: Callable[[Tensor, Tensor], Any]) -> Score:
    """A reward of embeddings (B, D) and labels (B,)."""
    return lambda scored: reward(scored.embeddings(backbone), scored.batch.labels)


def reads_or_fetches(*sources: object) -> str:
    """For `reaches_outside`: paths and addresses; what is not text names nothing."""
    return f"reads or fetches {', '.join(source for source in sources if isinstance(source, str))}"
