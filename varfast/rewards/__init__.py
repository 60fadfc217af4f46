"""Rewards: what the policy is trained to earn. One file a reward; composed here by the names they have in the config.

A reward is any callable (images, labels) -> (B,) of finite numbers: images (B, 3, H, W) float32 in [0, 1] and labels
(B,) int64, both on the policy's device. Your own is named in the config by its import path::

    reward:
      redness: {type: function, function: "my_rewards:redness", weight: 0.5}

Axes: B image.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from varfast.config import BrightnessReward, FunctionReward, RewardConfig
from varfast.rewards.brightness import Brightness
from varfast.types import InputError, Rewards

Reward = Callable[[Tensor, Tensor], Any]


class WeightedSum:
    """sum over components of weight * reward.

    Args:
        components: settings by name.
    Raises: InputError if a user's function cannot be imported.
    """

    def __init__(self, components: dict[str, RewardConfig]) -> None:
        self._components = {name: (config.weight, _build(name, config)) for name, config in components.items()}

    @torch.no_grad()
    def __call__(self, images: Tensor, labels_B: Tensor) -> Rewards:
        """Score (B, 3, H, W) images in [0, 1].

        Raises: InputError if a component returns another shape than (B,), or a number that is not finite.
        """
        scores = {
            name: _checked(name, reward(images, labels_B), images) for name, (_, reward) in self._components.items()
        }
        total_B = torch.stack([weight * scores[name] for name, (weight, _) in self._components.items()]).sum(dim=0)
        return Rewards(total_B, scores)


def _build(name: str, config: RewardConfig) -> Reward:
    if isinstance(config, BrightnessReward):
        return Brightness(config.mode, config.threshold)
    return _import(name, config)


def _import(name: str, config: FunctionReward) -> Reward:
    where = f"reward.{name}.function={config.function}"
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
        raise InputError(
            f"reward {name} returned {float(scores_B[bad[0]])} for image {bad[0]} ({len(bad)} of {len(images)} are not "
            "finite); mend the reward, or clamp it"
        )
    return scores_B
