"""Inception-v3 as FID networks: torch-fidelity's copy of TensorFlow's, and torchvision's.

Axes: B image, D feature, K class. Levels are uint8 (B, 3, H, W).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varfast.features.names import content_name
from varfast.rewards.files import fetch, file_name
from varfast.types import InputError
from varfast.weights.containers import read_checkpoint

_FIDELITY_SHA256 = "6726825d"  # torch-fidelity names the file by its first digits
_SIDE = 299


class Inception:
    """Inception-v3 of the FID paper, from torch-fidelity: with TensorFlow's weights and its way to resize.

    Args:
        weights: path, hf:// or https address; None: torch-fidelity's public file.
        device: where it runs.
        key: of the argument that names the weights, for errors.
    Raises: InputError if the library is missing, or if the weights cannot be loaded or do not fit.
    """

    width = 2048

    def __init__(self, weights: str | None, device: torch.device, key: str) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            raise InputError(f"{key}: these features need torch-fidelity; pip install 'varfast[eval]' ({error})"
                             ) from error  # fmt: skip
        address = weights or URL_INCEPTION_V3
        public = file_name(address) == file_name(URL_INCEPTION_V3)
        path = fetch(address, key, _FIDELITY_SHA256 if public else "")
        self.name = "inception" if public else f"inception {content_name(path)}"
        read_checkpoint(path)  # refuses pickles with code, which the library would run
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"{key}={address} does not hold torch-fidelity's Inception-v3: {str(error)[:300]}"
            ) from error
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


class TorchvisionInception:
    """torchvision's Inception-v3, IMAGENET1K_V1: its pooled features, of images resized bilinearly with antialiasing.

    Its numbers are not those of Inception, so neither are distances. It has the logits of 1000 classes.

    Args:
        weights: path, hf:// or https address; None: torchvision's file, which its cache may hold.
        device, key: as of Inception.
    Raises: InputError as Inception.
    Source: the features of arXiv:2603.23086.
    """

    width = 2048

    def __init__(self, weights: str | None, device: torch.device, key: str) -> None:
        try:
            from torchvision.models import Inception_V3_Weights, inception_v3
        except ImportError as error:
            raise InputError(f"{key}: these features need torchvision; pip install 'varfast[rewards]' ({error})"
                             ) from error  # fmt: skip
        entry = Inception_V3_Weights.IMAGENET1K_V1
        address = weights or entry.url
        public = file_name(address) == file_name(entry.url)
        digits = re.search(r"-([0-9a-f]{8})\.pth$", entry.url)
        path = fetch(address, key, digits[1] if digits and public else "")
        self.name = "inception_torchvision" if public else f"inception_torchvision {content_name(path)}"
        # transform_input: as torchvision sets it where it loads the weights itself.
        network = inception_v3(weights=None, transform_input=True, init_weights=False)
        try:
            network.load_state_dict(read_checkpoint(path))
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InputError(f"{key}={address} does not hold torchvision's Inception-v3: {str(error)[:300]}") from error
        self._head = network.fc.to(device)
        network.fc = torch.nn.Identity()
        self._network: Any = network.eval().requires_grad_(False).to(device)
        self._device = device
        mean_std = (entry.transforms().mean, entry.transforms().std)
        self._mean, self._std = (torch.tensor(values, device=device).view(3, 1, 1) for values in mean_std)

    @torch.no_grad()
    def features(self, levels: Tensor) -> Tensor:
        images = levels.to(self._device).float() / 255.0
        images = F.interpolate(images, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False, antialias=True)
        features_BD: Tensor = self._network((images - self._mean) / self._std)
        return features_BD

    @torch.no_grad()
    def __call__(self, levels: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """(B, 3, H, W) uint8 -> features (B, 2048) and logits (B, 1000), float32."""
        features_BD = self.features(levels)
        return features_BD.cpu().numpy(), self._head(features_BD).cpu().numpy()
