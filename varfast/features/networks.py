"""Networks that describe an image by features, by name.

Axes: B image, D feature, K class. Levels are uint8 (B, 3, H, W), as a PNG stores them: features of a sample are then
those of its file.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from varfast.data.datasets import DigitsClassifier
from varfast.rewards.files import fetch, file_name
from varfast.types import InputError
from varfast.weights.containers import read_checkpoint

_INCEPTION_SHA256 = "6726825d"  # torch-fidelity names the file by its first digits


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


class Inception:
    """Inception-v3 of the FID paper, from torch-fidelity: with TensorFlow's weights and its way to resize.

    Args:
        weights: path, hf:// or https address; None: torch-fidelity's public file.
        device: where it runs.
        key: of the argument that names the weights, for errors.
    Raises: InputError if the library is missing, or if the weights cannot be loaded or do not fit.
    """

    name, width = "inception", 2048

    def __init__(self, weights: str | None, device: torch.device, key: str = "inception_weights") -> None:
        check_installed()
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        address = weights or URL_INCEPTION_V3
        public = file_name(address) == file_name(URL_INCEPTION_V3)
        path = fetch(address, key, _INCEPTION_SHA256 if public else "")
        read_checkpoint(path)  # refuses pickles with code, which the library would run
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except (RuntimeError, TypeError) as error:
            raise InputError(f"{key}={address} does not hold torch-fidelity's Inception-v3: {str(error)[:300]}"
                             ) from error  # fmt: skip
        self._network: Any = network.to(device)
        self._device = device

    @torch.no_grad()
    def features(self, levels: Tensor) -> Tensor:
        features_BD: Tensor = self._network(levels.to(self._device))[0]
        return features_BD

    @torch.no_grad()
    def __call__(self, levels: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """(B, 3, H, W) uint8 -> features (B, 2048) and logits (B, 1008), float32."""
        features_BD, logits_BK = self._network(levels.to(self._device))
        return features_BD.cpu().numpy(), logits_BK.cpu().numpy()


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


def load_network(name: str, weights: str | None, device: torch.device, key: str = "inception_weights") -> Network:
    """A network by its name.

    Raises: InputError as the networks.
    """
    return DigitsPixels() if name == "digits" else Inception(weights, device, key)


def check_installed() -> None:
    """Raises: InputError if a library is missing."""
    try:
        import prdc  # noqa: F401
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise InputError(f"FID and its kin need two libraries; pip install 'varfast[eval]' ({error})") from error
