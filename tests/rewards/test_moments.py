"""Distances of moments against recomputation from the images: with all of them, and without each one."""

import numpy as np
import pytest
import torch

from varfast.rewards.moments import DiagonalDistance, FullDistance, roots_after_downdate

EMA = 0.5


def sets(features, images, base_images=300, real_images=400, seed=0):
    """Features of real images, of the base, and of a step: correlated, and of different distributions; float64."""
    rng = np.random.RandomState(seed)
    mix = rng.randn(features, features) / features**0.5
    shapes = (real_images, base_images, images)
    return [rng.randn(n, features) @ (mix + 0.2 * k * np.eye(features)) + 0.3 * k for k, n in enumerate(shapes)]


def brute_diagonal(real_MD, earlier_ND, step_ND):
    """From the formula of arXiv:2603.23086, with moments of the images that are there."""
    first = EMA * earlier_ND.mean(0) + (1 - EMA) * step_ND.mean(0)
    second = EMA * (earlier_ND**2).mean(0) + (1 - EMA) * (step_ND**2).mean(0)
    sigma = np.sqrt(np.maximum(second - first**2, 0) + 1e-12)
    real = np.sqrt(real_MD.var(0, ddof=1) + 1e-12)
    return ((real_MD.mean(0) - first) ** 2).sum() + ((real - sigma) ** 2).sum()


def brute_full(real_MD, earlier_ND, step_ND):
    """Frechet distance of the reference to the weighted images themselves, without second moments.

    With covariances X^T X and Y^T Y, tr (X^T X Y^T Y)^1/2 is the sum of the singular values of X Y^T.
    """
    weight = np.concatenate(
        [np.full(len(earlier_ND), EMA / len(earlier_ND)), np.full(len(step_ND), (1 - EMA) / len(step_ND))]
    )
    images = np.concatenate([earlier_ND, step_ND])
    mean = weight @ images
    generated = np.sqrt(weight)[:, None] * (images - mean)
    real = (real_MD - real_MD.mean(0)) / np.sqrt(len(real_MD) - 1)
    # Of R and not of the images: R^T R is the covariance too, and small.
    real, generated = (np.linalg.qr(rows, mode="r") for rows in (real, generated))
    roots = np.linalg.svd(real @ generated.T, compute_uv=False).sum()
    return ((real_MD.mean(0) - mean) ** 2).sum() + (real**2).sum() + (generated**2).sum() - 2 * roots


def distance_to(real_MD, kind):
    mu_D, sigma_DD = torch.from_numpy(real_MD.mean(0)), torch.from_numpy(np.atleast_2d(np.cov(real_MD, rowvar=False)))
    return FullDistance(mu_D, sigma_DD) if kind == "full" else DiagonalDistance(mu_D, sigma_DD.diagonal())


def found(kind, real_MD, earlier_ND, step_ND):
    distance = distance_to(real_MD, kind)
    step = distance.moments(torch.from_numpy(step_ND))
    after = distance.moments(torch.from_numpy(earlier_ND)).towards(step, 1 - EMA)
    return distance.without_each(after, step, torch.from_numpy(step_ND), 1 - EMA)


@pytest.mark.parametrize(("features", "images"), [(1, 2), (5, 2), (33, 12), (64, 40)])
@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_without_each_equals_recomputation_without_the_image(kind, features, images):
    real, earlier, step = sets(features, images)
    brute = brute_full if kind == "full" else brute_diagonal
    whole = brute(real, earlier, step)
    want = np.array([brute(real, earlier, np.delete(step, i, axis=0)) for i in range(images)]) - whole
    scores, distance = found(kind, real, earlier, step)
    np.testing.assert_allclose(distance, whole, rtol=1e-9)
    np.testing.assert_allclose(scores, want, rtol=1e-9, atol=1e-10 * np.abs(want).max())
    assert scores.dtype == torch.float64


def test_without_each_of_fewer_images_than_features_and_of_equal_ones():
    """Covariances without a full rank: leaving an image out takes a direction away. Roots of 0 know 1e-16 as 1e-8."""
    real, earlier, step = sets(24, 6, base_images=8)
    step[3] = step[2]
    whole = brute_full(real, earlier, step)
    want = np.array([brute_full(real, earlier, np.delete(step, i, axis=0)) for i in range(6)]) - whole
    scores, distance = found("full", real, earlier, step)
    np.testing.assert_allclose(distance, whole, rtol=1e-6)
    np.testing.assert_allclose(scores, want, rtol=0, atol=1e-6 * np.abs(want).max())
    assert scores[2] == pytest.approx(float(scores[3]), rel=1e-9)


def test_full_distance_equals_torch_fidelitys():
    from varfast.evaluation.metrics import fid, statistics

    real, other, _ = sets(12, 2)
    distance = distance_to(real, "full")
    want = fid(statistics(real), statistics(other))
    factor = (len(other) - 1) / len(other)  # theirs is divided by N - 1
    moments = distance.moments(torch.from_numpy(other))
    second = (moments.second - torch.outer(moments.first_D, moments.first_D)) / factor
    unbiased = type(moments)(moments.first_D, second + torch.outer(moments.first_D, moments.first_D))
    assert float(distance(unbiased)) == pytest.approx(want, rel=1e-9)


def test_the_image_that_brings_the_set_nearer_earns_more():
    """Real images lie round 0; the base's and the step's round 1, but for one at 0 and one at 3."""
    rng = np.random.RandomState(0)
    real, earlier, step = rng.randn(500, 4), rng.randn(500, 4) + 1, rng.randn(32, 4) * 0.1 + 1
    step[5], step[9] = 0.0, 3.0
    for kind in ("diagonal", "full"):
        scores, _ = found(kind, real, earlier, step)
        assert scores[5] > 0 > scores[9]
        assert (scores.argmax(), scores.argmin()) == (5, 9)


def test_roots_after_downdate_equal_decompositions():
    rng = np.random.RandomState(0)
    for values in (10.0 ** -np.arange(12), np.ones(5), np.array([0.0, 0.0, 2.0]), np.zeros(3)):
        values = np.sort(values)
        # A downdate may take a direction away at most.
        update = rng.randn(6, len(values)) * np.sqrt(values)
        update /= (
            np.maximum(1.0, np.sqrt(((update / np.sqrt(np.maximum(values, 1e-300))) ** 2).sum(1)))[:, None] * 1.001
        )
        update[0] = 0
        want = [
            np.sqrt(np.maximum(np.linalg.eigvalsh(np.diag(values) - np.outer(z, z)), 0)).sum() - np.sqrt(values).sum()
            for z in update
        ]
        got = roots_after_downdate(torch.from_numpy(values), torch.from_numpy(update), 1.0)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)
        assert got[0] == 0
