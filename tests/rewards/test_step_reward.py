"""A reward of each image among all images of a step, with a state: what a distance between distributions needs."""

import pytest
import torch

from varfast.rewards import BrightnessReward, WeightedSum
from varfast.rewards.building import StepReward
from varfast.train import train
from varfast.types import NotFiniteReward

from ..runs import assert_same_run, metrics

DECAY = 0.5


class FarFromTheMean:
    """Distance of an image's mean from an average over steps; the average moves by the step's own mean."""

    def __init__(self):
        self.mean, self.seen = torch.zeros(()), torch.zeros((), dtype=torch.int64)

    def measure(self, scored):
        return scored.images.flatten(2).mean(dim=2)  # (b, 3)

    def score(self, measured, labels_B, learn):
        grey_B = measured.mean(dim=1)
        if learn:
            self.mean.lerp_(grey_B.mean(), 1 - DECAY)
            self.seen += len(grey_B)
        return (grey_B - self.mean).abs()

    def state(self):
        return {"mean": self.mean, "seen": self.seen}


@pytest.fixture
def built(monkeypatch):
    """The rewards that were built; a config names them as brightness."""
    made = []
    monkeypatch.setattr(BrightnessReward, "build", lambda *_: made.append(FarFromTheMean()) or made[-1])
    return made


def test_a_step_is_scored_as_a_whole_and_the_state_moves_only_where_it_learns(built):
    reward = WeightedSum({"far": BrightnessReward(type="brightness", weight=2.0)})
    assert isinstance(built[0], StepReward)
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels_B = torch.arange(6)
    grey = images.double().mean(dim=(1, 2, 3))
    before = reward(images, labels_B)
    torch.testing.assert_close(before.components["far"].double(), grey, rtol=1e-6, atol=0)
    assert built[0].seen == 0

    parts = [reward.measure(images[rows], labels_B[rows]) for rows in (slice(0, 2), slice(2, 6))]
    assert parts[1]["far"].shape == (4, 3)
    measured = {"far": torch.cat([part["far"] for part in parts])}
    found = reward.score(measured, labels_B, learn=True)
    exact = (grey - 0.5 * grey.mean()).abs()
    torch.testing.assert_close(found.components["far"].double(), exact, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.total_B, 2.0 * found.components["far"])
    assert set(reward.state()) == {"far.mean", "far.seen"}
    assert built[0].seen == 6


def test_a_run_counts_each_step_once_and_goes_on_with_the_state(built, make_config, tmp_path):
    def run(folder, steps):
        config = make_config(run__dir=str(tmp_path / folder), run__steps=steps, log__checkpoint_every=1)
        assert train(config) == 0

    run("whole", 4)
    assert built[-1].seen == 4 * 8  # neither the table of before and after nor grids count
    run("parts", 2)
    run("parts", 4)
    assert built[-1].seen == 4 * 8
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert len({line["reward_mean"] for line in metrics(tmp_path / "whole")}) == 4


def test_what_is_measured_must_be_finite(built, make_config):
    reward = WeightedSum({"far": BrightnessReward(type="brightness")})
    images = torch.full((2, 3, 4, 4), float("nan"))
    with pytest.raises(NotFiniteReward, match="far"):
        reward.measure(images, torch.zeros(2, dtype=torch.int64))
