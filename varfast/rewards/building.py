"""What the section of a reward is given to build it, and what a built reward does. No PyTorch.

Axes: B image, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar, cast

from pydantic import Field

from varfast.types import RewardBatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Weight = Annotated[float, Field(ge=-1e6, le=1e6)]


class ImageNetwork(Protocol):
    """A network whose pass over images several rewards may share.

    Attributes:
        batch_size: images at a time.
    """

    batch_size: int

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> what the rewards read, (B, ...)."""
        ...

    def texts_are_read(self) -> None:
        """All rewards are built: what reads their texts may be freed."""
        ...


_Network = TypeVar("_Network", bound=ImageNetwork)


@dataclass(frozen=True)
class Building:
    """Where a reward is built.

    Attributes:
        key: of the reward in the config, as reward.mine; for errors.
        device: of the images.
        num_classes: number of labels, to check texts and classifiers against; None: not checked.
        seed: of the run.
        beside: folder of the config file, where a user's reward is looked for too.
        shared: the networks that were loaded: each one once, however many rewards name it.
    """

    key: str
    device: torch.device
    num_classes: int | None = None
    seed: int = 0
    beside: Path | None = None
    shared: dict[Hashable, ImageNetwork] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the reward: what the user calls it, as mine."""
        return self.key.partition(".")[2] or self.key

    def share(self, spec: Hashable, batch_size: int, load: Callable[[], _Network]) -> _Network:
        """A network that works in the smallest of the batch sizes that it is asked for with.

        Args:
            spec: rewards that ask with an equal one get the same network; it tells the kind of network too.
            load: called for the first of them.
        """
        if spec not in self.shared:
            self.shared[spec] = load()
        network = cast("_Network", self.shared[spec])
        network.batch_size = min(network.batch_size, batch_size)
        return network


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
    _embeddings: dict[ImageNetwork, Tensor] = field(default_factory=dict, init=False)

    def embeddings(self, network: ImageNetwork) -> Tensor:
        """(B, ...) of the images, computed once for all rewards on this network."""
        if network not in self._embeddings:
            self._embeddings[network] = network.embed_images(self.images)
        return self._embeddings[network]


class Reward(Protocol):
    """What a section builds. Its state, if it has one, is saved with the run and loaded in place."""

    def measure(self, scored: Scored) -> Tensor:
        """On each process, of its own images: (B, ...), a row for each.

        Raises: InputError if there is none; NotFiniteReward, which is one too, for numbers that are not finite.
        """
        ...

    def score(self, measured: Tensor) -> Tensor:
        """(B,) float32, from what the processes measured of all images of a step, (B, ...). It changes no state."""
        ...

    def learn(self, measured: Tensor) -> None:
        """Take the images of a step of training into the state, in place; not called for a step that is skipped.

        Each process has its own copy of the state, so what is done must be a function of state and `measured` alone.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """The tensors that `learn` changes, by name; {} for a reward that keeps nothing."""
        ...


class PerImage:
    """A reward that looks at each image by itself: what it measures is the score.

    Args:
        building: where it stands.
        function: what it computes: (B,) numbers of any kind, which are checked.
    """

    def __init__(self, building: Building, function: Callable[[Scored], Any]) -> None:
        self._name, self._function = building.name, function

    def measure(self, scored: Scored) -> Tensor:
        from varfast.rewards.scores import scores

        return scores(self._name, self._function(scored), len(scored.images), scored.images.device)

    def score(self, measured: Tensor) -> Tensor:
        return measured

    def learn(self, measured: Tensor) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}


def on_images(building: Building, reward: Callable[[Tensor, Tensor], Any]) -> Reward:
    """A reward of each image by itself, from images (B, 3, H, W) and labels (B,)."""
    return PerImage(building, lambda scored: reward(scored.images, scored.batch.labels))


def on_embeddings(building: Building, network: ImageNetwork, reward: Callable[[Tensor, Tensor], Any]) -> Reward:
    """A reward of each image by itself, from embeddings (B, ...) and labels (B,)."""
    return PerImage(building, lambda scored: reward(scored.embeddings(network), scored.batch.labels))


def reads_or_fetches(*sources: object) -> str:
    """For `reaches_outside`: paths and addresses; what is not text names nothing."""
    return f"reads or fetches {', '.join(source for source in sources if isinstance(source, str))}"
