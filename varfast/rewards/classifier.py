"""Confidence of a classifier: the probability that it gives to an image's label.

Axes: B image, N class.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from varfast.rewards.building import Building, PerImage, Reward, RewardSection, check_prompts
from varfast.rewards.files import fetch, file_name
from varfast.settings.section import Section, Source
from varfast.types import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# torchvision switches transform_input on where it loads their weights.
_CHANGE_THEIR_INPUT = ("googlenet", "inception_v3")


class ClassifierConfig(Section):
    """A classifier whose classes are the labels."""

    model: str = Field(
        "resnet50", description="a classifier of torchvision.models.list_models(), or 'digits' for the handwritten ones"
    )
    weights: str = Field("IMAGENET1K_V2", description="name of the weights in torchvision, with their preprocessing")
    file: Source | None = Field(
        None,
        description="the weights' path, hf:// or https address; default: torchvision's cache, then its address. A file "
        "of the public name must have its SHA-256",
    )
    batch_size: int = Field(64, ge=1, le=1_000_000, description="images at a time")


class ClassifierReward(ClassifierConfig, RewardSection):
    """Probability that a classifier gives to the label."""

    type: Literal["classifier"] = Field(description="the kind of reward")

    def check_prompts(self, key: str, on_prompts: bool) -> None:
        if on_prompts:
            raise ValueError(f"{key}: a classifier compares images with labels, and the run is on prompts; use clip, "
                             "imagereward or vlm")  # fmt: skip

    def build(self, building: Building) -> Reward:
        key, num_classes = building.key, building.num_classes
        check_prompts(self, building)
        if self.model == "digits":
            return ClassifierScore(building, DigitsConfidence(num_classes, key))
        return ClassifierScore(
            building,
            Confidence(self.model, self.weights, self.file, building.device, self.batch_size, num_classes, key),
        )

    def reaches_outside(self) -> str | None:
        if self.model == "digits":
            return None
        return f"reads or fetches {self.file or f'the weights of {self.model}'}"


class ClassifierScore(PerImage):
    """The reward of a classifier.

    Attributes:
        ranks: from images (B, 3, H, W) and labels (B,) to (B,), how many classes rank before the label.
    """

    def __init__(self, building: Building, classifier: DigitsConfidence | Confidence) -> None:
        super().__init__(building, lambda scored: classifier(scored.images, scored.batch.labels))
        self.ranks = classifier.ranks


class DigitsConfidence:
    """Probability of the label by the classifier of handwritten digits (varfast.data.datasets); it runs on the CPU.

    Raises: InputError if scikit-learn is missing, or if there are not ten labels.
    """

    def __init__(self, num_classes: int | None, key: str) -> None:

        from varfast.data.datasets import DigitsClassifier

        _check_classes("digits", 10, num_classes, key)
        self._classifier = DigitsClassifier()

    def __call__(self, images: Tensor, labels_B: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], (B,) labels -> (B,) in [0, 1]."""
        return self._classifier.confidence(images, labels_B).to(images.device)

    def ranks(self, images: Tensor, labels_B: Tensor) -> Tensor:
        """As `Confidence.ranks`, on the CPU."""
        return self._classifier.ranks(images, labels_B)


class Confidence:
    """Softmax probability of the label by a classifier of torchvision; labels are its classes.

    Args:
        model, weights: names of a model and of its weights in torchvision, as resnet50 and IMAGENET1K_V2.
        file: the weights' path, hf:// or https address; None: where torchvision has them (its cache, or the network).
        device: where it runs.
        batch_size: images at a time.
        num_classes: of the policy, must be that of the classifier; None: not checked.
        key: where the reward stands in the config, for errors.
    Raises: InputError for a name that torchvision does not have, weights that cannot be had or do not fit, or another
        number of classes.
    """

    def __init__(
        self,
        model: str,
        weights: str,
        file: str | None,
        device: torch.device,
        batch_size: int,
        num_classes: int | None,
        key: str,
    ) -> None:
        from varfast.rewards.preprocess import Preprocessing

        entry = _weights_entry(model, weights, key)
        _check_classes(f"{model} {weights}", len(entry.meta["categories"]), num_classes, key)
        network = _from_torchvision(model, entry, key) if file is None else _from_file(model, entry, file, key)
        self._network: Any = network.eval().requires_grad_(False).to(device)
        preset = entry.transforms()
        self._preprocess = Preprocessing(
            preset.resize_size[0],
            preset.crop_size[0],
            "shortest",
            preset.interpolation.value,
            tuple(preset.mean),
            tuple(preset.std),
        )
        self._device = device
        self._batch_size = batch_size

    def __call__(self, images: Tensor, labels_B: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], (B,) labels -> (B,) in [0, 1]."""
        return self._logits(images).softmax(dim=1).gather(1, labels_B.to(self._device).unsqueeze(1)).squeeze(1)

    def ranks(self, images: Tensor, labels_B: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], (B,) labels -> (B,) int64, how many classes it finds likelier than the label."""
        logits_BN = self._logits(images)
        own_B1 = logits_BN.gather(1, labels_B.to(self._device).unsqueeze(1))
        return (~(logits_BN <= own_B1)).sum(dim=1)  # not >: logits that are not numbers would put every label first

    def _logits(self, images: Tensor) -> Tensor:
        import torch

        with torch.no_grad():
            return torch.cat(
                [self._network(self._preprocess(part.to(self._device))) for part in images.split(self._batch_size)]
            )


def _weights_entry(model: str, weights: str, key: str) -> Any:
    try:
        import torchvision
    except ImportError as error:
        raise InputError(f"{key}: this reward needs torchvision; pip install 'varfast[rewards]' ({error})") from error
    models = torchvision.models.list_models(module=torchvision.models)
    if model not in models:
        raise InputError(f"{key}.model={model}: want digits, or a classifier of torchvision{_nearest(model, models)}")
    known = torchvision.models.get_model_weights(model).__members__
    if weights not in known:
        raise InputError(f"{key}.weights={weights}: torchvision has {', '.join(known)} for {model}")
    return known[weights]


def _from_torchvision(model: str, entry: Any, key: str) -> Any:
    import torchvision
    from torch import hub

    try:
        return torchvision.models.get_model(model, weights=entry)
    except (OSError, RuntimeError) as error:
        cached = f"{hub.get_dir()}/checkpoints/{file_name(entry.url)}"
        raise InputError(
            f"{key}: the weights of {model} cannot be fetched from {entry.url}, and are not (whole) in {cached}: "
            f"{error}\n"
            f"  without a network, put the file there, or set {key}.file to its path"
        ) from error


def _from_file(model: str, entry: Any, file: str, key: str) -> Any:
    import torchvision

    from varfast.weights.containers import read_checkpoint

    if model in _CHANGE_THEIR_INPUT:
        raise InputError(f"{key}.file: {model} is only right where torchvision loads its weights; leave file out")
    network = torchvision.models.get_model(model, weights=None)
    # torchvision's names end with the first eight digits of the SHA-256: resnet50-11ad3fa6.pth
    digits = re.search(r"-([0-9a-f]{8})\.pth$", entry.url)
    public = digits is not None and file_name(file) == file_name(entry.url)
    path = fetch(file, f"{key}.file", digits[1] if digits and public else "")
    try:
        network.load_state_dict(read_checkpoint(path))
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"{key}.file={file} does not hold the weights of torchvision's {model}: {str(error)[:300]}"
        ) from error
    return network


def _check_classes(what: str, known: int, num_classes: int | None, key: str) -> None:
    if num_classes is not None and num_classes != known:
        raise InputError(
            f"{key}: {what} tells {known} classes apart, the policy has {num_classes} labels; they must be the same"
        )


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else " (torchvision.models.list_models())"
