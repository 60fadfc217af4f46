"""Statistics of real images from where a config says: the digits, a folder, an .npz of images or of statistics.

Axes: D feature. Levels are uint8 (., 3, H, W).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from varfast.features.images import is_folder, listed, of_archive, of_digits, of_folder
from varfast.features.networks import Network
from varfast.features.statistics import Statistics, read_statistics, save_statistics, statistics_of
from varfast.files import WriteError
from varfast.types import InputError
from varfast.weights.containers import Arrays
from varfast.weights.files import regular_file
from varfast.weights.hub import one_line

WANTED = "a folder of images, an .npz with arr_0 or with mu and sigma, or digits"


def reference_statistics(address: str, network: Network, image_size: int, key: str, cache: Path) -> Statistics:
    """Mean and covariance of the features of real images.

    Those of a folder, or of images in an .npz, are computed once and kept: in cache/<hash>.npz, by a hash of the files'
    names, sizes and times, of the features, and of image_size.

    Args:
        address: 'digits'; a folder of images at any depth, which are resized to image_size (shorter side, Lanczos) and
            cropped at the centre; or an .npz with mu and sigma, or with images of that size as arr_0.
        key: where the address stands in the config, for errors.
        cache: a folder; if it cannot be written, nothing is kept.
    Raises: InputError for what cannot be read or is too little, and for statistics of other features.
    """
    if address == "digits":
        return statistics_of(map(network.features, of_digits(image_size)))
    if is_folder(address):
        folder = Path(address).expanduser()
        content = _fingerprint([(f.path, f.bytes, f.modified_ns) for f in listed(folder, key).files], str(folder))
        return _cached(of_folder(folder, image_size, key), content, network, image_size, cache)
    path = regular_file(address, key, WANTED)
    with Arrays(path, key) as arrays:
        if {"mu", "sigma"} <= arrays.names:
            return read_statistics(arrays, f"{key}={path}", network.name, network.width)
        if "arr_0" not in arrays.names:
            held = one_line(", ".join(sorted(arrays.names)), 200) or "nothing named"
            raise InputError(f"{key}={path} holds {held}; want arr_0, or mu and sigma")
    status = path.stat()
    content = _fingerprint([(str(path), status.st_size, status.st_mtime_ns)], "")
    return _cached(of_archive(path, image_size, key), content, network, image_size, cache)


def _fingerprint(files: list[tuple[str, int, int]], folder: str) -> str:
    """Of files by their names within the folder, sizes in bytes and times of change."""
    digest = hashlib.sha256()
    for path, size_bytes, modified_ns in files:
        digest.update(path[len(folder) :].encode(errors="surrogateescape") + b" %d %d\n" % (size_bytes, modified_ns))
    return digest.hexdigest()


def _cached(batches: Iterator[Tensor], content: str, network: Network, image_size: int, cache: Path) -> Statistics:
    identity = f"{content} {network.name} {image_size}"
    path = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
    if path.is_file():
        try:
            with Arrays(path, "statistics") as arrays:
                return read_statistics(arrays, str(path), network.name, network.width)
        except (InputError, KeyError) as error:
            print(f"statistics of real images in {path} are made again: {one_line(str(error), 300)}")
    print(f"statistics of real images: computing features of {network.name}, kept in {path}")
    found = statistics_of(map(network.features, batches))
    try:
        save_statistics(path, found, network.name)
    except WriteError as error:
        print(f"statistics of real images are not kept: {error}")
    return found
