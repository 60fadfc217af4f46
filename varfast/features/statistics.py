"""Mean and covariance of the features of a set of images: computed, written, read, and kept in a cache.

The file is an .npz with mu (D,) and sigma (D, D), as pytorch-fid and ADM write them, and beside them the name of the
features and the number of images, which theirs do not have.

Axes: M image; D feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from varfast.files import write_atomically
from varfast.types import InputError
from varfast.weights.containers import Arrays
from varfast.weights.hub import one_line

_LONGEST_NAME = 1000


@dataclass(frozen=True)
class Statistics:
    """Of a set of features, in float64.

    Attributes:
        mu_D, sigma_DD: mean and covariance (divided by M - 1).
        count: M; None if it is not known.
    """

    mu_D: np.ndarray
    sigma_DD: np.ndarray
    count: int | None = None


class Summing:
    """Mean and covariance of features that come part by part."""

    def __init__(self) -> None:
        self._count = 0
        self._shift_D = self._sum_D = self._products_DD = torch.zeros(0)

    def add(self, features_BD: Tensor) -> None:
        """Take some images in."""
        features_BD = features_BD.double()
        if not self._count:  # sums of what lies round 0 keep their digits
            width = features_BD.shape[1]
            self._shift_D, self._sum_D = features_BD.mean(dim=0), features_BD.new_zeros(width)
            self._products_DD = features_BD.new_zeros(width, width)
        centred_BD = features_BD - self._shift_D
        self._count += len(features_BD)
        self._sum_D += centred_BD.sum(dim=0)
        self._products_DD += centred_BD.T @ centred_BD

    def statistics(self) -> Statistics:
        """Of all images so far, which are two or more."""
        assert self._count > 1
        mean_D = self._sum_D / self._count
        sigma_DD = (self._products_DD - self._count * torch.outer(mean_D, mean_D)) / (self._count - 1)
        return Statistics((self._shift_D + mean_D).cpu().numpy(), sigma_DD.cpu().numpy(), self._count)


def save_statistics(path: Path, found: Statistics, features: str) -> None:
    """Write an .npz. features: name of the network. Raises: WriteError, an InputError."""
    arrays = {"mu": found.mu_D, "sigma": found.sigma_DD, "features": np.frombuffer(features.encode(), np.uint8)}
    if found.count is not None:
        arrays["images"] = np.array(found.count)
    write_atomically(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def read_statistics(arrays: Arrays, where: str, features: str, width: int) -> Statistics:
    """mu and sigma of an .npz that holds both.

    Args:
        where: the file, for errors.
        features, width: name and width of the network that the statistics must be of; a file of others has no name.
    Raises: InputError for statistics of other features, and for what is not finite or no covariance.
    """
    if "features" in arrays.names:
        shape = arrays.shape("features")
        if len(shape) != 1 or shape[0] > _LONGEST_NAME:
            raise InputError(f"{where}: features is {shape}, want the bytes of a name; make the file anew")
        content = arrays.read("features", shape)
        name = bytes(int(level) % 256 for level in content).decode(errors="replace")
        if name != features:
            raise InputError(
                f"{where} holds statistics of the features {one_line(name, 200)}; these are {features}. Name those, or "
                "make the statistics anew with python -m varfast.statistics"
            )
    shapes = {name: arrays.shape(name) for name in ("mu", "sigma")}
    if shapes != {"mu": (width,), "sigma": (width, width)}:
        raise InputError(
            f"{where}: mu {shapes['mu']} and sigma {shapes['sigma']} are statistics of other features; these "
            f"are {width} wide. Choose other features, or give the images"
        )
    count = int(arrays.read("images", ())) if "images" in arrays.names else None
    return Statistics(arrays.read("mu", (width,)), arrays.read("sigma", (width, width)), count)
