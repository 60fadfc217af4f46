"""Rewards: what the policy is trained to earn. One file a reward; composed here by the names they have in the config.

A reward is any callable (images, labels) -> (B,) of finite numbers: images (B, 3, H, W) float32 in [0, 1] and labels
(B,) int64, both on the policy's device. Your own is named in the config by its module or file, and may ask for more
than labels (docs/rewards.md)::

    reward:
      redness: {type: function, function: "my_rewards:redness", weight: 0.5}

Axes: B image, N text, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from varfast.config import (
    AestheticReward,
    BrightnessReward,
    ClassifierReward,
    ClipReward,
    FunctionReward,
    HPSv2Reward,
    HttpReward,
    RewardConfig,
)
from varfast.rewards import aesthetic
from varfast.rewards.backbone import Backbone, BackboneSpec, backbone_spec
from varfast.rewards.brightness import Brightness
from varfast.rewards.classifier import Confidence, DigitsConfidence
from varfast.rewards.clip import TextSimilarity, prompts
from varfast.rewards.function import UserReward
from varfast.rewards.hpsv2 import hpsv2_spec
from varfast.rewards.http import Http
from varfast.rewards.scores import must_be_finite, scores
from varfast.types import RewardBatch, Rewards

Reward = Callable[[Tensor, Tensor], Tensor]
_BuiltIn = BrightnessReward | AestheticReward | ClipReward | HPSv2Reward | ClassifierReward | HttpReward


@dataclass(frozen=True)
class _Component:
    """A reward with its weight. One with a backbone is called with its (B, D) embeddings in place of the images."""

    weight: float
    reward: Reward | UserReward
    backbone: Backbone | None = None


class WeightedSum:
    """sum over components of weight * reward.

    Rewards on the same CLIP model share one pass of it a batch of images.

    Args:
        components: settings by name.
        device: of the images.
        num_classes: number of labels, to check texts and classifiers against; None: not checked.
        section: where the components stand in the config, for errors.
        seed: of the run, for what a user's reward draws at random.
        names: class names of the labels, for user's rewards that ask for them; None: the labels have none.
        beside: folder of the config file, where a user's reward is looked for too.
    Raises: InputError if a user's function cannot be imported, or weights cannot be had or used.
    """

    def __init__(
        self,
        components: dict[str, RewardConfig],
        device: torch.device | str = "cpu",
        num_classes: int | None = None,
        section: str = "reward",
        seed: int = 0,
        names: Sequence[str] | None = None,
        beside: Path | None = None,
    ) -> None:
        self._seed, self._names = seed, names
        backbones = _Backbones(torch.device(device))
        self._components = {}
        for name, config in components.items():
            key = f"{section}.{name}"
            self._components[name] = (
                _Component(config.weight, UserReward(key, config, backbones.device, seed, beside))
                if isinstance(config, FunctionReward)
                else _build(key, config, backbones, num_classes)
            )
        backbones.drop_text_towers()

    @property
    def weights(self) -> dict[str, float]:
        """Of the components, by name."""
        return {name: part.weight for name, part in self._components.items()}

    @torch.no_grad()
    def __call__(self, images: Tensor, labels_B: Tensor, step: int | None = None, first_sample: int = 0) -> Rewards:
        """Score (B, 3, H, W) images in [0, 1].

        Args:
            step: of the training; None in an evaluation.
            first_sample: number of the first image among those of the step.
        Raises: InputError if a component returns anything but (B,) numbers; NotFiniteReward, which is one too, if it or
            the sum holds a number that is not finite.
        """
        batch = self._batch(labels_B, step)
        embeddings: dict[Backbone, Tensor] = {}
        found = {}
        for name, part in self._components.items():
            if isinstance(part.reward, UserReward):
                found[name] = part.reward(images, batch, first_sample)
                continue
            seen = images
            if part.backbone is not None:
                if part.backbone not in embeddings:
                    embeddings[part.backbone] = part.backbone.embed_images(images)
                seen = embeddings[part.backbone]
            found[name] = scores(name, part.reward(seen, labels_B), len(images), images.device)
        total_B = torch.stack([weight * found[name] for name, weight in self.weights.items()]).sum(dim=0)
        must_be_finite("(their weighted sum)", total_B)
        return Rewards(total_B, found)

    def _batch(self, labels_B: Tensor, step: int | None) -> RewardBatch:
        labels = labels_B.tolist()
        names = None if self._names is None else [self._names[label] for label in labels]
        return RewardBatch(
            labels_B, names, [str(label) for label in labels] if names is None else names, step, self._seed
        )


class _Backbones:
    """Each CLIP model once, however many rewards name it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._loaded: dict[BackboneSpec, Backbone] = {}

    def load(self, spec: BackboneSpec, batch_size: int, key: str) -> Backbone:
        if spec not in self._loaded:
            self._loaded[spec] = Backbone(spec, self.device, batch_size, key)
        backbone = self._loaded[spec]
        backbone.batch_size = min(backbone.batch_size, batch_size)
        return backbone

    def drop_text_towers(self) -> None:
        for backbone in self._loaded.values():
            backbone.drop_text_tower()


def _build(key: str, config: _BuiltIn, backbones: _Backbones, num_classes: int | None) -> _Component:
    if isinstance(config, BrightnessReward):
        return _Component(config.weight, Brightness(config.mode, config.threshold))
    if isinstance(config, AestheticReward):
        head = aesthetic.Aesthetic(config.head, backbones.device, f"{key}.head")
        spec = backbone_spec(aesthetic.CLIP_MODEL, config.pretrained, config.dtype, key)
        return _Component(config.weight, head, backbones.load(spec, config.batch_size, key))
    if isinstance(config, ClassifierReward):
        if config.model == "digits":
            return _Component(config.weight, DigitsConfidence(num_classes, key))
        return _Component(
            config.weight,
            Confidence(
                config.model, config.weights, config.file, backbones.device, config.batch_size, num_classes, key
            ),
        )
    if isinstance(config, HttpReward):
        http = Http(config.url, config.timeout_s, config.retries, config.batch_size, config.max_response_bytes, key)
        return _Component(config.weight, http)
    texts = prompts(config.prompt, config.label_prompt, config.names, num_classes, key)
    if isinstance(config, HPSv2Reward):
        spec = hpsv2_spec(config.pretrained, config.dtype)
    else:
        spec = backbone_spec(config.model, config.pretrained, config.dtype, key)
    backbone = backbones.load(spec, config.batch_size, key)
    texts_ND = backbone.embed_texts(texts, key)
    return _Component(config.weight, TextSimilarity(texts_ND, config.label_prompt is not None), backbone)
