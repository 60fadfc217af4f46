"""Features of images, and the real images that samples are compared with.

Axes: B image of a batch, M real image, D feature, K class; H, W pixels. Levels are uint8 (., 3, H, W).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from varfast.data.datasets import DigitsClassifier, digits
from varfast.data.images import SUFFIXES, Listing, check_images, list_images, passed_over, read_rgb
from varfast.evaluation.metrics import Statistics, check_installed, statistics, thinned
from varfast.rewards.files import fetch, file_name
from varfast.types import InputError
from varfast.weights.containers import Arrays, read_checkpoint
from varfast.weights.files import regular_file
from varfast.weights.hub import one_line

_BATCH_IMAGES = 64
_INCEPTION_SHA256 = "6726825d"  # torch-fidelity names the file by its first digits


def to_levels(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> uint8, as a PNG stores them."""
    return images.float().clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)


class Inception:
    """Inception-v3 of the FID paper, from torch-fidelity: with TensorFlow's weights and its way to resize.

    Args:
        weights: path, hf:// or https address; None: torch-fidelity's public file.
        device: where it runs.
    Raises: InputError if the library is missing, or if the weights cannot be loaded or do not fit.
    """

    width = 2048

    def __init__(self, weights: str | None, device: torch.device) -> None:
        check_installed()
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        address = weights or URL_INCEPTION_V3
        public = file_name(address) == file_name(URL_INCEPTION_V3)
        path = fetch(address, "inception_weights", _INCEPTION_SHA256 if public else "")
        read_checkpoint(path)  # refuses pickles with code, which the library would run
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"inception_weights={address} does not hold torch-fidelity's Inception-v3: {str(error)[:300]}"
            ) from error
        self._network: Any = network.to(device)
        self._device = device

    @torch.no_grad()
    def __call__(self, levels: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(B, 3, H, W) uint8 -> features (B, 2048) and logits (B, 1008), float32."""
        features_BD, logits_BK = self._network(levels.to(self._device))
        return features_BD.cpu().numpy(), logits_BK.cpu().numpy()


class DigitsPixels:
    """For tiny models, without weights: 8 x 8 grey levels as features, a classifier of handwritten digits for logits.

    Raises: InputError if a library is missing.
    """

    width = 64

    def __init__(self) -> None:
        check_installed()
        self._classifier = DigitsClassifier()

    def __call__(self, levels: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(B, 3, H, W) uint8 -> features (B, 64) and logits (B, 10), float64."""
        images = levels.cpu().double() / 255.0
        grey_BHW = torch.nn.functional.interpolate(images, size=(8, 8), mode="area").mean(dim=1)
        logits_BK = self._classifier.probabilities(images).clamp_min(1e-12).log()
        return grey_BHW.flatten(1).numpy(), logits_BK.numpy()


Network = Inception | DigitsPixels


def load_network(name: Literal["inception", "digits"], weights: str | None, device: torch.device) -> Network:
    """Raises: InputError as the networks."""
    return DigitsPixels() if name == "digits" else Inception(weights, device)


@dataclass(frozen=True)
class RealImages:
    """Real images that samples are compared with.

    Attributes:
        statistics: of the features of all its images.
        features_MD: of at most 10 000 of them; None if only the statistics are known.
        count: number of images; None if only the statistics are known.
    """

    statistics: Statistics
    features_MD: np.ndarray | None
    count: int | None


def load_real_images(address: str, network: Network, image_size: int) -> RealImages:
    """Features of real images.

    Args:
        address: 'digits'; or a folder of images at any depth, which are resized to image_size (shorter side, Lanczos)
            and cropped at the centre; or an .npz. That has arr_0, uint8 (M, image_size, image_size, 3), or mu and
            sigma, or both: then FID uses mu and sigma, and everything else uses arr_0, as for ADM's reference batches.
        network: computes the features.
    Raises: InputError if there are no images, a file is broken, or the statistics are of other features.
    """
    known = None
    if address == "digits":
        batches = iter(to_levels(digits(image_size)[0]).split(_BATCH_IMAGES))
    elif os.path.isdir(os.path.expanduser(address)):  # unlike Path.is_dir, no error for text that cannot be a path
        batches = _folder(Path(address).expanduser(), image_size)
    else:
        path = regular_file(address, "fid_reference", "a folder of images, an .npz or digits")
        known, batches = _archive(path, network.width, image_size)
    features = [network(levels)[0] for levels in batches]
    if not features:
        assert known is not None
        return RealImages(known, None, None)
    features_MD = np.concatenate(features)
    return RealImages(known or statistics(features_MD), thinned(features_MD), len(features_MD))


def check_real_images(address: str) -> None:
    """Check that the real images are there and can be read, without computing anything.

    Raises: InputError as load_real_images, except for what depends on the network.
    """
    path = Path(address).expanduser()
    if path.is_dir():
        check_images(f"fid_reference={path}", _listed(path))
    elif address != "digits" and not path.is_file():
        raise InputError(f"fid_reference={address}: no such file or folder; want a folder of images, an .npz or digits")


def _listed(folder: Path) -> Listing:
    found = list_images(str(folder))
    if not found.files and not found.troubles:
        others = passed_over([found])
        raise InputError(
            f"fid_reference={folder}: no images in it; want {', '.join(SUFFIXES)} files, at any depth"
            + (f". Files that are not read: {others}" if others else "")
        )
    if len(found.files) + len(found.troubles) < 2:
        raise InputError(f"fid_reference={folder}: one image in it; a covariance needs two at least")
    return found


def _folder(folder: Path, image_size: int) -> Iterator[Tensor]:
    found = _listed(folder)
    if found.troubles:
        check_images(f"fid_reference={folder}", found)
    with ThreadPoolExecutor(8) as pool:
        for first in range(0, len(found.files), _BATCH_IMAGES):
            part = found.files[first : first + _BATCH_IMAGES]
            yield torch.stack(list(pool.map(lambda file: _read_image(file.path, image_size), part)))


def _read_image(path: str, image_size: int) -> Tensor:
    picture = ImageOps.fit(read_rgb(path, "fid_reference"), (image_size, image_size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _archive(path: Path, width: int, image_size: int) -> tuple[Statistics | None, Iterator[Tensor]]:
    where = f"fid_reference={path}"
    with Arrays(path, "fid_reference") as arrays:
        names, known = arrays.names, None
        if {"mu", "sigma"} <= names:
            shapes = {name: arrays.shape(name) for name in ("mu", "sigma")}
            if shapes != {"mu": (width,), "sigma": (width, width)}:
                raise InputError(
                    f"{where}: mu {shapes['mu']} and sigma {shapes['sigma']} are statistics of other features; these "
                    f"are {width} wide. Choose other features, or give the images"
                )
            known = Statistics(arrays.read("mu", (width,)), arrays.read("sigma", (width, width)))
        if known is None and "arr_0" not in names:
            held = one_line(", ".join(sorted(names)), 200) or "nothing named"
            raise InputError(f"{where} holds {held}; want arr_0, or mu and sigma")
    return known, _stored_images(path, image_size) if "arr_0" in names else iter(())


def _stored_images(path: Path, image_size: int) -> Iterator[Tensor]:
    """The images of arr_0, batch by batch: 50 000 images of 512 x 512 pixels would take 39 GB."""
    side = image_size
    with Arrays(path, "fid_reference") as arrays, arrays.open("arr_0") as (file, shape, dtype, fortran_order):
        if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[1:] != (side, side, 3):
            raise InputError(f"fid_reference={path}: arr_0 is {dtype} {shape}, want uint8 (images, {side}, {side}, 3), "
                             "or a folder of images, which are resized")  # fmt: skip
        if shape[0] < 2:
            raise InputError(f"fid_reference={path}: {shape[0]} images in it; a covariance needs two at least")
        for first in range(0, shape[0], _BATCH_IMAGES):
            count = min(_BATCH_IMAGES, shape[0] - first)
            pixels = np.frombuffer(file.read(count * side * side * 3), np.uint8).reshape(count, side, side, 3)
            yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)
        file.read(1)  # zipfile compares the CRC at the end of the file
