"""Labelled images: the handwritten digits of scikit-learn, scenes of shapes, or any folder with a sub-folder for each
class.

Axes: N image; images are (N, 3, H, W) float32 in [0, 1].
"""

from __future__ import annotations

import functools
import hashlib
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from varfast.data.captions import SHAPES
from varfast.data.images import (
    SUFFIXES,
    Listing,
    check_images,
    is_hidden,
    list_images,
    passed_over,
    read_rgb,
    sorted_entries,
)
from varfast.data.shapes import labelled_shapes
from varfast.printable import printable
from varfast.types import InputError

Images = Dataset[tuple[Tensor, ...]]
# Data sets that need no files, by their names in a config: with labels and how many, and with captions.
LABELLED = {"digits": 10, "shapes": len(SHAPES.labels)}
CAPTIONED = ("captioned_digits", "captioned_shapes")

# Brightness of paper and ink of the digits: about one image in eleven is bright by the rule of arXiv:2505.23331 (mean
# luma >= 0.8).
_PAPER = (0.6, 1.0)
_INK_OVER_PAPER = (0.2, 0.75)
# Of an image whose sides have a larger ratio, only the middle is used.
_MOST_LONG = 8


def load_images(
    dataset: str, image_size: int, num_classes: int | None = None, sizes_key: str = "policy.var", check: bool = True
) -> Images:
    """Images and labels for pre-training.

    Args:
        dataset: "digits", "shapes", or a folder with a sub-folder for each class: see FolderImages.
        image_size: side in pixels. Digits come at 8, or at a multiple of 8 by repetition; shapes at 24 or more.
        num_classes: labels of the model, which must be the number of classes; None: not checked.
        sizes_key: where the config has num_classes, for errors.
        check: read every file once, to name all files that cannot be read.
    Raises: InputError if the folder is missing, has another number of classes or an empty one, if files cannot be read,
        or if a package is missing.
    """
    if dataset in LABELLED:
        if num_classes not in (None, LABELLED[dataset]):
            raise InputError(
                f"pretrain.dataset={dataset} has {LABELLED[dataset]} labels, {sizes_key}.num_classes={num_classes}; "
                f"set {sizes_key}.num_classes={LABELLED[dataset]}"
            )
        return TensorDataset(*(digits(image_size) if dataset == "digits" else labelled_shapes(image_size, seed=0)))
    images = FolderImages(str(Path(dataset).expanduser()), image_size)
    if num_classes is not None and len(images.classes) != num_classes:
        raise InputError(_other_number(images, num_classes, f"{sizes_key}.num_classes"))
    if check:
        images.check()
    return images


def _other_number(images: FolderImages, num_classes: int, key: str) -> str:
    count = len(images.classes)
    names = ", ".join(map(printable, images.classes[:5])) + (", ..." if count > 5 else "")
    without = (
        f"labels {count} to {num_classes - 1} would have no image, and a run would draw them all the same"
        if count < num_classes
        else "the last ones would have no label"
    )
    splits = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}
    split = next((name for name in images.classes if name.lower() in splits), None)
    hint = f", or name one of them, as pretrain.dataset={images.folder}/{split}" if split else ""
    return (
        f"pretrain.dataset={images.folder} has {count} class folders ({names}), {key}={num_classes}: "
        f"{without}; set {key}={count}{hint}"
    )


def digits(image_size: int = 8) -> tuple[Tensor, Tensor]:
    """The 1797 handwritten digits of scikit-learn, each with its own shade of ink on its own shade of paper.

    Returns: (1797, 3, image_size, image_size) float32 in [0, 1], (1797,) int64 labels. The shades are fixed.
    Source: E. Alpaydin and C. Kaynak, Optical recognition of handwritten digits, UCI, 1998.
    """
    if image_size % 8:
        raise InputError(f"the digits are 8 pixels wide; an image side of {image_size} is no multiple of 8")
    strokes_NHW, labels_N = load_strokes()
    rng = np.random.RandomState(0)
    paper_N = torch.from_numpy(rng.uniform(*_PAPER, len(labels_N)).astype(np.float32))
    ink_N = paper_N * torch.from_numpy(rng.uniform(*_INK_OVER_PAPER, len(labels_N)).astype(np.float32))
    images_NHW = paper_N[:, None, None] + (ink_N - paper_N)[:, None, None] * strokes_NHW
    repeat = image_size // 8
    images_NHW = images_NHW.repeat_interleave(repeat, dim=1).repeat_interleave(repeat, dim=2)
    return images_NHW.unsqueeze(1).repeat(1, 3, 1, 1), labels_N


def load_strokes() -> tuple[Tensor, Tensor]:
    """The 1797 handwritten digits of scikit-learn: (N, 8, 8) float32, 1 where there is ink, and (N,) int64 labels.

    Raises: InputError if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("the digits come with scikit-learn; pip install 'varfast[demo]'") from error
    data = load_digits()
    return torch.from_numpy(data.images.astype(np.float32) / 16.0), torch.from_numpy(data.target.astype(np.int64))


class FolderImages(Dataset[tuple[Tensor, ...]]):
    """A folder with a sub-folder for each class. Labels number the sub-folders in natural order: 2 before 10.

    Hidden folders are skipped. Images may lie at any depth of a class folder; suffixes may be in upper case. An image
    is resized to 9/8 of image_size (shorter side, Lanczos) and cropped at random.

    Attributes:
        folder: of the data set.
        classes: names of the sub-folders in the order of the labels.
        counts: number of images of each class.
        notes: lines that tell the user how the folder was read.

    Raises: InputError if there are no class folders, one holds no images, or a file cannot be read.
    """

    def __init__(self, folder: str, image_size: int) -> None:
        self.folder, self._size = folder, image_size
        self.classes = class_folders(folder)
        listings = [list_images(os.path.join(folder, name)) for name in self.classes]
        self.counts = [len(listing.files) for listing in listings]
        empty = [n for n, found in zip(self.classes, listings, strict=True) if not (found.files or found.troubles)]
        if empty:
            others = passed_over(listings)
            raise InputError(
                f"pretrain.dataset={folder}: no images in {', '.join(map(printable, empty[:10]))}"
                f"{f' and {len(empty) - 10} more' if len(empty) > 10 else ''}; every sub-folder is a label. Put images "
                f"there ({', '.join(SUFFIXES)}), or delete it{f'. Files that are not read: {others}' if others else ''}"
            )
        self._files = [(f.path, label) for label, found in enumerate(listings) for f in found.files]
        self._listing = Listing(
            [f for found in listings for f in found.files], [t for found in listings for t in found.troubles]
        )
        self.notes = _notes(folder, self.classes, listings)

    def check(self) -> None:
        """Read every file once. Raises: InputError as images.check_images."""
        check_images(f"pretrain.dataset={self.folder}", self._listing)

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Label of each class folder, named as in torchvision."""
        return {name: label for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, label = self._files[index]
        picture = read_rgb(path, f"pretrain.dataset={self.folder}")
        return random_crop(picture, self._size), torch.tensor(label)


def class_folders(folder: str) -> list[str]:
    """Names of the class folders of a data set, in the order of the labels.

    Raises: InputError if there are none.
    """
    where = f"pretrain.dataset={folder}"
    if os.path.isfile(folder):
        raise InputError(f"{where}: a file; want a folder with a sub-folder a class (unpack an archive first)")
    if not os.path.isdir(folder):
        captions = "; captions are for a model that is conditioned on text" if folder in CAPTIONED else ""
        raise InputError(
            f"{where}: no such folder; want 'digits', 'shapes' or a folder with a sub-folder a class{captions}"
        )
    try:
        entries = [entry for entry in sorted_entries(folder) if not is_hidden(entry.name)]
        gone = [entry.name for entry in entries if entry.is_symlink() and not os.path.exists(entry.path)]
        found = [entry.name for entry in entries if entry.name not in gone and entry.is_dir()]
    except OSError as error:
        raise InputError(f"{where}: the folder cannot be read: {error.strerror}; mend its rights") from error
    odd = [f"{name} is a link to nothing" for name in map(printable, gone)]
    odd += [f"{printable(n)} is a folder with the name of an image" for n in found if n.lower().endswith(SUFFIXES)]
    if odd:
        raise InputError(
            f"{where}: {'; '.join(odd[:10])}. A label less would shift all others: delete it or replace it"
        )
    if not found:
        loose = sum(entry.name.lower().endswith(SUFFIXES) for entry in entries)
        advice = (
            f"{loose} images lie in it directly; for a model with one label, put them all into one sub-folder, and set "
            "num_classes=1 among the sizes of the policy"
            if loose
            else "every sub-folder with images is a label"
        )
        raise InputError(f"{where}: no class folders in it; {advice}")
    return found


def _notes(folder: str, classes: list[str], listings: list[Listing]) -> list[str]:
    notes = []
    by_sight: dict[str, str] = {}
    for name in classes:
        other = by_sight.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            notes.append(f"{printable(other)} and {printable(name)} look alike and are two labels")
    for entry in sorted_entries(folder):
        if is_hidden(entry.name) and entry.is_dir():
            notes.append(f"{printable(entry.name)} is passed over: a hidden folder is no class")
    loose = sum(e.name.lower().endswith(SUFFIXES) and not is_hidden(e.name) and not e.is_dir()
                for e in sorted_entries(folder))  # fmt: skip
    if loose:
        notes.append(f"{loose} images beside the class folders belong to no class and are not read")
    if others := passed_over(listings):
        notes.append(f"files in class folders that are not read: {others}")
    return notes


def random_crop(picture: Image.Image, size: int) -> Tensor:
    """(3, size, size) in [0, 1]: pixels and random numbers are those of torchvision's Resize, RandomCrop, ToTensor."""
    width, height = picture.size
    if max(width, height) > _MOST_LONG * min(width, height):  # a line of pixels would be resized to gigabytes
        left, top = (max(0, side - _MOST_LONG * min(width, height)) // 2 for side in (width, height))
        picture = picture.crop((left, top, width - left, height - top))
        width, height = picture.size
    short = round(size * 9 / 8)
    scaled = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    picture = picture.resize(scaled, Image.Resampling.LANCZOS)
    top, left = (
        int(torch.randint(0, room + 1, (1,))) if scaled != (size, size) else 0
        for room in (scaled[1] - size, scaled[0] - size)
    )
    pixels_HW3 = np.array(picture.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels_HW3).permute(2, 0, 1).contiguous().float().div(255.0)


def fingerprint(dataset: str) -> str:
    """Identifies the content of a data set: order of its labels, and names, sizes and times of its images."""
    if dataset in LABELLED:
        return dataset
    digest = hashlib.sha256()
    folder = str(Path(dataset).expanduser())
    for label, name in enumerate(class_folders(folder)):
        digest.update(b"label %d %s\n" % (label, os.fsencode(name)))
        for file in list_images(os.path.join(folder, name)).files:
            digest.update(os.fsencode(file.path[len(folder) :]) + b" %d %d\n" % (file.bytes, file.modified_ns))
    return digest.hexdigest()


class DigitsClassifier:
    """Classifies digits of any shade: a support vector machine, fitted to scikit-learn's digits.

    Each image is first scaled to ink 1 on paper 0, so that its shades carry no information.

    Args:
        strokes: what it is fitted to in place of them: (N, S, S), 1 where there is ink, and (N,) labels. Images are
            resized to S x S pixels.
    """

    def __init__(self, strokes: tuple[Tensor, Tensor] | None = None) -> None:
        self._strokes_NSS, self._labels_N = load_strokes() if strokes is None else strokes
        from sklearn.svm import SVC

        self._model = SVC(C=10.0, gamma=0.02).fit(self._features(self._strokes_NSS), self._labels_N.numpy())

    @staticmethod
    def _features(ink_NHW: Tensor) -> np.ndarray:
        low = ink_NHW.amin(dim=(1, 2), keepdim=True)
        high = ink_NHW.amax(dim=(1, 2), keepdim=True)
        features: np.ndarray = ((ink_NHW - low) / (high - low).clamp_min(1e-6)).flatten(1).numpy() * 4.0
        return features

    def _image_features(self, images: Tensor) -> np.ndarray:
        size = tuple(self._strokes_NSS.shape[1:])
        small = torch.nn.functional.interpolate(images.float().cpu(), size=size, mode="area")
        return self._features(-small.mean(dim=1))

    def accuracy(self, images: Tensor, labels_N: Tensor) -> float:
        """Fraction of (N, 3, H, W) images in [0, 1] that are classified as their label."""
        predicted = self._model.predict(self._image_features(images))
        return float((predicted == labels_N.cpu().numpy()).mean())

    def confidence(self, images: Tensor, labels_N: Tensor) -> Tensor:
        """(N, 3, H, W) images in [0, 1] -> (N,) float32 probability of each image's label, on the CPU."""
        return self.probabilities(images).gather(1, labels_N.cpu().unsqueeze(1)).squeeze(1).float()

    def probabilities(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) images in [0, 1] -> (N, 10) float64, on the CPU."""
        return torch.from_numpy(self._calibrated.predict_proba(self._image_features(images)))

    def ranks(self, images: Tensor, labels_N: Tensor) -> Tensor:
        """(N, 3, H, W) images in [0, 1] -> (N,) int64, how many digits rank before the label; 0: classified as it."""
        features, labels_N = self._image_features(images), labels_N.cpu()
        margins = torch.from_numpy(self._model.decision_function(features))
        ranks_N = (margins > margins.gather(1, labels_N.unsqueeze(1))).sum(dim=1)
        # The machine decides by 45 pairs of digits and breaks ties by order; its margins break them by distance.
        read_N = torch.from_numpy(self._model.predict(features)) == labels_N
        return torch.where(read_N, 0, ranks_N.clamp_min(1))

    @functools.cached_property
    def _calibrated(self) -> Any:
        # The machine's margins, made probabilities by a logistic curve for each class, fitted to held-out fifths.
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.svm import SVC

        calibrated = CalibratedClassifierCV(SVC(C=10.0, gamma=0.02), ensemble=False)
        return calibrated.fit(self._features(self._strokes_NSS), self._labels_N.numpy())
