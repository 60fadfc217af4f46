"""Runs that cannot learn: each cause is named within 20 steps, once, and healthy runs are left alone."""

import json
from pathlib import Path

import pytest
import torch

from tests.runs import metrics
from varfast import InputError
from varfast.config import load_config
from varfast.runs.alarm import CAUSES, WINDOW, Alarm
from varfast.train import train
from varfast.types import NotFiniteReward

HEALTHY = {
    "reward_mean": 0.5, "reward_std": 0.1, "groups_without_signal": 1, "grad_norm": 0.3, "learning_rate": 1e-4,
    "clip_fraction": 0.05,
}  # fmt: skip


def found(steps, groups=4):
    alarm = Alarm(groups)
    return [(number, idle.what) for number, step in enumerate(steps, 1) if (idle := alarm.look(step))]


@pytest.mark.parametrize(
    ("what", "metrics"),
    [
        ("learning_rate", {"learning_rate": 0.0}),
        ("learning_rate", {"learning_rate": 1e-12}),
        ("reward", {"reward_std": 0.0, "groups_without_signal": 4}),
        ("signal", {"groups_without_signal": 4}),
        ("gradient", {"grad_norm": 0.0}),
        ("clipped", {"clip_fraction": 1.0}),
    ],
)
def test_alarm_names_each_cause_once_within_20_steps(what, metrics):
    assert WINDOW <= 20
    steps = [HEALTHY | metrics | {"loss": float(i)} for i in range(40)]
    assert found(steps) == [(WINDOW, what)]
    assert CAUSES[what][1]


def test_alarm_leaves_a_run_alone_that_learns_now_and_then():
    idle = HEALTHY | {"reward_std": 0.0, "groups_without_signal": 4, "grad_norm": 0.0, "clip_fraction": 1.0}
    steps = [HEALTHY if i % WINDOW == 0 else idle for i in range(60)]
    assert found(steps) == []


def test_alarm_tells_a_constant_reward_from_one_that_only_groups_share():
    steps = [HEALTHY | {"reward_std": 0.0, "reward_mean": float(i), "groups_without_signal": 4} for i in range(20)]
    assert found(steps) == [(WINDOW, "signal")]


def test_alarm_does_not_count_skipped_rollouts():
    skipped = {"skipped_rollouts": 1.0}
    assert found([skipped] * 40) == []
    steps = [step for _ in range(WINDOW) for step in (skipped, HEALTHY | {"grad_norm": 0.0})]
    assert found(steps) == [(2 * WINDOW, "gradient")]


def test_alarm_names_a_second_cause_later():
    steps = [HEALTHY | {"grad_norm": 0.0}] * WINDOW + [HEALTHY | {"clip_fraction": 1.0}] * WINDOW
    assert found(steps) == [(WINDOW, "gradient"), (2 * WINDOW, "clipped")]


CONSTANT = {"never": {"type": "brightness", "mode": "bright", "threshold": 2.0}}


def test_a_run_whose_reward_is_constant_says_so_and_stops_if_it_may(make_config, capsys):
    config = make_config(run__steps=30, reward=CONSTANT, run__stop_when_idle=True, eval__samples_per_label=0)
    assert train(config) == 0
    said = capsys.readouterr().out
    assert said.count("this run does not learn") == 1
    assert "every image earned the same reward" in said
    assert f"run complete: {WINDOW} steps, ended by run.stop_when_idle=true" in said
    assert len(metrics(config.run.dir)) == WINDOW
    assert json.loads((Path(config.run.dir) / "summary.json").read_text())["ended_by"] == "run.stop_when_idle=true"


def test_a_run_whose_reward_is_constant_goes_on_by_default(make_config, capsys):
    config = make_config(run__steps=WINDOW + 3, reward=CONSTANT, grpo__kl_beta=0.0, eval__samples_per_label=0)
    assert train(config) == 0
    assert capsys.readouterr().out.count("this run does not learn") == 1
    assert len(metrics(config.run.dir)) == WINDOW + 3


def nothing(images, labels):
    return torch.full((len(images),), float("nan"))


def by_label(images, labels):
    return labels.float() + torch.rand(1)  # another mean in each step, and equal within each group


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("learning_rate", {"update__lr": 1e-12}),
        ("signal", {"reward": {"own": {"type": "function", "function": f"{__name__}:by_label"}}}),
    ],
)
def test_a_run_that_cannot_learn_says_why(make_config, capsys, what, changed):
    config = make_config(run__steps=WINDOW, grpo__kl_beta=0.0, eval__samples_per_label=0, **changed)
    assert train(config) == 0
    said = capsys.readouterr().out
    assert said.count("this run does not learn") == 1
    assert CAUSES[what][1] in said


def test_a_reward_that_is_not_a_number_is_named_at_once_and_ends_the_run(make_config, capsys):
    config = make_config(
        run__steps=20,
        reward={"own": {"type": "function", "function": f"{__name__}:nothing"}},
        eval__samples_per_label=0,
    )
    with pytest.raises(NotFiniteReward, match="reward own returned nan for image 0"):
        train(config)
    assert "step 1 is left out: reward own returned nan" in capsys.readouterr().out
    ended = json.loads((Path(config.run.dir) / "ended.json").read_text())
    assert (ended["step"], ended["diverged"]) == (2, False)
    assert ended["why"].startswith("reward own returned nan")


@pytest.mark.parametrize(("key", "value"), [("update.lr", "0"), ("grpo.clip_eps", "0")])
def test_settings_that_learn_nothing_are_refused(key, value):
    with pytest.raises(InputError, match=f"{key}: got 0; want a number above 0"):
        load_config(Path(__file__).parents[1] / "configs" / "digits.yaml", [f"{key}={value}"])
