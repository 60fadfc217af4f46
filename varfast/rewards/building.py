"""What the section of a reward is given to build it, and what a built reward does. No PyTorch.

Axes: B image, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable

from pydantic import Field

from varfast.settings.section import Section
from varfast.types import InputError, Normalise, RewardBatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from varfast.data.prompts import PromptSet
    from varfast.features.config import FeaturesSection
    from varfast.features.networks import Network

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
        """All rewards are built: what reads their texts may be freed, unless one of them reads those of a batch."""
        ...


_Network = TypeVar("_Network", bound=ImageNetwork)


class RewardSection(Section):
    """What the sections of all rewards have in common."""

    # Whether an image has the score only among the others of a step, so that an evaluation does not measure it.
    of_sets: ClassVar[bool] = False

    weight: Weight = Field(1.0, description="factor in the sum")
    normalise: Normalise | None = Field(
        None,
        description="advantages of this reward by itself, which are added to those of the others: normalised within "
        "each group, or over the whole step; none: its raw numbers. Default: together with the others, as "
        "grpo.combine says",
    )

    @property
    def is_missing(self) -> bool:
        """Whether a run folder keeps no more than a text of it: a function that was given from Python."""
        return False

    def check_step(self, key: str, labels_per_step: int, labels: int) -> None:
        """Whether a step of the run is one that this reward can score.

        Args:
            key: where this section stands, for errors.
            labels_per_step, labels: of a step, and those that it draws from.
        Raises: ValueError if it is not.
        """

    def check_prompts(self, key: str, on_prompts: bool) -> None:
        """Whether the run has what this reward compares images with: texts, or labels.

        Args:
            key: where this section stands, for errors.
            on_prompts: the run is on prompts, and not on labels.
        Raises: ValueError if it has not.
        """


@dataclass(frozen=True)
class Building:
    """Where a reward is built.

    Attributes:
        key: of the reward in the config, as reward.mine; for errors.
        device: of the images.
        num_classes: number of labels, to check texts and classifiers against; None: not checked.
        seed: of the run.
        beside: folder of the config file, where a user's reward is looked for too.
        names: what the labels are called; None: not known.
        image_size: side of the policy's images in pixels, to which real images are resized; None: not known.
        prompts: the texts that ids are rows of, for a policy that is conditioned on text; None: it has labels.
        shared: the networks that were loaded: each one once, however many rewards name it.
        networks: those that compute features, likewise, by their settings.
    """

    key: str
    device: torch.device
    num_classes: int | None = None
    seed: int = 0
    beside: Path | None = None
    names: Sequence[str] | None = None
    image_size: int | None = None
    prompts: PromptSet | None = None
    shared: dict[Hashable, ImageNetwork] = field(default_factory=dict)
    networks: dict[FeaturesSection, Network] = field(default_factory=dict)

    def network(self, section: FeaturesSection) -> Network:
        """What computes the features that a section names."""
        key = section.chosen
        if key not in self.networks:
            if section.features == "clip":
                self.networks[key] = self._clip(section)
            else:
                self.networks[key] = section.load(self.device, self.key)
        return self.networks[key]

    def _clip(self, section: FeaturesSection) -> Network:
        """Features of a CLIP that rewards of images and texts may run too."""
        from varfast.features.embedders import ClipFeatures
        from varfast.rewards.backbone import shared_backbone

        spec = section.clip_spec(self.key)
        return ClipFeatures(shared_backbone(self, spec, section.batch_size), spec)

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

    def learn(self, measured: Tensor) -> Mapping[str, Tensor] | None:
        """Take the images of a step of training into the state, in place; not called for a step that is skipped.

        Each process has its own copy of the state, so what is done must be a function of state and `measured` alone.

        Returns: numbers of the step, () each by name, for metrics.jsonl; or None.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """The tensors that `learn` changes, by name; {} for a reward that keeps nothing."""
        ...


@runtime_checkable
class SetReward(Reward, Protocol):
    """A reward of a set of images: what it scores is a step of training, compared with a state that began at the base.

    A single image has no score of its own, so an evaluation leaves it out.
    """

    def base_images(self, images: int) -> int:
        """How many images of the base the state begins with, for steps of `images` images.

        Raises: InputError if a step of so many images, or the base's, are too few.
        """
        ...

    def begin(self, measured: Tensor) -> None:
        """Set the state, in place, to what is measured of images of the base; before the first step of a run."""
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


def check_prompts(section: RewardSection, building: Building) -> None:
    """`section.check_prompts` for a reward that is built without a run's config. Raises: InputError."""
    try:
        section.check_prompts(building.key, building.prompts is not None)
    except ValueError as error:
        raise InputError(str(error)) from error


def on_images(building: Building, reward: Callable[[Tensor, Tensor], Any]) -> Reward:
    """A reward of each image by itself, from images (B, 3, H, W) and labels (B,)."""
    return PerImage(building, lambda scored: reward(scored.images, scored.batch.labels))


def on_embeddings(building: Building, network: ImageNetwork, reward: Callable[[Tensor, Tensor], Any]) -> Reward:
    """A reward of each image by itself, from embeddings (B, ...) and labels (B,)."""
    return PerImage(building, lambda scored: reward(scored.embeddings(network), scored.batch.labels))


def reads_or_fetches(*sources: object) -> str:
    """For `reaches_outside`: paths and addresses; what is not text names nothing."""
    return f"reads or fetches {', '.join(source for source in sources if isinstance(source, str))}"
