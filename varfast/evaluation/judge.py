"""What is measured of each image: scores, the rank of its label, features.

Axes: B image of a chunk; H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from varfast.data.datasets import DigitsClassifier
from varfast.evaluation.arguments import Task
from varfast.evaluation.config import EvaluateConfig
from varfast.evaluation.metrics import Numbers
from varfast.evaluation.subjects import Subjects
from varfast.features.config import FeaturesName, FeaturesSection
from varfast.features.networks import Network, load_network
from varfast.rewards import WeightedSum
from varfast.rewards.classifier import ClassifierConfig, Confidence
from varfast.types import InputError

# Networks that classify too, so that an inception score can be computed.
_CLASSIFYING = ("inception", "inception_torchvision", "digits")


class Judge:
    """Scores, ranks of the label and features of images.

    Attributes:
        networks: compute the features, by name.
    Raises: InputError for weights that cannot be had and libraries that are missing.
    """

    def __init__(self, task: Task, subjects: Subjects, device: torch.device) -> None:
        prompts, names = subjects.prompts, subjects.names
        if prompts is not None and task.classifier is not None:
            raise InputError(
                f"classifier={task.classifier.model} tells labels apart, and {task.config.checkpoint} is a model of "
                "texts; use classifier=null, and rewards that read the prompt under scores"
            )
        labels = subjects.count if prompts is None else None
        self._scores = (
            WeightedSum(task.scores, device, labels, "scores", names=names, prompts=prompts) if task.scores else None
        )
        self._ranks = _classifier(task.classifier, subjects.count, device) if task.classifier else None
        self.networks: dict[str, Network] = {
            name: _network(task.config, name, device) for name in task.config.feature_networks
        }

    def __call__(self, images: Tensor, labels_B: Tensor, levels: Tensor) -> Numbers:
        """Arrays of B rows by name, as column_names has them.

        Args:
            images: (B, 3, H, W) in [0, 1], for scores and the classifier.
            levels: (B, 3, H, W) uint8, for features.
        """
        numbers: Numbers = {}
        if self._scores is not None:
            components = self._scores(images, labels_B).components
            numbers |= {f"score/{name}": score_B.cpu().numpy() for name, score_B in components.items()}
        if self._ranks is not None:
            ranks_B = self._ranks(images, labels_B).cpu().numpy()
            numbers |= {"top1": ranks_B < 1, "top5": ranks_B < 5}
        for name, network in self.networks.items():
            features, logits = columns_of(name, list(self.networks))
            numbers[features], of_classes = network(levels)
            if logits is not None and of_classes is not None:
                numbers[logits] = of_classes
        return numbers


def _network(config: EvaluateConfig, name: FeaturesName, device: torch.device) -> Network:
    if name in config.networks:
        return config.networks[name].load(device, f"networks.{name}")
    if name == "inception":
        return load_network(name, config.inception_weights, device)
    return FeaturesSection(features=name).load(device, f"networks.{name}")


def columns_of(network: str, networks: Sequence[str]) -> tuple[str, str | None]:
    """Names of the arrays that a network of several computes: features, and logits if it has any."""
    suffix = "" if len(networks) == 1 else f"/{network}"
    return f"features{suffix}", f"logits{suffix}" if network in _CLASSIFYING else None


def column_names(task: Task) -> list[str]:
    """Names of the arrays that a Judge returns: score/<name>, top1, top5, features, logits."""
    columns = [f"score/{name}" for name in task.scores]
    columns += ["top1", "top5"] if task.classifier else []
    networks = task.config.feature_networks
    return columns + [name for network in networks for name in columns_of(network, networks) if name is not None]


def _classifier(config: ClassifierConfig, num_classes: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """From images and labels to the number of labels that the classifier ranks higher."""
    if config.model == "digits":
        if num_classes != 10:
            raise InputError(f"classifier=digits tells 10 classes apart, the policy has {num_classes} labels")
        return DigitsClassifier().ranks
    return Confidence(
        config.model, config.weights, config.file, device, config.batch_size, num_classes, "classifier"
    ).ranks
