"""Real images, batch by batch: of a folder, of an .npz, or the digits.

Axes: M real image; H, W pixels. Levels are uint8 (., 3, H, W).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from varfast.data.datasets import digits
from varfast.data.images import SUFFIXES, Listing, check_images, list_images, passed_over, read_rgb
from varfast.features.networks import to_levels
from varfast.types import InputError
from varfast.weights.containers import Arrays

BATCH_IMAGES = 64
DIGITS = 1797  # images of scikit-learn


def is_folder(address: str) -> bool:
    return os.path.isdir(os.path.expanduser(address))  # unlike Path.is_dir, no error for text that cannot be a path


def listed(folder: Path, key: str) -> Listing:
    """The images of a folder, at any depth. Raises: InputError if there are fewer than two."""
    found = list_images(str(folder))
    if not found.files and not found.troubles:
        others = passed_over([found])
        raise InputError(
            f"{key}={folder}: no images in it; want {', '.join(SUFFIXES)} files, at any depth"
            + (f". Files that are not read: {others}" if others else "")
        )
    if len(found.files) + len(found.troubles) < 2:
        raise InputError(f"{key}={folder}: one image in it; a covariance needs two at least")
    return found


def of_digits(image_size: int) -> Iterator[Tensor]:
    """Levels of the handwritten digits, of which varfast.data.datasets.digits makes images."""
    yield from to_levels(digits(image_size)[0]).split(BATCH_IMAGES)


def of_folder(folder: Path, image_size: int, key: str) -> Iterator[Tensor]:
    """Levels of the images of a folder, resized to image_size (shorter side, Lanczos) and cropped at the centre.

    Raises: InputError, which names `key`, if there are no images, or some cannot be read.
    """
    found = listed(folder, key)
    if found.troubles:
        check_images(f"{key}={folder}", found)
    with ThreadPoolExecutor(8) as pool:
        for first in range(0, len(found.files), BATCH_IMAGES):
            part = found.files[first : first + BATCH_IMAGES]
            yield torch.stack(list(pool.map(lambda file: _read_image(file.path, image_size, key), part)))


def _read_image(path: str, image_size: int, key: str) -> Tensor:
    picture = ImageOps.fit(read_rgb(path, key), (image_size, image_size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def of_archive(path: Path, image_size: int, key: str) -> Iterator[Tensor]:
    """Levels of arr_0, batch by batch: 50 000 images of 512 x 512 pixels would take 39 GB.

    Raises: InputError, which names `key`, unless arr_0 is uint8 (M, image_size, image_size, 3) with two images or more.
    """
    side = image_size
    with Arrays(path, key) as arrays, arrays.open("arr_0") as (file, shape, dtype, fortran_order):
        if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[1:] != (side, side, 3):
            raise InputError(f"{key}={path}: arr_0 is {dtype} {shape}, want uint8 (images, {side}, {side}, 3), "
                             "or a folder of images, which are resized")  # fmt: skip
        if shape[0] < 2:
            raise InputError(f"{key}={path}: {shape[0]} images in it; a covariance needs two at least")
        for first in range(0, shape[0], BATCH_IMAGES):
            count = min(BATCH_IMAGES, shape[0] - first)
            pixels = np.frombuffer(file.read(count * side * side * 3), np.uint8).reshape(count, side, side, 3)
            yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)
        file.read(1)  # zipfile compares the CRC at the end of the file
