"""Numbers over many images: means with intervals, and distances between sets of features.

torch-fidelity computes FID and inception score; prdc computes precision, recall, density and coverage. Everything is in
float64.

Axes: N image, M real image, D feature, K class.
"""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass

import numpy as np
import torch

from varfast.features.statistics import Statistics

# Arrays with a row for each image, by name of what they hold.
Numbers = dict[str, np.ndarray]

# The manifold of a set is estimated from so many nearest neighbours, and from at most so many images: prdc holds
# several matrices of N x M distances, 0.8 GB each for 10 000 images.
NEIGHBOURS = 5
NEIGHBOUR_IMAGES = 10_000
# Images in each split of the inception score, as in ADM's evaluator, which makes ten splits of 50 000 images.
_SPLIT_IMAGES = 5000
_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A number, and the bounds of its 95 % interval if it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, sign: str = "") -> str:
        """As "0.5 [0.4, 0.6]", four digits each. sign: "+" for differences."""
        return interval_text(self.value, self.low, self.high, sign)


def interval_text(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    """A number with the bounds of its interval, if it has one."""
    if value is None:
        return ""
    bounds = "" if low is None or high is None else f" [{low:{sign}.4g}, {high:{sign}.4g}]"
    return f"{value:{sign}.4g}{bounds}"


def mean_interval(values_N: np.ndarray) -> Estimate:
    """Mean with its 95 % interval: normal, or Wilson's where every value is 0 or 1 (a share).

    Args:
        values_N: (N,), N >= 1; no interval at N = 1, unless it is a share.
    """
    if np.isin(values_N, (0, 1)).all():
        return _share_interval(int(values_N.sum()), len(values_N))
    return _normal_interval(values_N)


def difference_interval(before_N: np.ndarray, after_N: np.ndarray) -> Estimate:
    """Mean of after - before with its 95 % interval, over pairs of images.

    The two images of a pair have the same label and random numbers, so the interval is computed from their differences.
    It is a normal one, or that of Bonett and Price if every value is 0 or 1: if all images changed, or none, a normal
    interval would have no width.

    Source of the latter: Bonett, Price, "Adjusted Wald confidence interval for a difference of binomial proportions
    based on paired data", 2012.
    """
    after_N, before_N = after_N.astype(np.float64), before_N.astype(np.float64)
    if not (np.isin(before_N, (0, 1)).all() and np.isin(after_N, (0, 1)).all()):
        return _normal_interval(after_N - before_N)
    total = len(after_N) + 2
    gained, lost = (float((change_N > 0).sum() + 1) / total for change_N in (after_N - before_N, before_N - after_N))
    half = _Z * math.sqrt((gained + lost - (gained - lost) ** 2) / total)
    centre = gained - lost
    return Estimate(float((after_N - before_N).mean()), max(-1.0, centre - half), min(1.0, centre + half))


def _normal_interval(values_N: np.ndarray) -> Estimate:
    values_N = values_N.astype(np.float64)
    mean = float(values_N.mean())
    if len(values_N) < 2:
        return Estimate(mean)
    half = _Z * float(values_N.std(ddof=1)) / math.sqrt(len(values_N))
    return Estimate(mean, mean - half, mean + half)


def _share_interval(hits: int, total: int) -> Estimate:
    # Wilson's interval, since a normal one has no width if no image, or every image, is a hit.
    share, z2 = hits / total, _Z * _Z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    # Of no hits, and of hits alone, one end is the share itself: rounding would leave 1e-17 beside it.
    low, high = (0.0 if hits == 0 else centre - half), (1.0 if hits == total else centre + half)
    return Estimate(share, max(0.0, low), min(1.0, high))


def statistics(features_ND: np.ndarray) -> Statistics:
    """Mean and covariance (divided by N - 1) of at least two images."""
    assert len(features_ND) > 1
    from torch_fidelity.metric_fid import fid_features_to_statistics

    found = fid_features_to_statistics(torch.from_numpy(features_ND).double())
    return Statistics(found["mu"], found["sigma"])


def fid(a: Statistics, b: Statistics) -> float:
    """Fréchet distance of two normal distributions: |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2).

    Source: FID, arXiv:1706.08500.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    stats = [{"mu": s.mu_D, "sigma": s.sigma_DD} for s in (a, b)]
    # Of equal distributions it may be -1e-8.
    return max(0.0, float(fid_statistics_to_metric(*stats, verbose=False)[KEY_METRIC_FID]))


def inception_score(logits_NK: np.ndarray) -> float:
    """exp(mean KL(p(k|image) || p(k))), averaged over shuffled splits of 5000 images.

    Source: arXiv:1606.03498.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    splits = max(1, len(logits_NK) // _SPLIT_IMAGES)
    return float(isc_features_to_metric(torch.from_numpy(logits_NK), splits)[KEY_METRIC_ISC_MEAN])


def neighbours(real_MD: np.ndarray, features_ND: np.ndarray) -> dict[str, float]:
    """Precision, recall, density and coverage from the 5 nearest neighbours, over at most 10 000 images of each set.

    Args:
        real_MD, features_ND: at least seven images each; of a larger set, evenly spaced ones are used.
    Source: arXiv:1904.06991 and arXiv:2002.09797.
    """
    assert min(len(real_MD), len(features_ND)) > NEIGHBOURS + 1
    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()):  # prdc prints the sizes
        found = compute_prdc(thinned(real_MD).astype(np.float64), thinned(features_ND).astype(np.float64), NEIGHBOURS)
    return {name: float(found[name]) for name in ("precision", "recall", "density", "coverage")}


def thinned(features_ND: np.ndarray) -> np.ndarray:
    """The rows, or 10 000 evenly spaced ones if there are more."""
    if len(features_ND) <= NEIGHBOUR_IMAGES:
        return features_ND
    return features_ND[np.arange(NEIGHBOUR_IMAGES) * len(features_ND) // NEIGHBOUR_IMAGES]


def diversity(features_ND: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """(labels,) mean distance between images of the same label, for each label with at least two images, ascending."""
    groups = [features_ND[labels_N == label] for label in np.unique(labels_N)]
    return np.array(
        [float(torch.pdist(torch.from_numpy(rows_ND).double()).mean()) for rows_ND in groups if len(rows_ND) > 1]
    )
