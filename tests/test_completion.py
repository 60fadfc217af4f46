"""What a shell completes: commands, keys, values, configs and run folders."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from varfast.completion import completions

CONFIG = "run: {dir: r, steps: 3}\npolicy: {preset: d16, checkpoint: random}\nreward: {mine: {type: brightness}}\n"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a config, a run beside a folder of others, and a file of weights."""
    for folder in ("runs/a", "runs/b", "configs"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / ("config.yaml" if "runs" in folder else "own.yaml")).write_text(CONFIG)
    (tmp_path / "configs" / "notes.txt").write_text("")
    (tmp_path / "weights.pth").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def completed(line: str) -> list[str]:
    *before, begun = line.split(" ")
    return list(completions(before, begun))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tr", ["train"]),
        ("--v", ["--version"]),
        ("help ro", ["roofline"]),
        ("completion ", ["bash", "zsh", "fish"]),
        ("nonsense ", []),
        ("train con", ["configs/"]),
        ("train configs/", ["configs/own.yaml"]),
        ("train configs/own.yaml con", []),  # one config is enough
        ("sample runs/", ["runs/a", "runs/b"]),
        ("sample we", ["weights.pth"]),
        ("export we", []),  # exports runs alone
        ("report runs/a runs/b", ["runs/b"]),
        ("train update.l", ["update.lr=", "update.lr_schedule="]),
        ("train update.optimizer=a", ["update.optimizer=adamw", "update.optimizer=apex", "update.optimizer=adamw8bit"]),
        ("train --update.optimizer=ap", ["--update.optimizer=apex"]),
        ("train --update.optimizer ap", ["apex"]),
        ("train --run.det", ["--run.deterministic="]),
        ("train --prof", ["--profile"]),
        ("train run.deterministic=", ["run.deterministic=true", "run.deterministic=false"]),
        ("train run.device=c", ["run.device=cpu", "run.device=cuda"]),
        ("train update.micro_batch=", ["update.micro_batch=null"]),
        ("train policy.checkpoint=we", ["policy.checkpoint=weights.pth"]),
        ("train --sweep update.optimizer=adamw,ap", ["update.optimizer=adamw,apex"]),
        ("train --sweep grpo.cl", ["grpo.clip_eps="]),
        ("sample runs/a dt", ["dtype="]),
        ("sample runs/a dtype=", ["dtype=float32", "dtype=bfloat16"]),
        ("env ", ["--help", "--version"]),
    ],
)
def test_completions_of_a_line(workplace, line, found):
    assert completed(line) == found


def test_names_and_types_come_from_the_config_and_the_line(workplace):
    assert "reward.mine.threshold=" in completed("train configs/own.yaml reward.mi")
    assert "reward.mine.function=" not in completed("train configs/own.yaml reward.mine.")
    assert "reward.mine.function=" in completed("train configs/own.yaml reward.mine.type=function reward.mine.")
    assert "reward.x.type=pickscore" in completed("train runs/a reward.x.type=p")
    assert "policy.gpt." in completed("train policy.family=llamagen policy.")
    assert "policy.gpt." not in completed("train configs/own.yaml policy.")


def test_a_section_alone_is_answered_by_its_keys(workplace):
    """A shell puts a space after the only completion, and update. is no argument."""
    found = completed("train upd")
    assert len(found) > 5
    assert all(word.startswith("update.") for word in found)


def test_what_cannot_be_read_completes_as_if_it_were_not_there(workplace):
    (workplace / "bad.yaml").write_text("{")
    assert completed("train bad.yaml update.lr_") == ["update.lr_schedule="]
    assert completed("train ~nobody/x") == []
    assert completed("train missing/") == []


BASH = """
eval "$(varfast completion bash)"
IFS= read -r COMP_LINE
COMP_POINT=${#COMP_LINE} COMP_TYPE=9
_python_argcomplete varfast
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_gets_an_answer_without_pytorch(workplace):
    folder = workplace / "bin"
    folder.mkdir()
    script = folder / "varfast"
    script.write_text(
        f"#!{sys.executable}\nimport json, sys\nfrom varfast.command import main\nimport os\n"
        "end = os._exit\nos._exit = lambda code: (json.dump('torch' in sys.modules, open('torch.json', 'w')), end(0))\n"
        "main()\n"
    )
    script.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", BASH],
        input="varfast train configs/own.yaml update.optimizer=ad",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.split(), done.stderr) == (["adamw", "adamw8bit"], "")
    assert json.loads((workplace / "torch.json").read_text()) is False
