"""Labelled images: the handwritten digits of scikit-learn, and any folder with one sub-folder a class.

Axes: N image; images are (N, 3, H, W) float32 in [0, 1].
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from varfast.types import InputError

Images = Dataset[tuple[Tensor, ...]]

# Ink and paper of the drawn digits: about one in eleven images is bright by the paper's rule (mean luma >= 0.8).
_PAPER = (0.6, 1.0)
_INK_OVER_PAPER = (0.2, 0.75)


def load_images(dataset: str, image_size: int) -> Images:
    """Images and labels for pre-training.

    Args:
        dataset: "digits", or a folder with one sub-folder a class; labels follow the sub-folders' sorted names.
        image_size: side in pixels. Digits come at 8, or at a multiple of 8 by repetition; other images are resized
            (shorter side, Lanczos) to 9/8 of it and cropped at random.
    Raises: InputError if the folder is missing or holds no images, or if a package is missing.
    """
    if dataset == "digits":
        return TensorDataset(*digits(image_size))
    return _image_folder(Path(dataset).expanduser(), image_size)


def digits(image_size: int = 8) -> tuple[Tensor, Tensor]:
    """The 1797 handwritten digits of scikit-learn, each drawn in its own shade of ink on its own shade of paper.

    Returns: (1797, 3, image_size, image_size) float32 in [0, 1], (1797,) int64 labels. The shades are fixed.
    Source: E. Alpaydin and C. Kaynak, Optical recognition of handwritten digits, UCI, 1998.
    """
    if image_size % 8:
        raise InputError(f"the digits are 8 pixels wide; an image side of {image_size} is no multiple of 8")
    strokes_NHW, labels_N = _load_digits()
    rng = np.random.RandomState(0)
    paper_N = torch.from_numpy(rng.uniform(*_PAPER, len(labels_N)).astype(np.float32))
    ink_N = paper_N * torch.from_numpy(rng.uniform(*_INK_OVER_PAPER, len(labels_N)).astype(np.float32))
    images_NHW = paper_N[:, None, None] + (ink_N - paper_N)[:, None, None] * strokes_NHW
    repeat = image_size // 8
    images_NHW = images_NHW.repeat_interleave(repeat, dim=1).repeat_interleave(repeat, dim=2)
    return images_NHW.unsqueeze(1).repeat(1, 3, 1, 1), labels_N


def _load_digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("the digits come with scikit-learn; pip install 'varfast[demo]'") from error
    data = load_digits()
    return torch.from_numpy(data.images.astype(np.float32) / 16.0), torch.from_numpy(data.target.astype(np.int64))


def _image_folder(folder: Path, image_size: int) -> Images:
    if not folder.is_dir():
        raise InputError(
            f"pretrain.dataset={folder}: no such folder; want 'digits' or a folder with a sub-folder a class"
        )
    try:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise InputError(
            f"images in a folder are read by torchvision; pip install 'varfast[images]' ({error})"
        ) from error
    transform = transforms.Compose(
        [
            transforms.Resize(round(image_size * 9 / 8), interpolation=transforms.InterpolationMode.LANCZOS),
            transforms.RandomCrop(image_size),
            transforms.ToTensor(),
        ]
    )
    try:
        images: Images = ImageFolder(str(folder), transform, target_transform=torch.tensor)
    except FileNotFoundError as error:
        raise InputError(f"pretrain.dataset={folder}: {error}") from error
    return images


def fingerprint(dataset: str) -> str:
    """What the content of a data set is known by: names, sizes and times of its files."""
    if dataset == "digits":
        return "digits"
    digest = hashlib.sha256()
    folder = Path(dataset).expanduser()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class DigitsClassifier:
    """Reads digits of any shade: a support vector machine fitted to the real ones, whatever ink and paper.

    Each image is scaled to ink 1 on paper 0 first, so that its shades carry no information.
    """

    def __init__(self) -> None:
        strokes_NHW, labels_N = _load_digits()
        from sklearn.svm import SVC

        self._model = SVC(C=10.0, gamma=0.02).fit(self._features(strokes_NHW), labels_N.numpy())

    @staticmethod
    def _features(ink_NHW: Tensor) -> np.ndarray:
        low = ink_NHW.amin(dim=(1, 2), keepdim=True)
        high = ink_NHW.amax(dim=(1, 2), keepdim=True)
        features: np.ndarray = ((ink_NHW - low) / (high - low).clamp_min(1e-6)).flatten(1).numpy() * 4.0
        return features

    @classmethod
    def _image_features(cls, images: Tensor) -> np.ndarray:
        small = torch.nn.functional.interpolate(images.float().cpu(), size=(8, 8), mode="area")
        return cls._features(-small.mean(dim=1))

    def accuracy(self, images: Tensor, labels_N: Tensor) -> float:
        """Share of (N, 3, H, W) images in [0, 1] that are read as their label."""
        predicted = self._model.predict(self._image_features(images))
        return float((predicted == labels_N.cpu().numpy()).mean())

    def confidence(self, images: Tensor, labels_N: Tensor) -> Tensor:
        """(N, 3, H, W) images in [0, 1] -> (N,) float32, probability of each one's label, on the CPU."""
        return self.probabilities(images).gather(1, labels_N.cpu().unsqueeze(1)).squeeze(1).float()

    def probabilities(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) images in [0, 1] -> (N, 10) float64, on the CPU."""
        return torch.from_numpy(self._calibrated.predict_proba(self._image_features(images)))

    def ranks(self, images: Tensor, labels_N: Tensor) -> Tensor:
        """(N, 3, H, W) images in [0, 1] -> (N,) int64, how many digits come before the label; 0: read as it."""
        features, labels_N = self._image_features(images), labels_N.cpu()
        margins = torch.from_numpy(self._model.decision_function(features))
        ranks_N = (margins > margins.gather(1, labels_N.unsqueeze(1))).sum(dim=1)
        # Ten digits play 45 pairs; the machine breaks ties of won pairs by order, its margins by distance.
        read_N = torch.from_numpy(self._model.predict(features)) == labels_N
        return torch.where(read_N, 0, ranks_N.clamp_min(1))

    @functools.cached_property
    def _calibrated(self) -> Any:
        # The machine's own margins, turned into probabilities by a logistic curve a class, fitted to held-out fifths.
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.svm import SVC

        strokes_NHW, labels_N = _load_digits()
        calibrated = CalibratedClassifierCV(SVC(C=10.0, gamma=0.02), ensemble=False)
        return calibrated.fit(self._features(strokes_NHW), labels_N.numpy())
