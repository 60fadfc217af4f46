"""Statistics of real images from where a config says: the digits, a folder, an .npz of images or of statistics.

Axes: D feature. Levels are uint8 (., 3, H, W).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from varfast.features.images import BATCH_IMAGES, DIGITS, is_folder, listed, of_archive, of_digits, of_folder
from varfast.features.networks import Network
from varfast.features.statistics import Statistics, Summing, read_statistics, save_statistics
from varfast.files import WriteError
from varfast.progress import Progress
from varfast.types import InputError
from varfast.weights.containers import Arrays
from varfast.weights.files import regular_file
from varfast.weights.hub import one_line

WANTED = "a folder of images, an .npz with arr_0 or with mu and sigma, or digits"


def reference_statistics(
    address: str, network: Network, image_size: int, key: str, cache: Path, batch_size: int
) -> Statistics:
    """Mean and covariance of the features of real images.

    Those of a folder, or of images in an .npz, are computed once and kept: in cache/<hash>.npz, by a hash of the files'
    names, sizes and times, of the features, and of image_size.

    Args:
        address: 'digits'; a folder of images at any depth, which are resized to image_size (shorter side, Lanczos) and
            cropped at the centre; or an .npz with mu and sigma, or with images of that size as arr_0.
        key: where the address stands in the config, for errors.
        cache: a folder; if it cannot be written, nothing is kept.
        batch_size: images that the network gets at a time.
    Raises: InputError for what cannot be read or is too little, and for statistics of other features.
    """
    path = None if address == "digits" or is_folder(address) else regular_file(address, key, WANTED)
    if path is not None:
        with Arrays(path, key) as arrays:
            if {"mu", "sigma"} <= arrays.names:
                return read_statistics(arrays, f"{key}={path}", network.name, network.width)
    if address == "digits":  # quicker than a cache
        return computed_statistics(address, network, image_size, key, batch_size)
    kept = cache / f"{_identity(address, path, network, image_size, key)}.npz"
    if kept.is_file():
        try:
            with Arrays(kept, "statistics") as arrays:
                return read_statistics(arrays, str(kept), network.name, network.width)
        except (InputError, KeyError) as error:
            print(f"statistics of real images in {kept} are made again: {one_line(str(error), 300)}")
    found = computed_statistics(address, network, image_size, key, batch_size)
    try:
        save_statistics(kept, found, network.name)
    except WriteError as error:
        print(f"statistics of real images are not kept: {error}")
    return found


def computed_statistics(address: str, network: Network, image_size: int, key: str, batch_size: int) -> Statistics:
    """As reference_statistics, of images alone, without a cache. Raises: InputError as it, and for no images."""
    count, batches = _images(address, image_size, key)
    summing = Summing()
    batch_count, quiet = -(-count // BATCH_IMAGES), address == "digits"
    with Progress(f"{network.name} features of {count} images", batch_count, unit="batch", quiet=quiet) as progress:
        for levels in batches:
            for part in levels.split(batch_size):
                summing.add(network.features(part))
            progress.update()
    found = summing.statistics()
    if not np.isfinite(found.mu_D).all() or not np.isfinite(found.sigma_DD).all():
        raise InputError(
            f"{key}={address}: {network.name} features of these images are not finite; the network's weights are "
            "damaged, or overflow"
        )
    return found


def _images(address: str, image_size: int, key: str) -> tuple[int, Iterator[Tensor]]:
    """How many there are, and their levels."""
    if address == "digits":
        return DIGITS, of_digits(image_size)
    if is_folder(address):
        folder = Path(address).expanduser()
        return len(listed(folder, key).files), of_folder(folder, image_size, key)
    path = regular_file(address, key, WANTED)
    with Arrays(path, key) as arrays:
        if "arr_0" not in arrays.names:
            held = one_line(", ".join(sorted(arrays.names)), 200) or "nothing named"
            raise InputError(f"{key}={path} holds {held}; want images as arr_0, or mu and sigma")
        return (arrays.shape("arr_0") or (0,))[0], of_archive(path, image_size, key)


def _identity(address: str, path: Path | None, network: Network, image_size: int, key: str) -> str:
    """Of an archive, or of the files of a folder, by names, sizes in bytes and times of change; 16 hex digits."""
    digest = hashlib.sha256(f"{network.name} {network.width} {image_size}\n".encode())
    if path is not None:
        status = path.stat()
        digest.update(b"%s %d %d\n" % (os.fsencode(path.absolute()), status.st_size, status.st_mtime_ns))
    else:
        folder = str(Path(address).expanduser())
        for file in listed(Path(folder), key).files:
            digest.update(os.fsencode(file.path[len(folder) :]) + b" %d %d\n" % (file.bytes, file.modified_ns))
    return digest.hexdigest()[:16]
