"""What is measured of each image: scores, the rank of its label, features.

Axes: B image of a chunk; H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from varfast.data.datasets import DigitsClassifier
from varfast.data.labels import label_names
from varfast.evaluation.config import EvaluateConfig
from varfast.evaluation.metrics import Numbers
from varfast.features.networks import Network, load_network, to_levels
from varfast.rewards import WeightedSum
from varfast.rewards.classifier import ClassifierConfig, Confidence
from varfast.types import InputError


class Judge:
    """Scores, ranks of the label and features of images.

    Attributes:
        network: computes the features; None where none are asked for.
    Raises: InputError for weights that cannot be had and libraries that are missing.
    """

    def __init__(self, config: EvaluateConfig, num_classes: int, device: torch.device) -> None:
        names = label_names(config.checkpoint, num_classes)
        self._scores = WeightedSum(config.scores, device, num_classes, "scores", names=names) if config.scores else None
        self._ranks = _classifier(config.classifier, num_classes, device) if config.classifier else None
        self.network: Network | None = None
        if config.feature_network:
            self.network = load_network(config.feature_network, config.inception_weights, device)

    def __call__(self, images: Tensor, labels_B: Tensor) -> Numbers:
        """Images (B, 3, H, W) in [0, 1] -> arrays of B rows by name: score/<name>, top1, top5, features, logits."""
        numbers: Numbers = {}
        if self._scores is not None:
            components = self._scores(images, labels_B).components
            numbers |= {f"score/{name}": score_B.cpu().numpy() for name, score_B in components.items()}
        if self._ranks is not None:
            ranks_B = self._ranks(images, labels_B).cpu().numpy()
            numbers |= {"top1": ranks_B < 1, "top5": ranks_B < 5}
        if self.network is not None:
            numbers["features"], logits_BK = self.network(to_levels(images))
            if logits_BK is not None:
                numbers["logits"] = logits_BK
        return numbers


def column_names(config: EvaluateConfig) -> list[str]:
    """Names of the arrays that a Judge returns."""
    columns = [f"score/{name}" for name in config.scores]
    columns += ["top1", "top5"] if config.classifier else []
    return columns + (["features", "logits"] if config.feature_network else [])


def _classifier(config: ClassifierConfig, num_classes: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """From images and labels to the number of labels that the classifier ranks higher."""
    if config.model == "digits":
        if num_classes != 10:
            raise InputError(f"classifier=digits tells 10 classes apart, the policy has {num_classes} labels")
        return DigitsClassifier().ranks
    return Confidence(
        config.model, config.weights, config.file, device, config.batch_size, num_classes, "classifier"
    ).ranks
