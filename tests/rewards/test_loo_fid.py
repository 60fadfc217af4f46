"""LOO-FID as a reward: in a run, from the base's samples on, and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from varfast import InputError
from varfast.data.datasets import digits
from varfast.evaluation.config import EvaluateConfig
from varfast.features.networks import DigitsPixels, to_levels
from varfast.rewards import LooFidReward, WeightedSum
from varfast.rewards.clip import ClipReward
from varfast.rewards.leave_one_out import LeaveOneOut
from varfast.settings.loading import parse_arguments
from varfast.train import train
from varfast.types import NotFiniteReward

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


def test_sections_with_equal_features_share_a_network(images, tiny_clip):
    of_clip = {"features": "clip", "model": "tiny", "pretrained": tiny_clip}
    reward = WeightedSum(
        {
            "a": LooFidReward(**section()),
            "b": LooFidReward(**section(covariance="full", weight=2.0)),
            "c": LooFidReward(**section(**of_clip)),
            "text": ClipReward(type="clip", model="tiny", pretrained=tiny_clip, prompt="a digit"),
        },
        image_size=8,
    )
    a, b, c = (reward._rewards[name]._network for name in "abc")
    assert a is b
    passes = []
    embed = c.backbone.embed_images
    c.backbone.embed_images = lambda images: passes.append(len(images)) or embed(images)
    measured = reward.measure(images, torch.zeros(64, dtype=torch.int64))
    assert passes == [64]
    torch.testing.assert_close(measured["c"], embed(images).double())
    # In an evaluation, which has no step, images have the scores that they have by themselves.
    assert set(reward(images, torch.zeros(64, dtype=torch.int64)).components) == {"text"}
    assert float(weighted_sum()(images, torch.zeros(64, dtype=torch.int64)).total_B.sum()) == 0.0


def test_too_few_images_for_a_covariance_are_refused(make_config, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for i, picture in enumerate(to_levels(digits(8)[0][:60]).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(picture).save(few / f"{i}.png")
    cache = str(tmp_path / "cache")
    assert weighted_sum(reference=str(few), cache_dir=cache).base_images(2) == 100
    with pytest.raises(InputError, match=r"reward.fid.reference=.*few: 60 images are too few .* 64 features.*diagonal"):
        weighted_sum(reference=str(few), cache_dir=cache, covariance="full")
    for settings, images, message in (
        ({"begin_images": 64}, 512, r"reward.fid.begin_images=64 are too few .* more than 64; 65 or more"),
        ({}, 16, r"steps of 16 images, averaged with reward.fid.ema=0.5 as if they were 48, are too few"),
        ({"ema": 0.9}, 1, r"a step of 1 image"),
    ):
        with pytest.raises(InputError, match=message):
            weighted_sum(covariance="full", **settings).base_images(images)
    assert weighted_sum(covariance="full", ema=0.9).base_images(16) == 100
    config = make_config(
        run__dir=str(tmp_path / "run"), policy__var=SIZES, reward={"fid": section(covariance="full")}
    )  # 8 images a step
    with pytest.raises(InputError, match="steps of 8 images, averaged with .* as if they were 24, are too few"):
        train(config)


def test_steps_of_one_label_are_refused(make_config):
    with pytest.raises(InputError, match=r"reward.fid with rollout.labels_per_step=1: all images .* real ones of 5"):
        make_config(reward={"fid": section()}, rollout__labels_per_step=1)
    make_config(reward={"fid": section()}, rollout__labels_per_step=1, rollout__labels=[3])


def test_features_that_are_not_finite_leave_the_rollout_out(images):
    reward = weighted_sum()
    network = reward._rewards["fid"]._network
    network.features = lambda levels: torch.full((len(levels), 64), 1.0).index_fill(0, torch.tensor([3]), float("nan"))
    with pytest.raises(NotFiniteReward, match=r"reward fid: the digits features of image 3 are not finite \(1 of 64"):
        reward.measure(images, torch.zeros(64, dtype=torch.int64))


def test_an_evaluation_does_not_take_it_as_a_score():
    with pytest.raises(InputError, match="fid: loo_fid scores an image among those of a step of training; here fid_r"):
        parse_arguments(["checkpoint=x", "scores.fid.type=loo_fid", "scores.fid.reference=digits"], EvaluateConfig)


def test_what_reaches_outside_of_a_run_folder_is_named():
    assert LooFidReward(**section()).reaches_outside() is None
    assert LooFidReward(**section(reference="real.npz")).reaches_outside() == "reads or fetches real.npz"
    assert "the weights of dino, real" in LooFidReward(**section(features="dino", reference="real")).reaches_outside()
