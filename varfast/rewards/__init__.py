"""Rewards: what the policy is trained to earn. One file a reward; composed here by the names they have in the config.

To add a reward, write one file and name its section in RewardConfig below. The file holds the section of the config and
the class that computes. The section derives from building.RewardSection and has two methods::

    build(building) -> Reward
        makes the reward; building.py has what it is given, and what a reward does
    reaches_outside() -> str | None
        what the reward does beyond computing on the images: the code that it runs, the server that it asks, the files
        that it reads. None: nothing, so that it may be taken from a run folder that somebody else made
        (docs/security.md)

These files import PyTorch inside of functions: a config is checked before PyTorch is imported, which takes seconds.

Your own reward is any callable (images, labels) -> (B,) of finite numbers: images (B, 3, H, W) float32 in [0, 1] and
labels (B,) int64, both on the policy's device. It is named in the config by its module or file, and may ask for more
than labels (docs/rewards.md)::

    reward:
      redness: {type: function, function: "my_rewards:redness", weight: 0.5}

Axes: B image.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from varfast.rewards.aesthetic import AestheticReward
from varfast.rewards.brightness import BrightnessReward
from varfast.rewards.building import Building, Scored, SetReward
from varfast.rewards.classifier import ClassifierReward, ClassifierScore
from varfast.rewards.clip import ClipReward
from varfast.rewards.colour_match import ColourMatchReward
from varfast.rewards.composition import CompositionReward
from varfast.rewards.function import FunctionReward
from varfast.rewards.hpsv2 import HPSv2Reward
from varfast.rewards.http import HttpReward
from varfast.rewards.imagereward import ImageRewardReward
from varfast.rewards.loo_fid import LooFidReward
from varfast.rewards.pickscore import PickScoreReward
from varfast.rewards.vlm import VlmReward
from varfast.rewards.vqascore import VQAScoreReward
from varfast.types import RewardBatch, Rewards

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from varfast.data.prompts import PromptSet

RewardConfig = Annotated[
    BrightnessReward
    | FunctionReward
    | AestheticReward
    | ClipReward
    | HPSv2Reward
    | PickScoreReward
    | ImageRewardReward
    | VQAScoreReward
    | ClassifierReward
    | CompositionReward
    | ColourMatchReward
    | VlmReward
    | HttpReward
    | LooFidReward,
    Field(discriminator="type"),
]


class WeightedSum:
    """sum over components of weight * reward.

    Attributes:
        weights: of the components, by name.
        apart: how components are normalised by themselves; those that are not have no entry.

    Rewards on the same network share one pass of it a batch of images.

    Args:
        components: settings by name.
        device: of the images.
        num_classes: number of labels, to check texts and classifiers against; None: not checked.
        section: where the components stand in the config, for errors.
        seed: of the run, for what a user's reward draws at random.
        names: class names of the labels, for rewards that ask for them; None: the labels have none.
        beside: folder of the config file, where a user's reward is looked for too.
        image_size: side of the policy's images, to which a reward resizes real images; None: not known.
        prompts: the texts that labels are rows of, for a policy that is conditioned on text.
    Raises: InputError if a user's function cannot be imported, or weights cannot be had or used.
    """

    def __init__(
        self,
        components: Mapping[str, RewardConfig],
        device: torch.device | str = "cpu",
        num_classes: int | None = None,
        section: str = "reward",
        seed: int = 0,
        names: Sequence[str] | None = None,
        beside: Path | None = None,
        image_size: int | None = None,
        prompts: PromptSet | None = None,
    ) -> None:
        import torch

        self._seed, self._names, self._prompts = seed, names, prompts
        self.weights = {name: config.weight for name, config in components.items()}
        self.apart = {name: config.normalise for name, config in components.items() if config.normalise is not None}
        building = Building(section, torch.device(device), num_classes, seed, beside, names, image_size, prompts)
        self._rewards = {
            name: config.build(replace(building, key=f"{section}.{name}")) for name, config in components.items()
        }
        for network in building.shared.values():
            network.texts_are_read()
        self._of_sets = {name: reward for name, reward in self._rewards.items() if isinstance(reward, SetReward)}
        self._of_images = self._rewards.keys() - self._of_sets

    def __call__(self, images: Tensor, labels_B: Tensor, step: int | None = None, first_sample: int = 0) -> Rewards:
        """`measure`, then `score`, of one process's images, by the rewards that an image has by itself."""
        measured = self.measure(images, labels_B, step, first_sample, self._of_images)
        return self.score(measured) if measured else Rewards(images.new_zeros(len(images)), {})

    def measure(
        self,
        images: Tensor,
        labels_B: Tensor,
        step: int | None = None,
        first_sample: int = 0,
        names: Collection[str] | None = None,
    ) -> dict[str, Tensor]:
        """What each component measures of (B, 3, H, W) images in [0, 1]: (B, ...) by name.

        Args:
            step: of the training; None in an evaluation.
            first_sample: number of the first image among those of the step.
            names: of the components that measure; None: all.
        Raises: InputError if a component returns anything but (B,) numbers; NotFiniteReward, which is one too, if a
            number is not finite.
        """
        import torch

        scored = Scored(images, self._batch(labels_B, step), first_sample)
        with torch.no_grad():
            return {
                name: reward.measure(scored) for name, reward in self._rewards.items() if names is None or name in names
            }

    def score(self, measured: dict[str, Tensor]) -> Rewards:
        """The rewards of all images of a step, from what the processes measured: of the components in `measured`.

        Raises: NotFiniteReward if the sum holds a number that is not finite.
        """
        import torch

        from varfast.rewards.scores import must_be_finite

        with torch.no_grad():
            found = {name: self._rewards[name].score(value) for name, value in measured.items()}
            total_B = torch.stack([self.weights[name] * score_B for name, score_B in found.items()]).sum(dim=0)
        must_be_finite("(their weighted sum)", total_B)
        return Rewards(total_B, found)

    def learn(self, measured: dict[str, Tensor]) -> dict[str, Tensor]:
        """Components that keep a state take the images of a step of training into it.

        Returns: () numbers of the step, by <name of the number>/<name of the component>.
        """
        import torch

        with torch.no_grad():
            found = {name: reward.learn(measured[name]) or {} for name, reward in self._rewards.items()}
        return {f"{number}/{name}": value for name, numbers in found.items() for number, value in numbers.items()}

    @property
    def ranks(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Of the first component that is a classifier, how many classes it ranks before the label; None: there is none.

        From images (B, 3, H, W) and labels (B,) to (B,).
        """
        classifiers = (reward for reward in self._rewards.values() if isinstance(reward, ClassifierScore))
        return next((classifier.ranks for classifier in classifiers), None)

    def base_images(self, images: int) -> int:
        """How many images of the base the states of rewards of sets begin with; 0 if there are no such rewards.

        Args:
            images: of a step of training.
        Raises: InputError if so many are too few.
        """
        return max((reward.base_images(images) for reward in self._of_sets.values()), default=0)

    def measure_sets(self, images: Tensor, labels_B: Tensor, first_sample: int = 0) -> dict[str, Tensor]:
        """What rewards of sets measure, as `measure`, of images of the base."""
        return self.measure(images, labels_B, None, first_sample, self._of_sets)

    def begin(self, measured: dict[str, Tensor]) -> None:
        """Rewards of sets begin with what was measured of images of the base."""
        import torch

        with torch.no_grad():
            for name, reward in self._of_sets.items():
                reward.begin(measured[name])

    def state(self) -> dict[str, Tensor]:
        """What the components keep from step to step, to save, or to load into, in place."""
        return {f"{name}.{key}": t for name, reward in self._rewards.items() for key, t in reward.state().items()}

    def _batch(self, labels_B: Tensor, step: int | None) -> RewardBatch:
        labels = labels_B.tolist()
        if self._prompts is not None:
            rows = [self._prompts.prompts[row] for row in labels]
            texts, tags = [row.text for row in rows], [row.tag for row in rows]
            return RewardBatch(labels_B, None, texts, step, self._seed, tags, [dict(row.metadata) for row in rows])
        names = None if self._names is None else [self._names[label] for label in labels]
        return RewardBatch(
            labels_B, names, [str(label) for label in labels] if names is None else names, step, self._seed
        )
