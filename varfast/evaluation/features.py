"""The real images that samples are compared with.

Axes: M real image, D feature. Levels are uint8 (., 3, H, W).
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from varfast.data.images import check_images
from varfast.evaluation.metrics import statistics, thinned
from varfast.features.images import is_folder, listed, of_archive, of_digits, of_folder
from varfast.features.networks import Network
from varfast.features.statistics import Statistics, read_statistics
from varfast.types import InputError
from varfast.weights.containers import Arrays
from varfast.weights.files import regular_file
from varfast.weights.hub import one_line

_KEY = "fid_reference"


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
        batches = of_digits(image_size)
    elif is_folder(address):
        batches = of_folder(Path(address).expanduser(), image_size, _KEY)
    else:
        path = regular_file(address, _KEY, "a folder of images, an .npz or digits")
        known, batches = _archive(path, network, image_size)
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
        check_images(f"{_KEY}={path}", listed(path, _KEY))
    elif address != "digits" and not path.is_file():
        raise InputError(f"fid_reference={address}: no such file or folder; want a folder of images, an .npz or digits")
    elif address != "digits" and not zipfile.is_zipfile(path):
        raise InputError(f"fid_reference={address} is no .npz; want a folder of images, an .npz or digits")


def _archive(path: Path, network: Network, image_size: int) -> tuple[Statistics | None, Iterator[Tensor]]:
    where = f"{_KEY}={path}"
    with Arrays(path, _KEY) as arrays:
        names, known = arrays.names, None
        if {"mu", "sigma"} <= names:
            known = read_statistics(arrays, where, network.name, network.width)
        if known is None and "arr_0" not in names:
            held = one_line(", ".join(sorted(names)), 200) or "nothing named"
            raise InputError(f"{where} holds {held}; want arr_0, or mu and sigma")
    return known, of_archive(path, image_size, _KEY) if "arr_0" in names else iter(())
