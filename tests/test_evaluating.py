"""Evaluation during training. On several processes: tests/test_distributed.py."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from varfast import InputError, Policy
from varfast.randomness import EVAL_STEP
from varfast.runs.evaluating import eval_metrics
from varfast.train import train

from .runs import assert_same_run, metrics

# All that an evaluation could disturb: averages that are swapped in, copies in 16 bits, a second optimizer step.
SETTINGS = {
    "run__steps": 5, "run__dtype": "bfloat16", "update__lr": 1e-2, "update__ema_decay": 0.5, "log__checkpoint_every": 3,
}  # fmt: skip
NAMES = {"eval/reward", "eval/reward/luma", "eval/entropy"}


def evaluated(folder):
    """The numbers of each evaluation, by step."""
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    found = {line["step"]: {k: v for k, v in line.items() if k.startswith("eval/")} for line in lines}
    return {step: numbers for step, numbers in found.items() if numbers}


def without_evaluations(folder):
    return [{k: v for k, v in line.items() if not k.startswith("eval")} for line in metrics(folder) if line["step"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def whole(make_config, runs):
    """A run that is evaluated after every second step, made once."""
    config = make_config(**SETTINGS, eval__every=2, run__dir=str(runs / "whole"))
    if not Path(config.run.dir).exists():
        train(config)
    return config


def test_an_evaluation_changes_nothing_and_shows_what_a_shorter_run_would_deliver(whole, make_config, tmp_path):
    plain = make_config(**SETTINGS)
    train(plain)
    states = [{k: v for k, v in json.loads((Path(c.run.dir) / "summary.json").read_text()).items() if k != "spent"}
              for c in (plain, whole)]  # fmt: skip
    assert states[0] == states[1]
    assert evaluated(plain.run.dir) == {}
    assert metrics(plain.run.dir) == without_evaluations(whole.run.dir)
    shorter = make_config(**SETTINGS | {"run__steps": 2}, run__dir=str(tmp_path / "shorter"))
    train(shorter)
    after_two = json.loads((Path(shorter.run.dir) / "summary.json").read_text())["after"]
    found = evaluated(whole.run.dir)
    assert list(found) == [0, 2, 4, 5]
    assert all(numbers.keys() == NAMES for numbers in found.values())
    for step, table in ((0, states[0]["before"]), (2, after_two), (5, states[0]["after"])):
        assert {name.removeprefix("eval/"): value for name, value in found[step].items()} == table
    assert len({numbers["eval/entropy"] for numbers in found.values()}) == 4


def test_a_run_that_goes_on_has_the_same_evaluations(whole, make_config):
    for steps in (4, 5):
        config = make_config(**SETTINGS | {"run__steps": steps}, eval__every=2)
        train(config)
    assert_same_run(config.run.dir, whole.run.dir)
    # As if killed between an evaluation's end and its line: one checkpoint further, the last step's has no numbers.
    path = Path(config.run.dir) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    without = {k: v for k, v in lines[-1].items() if not k.startswith("eval")}
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:-1], without]))
    train(config)
    assert metrics(config.run.dir) == metrics(whole.run.dir)


def test_evaluations_may_begin_in_the_middle_of_a_run(whole, make_config):
    train(make_config(**SETTINGS | {"run__steps": 4}))
    config = make_config(**SETTINGS, eval__every=2)
    train(config)
    assert evaluated(config.run.dir) == {s: e for s, e in evaluated(whole.run.dir).items() if s != 2}


@pytest.mark.parametrize("at", [2, 3], ids=["in the middle", "after the last step"])
def test_a_signal_ends_an_evaluation_which_is_made_up_for(whole, make_config, monkeypatch, at):
    """Sampling is in two chunks; the signal comes in the first one, and the second is not sampled."""
    sampled = []

    def stop(self, prompts, how, key, *arguments, sample=Policy.sample_images, **keywords):
        if key.step == EVAL_STEP:
            sampled.append(key.first_sample)
            if len(sampled) == 2 * at - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return sample(self, prompts, how, key, *arguments, **keywords)

    settings = SETTINGS | {"rollout__micro_batch": 8, "eval__every": 4}
    monkeypatch.setattr(Policy, "sample_images", stop)
    config = make_config(**settings)
    assert train(config) == 128 + signal.SIGTERM
    assert sampled == [0, 8] * (at - 1) + [0]
    assert not (Path(config.run.dir) / "summary.json").exists()
    assert list(evaluated(config.run.dir)) == [0, 4][: at - 1]
    train(config)
    assert list(evaluated(config.run.dir)) == [0, 4, 5]
    numbers = {step: evaluated(whole.run.dir)[step] for step in (0, 4, 5)}
    for step, found in evaluated(config.run.dir).items():
        assert found == pytest.approx(numbers[step], rel=1e-5)


@pytest.fixture
def failing(make_config, tmp_path, forget_modules):
    """A reward whose calls fail from the n-th on, which `fail(n, how)` chooses: "nan", or an error to raise."""
    path = tmp_path / "failing.py"

    def fail(number, how):
        path.write_text(
            "calls = []\ndef reward(images, labels):\n    calls.append(1)\n"
            f"    broken = len(calls) == {number}\n"
            f"    if broken and {how!r} != 'nan':\n        raise KeyError({how!r})\n"
            "    return images.mean(dim=(1, 2, 3)) * (float('nan') if broken else 1)\n"
        )
        reward = {"mine": {"type": "function", "function": f"{path}:reward"}}
        return make_config(reward=reward, eval__every=2, eval__samples_per_label=1, run__steps=4)

    return fail


def test_an_evaluation_with_a_reward_that_is_not_finite_is_left_out(failing, capsys):
    config = failing(4, "nan")  # before, two steps, and the evaluation
    train(config)
    assert "the evaluation after step 2 is left out: reward mine returned nan" in capsys.readouterr().out
    assert list(evaluated(config.run.dir)) == [0, 4]


def test_a_reward_that_raises_in_an_evaluation_loses_nothing(failing):
    config = failing(4, "what I look for")
    with pytest.raises(KeyError, match="what I look for") as caught:
        train(config)
    assert "holds step 2; the same command goes on" in "".join(caught.value.__notes__)


def test_metrics_of_prompts_have_their_domain():
    values = {"reward": [1.0, 2.0], "reward (held out)": [3.0], "reward/a (out of domain)": [4.0]}
    found = eval_metrics({name: np.array(numbers) for name, numbers in values.items()})
    assert found == {"eval/reward": 1.5, "eval/held_out/reward": 3.0, "eval/out_of_domain/reward/a": 4.0}


def test_an_evaluation_needs_samples(make_config):
    with pytest.raises(InputError, match=r"eval\.every=2 with eval\.samples_per_label=0"):
        make_config(eval__every=2, eval__samples_per_label=0)
