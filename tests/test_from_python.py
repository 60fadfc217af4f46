"""varfast.train called with rewards that are Python objects: notebooks and scripts."""

import functools
import inspect
import json
import os
import pickle
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml

import varfast
import varfast.export
import varfast.report
import varfast.sample
from varfast import InputError
from varfast.command import read_train
from varfast.config import parse_config
from varfast.evaluation.arguments import resolved
from varfast.evaluation.config import EvaluateConfig
from varfast.rewards.given import Given
from varfast.runs.signals import Stopped

from .runs import assert_same_run


def redness(images, labels):
    return images[:, 0].mean(dim=(1, 2))


def threshold(value):
    return lambda images: (images.mean(dim=(1, 2, 3)) > value).float()


class Judge(torch.nn.Module):
    """The usual shape of a model's output: (B, 1)."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.head = torch.nn.Linear(3, 1)

    def forward(self, images):
        self.seen.append((self.training, torch.is_grad_enabled()))
        return self.head(images.mean(dim=(2, 3)))

    def score(self, images, step):
        return images.mean(dim=(1, 2, 3))


@pytest.fixture
def settings(make_config, tmp_path):
    """A config as a dict, of two steps."""

    def make(name="run", **overrides):
        config = make_config(run__dir=str(tmp_path / name), run__steps=2, **overrides)
        return config.model_dump(exclude_unset=True)

    return make


# ---------------------------------------------------------------------------------------------------------------------
# The name


def forget(monkeypatch):
    """As if nothing had asked for varfast.train yet."""
    for name in ("varfast.train", "varfast.from_python"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("train", "from_python"):
        monkeypatch.delattr(varfast, name, raising=False)


@pytest.mark.parametrize(
    "first",
    [
        "import varfast",
        "import varfast.train",
        "from varfast.train import train",
        "from varfast import train",
        "import varfast.from_python",
        "from varfast.train import main; import varfast.sample",
    ],
)
def test_varfast_train_is_the_function_and_the_module_in_every_order_of_imports(monkeypatch, first):
    forget(monkeypatch)
    names = {}
    exec(f"{first}\nimport varfast", names)
    called = []
    module = varfast.train
    monkeypatch.setattr(
        sys.modules.get("varfast.from_python") or from_python(), "train", lambda *a, **k: called.append((a, k))
    )
    names["varfast"].train("c.yaml", rewards={})
    assert called == [(("c.yaml",), {"rewards": {}})]
    assert sys.modules["varfast.train"] is module is names["varfast"].train
    from varfast.train import main, train

    assert inspect.isfunction(train)
    assert inspect.isfunction(main)
    assert module.train is train


def from_python():
    import varfast.from_python

    return varfast.from_python


def test_varfast_train_is_passed_on_by_name_and_shows_its_arguments():
    assert pickle.loads(pickle.dumps(varfast.train)) is varfast.train
    assert list(inspect.signature(varfast.train).parameters)[:3] == ["config", "overrides", "rewards"]


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


def test_objects_of_all_kinds_are_rewards(settings, capsys):
    judge = Judge()
    run = varfast.train(
        settings(update__minibatch=8),
        rewards={
            "red": redness,
            "dark": (lambda images: -images.mean(dim=(1, 2, 3)), 0.5),
            "bright": threshold(0.5),
            "judge": judge,
            "method": {"function": judge.score, "weight": 2, "normalise": "batch"},
            "partial": functools.partial(redness, labels=None),
            "made": {"function": Judge, "weight": 0.0},
            "luma": {"type": "brightness", "mode": "raw"},
        },
    )
    last = run.metrics[-1]
    assert last["step"] == run.step == 2
    names = ("red", "dark", "bright", "judge", "method", "partial", "made", "luma")
    total = sum(weight * last[f"reward/{name}"] for name, weight in zip(names, (1, 0.5, 1, 1, 2, 1, 0, 1), strict=True))
    assert last["reward_mean"] == pytest.approx(total, rel=1e-4)
    assert last["reward/red"] == pytest.approx(last["reward/partial"])
    assert set(judge.seen) == {(False, False)}  # in eval(), without gradients
    assert run.before.keys() == run.after.keys() == {"reward", "entropy", *(f"reward/{name}" for name in names)}
    assert repr(run).startswith(f"TrainedRun('{run.folder}', 2 steps: reward ")
    policy = run.policy()
    assert policy.sample([0, 1], seed=0).tokens_BL.shape == (2, 5)
    assert run.report() == run.folder / "report.html"
    assert "reward/judge" in run.report().read_text()
    assert "run complete: 2 steps" in capsys.readouterr().out


def test_a_function_in_the_config_itself_is_the_same_reward(settings, tmp_path):
    section = {"red": {"type": "function", "function": redness}}
    varfast.train(settings("given"), rewards={"red": redness})
    varfast.train(settings("dict") | {"reward": section})
    varfast.train(parse_config(settings("config", reward=section)))
    for name in ("dict", "config"):
        assert_same_run(tmp_path / "given", tmp_path / name)


def test_a_config_is_a_path_or_a_dict_or_a_config(settings, tmp_path, monkeypatch, forget_modules):
    data = settings()
    data["run"]["dir"] = tmp_path / "run"  # paths and tuples, as Python has them
    data["rollout"]["labels"] = (0, 1)
    data["reward"] = {"mine": {"type": "function", "function": "beside_it:score"}}
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "beside_it.py").write_text("def score(images): return images.mean(dim=(1, 2, 3))")
    seen = []
    monkeypatch.setattr(from_python(), "run", lambda *args: seen.append(args) or 128 + signal.SIGINT)
    path = tmp_path / "sub" / "c.yaml"
    path.write_text(yaml.safe_dump(settings() | {"reward": data["reward"]}))
    for config in (path, str(path), data, parse_config(settings())):
        with pytest.raises(Stopped):
            varfast.train(config, ["run.steps=7", "update.lr=1e-3"], rewards={"red": redness})
        with pytest.raises(Stopped):
            varfast.train(config, "run.steps=7")
    for (config, profile, _, of_folder), named in zip(seen, [["red"], None] * 4, strict=True):
        assert config.run.steps == 7
        assert config.run.dir == str(tmp_path / "run")
        assert (profile, of_folder) == (False, False)
        if named is not None:
            assert list(config.reward) == named  # in place of all of the config
            assert config.update.lr == 1e-3
    assert [beside for _, _, beside, _ in seen] == [tmp_path / "sub"] * 4 + [None] * 4
    assert seen[4][0].rollout.labels == [0, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rewards": redness}, "rewards is <function redness .*; want names and functions, as rewards={'mine'"),
        ({"rewards": [redness]}, "rewards is .*; want names and functions"),
        ({"rewards": {}}, "rewards is empty; want rewards={'mine': function}"),
        ({"rewards": {"red": 3}}, r"rewards\['red'\] is 3; want a function, \(function, weight\), or a dict"),
        ({"rewards": {"red": (redness, "1")}}, "reward.red.weight: got '1'; want a number"),
        ({"rewards": {"red": {"function": redness, "wieght": 1.0}}}, "did you mean reward.red.weight"),
        ({"rewards": {"red": {"weight": 1.0}}}, "reward.red.function is missing"),
        ({"rewards": {"red": {"function": 3}}}, "reward.red.function: got 3, want module:name or file.py:name, or"),
        ({"rewards": {3: redness}}, "reward: got the key 3; want a name"),
        ({"rewards": {"red": lambda images, labels, mask: 0}}, r"red must take \(images, labels\); .*needs 'mask'"),
        ({"config": 3}, "config is 3; want the path of a YAML file, a dict or a Config"),
        ({"overrides": ["run.stepz=3"]}, "run.stepz: unknown key; did you mean run.steps"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml: No such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said(settings, given, message):
    with pytest.raises(InputError, match=message):
        varfast.train(**({"config": settings()} | given))


def test_an_error_of_a_reward_is_its_own_and_names_it(settings):
    def broken(images):
        return images.no_such_method()

    with pytest.raises(AttributeError, match="no_such_method") as caught:
        varfast.train(settings(), rewards={"mine": broken})
    assert any("in reward mine (tests.test_from_python:" in note for note in caught.value.__notes__)
    assert caught.traceback[-1].name == "broken"


# ---------------------------------------------------------------------------------------------------------------------
# What the folder keeps


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run with a function and a lambda."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    tiny = {"depth": 1, "patch_nums": [1, 2], "vocab_size": 16, "code_width": 4, "num_classes": 5}
    config = {
        "run": {"dir": folder, "steps": 2, "device": "cpu"},
        "policy": {
            "checkpoint": "random",
            "var": tiny,
            "vqvae": {"base_channels": 32, "channel_multipliers": [1], "num_res_blocks": 1},
        },
        "rollout": {"labels_per_step": 2, "group_size": 4},
        "update": {"minibatch": 4},
        "log": {"tensorboard": False},
        "eval": {"samples_per_label": 2},
    }
    return varfast.train(config, rewards={"red": redness, "high": (threshold(0.5), 0.5)}).folder


def test_the_folder_records_where_a_function_comes_from_and_its_code(finished):
    recorded = yaml.safe_load((finished / "config.yaml").read_text())["reward"]
    assert recorded["red"]["function"].startswith("given from Python: tests.test_from_python:redness (code ")
    assert "test_from_python:threshold.<locals>.<lambda> (code " in recorded["high"]["function"]
    assert recorded["high"]["weight"] == 0.5


def test_all_commands_read_the_folder_without_the_functions(finished, tmp_path, capsys):
    assert varfast.report.main([str(finished), f"out={tmp_path / 'report.html'}"]) == 0
    assert varfast.sample.main([str(finished), f"out={tmp_path / 'out.png'}", "device=cpu"]) == 0
    assert varfast.export.main([str(finished), f"out={tmp_path / 'model.safetensors'}"]) == 0
    assert "test_from_python:redness" in (tmp_path / "model.md").read_text()
    assert varfast.load_policy(finished).num_classes == 5
    said = []
    task = resolved(EvaluateConfig(checkpoint=str(finished)), said.append)
    assert task.scores == {}
    assert "red (runs tests.test_from_python:redness)" in said[0]
    assert '"function": "FILE.py:NAME"' in said[0]


def test_a_run_goes_on_with_the_same_functions_and_no_others(finished, tmp_path, capsys):
    finished = shutil.copytree(finished, tmp_path / "run")
    same = {"red": redness, "high": (threshold(0.5), 0.5)}
    for config in (finished, finished / "config.yaml"):
        with pytest.raises(InputError) as error:
            varfast.train(config, ["run.steps=3"])
        assert (
            "reward.red.function=tests.test_from_python:redness was given from Python, and no file can keep it. Give "
            "it again, as varfast.train(..., rewards={'red': ...})"
        ) in str(error.value)
    with pytest.raises(InputError, match="was given from Python"):
        read_train([str(finished)])
    with pytest.raises(InputError, match="was given from Python"):  # of who parses the config and trains by himself
        varfast.train.train(parse_config(yaml.safe_load((finished / "config.yaml").read_text())))
    for other in (
        {"red": redness},
        same | {"red": lambda images, labels: images[:, 0].mean(dim=(1, 2))},
        same | {"high": (threshold(0.6), 0.5)},
        same | {"high": (threshold(0.5), 0.6)},
        {"reddish": redness, "high": same["high"]},
    ):
        with pytest.raises(InputError, match=r"holds a run with another config:\n  reward[\s\S]*run.allow_change"):
            varfast.train(finished, ["run.steps=3"], rewards=other)
    assert varfast.train(finished, ["run.steps=3"], rewards=same).step == 3
    changed = same | {"high": (threshold(0.6), 0.5)}
    assert varfast.train(finished, ["run.steps=4", "run.allow_change=[reward]"], rewards=changed).step == 4
    assert "reward.high.function: given from Python: " in capsys.readouterr().out


def test_a_run_in_two_parts_equals_a_whole_one(settings, tmp_path):
    rewards = {"mine": lambda images, step: images.mean(dim=(1, 2, 3)) * torch.rand(len(images))}
    varfast.train(settings("whole"), ["run.steps=3"], rewards=rewards)
    varfast.train(settings("parts"), ["run.steps=1"], rewards=rewards)
    varfast.train(tmp_path / "parts", ["run.steps=3"], rewards=rewards)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def defined(source, name="score"):
    names = {"__name__": "cell"}
    exec(source, names)
    return Given(names[name]).text


def test_the_recorded_code_changes_with_what_a_function_does_and_with_nothing_else():
    source = 'def score(images, scale=1.0):\n    """Doc."""\n    return [scale * x.sum() for x in images]\n'
    first = defined(source)
    assert first == defined("\n\n# moved\n" + source.replace("Doc", "Other").replace("return", "# why\n    return"))
    others = [
        source.replace("1.0", "2.0"),
        source.replace("sum", "mean"),
        source.replace("x.sum()", "x.sum() + 1"),
        source.replace("images,", "pictures,").replace("in images", "in pictures"),
    ]
    assert len({first, *map(defined, others)}) == 5
    methods = (
        "class Judge:\n    def __call__(self, images):\n        return self.of(images)\n    def of(self, x):\n        "
    )
    assert defined(f"{methods}return x", "Judge") != defined(f"{methods}return -x", "Judge")
    assert Given(torch.mean).text.startswith("given from Python: ")


# ---------------------------------------------------------------------------------------------------------------------
# Stopping


def test_a_stop_saves_and_raises_and_the_same_call_goes_on(settings, tmp_path):
    calls = []

    def interrupted(images, step):
        calls.append(step)
        if calls == [None, None, 0, 1]:
            os.kill(os.getpid(), signal.SIGINT)  # what a notebook's stop button sends
        return images.mean(dim=(1, 2, 3))

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT") as caught:
        varfast.train(settings(), ["run.steps=4"], rewards={"mine": interrupted})
    assert caught.value.code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert calls[-1] == 1  # the step that it came in was finished
    run = varfast.train(tmp_path / "run", rewards={"mine": interrupted})
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4]


def test_another_thread_trains(settings):
    found = []
    thread = threading.Thread(target=lambda: found.append(varfast.train(settings(), rewards={"red": redness})))
    thread.start()
    thread.join()
    assert [run.step for run in found] == [2]


def test_dpo_takes_functions_too(settings):
    run = varfast.train(settings(dpo={}, grpo=None), rewards={"red": redness})
    assert "preferred_above" in run.metrics[-1] or "loss" in run.metrics[-1]
    assert json.loads((Path(run.folder) / "summary.json").read_text())["after"] == run.after
