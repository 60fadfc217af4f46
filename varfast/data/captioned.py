"""Captioned images, to pre-train a model that is conditioned on text: scenes of digits or shapes, or one's own folder.

Such a data set gives an image and the row of its caption, as a labelled one gives its label; `texts` are the captions,
each once.

Axes: N image; images are (N, 3, H, W) float32 in [0, 1].
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from varfast.data.datasets import CAPTIONED, random_crop
from varfast.data.images import SUFFIXES, ImageFile, Listing, check_images, read_rgb
from varfast.data.scenes import captioned_scenes
from varfast.data.shapes import captioned_shapes
from varfast.files import parse_json, read_text
from varfast.printable import printable
from varfast.types import InputError

_SCENES_A_CAPTION = {"captioned_digits": 20, "captioned_shapes": 40}
METADATA_FILE = "metadata.jsonl"
_EXAMPLE = '{"file_name": "cat.png", "text": "a cat"}'
_MOST_LETTERS = 20_000


class CaptionedScenes(TensorDataset):
    """Scenes of digits or shapes, a function of the seed.

    Attributes:
        texts: captions by row.
    """

    def __init__(self, dataset: str, image_size: int, seed: int) -> None:
        draw = {"captioned_digits": captioned_scenes, "captioned_shapes": captioned_shapes}[dataset]
        images, rows_N, self.texts = draw(_SCENES_A_CAPTION[dataset], image_size, seed)
        super().__init__(images, rows_N)


class CaptionedFolder(Dataset[tuple[Tensor, ...]]):
    """A folder with metadata.jsonl, the imagefolder convention of the package datasets: a line an image.

    Images are resized and cropped as those of varfast.data.datasets.FolderImages.

    Attributes:
        folder: of the data set.
        texts: captions by row, each once, in the order in which they first come.
    Raises: InputError for a metadata.jsonl that is missing, is not lines of file_name and text, or names a file that is
        missing or outside of the folder.
    """

    def __init__(self, folder: str, image_size: int) -> None:
        self.folder, self._size = folder, image_size
        rows: dict[str, int] = {}
        self._files = [(file, rows.setdefault(text, len(rows))) for file, text in _captions(folder)]
        self.texts = list(rows)

    def check(self) -> None:
        """Read every file once. Raises: InputError as images.check_images."""
        check_images(f"pretrain.dataset={self.folder}", Listing([file for file, _ in self._files]))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        file, row = self._files[index]
        return random_crop(read_rgb(file.path, f"pretrain.dataset={self.folder}"), self._size), torch.tensor(row)


Captioned = CaptionedScenes | CaptionedFolder


def load_captioned(dataset: str, image_size: int, seed: int, check: bool = True) -> Captioned:
    """Images and rows of captions for pre-training.

    Args:
        dataset: "captioned_digits", "captioned_shapes", or a folder with metadata.jsonl.
        image_size: side in pixels; of the digits a multiple of 12, of the shapes at least 24.
        seed: of the run, for the scenes.
        check: read every file once, to name all files that cannot be read.
    Raises: InputError as CaptionedFolder, varfast.data.scenes.draw_scene and varfast.data.shapes.draw_shapes.
    """
    if dataset in CAPTIONED:
        return CaptionedScenes(dataset, image_size, seed)
    images = CaptionedFolder(str(Path(dataset).expanduser()), image_size)
    if check:
        images.check()
    return images


def captions_fingerprint(dataset: str) -> str:
    """Identifies the content of a captioned data set: captions, names, sizes and times of its images."""
    if dataset in CAPTIONED:
        return dataset
    digest = hashlib.sha256()
    folder = str(Path(dataset).expanduser())
    for file, text in _captions(folder):
        name = os.fsencode(os.path.relpath(file.path, folder))
        digest.update(repr((name, file.bytes, file.modified_ns, text)).encode())
    return digest.hexdigest()


def _captions(folder: str) -> Iterator[tuple[ImageFile, str]]:
    """The lines of metadata.jsonl."""
    where, path = f"pretrain.dataset={folder}", Path(folder) / METADATA_FILE
    if not path.is_file():
        raise InputError(
            f"{where}: no {METADATA_FILE} in it; a model that is conditioned on text is pre-trained on "
            f"{' or '.join(map(repr, CAPTIONED))}, or on a folder whose {METADATA_FILE} has a line an image, as "
            f"{_EXAMPLE}"
        )
    found = False
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            found = True
            yield _caption(folder, line, f"{path}, line {number}")
    if not found:
        raise InputError(f"{path} is empty; want a line an image, as {_EXAMPLE}")


def _caption(folder: str, line: str, where: str) -> tuple[ImageFile, str]:
    try:
        row: Any = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {printable(error)}; want {_EXAMPLE}") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file_name", "text")):
        raise InputError(f"{where} is {printable(line)}; want file_name and text, as {_EXAMPLE}")
    name, text = row["file_name"], row["text"].strip()
    if not text or len(text) > _MOST_LETTERS:
        raise InputError(f"{where}: the text has {len(text)} letters; want 1 to {_MOST_LETTERS}")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise InputError(f"{where}: file_name={printable(repr(name))} leads out of the folder; want a path within it")
    if not name.lower().endswith(SUFFIXES):
        raise InputError(f"{where}: file_name={printable(repr(name))} is no image; want one of {', '.join(SUFFIXES)}")
    path = os.path.join(folder, name)
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {printable(path)} cannot be read: {printable(error)}") from error
    return ImageFile(path, status.st_size, status.st_mtime_ns), text
