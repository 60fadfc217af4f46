"""A run folder that somebody handed on is data: opening it runs nothing, asks nobody, and writes into it alone.

docs/security.md says what is trusted and why.
"""

import contextlib
import json
import shlex
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml

import varfast.evaluate
import varfast.export
import varfast.report
import varfast.sample
from varfast import InputError
from varfast.evaluate import main as evaluate_main
from varfast.evaluation.arguments import resolved
from varfast.evaluation.config import EvaluateConfig
from varfast.settings.loading import parse_arguments
from varfast.train import main as train_main
from varfast.train import train

pytestmark = pytest.mark.usefixtures("forget_modules")
FEW = ["samples_per_label=1", "labels=[0]", "device=cpu"]


@pytest.fixture
def handed_on(make_config, tmp_path):
    """A run folder; and a function that changes sections of its config.yaml, in the checkpoints' copies too."""
    config = make_config(run__steps=1, eval__samples_per_label=0)
    train(config)
    folder = tmp_path / "handed_on"
    shutil.copytree(config.run.dir, folder)

    def change(**sections):
        data = yaml.safe_load((folder / "config.yaml").read_text())
        for name, section in sections.items():
            data[name] = section
        (folder / "config.yaml").write_text(yaml.safe_dump(data))

    return folder, change


@pytest.fixture
def no_network(monkeypatch):
    """Whom the process asked."""
    asked = []

    def refuse(self, address, *rest):
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *args, **kw: asked.append(args[:2]) or (_ for _ in ()).throw(OSError)
    )
    return asked


HOSTILE = {
    "popen": {"type": "function", "function": "subprocess:Popen", "args": {"args": ["touch", "{folder}/PWNED"]}},
    "system": {"type": "function", "function": "os:system"},
    "file": {"type": "function", "function": "{folder}/evil.py:score"},
    "beside": {"type": "function", "function": "evil:score"},
    "http": {"type": "http", "url": "http://169.254.169.254/latest/meta-data"},
    "vlm": {"type": "vlm", "url": "http://169.254.169.254", "model": "m", "question": "?", "api_key_env": "PATH"},
    "names": {"type": "clip", "label_prompt": "a {name}", "names": "/etc/passwd"},
    "weights": {"type": "clip", "prompt": "a", "pretrained": "hf://evil/repo/model.safetensors"},
    "head": {"type": "aesthetic", "head": "https://evil.example/head.pth"},
    "tag": {"type": "aesthetic"},
    "hpsv2": {"type": "hpsv2", "prompt": "a"},
    "pickscore": {"type": "pickscore", "prompt": "a"},
    "imagereward": {"type": "imagereward", "prompt": "a"},
    "torchvision": {"type": "classifier", "file": "/dev/zero"},
}


def hostile(folder):
    return json.loads(json.dumps(HOSTILE).replace("{folder}", str(folder)))


def opened(folder, tmp_path):
    """Every command on the folder, and the Python API; it may be refused, in one line."""
    for main, arguments in (
        (varfast.evaluate.main, [f"checkpoint={folder}", *FEW, f"out={tmp_path / 'evaluated'}"]),
        (varfast.sample.main, [f"checkpoint={folder}", f"out={tmp_path / 'out.png'}", "device=cpu"]),
        (varfast.export.main, [f"checkpoint={folder}", f"out={tmp_path / 'model.safetensors'}"]),
        (varfast.report.main, [str(folder), f"out={tmp_path / 'report.html'}"]),
        (lambda folders: 0 * len(varfast.load_policy(*folders).parts), [str(folder)]),
    ):
        try:
            assert main(arguments) == 0
        except InputError as error:
            print("refused:", error)


def test_a_folder_that_is_opened_runs_asks_and_reads_nothing_that_its_config_names(
    handed_on, tmp_path, no_network, monkeypatch, capsys
):
    folder, change = handed_on
    (folder / "evil.py").write_text(f"open({str(folder / 'PWNED')!r}, 'w')\ndef score(images, labels): pass\n")
    change(reward=hostile(folder) | {"luma": {"type": "brightness", "mode": "raw"}})
    read = []
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.addaudithook(lambda event, args: read.append(str(args[0])) if event == "open" and on[0] else None)
    on = [True]
    try:
        opened(folder, tmp_path)
    finally:
        on[0] = False
    assert not (folder / "PWNED").exists()
    assert "evil" not in sys.modules
    assert no_network == []
    assert not {"/etc/passwd", "/dev/zero"} & set(read)
    assert "score/luma" in capsys.readouterr().out  # what only computes on the images is measured


def test_what_evaluate_leaves_out_is_one_line_with_the_argument_that_brings_it_back(handed_on, tmp_path, capsys):
    folder, change = handed_on
    (tmp_path / "mine.py").write_text("def score(images, labels, text):\n    return [float(len(text))] * len(images)\n")
    mine = {"type": "function", "function": f"{tmp_path}/mine.py:score", "args": {"text": 'it\'s $(x) "é"'}}
    change(reward={"mine": mine, "luma": {"type": "brightness", "mode": "raw", "weight": 2.0}})
    arguments = [f"checkpoint={folder}", *FEW, f"out={tmp_path / 'a'}"]
    assert evaluate_main(arguments) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "left out" in line]
    assert f"mine (runs {tmp_path}/mine.py:score)" in line
    assert "score/mine" not in out
    override = shlex.split(line[line.index("add ") + 4 :])
    config = parse_arguments([f"checkpoint={folder}", *override], EvaluateConfig)
    assert {n: r.model_dump(exclude_defaults=True) for n, r in config.scores.items()} == {
        "mine": mine, "luma": {"type": "brightness", "mode": "raw", "weight": 2.0}
    }  # fmt: skip
    arguments[-1] = f"out={tmp_path / 'b'}"
    assert evaluate_main([*arguments, *override]) == 0
    out = capsys.readouterr().out
    assert "left out" not in out
    assert "score/mine" in out
    assert "score/luma" in out


def test_every_kind_of_reward_that_reaches_outside_is_left_out(handed_on):
    folder, change = handed_on
    safe = {"luma": {"type": "brightness"}, "digit": {"type": "classifier", "model": "digits"}}
    change(reward=hostile(folder) | safe)
    said = []
    found = resolved(EvaluateConfig(checkpoint=str(folder)), said.append)
    assert set(found.scores) == set(safe)
    (line,) = said
    assert all(f"{name} (" in line for name in HOSTILE)
    assert not any(f"{name} (" in line for name in safe)


def test_names_from_a_folder_are_printed_without_what_a_terminal_obeys(handed_on, tmp_path, capsys):
    folder, change = handed_on
    evil = {"\x1b]0;owned\x07": {"type": "brightness"}, "\x1b[2J": {"type": "function", "function": "os:system"}}
    change(reward=evil)
    assert evaluate_main([f"checkpoint={folder}", *FEW, f"out={tmp_path / 'a'}"]) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert r"score/\x1b]0;owned\x07" in printed.out


def test_evaluate_writes_through_no_link_of_a_folder(handed_on, tmp_path):
    """A link in place of a file that it would write: what the link leads to stays as it is."""
    folder, _ = handed_on
    precious = tmp_path / "precious"
    arguments = [f"checkpoint={folder}", *FEW, "save=png"]
    assert evaluate_main(arguments) == 0
    written = [p for p in (folder / "evaluation").rglob("*") if p.is_file()]
    assert {p.suffix for p in written} == {".json", ".png", ".npz"}
    shutil.copytree(folder / "evaluation", tmp_path / "whole")
    for path in written:
        for suffix in ("", ".incomplete"):
            shutil.rmtree(folder / "evaluation")
            shutil.copytree(tmp_path / "whole", folder / "evaluation")
            precious.write_text("precious")
            link = path.with_name(path.name + suffix)
            link.unlink(missing_ok=True)
            link.symlink_to(precious)
            if path.suffix == ".png" and path.parent.name != "evaluation":  # sampled again
                shutil.rmtree(folder / "evaluation" / "chunks")
            with contextlib.suppress(InputError):
                evaluate_main(arguments)
            assert precious.read_text() == "precious", link
    shutil.rmtree(folder / "evaluation" / "images")
    shutil.rmtree(folder / "evaluation" / "chunks")
    (folder / "evaluation" / "images").symlink_to(tmp_path)
    with pytest.raises(InputError, match="images is a link"):
        evaluate_main(arguments)


def test_a_config_that_is_passed_is_trusted_and_one_that_lies_in_the_folder_is_compared(
    handed_on, tmp_path, monkeypatch
):
    """`train config.yaml` runs what that file names; resuming reads the folder's config and runs nothing of it."""
    folder, change = handed_on
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "open('ran', 'w').close()\ndef score(images, labels): return [1.0] * len(images)\n"
    )
    data = yaml.safe_load((folder / "config.yaml").read_text())
    data["run"]["dir"] = str(folder)
    data["run"]["steps"] = 2
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(data))
    change(reward={"mine": {"type": "function", "function": "mine.py:score"}})
    assert train_main(["own.yaml"]) == 0
    assert not Path("ran").exists()
    data["reward"] = {"mine": {"type": "function", "function": "mine.py:score"}}
    data["run"]["dir"] = str(tmp_path / "new")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(data))
    assert train_main(["own.yaml"]) == 0
    assert Path("ran").exists()


def test_a_folder_given_to_train_is_no_config_that_was_passed(handed_on):
    folder, change = handed_on
    change(reward=hostile(folder))
    with pytest.raises(InputError, match=r"popen \(runs subprocess:Popen\).* as a file: .*/config.yaml run.dir="):
        train_main([str(folder)])
    assert not (folder / "PWNED").exists()
    luma = {"luma": {"type": "brightness", "mode": "raw"}}
    change(reward=luma, log={"wandb": "evil"})
    with pytest.raises(InputError, match=r"log.wandb \(sends the run's metrics to evil\).* as a file: "):
        train_main([str(folder)])
    change(reward=luma, log={})
    assert train_main([str(folder)]) == 0


@pytest.mark.parametrize("address", ["hf://evil/repo/model.pth", "{weights}", "pretrain"])
def test_a_folder_given_to_train_starts_from_nothing_outside_of_it(
    make_config, make_policy, tmp_path, no_network, address
):
    """Its base is lost, or was never there: what the config names in its place is not read, fetched or made."""
    policy, weights = make_policy(patch_nums=(1, 2), vocab_size=16, code_width=4), tmp_path / "var.pth"
    torch.save(policy.var.state_dict(), weights)
    torch.save(policy.vqvae.state_dict(), tmp_path / "vqvae.pth")
    named = {"policy__checkpoint": str(weights), "policy__vqvae_checkpoint": str(tmp_path / "vqvae.pth")}
    config = make_config(run__steps=1, eval__samples_per_label=0, **named)
    train(config)
    folder = tmp_path / "handed_on"
    shutil.copytree(config.run.dir, folder)
    assert train_main([str(folder), "run.steps=2"]) == 0

    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "base")
    note = (folder / "base.json").read_text()
    (folder / "base.json").write_text(note.replace(str(tmp_path), str(tmp_path / "elsewhere")))
    data = yaml.safe_load((folder / "config.yaml").read_text())
    data["policy"]["checkpoint"] = address.format(weights=weights)
    if address == "pretrain":
        del data["policy"]["vqvae_checkpoint"]
        data["pretrain"]["dataset"] = "/etc"
    (folder / "config.yaml").write_text(yaml.safe_dump(data))
    for lost in ("is not there as it was", "is not in its folder"):
        with pytest.raises(InputError, match=lost) as raised:
            train_main([str(folder), "run.steps=3"])
        said = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
        assert f"pass it as a file: {folder}/config.yaml run.dir={folder}" in said
        (folder / "base.json").unlink(missing_ok=True)
    assert no_network == []
    if address == "{weights}":
        assert train_main([f"{folder}/config.yaml", f"run.dir={folder}", "run.steps=3"]) == 0
