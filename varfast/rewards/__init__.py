"""Rewards: what the policy is trained to earn. One file a reward; composed here by the names they have in the config.

A reward is any callable (images, labels) -> (B,) of finite numbers: images (B, 3, H, W) float32 in [0, 1] and labels
(B,) int64, both on the policy's device. Your own is named in the config by its import path::

    reward:
      redness: {type: function, function: "my_rewards:redness", weight: 0.5}

Axes: B image, N text, D embedding.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varfast.config import (
    AestheticReward,
    BrightnessReward,
    ClassifierReward,
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
from varfast.rewards.hpsv2 import hpsv2_spec
from varfast.rewards.http import Http
from varfast.types import InputError, NotFiniteReward, Rewards

Reward = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class _Component:
    """A reward with its weight. One with a backbone is called with its (B, D) embeddings in place of the images."""

    weight: float
    reward: Reward
    backbone: Backbone | None = None


class WeightedSum:
    """sum over components of weight * reward.

    Rewards on the same CLIP model share one pass of it a batch of images.

    Args:
        components: settings by name.
        device: of the images.
        num_classes: number of labels, to check texts and classifiers against; None: not checked.
        section: where the components stand in the config, for errors.
    Raises: InputError if a user's function cannot be imported, or weights cannot be had or used.
    """

    def __init__(
        self,
        components: dict[str, RewardConfig],
        device: torch.device | str = "cpu",
        num_classes: int | None = None,
        section: str = "reward",
    ) -> None:
        backbones = _Backbones(torch.device(device))
        self._components = {
            name: _build(f"{section}.{name}", config, backbones, num_classes) for name, config in components.items()
        }
        backbones.drop_text_towers()

    @property
    def weights(self) -> dict[str, float]:
        """Of the components, by name."""
        return {name: part.weight for name, part in self._components.items()}

    @torch.no_grad()
    def __call__(self, images: Tensor, labels_B: Tensor) -> Rewards:
        """Score (B, 3, H, W) images in [0, 1].

        Raises: InputError if a component returns another shape than (B,); NotFiniteReward, which is one too, if it
            or the sum holds a number that is not finite.
        """
        embeddings: dict[Backbone, Tensor] = {}
        scores = {}
        for name, part in self._components.items():
            seen = images
            if part.backbone is not None:
                if part.backbone not in embeddings:
                    embeddings[part.backbone] = part.backbone.embed_images(images)
                seen = embeddings[part.backbone]
            scores[name] = _checked(name, part.reward(seen, labels_B), images)
        total_B = torch.stack([weight * scores[name] for name, weight in self.weights.items()]).sum(dim=0)
        return Rewards(_checked("(their weighted sum)", total_B, images), scores)


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


def _build(key: str, config: RewardConfig, backbones: _Backbones, num_classes: int | None) -> _Component:
    if isinstance(config, BrightnessReward):
        return _Component(config.weight, Brightness(config.mode, config.threshold))
    if isinstance(config, FunctionReward):
        return _Component(config.weight, _import(key, config))
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


def _import(key: str, config: FunctionReward) -> Reward:
    where = f"{key}.function={config.function}"
    module_name, _, attribute = config.function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.split(".")[0] and error.name != module_name:
            raise  # something that the user's module imports
        raise InputError(f"{where}: no module {module_name}; run from its folder, or set PYTHONPATH to it") from error
    target: Any = getattr(module, attribute, None)
    if not callable(target):
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        raise InputError(f"{where}: {module_name} has no such function{f'; did you mean {near[0]}?' if near else ''}")
    if isinstance(target, type):
        return target(**config.args)
    return functools.partial(target, **config.args)


def _checked(name: str, scores: Any, images: Tensor) -> Tensor:
    scores_B = torch.as_tensor(scores, device=images.device).float()
    if scores_B.shape != images.shape[:1]:
        raise InputError(
            f"reward {name} returned shape {tuple(scores_B.shape)} for {len(images)} images; want ({len(images)},), "
            "one number an image"
        )
    bad = (~scores_B.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise NotFiniteReward(
            f"reward {name} returned {float(scores_B[bad[0]])} for image {bad[0]} ({len(bad)} of {len(images)} are not "
            "finite); mend the reward, or clamp it"
        )
    return scores_B
