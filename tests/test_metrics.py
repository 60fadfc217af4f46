import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.stats

from varfast.evaluation import metrics
from varfast.evaluation.metrics import Statistics


def features(count, seed, width=6, shift=0.0):
    rng = np.random.RandomState(seed)
    return rng.randn(count, width) @ rng.randn(width, width) + shift


def test_mean_interval_is_the_normal_one_and_wilsons_for_shares():
    values = np.random.RandomState(0).rand(40)
    found = metrics.mean_interval(values.astype(np.float32))
    low, high = scipy.stats.norm.interval(0.95, loc=values.mean(), scale=scipy.stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high), rel=1e-6)
    for hits, total in ((0, 5), (3, 40), (40, 40), (1, 1)):
        shares = np.arange(total) < hits
        found = metrics.mean_interval(shares)
        wilson = scipy.stats.binomtest(hits, total).proportion_ci(method="wilson")
        assert (found.value, found.low, found.high) == pytest.approx((hits / total, wilson.low, wilson.high), abs=1e-12)
        assert metrics.mean_interval(shares.astype(np.float32)) == found
    assert metrics.mean_interval(np.zeros(12, dtype=bool)).low == 0.0
    assert metrics.mean_interval(np.ones(12, dtype=bool)).high == 1.0
    assert metrics.mean_interval(np.array([0.3])) == metrics.Estimate(0.3)


def test_mean_interval_covers_the_mean_19_times_of_20():
    rng = np.random.RandomState(0)
    intervals = [metrics.mean_interval(rng.exponential(size=200)) for _ in range(1000)]
    covered = np.mean([found.low < 1.0 < found.high for found in intervals])
    assert 0.93 < covered < 0.97


def test_difference_interval_is_that_of_the_pairs():
    rng = np.random.RandomState(0)
    before = rng.rand(50)
    after = before + 0.01 * rng.rand(50)
    found = metrics.difference_interval(before, after)
    low, high = scipy.stats.norm.interval(0.95, loc=(after - before).mean(), scale=scipy.stats.sem(after - before))
    assert (found.value, found.low, found.high) == pytest.approx(((after - before).mean(), low, high), rel=1e-12)
    assert metrics.difference_interval(np.array([0.5]), np.array([0.25])) == metrics.Estimate(-0.25)


def test_difference_interval_of_shares_has_a_width_where_all_images_changed():
    none, all_of_them = np.zeros(50, bool), np.ones(50, bool)
    gone = metrics.difference_interval(all_of_them, none)
    assert (gone.value, gone.low) == (-1.0, -1.0)
    assert -0.9 < gone.high < -0.85
    same = metrics.difference_interval(none, none)
    assert same.value == 0.0
    assert 0.01 < same.high < 0.1
    assert same.low == -same.high
    # Written out: of 40 pairs 10 gained and 2 lost.
    before, after = np.repeat([0, 0, 1, 1], [10, 8, 2, 20]), np.repeat([1, 0, 0, 1], [10, 8, 2, 20])
    found, p12, p21 = metrics.difference_interval(before, after), 11 / 42, 3 / 42
    half = 1.959964 * ((p12 + p21 - (p12 - p21) ** 2) / 42) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx((0.2, p12 - p21 - half, p12 - p21 + half), abs=1e-6)


def test_difference_interval_of_shares_covers_the_difference_19_times_of_20():
    rng = np.random.RandomState(0)
    covered = []
    for _ in range(1000):
        before = rng.rand(60) < 0.1
        after = before | (rng.rand(60) < 0.9)
        found = metrics.difference_interval(before, after)
        covered.append(found.low < 0.9 * 0.9 < found.high)
    assert np.mean(covered) > 0.93


def test_fid_equals_the_formula_with_a_matrix_root():
    a, b = features(300, 0), features(200, 1, shift=0.5)
    mu, sigma = [x.mean(axis=0) for x in (a, b)], [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(sigma[0] @ sigma[1]).real
    want = ((mu[0] - mu[1]) ** 2).sum() + np.trace(sigma[0] + sigma[1] - 2 * root)
    assert metrics.fid(metrics.statistics(a), metrics.statistics(b)) == pytest.approx(want, rel=1e-10)
    assert metrics.fid(metrics.statistics(a), metrics.statistics(a)) == pytest.approx(0, abs=1e-8)
    single = metrics.statistics(a.astype(np.float32))  # added up in float64
    assert single.mu_D.dtype == single.sigma_DD.dtype == np.float64
    np.testing.assert_allclose(single.sigma_DD, np.cov(a.astype(np.float32).astype(np.float64), rowvar=False))


def test_fid_of_diagonal_covariances_is_known():
    a = Statistics(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = Statistics(np.array([1.0, 0.0, 2.0]), np.diag([4.0, 4.0, 0.0]))
    assert metrics.fid(a, b) == pytest.approx(5 + (1 - 2) ** 2 + 0 + 3**2)


def test_inception_score_equals_the_formula_and_its_bounds(monkeypatch):
    logits = np.random.RandomState(0).randn(50, 7)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    want = np.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean())
    assert metrics.inception_score(logits) == pytest.approx(want, rel=1e-12)
    assert metrics.inception_score(np.zeros((20, 4))) == pytest.approx(1.0)
    certain = 100.0 * np.eye(4)[np.arange(20) % 4]
    assert metrics.inception_score(certain) == pytest.approx(4.0)
    monkeypatch.setattr(metrics, "_SPLIT_IMAGES", 5)  # four splits of five: none can show all labels evenly
    assert 2.0 < metrics.inception_score(certain) < 4.0


def test_neighbours_equal_the_definitions_image_by_image(capsys):
    real, fake = features(40, 0), features(30, 1)
    radius = {}
    for name, points in (("real", real), ("fake", fake)):
        apart = scipy.spatial.distance.cdist(points, points)
        radius[name] = np.sort(apart, axis=1)[:, metrics.NEIGHBOURS]  # the first is the point itself
    between = scipy.spatial.distance.cdist(real, fake)
    balls = [[between[i, j] < radius["real"][i] for i in range(40)] for j in range(30)]
    want = {
        "precision": np.mean([any(ball) for ball in balls]),
        "recall": np.mean([any(between[i, j] < radius["fake"][j] for j in range(30)) for i in range(40)]),
        "density": np.mean([sum(ball) for ball in balls]) / metrics.NEIGHBOURS,
        "coverage": np.mean([min(between[i]) < radius["real"][i] for i in range(40)]),
    }
    assert metrics.neighbours(real, fake) == pytest.approx(want)
    assert 0 < min(want.values()) < max(want.values())
    assert capsys.readouterr().out == ""


def test_neighbours_thin_large_sets_evenly(monkeypatch):
    monkeypatch.setattr(metrics, "NEIGHBOUR_IMAGES", 20)
    real, fake = features(60, 0), features(50, 1)
    assert metrics.thinned(np.arange(50)).tolist() == [i * 50 // 20 for i in range(20)]
    assert metrics.thinned(np.arange(20)).tolist() == list(range(20))
    assert metrics.neighbours(real, fake) == metrics.neighbours(real[::3], metrics.thinned(fake))


def test_diversity_is_the_mean_distance_within_each_label():
    points, labels = features(9, 0).astype(np.float32), np.array([3, 0, 3, 0, 3, 7, 0, 3, 0])
    want = []
    for label in (0, 3):  # 7 has one image alone
        rows = points[labels == label].astype(np.float64)
        want.append(np.mean([np.linalg.norm(a - b) for i, a in enumerate(rows) for b in rows[:i]]))
    np.testing.assert_allclose(metrics.diversity(points, labels), want, rtol=1e-12)
    assert len(metrics.diversity(points[:1], labels[:1])) == 0
