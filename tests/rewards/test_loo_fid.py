"""LOO-FID as a reward: in a run, from the base's samples on, and what it refuses."""

import numpy as np
import pytest
import torch

from varfast.data.datasets import digits
from varfast.features.networks import DigitsPixels, to_levels
from varfast.rewards import LooFidReward, WeightedSum
from varfast.rewards.leave_one_out import LeaveOneOut
from varfast.train import train

from ..runs import assert_same_run, metrics

SIZES = {"depth": 1, "patch_nums": [1, 8], "vocab_size": 16, "code_width": 4, "num_classes": 5}


def section(**settings):
    return {"type": "loo_fid", "features": "digits", "reference": "digits", "begin_images": 100} | settings


def weighted_sum(image_size=8, **settings):
    return WeightedSum({"fid": LooFidReward(**section(**settings))}, image_size=image_size)


@pytest.fixture(scope="module")
def images():
    """64 digits, each with its own shades."""
    return digits(8)[0][:64]


def features(images):
    return DigitsPixels().features(to_levels(images)).numpy()


def test_images_earn_what_the_distance_would_be_more_without_them(images):
    reward, labels_B = weighted_sum(ema=0.25), torch.zeros(64, dtype=torch.int64)
    assert reward.base_images(20) == 100
    base = digits(8)[0][1000:1100]
    reward.begin(reward.measure_sets(base, torch.zeros(100, dtype=torch.int64)))
    real = features(digits(8)[0])
    first, second = features(base).mean(0), (features(base) ** 2).mean(0)
    parts = [reward.measure(images[rows], labels_B[rows], 0, rows.start) for rows in (slice(0, 50), slice(50, 64))]
    measured = {"fid": torch.cat([part["fid"] for part in parts])}

    def distance(rows_BD):
        mean, square = (0.25 * old + 0.75 * (rows_BD**k).mean(0) for k, old in ((1, first), (2, second)))
        sigma = np.sqrt(np.maximum(square - mean**2, 0) + 1e-12)
        return ((real.mean(0) - mean) ** 2).sum() + ((np.sqrt(real.var(0, ddof=1) + 1e-12) - sigma) ** 2).sum()

    for _ in range(2):  # the second step sees the moments that the first one left
        rows_BD = features(images)
        want = [distance(np.delete(rows_BD, i, axis=0)) - distance(rows_BD) for i in range(64)]
        np.testing.assert_allclose(reward.score(measured).components["fid"], want, rtol=1e-5)
        assert float(reward.learn(measured)["distance/fid"]) == pytest.approx(distance(rows_BD), rel=1e-9)
        first, second = (0.25 * old + 0.75 * (rows_BD**k).mean(0) for k, old in ((1, first), (2, second)))


def test_a_run_goes_on_with_the_moments(make_config, tmp_path):
    def run(folder, steps):
        reward = {
            "diagonal": section(),
            "full": section(covariance="full", ema=0.9, weight=0.1),
            "luma": {"type": "brightness", "mode": "raw", "weight": 0.1},
        }
        config = make_config(
            run__dir=str(tmp_path / folder), run__steps=steps, policy__var=SIZES, reward=reward, update__lr=3e-3,
            rollout__labels_per_step=4, rollout__group_size=8, update__minibatch=32, log__checkpoint_every=2,
            grpo__kl_beta=0.0,
        )  # fmt: skip
        assert train(config) == 0

    run("whole", 5)
    run("parts", 2)
    run("parts", 5)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert len({line["distance/full"] for line in metrics(tmp_path / "whole")}) == 5


def test_the_moments_begin_with_the_base_as_training_samples_it(make_config, tmp_path, monkeypatch):
    begun = []
    begin = LeaveOneOut.begin
    monkeypatch.setattr(LeaveOneOut, "begin", lambda self, measured: begun.append(measured) or begin(self, measured))
    for folder, micro_batch in (("a", 8), ("b", 2)):
        config = make_config(
            run__dir=str(tmp_path / folder), run__steps=1, policy__var=SIZES, reward={"fid": section()},
            rollout__micro_batch=micro_batch, eval__samples_per_label=0,
        )  # fmt: skip
        train(config)
    assert begun[0].shape == (100, 64)
    torch.testing.assert_close(begun[0], begun[1], rtol=0, atol=1.01 / 255)  # rounding may tip a level
    assert len(begun[0].unique(dim=0)) > 50
