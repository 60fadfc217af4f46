"""Distance of a set of images to a reference by moments of features, and what each image of a step changes in it.

A generator is described by averages m1 of f and m2 of f f^T (or f^2) over its images, which a step moves by
m <- b m + (1 - b) m_step. Let d be the distance of the moments after the step and d_i what it would be had the step
come without image i. Image i then earns d_i - d: more than 0 if it brings the set nearer to the reference.

With N images in the step and c = (1 - b) / (N - 1), leaving out image i turns m1 into u - c f_i, where u = m1 + c
m1_step, and m2 into m2 + c (m2_step - f_i f_i^T).

Everything is in float64, and a function of state and features alone: each process computes the same bits.

Axes: N image of a step; D feature; R direction in which the reference has a variance; Q node of an integral.
Source: arXiv:2603.23086 for the diagonal distance; the full one is FID's, arXiv:1706.08500.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Under the root of a variance, as in the authors' code.
_VARIANCE_EPS = 1e-12
# Nodes of the integral in log s. Its integrand is analytic within pi / 2 of the real axis, so that the trapezoidal rule
# is off by exp(-pi^2 / step) = 7e-18. Beyond the ends is 1e-16 and 1e-13 of the whole.
_NODE_STEP = 0.25
_NODES_FROM, _NODES_TO = -37.0, 10.0


@dataclass(frozen=True)
class Moments:
    """Averages over images.

    Attributes:
        first_D: (D,) of f.
        second: (D,) of f^2, or (D, D) of f f^T.
    """

    first_D: Tensor
    second: Tensor

    def towards(self, other: Moments, share: float) -> Moments:
        """(1 - share) of these and `share` of the others."""
        return Moments(
            (1.0 - share) * self.first_D + share * other.first_D, (1.0 - share) * self.second + share * other.second
        )


class Distance(Protocol):
    """Of moments to those of a reference."""

    def moments(self, features_ND: Tensor) -> Moments:
        """Of a set of images, with the second moments that this distance reads."""
        ...

    def __call__(self, moments: Moments) -> Tensor:
        """() the distance."""
        ...

    def without_each(self, moments: Moments, step: Moments, features_ND: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """(N,) how much larger the distance is without each image of the step; and the distance, ().

        Args:
            moments: with the whole step in them.
            step: moments of the step alone.
            features_ND: (N, D) of the step, N >= 2.
            share: of the step in `moments`.
        """
        ...


class DiagonalDistance:
    """|mu_r - mu|^2 + |sigma_r - sigma|^2 with the standard deviation sigma of each feature by itself.

    Args:
        mu_D, variance_D: of the reference.
    """

    def __init__(self, mu_D: Tensor, variance_D: Tensor) -> None:
        self._mu_D, self._sigma_D = mu_D.double(), _deviation(variance_D.double())

    def moments(self, features_ND: Tensor) -> Moments:
        features_ND = features_ND.double()
        return Moments(features_ND.mean(dim=0), features_ND.square().mean(dim=0))

    def __call__(self, moments: Moments) -> Tensor:
        sigma_D = _deviation(moments.second - moments.first_D.square())
        return (self._mu_D - moments.first_D).square().sum() + (self._sigma_D - sigma_D).square().sum()

    def without_each(self, moments: Moments, step: Moments, features_ND: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """16 N D operations, 17 MFLOP for 512 images of 2048 features."""
        features_ND = features_ND.double()
        c = share / (len(features_ND) - 1)
        first_ND = moments.first_D + c * (step.first_D - features_ND)
        second_ND = moments.second + c * (step.second - features_ND.square())
        sigma_D = _deviation(moments.second - moments.first_D.square())
        sigma_ND = _deviation(second_ND - first_ND.square())
        # a^2 - b^2 = (a - b) (a + b), feature by feature: the difference of two whole distances would lose digits.
        means_ND = (moments.first_D - first_ND) * (2.0 * self._mu_D - first_ND - moments.first_D)
        sigmas_ND = (sigma_D - sigma_ND) * (2.0 * self._sigma_D - sigma_ND - sigma_D)
        return (means_ND + sigmas_ND).sum(dim=1), self(moments)


class FullDistance:
    """Frechet distance |mu_r - mu|^2 + tr(S_r + S - 2 (S_r S)^1/2) of two normal distributions.

    tr (S_r S)^1/2 is the sum of the roots of the eigenvalues of W^T S W, where S_r = W W^T.

    Args:
        mu_D, sigma_DD: mean and covariance of the reference.
    """

    def __init__(self, mu_D: Tensor, sigma_DD: Tensor) -> None:
        self._mu_D = mu_D.double()
        variances_D, axes_DD = torch.linalg.eigh(sigma_DD.double())
        # Directions of no variance but that of rounding add nothing to the trace.
        kept = variances_D > len(mu_D) * torch.finfo(torch.float64).eps * variances_D[-1]
        self._whitening_DR = axes_DD[:, kept] * variances_D[kept].sqrt()
        self._trace = variances_D[kept].sum()

    def moments(self, features_ND: Tensor) -> Moments:
        features_ND = features_ND.double()
        return Moments(features_ND.mean(dim=0), features_ND.T @ features_ND / len(features_ND))

    def __call__(self, moments: Moments) -> Tensor:
        return self._parts(moments)[0]

    def without_each(self, moments: Moments, step: Moments, features_ND: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Two decompositions, whatever N is: 20 D^3 + 4 N D^2 operations, 180 GFLOP for 512 images of 2048 features.

        (Decomposing for each image would be 4/3 N D^3: 5900 GFLOP.)

        Without image i the covariance is A - (c + c^2) g_i g_i^T, where A = m2 + c m2_step - u u^T / (1 + c) is the
        same for all images and g_i = f_i - u / (1 + c). So each image is an update of rank one of W^T A W.
        """
        features_ND = features_ND.double()
        c = share / (len(features_ND) - 1)
        u_D = moments.first_D + c * step.first_D
        common_DD = moments.second + c * step.second - torch.outer(u_D, u_D) / (1.0 + c)
        shifted_ND = features_ND - u_D / (1.0 + c)
        values_R, axes_RR = torch.linalg.eigh(self._whitened(common_DD))
        update_NR = shifted_ND @ (self._whitening_DR @ axes_RR)
        distance, trace, roots = self._parts(moments)
        roots_N = _roots(values_R).sum() - roots + roots_after_downdate(values_R, update_NR, c + c * c)
        traces_N = common_DD.trace() - trace - (c + c * c) * shifted_ND.square().sum(dim=1)
        first_ND = moments.first_D + c * (step.first_D - features_ND)
        means_ND = (moments.first_D - first_ND) * (2.0 * self._mu_D - first_ND - moments.first_D)
        return means_ND.sum(dim=1) + traces_N - 2.0 * roots_N, distance

    def _parts(self, moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
        """The distance, tr S, and tr (S_r S)^1/2."""
        covariance_DD = moments.second - torch.outer(moments.first_D, moments.first_D)
        trace, roots = covariance_DD.trace(), _roots(torch.linalg.eigvalsh(self._whitened(covariance_DD))).sum()
        return (self._mu_D - moments.first_D).square().sum() + self._trace + trace - 2.0 * roots, trace, roots

    def _whitened(self, covariance_DD: Tensor) -> Tensor:
        whitened_RR = self._whitening_DR.T @ covariance_DD @ self._whitening_DR
        return (whitened_RR + whitened_RR.T) / 2.0


def roots_after_downdate(values_R: Tensor, update_NR: Tensor, rho: float) -> Tensor:
    """(N,) tr (L - rho z z^T)^1/2 - tr L^1/2, where L is the diagonal matrix of values_R >= 0 and z a row of update_NR.

    The determinants of L - rho z z^T + t and L + t have the ratio 1 - p(t), p(t) = rho sum_k z_k^2 / (L_k + t). With
    x^1/2 = 1/pi int x / (x + t) t^-1/2 dt, the difference is 1/pi int_0^oo log(1 - p(s^2)) ds. The nodes are even in
    log s, 189 of them, and the same for all rows: one product of matrices, 400 N R operations. No eigenvalue is sought.
    """
    values_R = values_R.clamp_min(0.0)
    largest = values_R[-1:].amax()
    if largest == 0.0:
        return torch.zeros(len(update_NR), dtype=torch.float64, device=update_NR.device)
    scale = largest.sqrt()
    count = round((_NODES_TO - _NODES_FROM) / _NODE_STEP) + 1
    nodes_Q = scale * torch.linspace(_NODES_FROM, _NODES_TO, count, dtype=torch.float64, device=values_R.device).exp()
    squares_NR = rho * update_NR.square()
    p_NQ = squares_NR @ (1.0 / (values_R.unsqueeze(1) + nodes_Q.square()))
    # Removing an image may take away a direction: then p -> 1 as s -> 0, and rounding may make it more.
    logs_NQ = torch.log1p(-p_NQ.clamp_max(1.0 - 2.0**-53))
    # log(1 - p) falls as -a / s^2, which would need nodes far out. Of -a / (s^2 + scale^2) the integral is known; the
    # rest falls as s^-4.
    total_N1 = squares_NR.sum(dim=1, keepdim=True)
    rest_NQ = logs_NQ + total_N1 / (nodes_Q.square() + largest)
    return (rest_NQ @ nodes_Q) * _NODE_STEP / math.pi - total_N1.squeeze(1) / (2.0 * scale)


def _deviation(variance: Tensor) -> Tensor:
    return (variance.clamp_min(0.0) + _VARIANCE_EPS).sqrt()


def _roots(values: Tensor) -> Tensor:
    """Of eigenvalues that rounding may have made less than 0."""
    return values.clamp_min(0.0).sqrt()
