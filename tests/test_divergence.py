"""A policy that diverges ends with a diagnosis, and the last good checkpoint is still there."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import varfast.sample
from varfast.distributed import ALONE, World
from varfast.learner import Learner
from varfast.policies.checks import check_finite
from varfast.randomness import Key
from varfast.runs.divergence import diagnosis, found_diverged
from varfast.runs.folder import RunFolder
from varfast.runs.load import load_run
from varfast.runs.run import _measured
from varfast.train import train
from varfast.types import NotFinitePolicy, NotFiniteReward, Sampling


def test_a_learning_rate_that_is_too_large_ends_with_a_diagnosis(make_config):
    config = make_config(update__lr=1e9, run__steps=50, log__checkpoint_every=1, log__keep_last=2)
    with pytest.raises(NotFinitePolicy) as caught:
        train(config)
    message = str(caught.value)
    for text in ("the policy diverged: after step ", " of 50 it cannot be sampled: ", "learning_rate 1e+09, grad_norm ",
                 "in another run.dir, set a lower update.lr (now 1e+09)", "a higher grpo.kl_beta"):  # fmt: skip
        assert text in message
    ended = json.loads((Path(config.run.dir) / "ended.json").read_text())
    assert ended["diverged"]
    assert ended["why"] == message
    for folder in (RunFolder(config.run.dir).checkpoints).glob("step_*"):  # whatever is there can be sampled
        assert folder.suffix == ""
        load_run(RunFolder(config.run.dir), torch.device("cpu"), "float32").sample([0, 1, 2, 3, 4], seed=0)
    with pytest.raises(NotFinitePolicy):  # the same command ends alike, and quickly
        train(config)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("every", [{"log__checkpoint_every": 1}, {"log__checkpoint_every": 3, "log__grid_every": 1}])
def test_weights_that_are_not_finite_are_neither_saved_nor_shown(make_config, monkeypatch, value, every):
    step_of = Learner.step

    def poisoned(self, scored, step, total_steps):
        stats = step_of(self, scored, step, total_steps)
        if step == 3:
            with torch.no_grad():
                self.state.policy.trainable.class_emb.weight[5, 0] = (
                    value  # of "no label": no logit of a rollout shows it
                )
        return stats

    monkeypatch.setattr(Learner, "step", poisoned)
    config = make_config(run__steps=8, log__keep_last=1, **every)
    with pytest.raises(NotFinitePolicy, match="1 of .* weights hold NaN or infinite numbers, the first is class_emb"):
        train(config)
    folder = RunFolder(config.run.dir)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step_000003"]
    monkeypatch.undo()
    assert train(config) == 0  # the poison was not in the checkpoint


def test_a_rollout_that_is_not_finite_is_not_measuredd(make_config, monkeypatch):
    config = make_config(log__checkpoint_every=2, run__steps=4)
    calls = []

    def diverged(rollout, images=None):
        calls.append(rollout)
        if len(calls) == 4:
            raise NotFinitePolicy("logits")
        check_finite(rollout, images)

    monkeypatch.setattr("varfast.runs.run.check_finite", diverged)
    with pytest.raises(NotFinitePolicy, match="step_000002 is the last good checkpoint") as caught:
        train(config)
    assert "after step 3 of 4 it cannot be sampled: logits\n  step 3: learning_rate " in str(caught.value)
    assert f"python -m varfast.export checkpoint={config.run.dir} out=good.pth" in str(caught.value)


def test_sample_says_that_a_policy_diverged_and_writes_no_picture(make_policy, monkeypatch, tmp_path):
    policy = make_policy()
    with torch.no_grad():
        policy.var.head.weight.fill_(math.inf)
    monkeypatch.setattr("varfast.sample.load_policy", lambda *_, **__: policy)
    with pytest.raises(NotFinitePolicy, match="the transformer's logits hold NaN or infinite numbers"):
        varfast.sample.main(["checkpoint=some.pth", f"out={tmp_path / 'out.png'}", "device=cpu"])
    assert not list(tmp_path.iterdir())


class OfTwo(World):
    """As if another process had said that its policy or reward failed."""

    def __init__(self, worst):
        super().__init__(1, 2)
        object.__setattr__(self, "worst", worst)

    def largest(self, number):
        return max(number, self.worst)


def test_all_processes_end_alike(make_policy, make_config, tmp_path):
    policy, config = make_policy(), make_config()
    assert found_diverged(policy, [0, 1], config, ALONE) is None
    found = found_diverged(policy, [0, 1], config, OfTwo(1))
    assert "after step 2 of" in str(diagnosis(found, config, tmp_path, 2, {}))
    assert "the weights of another process, which says which, are not finite" in str(found)
    rollout, images = policy.sample_images([0, 1], Sampling(), Key(0))
    found = _measured(lambda *_: None, images, rollout, Key(0), OfTwo(3), nullcontext())
    assert isinstance(found, NotFinitePolicy)
    found = _measured(lambda *_: None, images.fill_(math.nan), rollout, Key(0), OfTwo(1), nullcontext())
    assert isinstance(found, NotFinitePolicy)

    def bad(*_):
        raise NotFiniteReward("nan")

    assert isinstance(_measured(bad, images.zero_(), rollout, Key(0), OfTwo(0), nullcontext()), NotFiniteReward)


def test_the_diagnosis_says_what_holds_the_weights(make_config, tmp_path):
    config, found = make_config(), NotFinitePolicy("logits")
    assert "before the first step: logits" in str(diagnosis(found, config, tmp_path, 0, {}))
    assert "there is no earlier checkpoint" in str(diagnosis(found, config, tmp_path, 2, {}))
    for name in ("step_000001", "step_000002", "step_000002.part", "step_000003.damaged"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    message = str(diagnosis(found, config, tmp_path, 2, {"kl": 0.5}))
    assert "step_000002 holds these weights; delete it to go on from an earlier one" in message
    assert "step_000001 is the last good checkpoint" in message
    assert "export" not in message
    assert "step 2: kl 0.5" in message
