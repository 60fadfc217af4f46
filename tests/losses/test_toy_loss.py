"""A second loss, in this one file, drives the trainer: what varfast.losses.Loss asks for is enough."""

from dataclasses import replace

import pytest
import torch

from varfast.losses import Stat
from varfast.train import train
from varfast.types import Batch

from ..runs import assert_same_run, metrics


class Reinforce:
    """-A log p, with a bonus for entropy; images stay in pairs."""

    unit = 2
    mean_of_kept = False
    needs_reference = False
    needs_entropy = True
    stats = (
        Stat("entropy_bonus"),
        Stat("least_logp", over_images="max", over_minibatches="first"),
        Stat("pairs_apart"),
    )

    def __init__(self, bonus=0.01):
        self.bonus, self.labels = bonus, []

    def batch(self, rollout, rewards, reward, group_size):
        deviation_B = rewards.total_B - rewards.total_B.mean()
        return replace(Batch.of(rollout, deviation_B), numbers={"groups": torch.tensor(len(deviation_B) // group_size)})

    def begin(self, batch, step, total_steps):
        pass

    def keep(self, batch):
        return None

    def __call__(self, logp, batch):
        assert logp.entropy_BL.requires_grad
        self.labels.append(batch.rollout.labels_B.tolist())
        bonus = self.bonus * logp.entropy_BL.mean(dim=1).mean()
        loss = -(batch.advantages_BL * logp.logp_BL).mean(dim=1).mean() - bonus
        labels_N2 = batch.rollout.labels_B.view(-1, 2)
        apart = (labels_N2[:, 0] != labels_N2[:, 1]).float().mean()
        return loss, torch.stack([bonus.detach(), -logp.logp_BL.detach().min(), apart])


def settings(make_config, folder, steps=3, **more):
    return make_config(run__dir=str(folder), run__steps=steps, grpo__kl_beta=0.0, update__minibatch=8, **more)


def test_a_second_loss_trains_and_its_statistics_are_recorded(make_config, tmp_path):
    loss = Reinforce()
    assert train(settings(make_config, tmp_path / "run"), loss=loss) == 0
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert {"loss", "entropy_bonus", "least_logp", "grad_norm"} <= line.keys()
        assert type(line["groups"]) is int
        assert line["groups"] == 2
        assert "kl" not in line
        assert "advantage_mean" not in line
        assert "clip_fraction" not in line
        assert line["pairs_apart"] == 0.0  # rows of a group are adjacent, and pairs stay whole
    # On-policy, before the first optimizer step, what is measured is the rollout's own entropy.
    assert lines[0]["entropy_bonus"] == pytest.approx(0.01 * lines[0]["entropy"], rel=1e-5)
    assert lines[0]["least_logp"] > 0
    assert lines[0]["grad_norm"] > 0


def test_a_micro_batch_keeps_pairs_and_gives_the_same_statistics(make_config, tmp_path):
    found = {}
    for size in (8, 2):
        train(settings(make_config, tmp_path / str(size), 1, update__micro_batch=size), loss=Reinforce())
        found[size] = metrics(tmp_path / str(size))[0]
    for name in ("loss", "entropy_bonus", "least_logp", "pairs_apart", "grad_norm"):
        assert found[8][name] == pytest.approx(found[2][name], rel=1e-4), name


def test_a_run_with_a_second_loss_goes_on_where_it_was(make_config, tmp_path):
    train(settings(make_config, tmp_path / "whole", 4), loss=Reinforce())
    train(settings(make_config, tmp_path / "parts", 2), loss=Reinforce())
    train(settings(make_config, tmp_path / "parts", 4), loss=Reinforce())
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


class TowardsTheReference(Reinforce):
    """Its own need of a reference counts, though kl_beta=0 holds none."""

    needs_reference = True
    stats = (Stat("distance"),)

    def __call__(self, logp, batch):
        distance = (logp.logp_BL - batch.logp_ref_BL).square().mean()
        return distance - (batch.advantages_BL * logp.logp_BL).mean(), distance.detach().unsqueeze(0)


def test_a_loss_that_needs_a_reference_has_one(make_config, tmp_path):
    train(settings(make_config, tmp_path / "run", update__lr=1e-2), loss=TowardsTheReference())
    distances = [line["distance"] for line in metrics(tmp_path / "run")]
    assert distances[0] < 1e-8  # the policy is still the base
    assert distances[2] > distances[0]


def test_the_entropy_bonus_changes_the_gradient(make_config, tmp_path):
    norms = []
    for bonus in (0.0, 1.0):
        train(settings(make_config, tmp_path / str(bonus), 1), loss=Reinforce(bonus))
        norms.append(metrics(tmp_path / str(bonus))[0]["grad_norm"])
    assert norms[0] != norms[1]
