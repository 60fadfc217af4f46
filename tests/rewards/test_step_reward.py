"""A reward of each image among all images of a step, with a state: what a distance between distributions needs."""

import pytest
import torch

from varfast.rewards import BrightnessReward, WeightedSum
from varfast.train import train

from ..runs import assert_same_run, metrics


class FarFromTheMean:
    """Distance of an image's mean from an average over steps; the average moves by half of the way to the step's."""

    def __init__(self):
        self.mean, self.seen = torch.zeros(()), torch.zeros((), dtype=torch.int64)

    def measure(self, scored):
        return scored.images.flatten(2).mean(dim=2)  # (b, 3)

    def score(self, measured):
        return (measured.mean(dim=1) - self.mean).abs()

    def learn(self, measured):
        self.mean.lerp_(measured.mean(), 0.5)
        self.seen += len(measured)

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
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels_B = torch.arange(6)
    grey = images.double().mean(dim=(1, 2, 3))
    parts = [reward.measure(images[rows], labels_B[rows]) for rows in (slice(0, 2), slice(2, 6))]
    assert parts[1]["far"].shape == (4, 3)
    measured = {"far": torch.cat([part["far"] for part in parts])}
    first = reward.score(measured).components["far"].double()
    torch.testing.assert_close(first, grey, rtol=1e-6, atol=0)
    assert built[0].seen == 0
    reward.learn(measured)
    found = reward(images, labels_B)
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
