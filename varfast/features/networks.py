"""Networks that describe an image by features, by name.

Axes: B image, D feature, K class. Levels are uint8 (B, 3, H, W), as a PNG stores them: features of a sample are then
those of its file.
"""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from varfast.data.datasets import DigitsClassifier


class Network(Protocol):
    """What describes images.

    Attributes:
        name: identifies the features: statistics of one name are not compared with those of another.
        width: D, number of features.
    """

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    def features(self, levels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) float32 or float64, on the network's device."""
        ...

    def __call__(self, levels: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """(B, 3, H, W) uint8 -> features (B, D), and logits (B, K) of a classifier or None."""
        ...


def to_levels(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> uint8, as a PNG stores them."""
    return images.float().clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)


def features_of(network: Network, images: Tensor, batch_size: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> (B, D), a batch at a time, of the levels that a PNG of each would have."""
    return torch.cat([network.features(to_levels(part)) for part in images.split(batch_size)])


class DigitsPixels:
    """For tiny models, without weights: 8 x 8 grey levels as features, a classifier of handwritten digits for logits.

    Raises: InputError if a library is missing, when logits are asked for.
    """

    name, width = "digits", 64

    def features(self, levels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 64) float64 in [0, 1]."""
        images = levels.double() / 255.0
        return torch.nn.functional.interpolate(images, size=(8, 8), mode="area").mean(dim=1).flatten(1)

    def __call__(self, levels: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """(B, 3, H, W) uint8 -> features (B, 64) and logits (B, 10), float64."""
        levels = levels.cpu()
        probabilities_BK = self._classifier.probabilities(levels.double() / 255.0)
        return self.features(levels).numpy(), probabilities_BK.clamp_min(1e-12).log().numpy()

    @functools.cached_property
    def _classifier(self) -> DigitsClassifier:
        return DigitsClassifier()


def load_network(
    name: str,
    weights: str | None,
    device: torch.device,
    key: str = "inception_weights",
) -> Network:
    """A network that its name alone describes: digits, inception or inception_torchvision.

    Args:
        weights: path, hf:// or https address; None: the public file.
        key: where they stand in the config, for errors.
    Raises: InputError as the networks.
    """
    if name == "digits":
        return DigitsPixels()
    from varfast.features.inception import Inception, TorchvisionInception

    return (
        TorchvisionInception(weights, device, key)
        if name == "inception_torchvision"
        else Inception(weights, device, key)
    )
