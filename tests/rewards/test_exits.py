"""A reward that ends the process: the state is saved first, the code is not 0, and the reward is named."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from varfast import InputError
from varfast.train import train

SOURCE = """
import os, signal, sys
calls, at, what = [0], 3, None
def score(images, labels):
    calls[0] += 1
    if what is not None and calls[0] == at:
        exec(what)
    return images.mean(dim=(1, 2, 3))
"""


@pytest.fixture
def leaver(tmp_path, monkeypatch):
    (tmp_path / "leaver.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import leaver

    yield leaver
    sys.modules.pop("leaver")


def metrics(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: line[k] for k in ("step", "reward/mine", "loss", "grad_norm")} for line in lines]


@pytest.mark.parametrize(
    ("what", "raised", "message"),
    [
        (
            "sys.exit(0)",
            InputError,
            r"reward mine \(leaver:score\), in step 3: it raised SystemExit\(0\), which would end",
        ),
        ("sys.exit('\\x1b[2J')", InputError, r"raised SystemExit\(\\x1b\[2J\)"),
        ("raise GeneratorExit", InputError, r"raised GeneratorExit\(\)"),
        ("raise KeyboardInterrupt(7)", KeyboardInterrupt, "7"),
        ("raise BaseException('mine')", BaseException, "mine"),
        ("os.kill(os.getpid(), signal.SIGINT)", None, ""),  # to the trainer, which ends after the step
    ],
)
def test_a_reward_that_ends_the_process_loses_no_step(make_config, leaver, tmp_path, what, raised, message, capsys):
    few = {"run__steps": 5, "log__checkpoint_every": 99, "eval__samples_per_label": 0,
           "reward": {"mine": {"type": "function", "function": "leaver:score"}}}  # fmt: skip
    whole = make_config(run__dir=str(tmp_path / "whole"), **few)
    assert train(whole) == 0
    leaver.calls[0], leaver.what = 0, what
    config = make_config(**few)
    if raised is None:
        assert train(config) == 130
    else:
        with pytest.raises(raised, match=message) as caught:
            train(config)
        notes = "\n".join(caught.value.__notes__)
        assert "holds step 2; the same command goes on from there" in notes
        assert "mine (leaver:score), in step 3" in notes + str(caught.value)
    leaver.what = None
    assert train(config) == 0
    assert metrics(config.run.dir) == metrics(whole.run.dir)
    ours, theirs = (torch.load(Path(c.run.dir) / "var.pth", weights_only=True) for c in (config, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_reward_that_imports_with_an_exit_trains_nothing(make_config, leaver, tmp_path):
    (tmp_path / "at_import.py").write_text("import sys\nsys.exit(0)\n")
    config = make_config(reward={"mine": {"type": "function", "function": f"{tmp_path}/at_import.py:score"}})
    with pytest.raises(InputError, match=r"reward mine .*, while it was imported or made: it raised SystemExit\(0\)"):
        train(config)
    assert not (Path(config.run.dir) / "metrics.jsonl").exists()


def test_what_a_reward_does_to_its_labels_and_gradients_does_not_reach_the_update(make_config, tmp_path, leaver):
    """The same bits as without it: gradients off when it is imported, labels and images written over, at every step."""
    (tmp_path / "rude.py").write_text(
        "import os, random, numpy, torch\ntorch.set_grad_enabled(False)\ntorch.set_default_dtype(torch.float64)\n"
        "def score(images, labels):\n"
        "    found = images.mean(dim=(1, 2, 3))\n"
        "    labels.zero_(); images.zero_(); torch.manual_seed(0); numpy.random.seed(0); random.seed(0)\n"
        "    torch.set_grad_enabled(False); torch.set_default_dtype(torch.float64); os.chdir('/')\n"
        "    return found[:, None]\n"
    )
    whole = make_config(
        run__dir=str(tmp_path / "whole"), reward={"mine": {"type": "function", "function": "leaver:score"}}
    )
    train(whole)
    config = make_config(reward={"mine": {"type": "function", "function": "rude:score"}})
    assert train(config) == 0
    sys.modules.pop("rude")
    assert metrics(config.run.dir) == metrics(whole.run.dir)
    ours, theirs = (torch.load(Path(c.run.dir) / "var.pth", weights_only=True) for c in (config, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert os.getcwd() != "/"
