"""What a command answers before PyTorch is imported, and how it reads its arguments."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "triton", "numpy", "PIL", "tensorboard", "huggingface_hub")

# Runs a command as `python -m` does, in one process for all of them, and says which heavy modules it brought.
AS_MODULES = """
import contextlib, io, json, runpy, sys
answers = []
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv = [module, *arguments]
    out, error, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=False)
        except SystemExit as end:
            code = end.code
    answers.append([code, out.getvalue(), error.getvalue(), [m for m in sys.modules if m in HEAVY]])
print(json.dumps(answers))
""".replace("HEAVY", repr(HEAVY))


@pytest.fixture(scope="module")
def answers():
    """Of command lines that need no PyTorch: (code, stdout, stderr, heavy modules) by what was typed."""
    commands = ("train", "sample", "evaluate", "report", "export", "pretrain", "roofline", "env")
    lines = [[f"varfast.{name}", "--help"] for name in commands]
    lines += [["varfast", name, "-h"] for name in commands]
    lines += [
        ["varfast"],
        ["varfast", "--version"],
        ["varfast", "trian", "configs/digits.yaml"],
        ["varfast", "configs/digits.yaml"],
        ["varfast.train", "--version"],
        ["varfast.train", "configs/digits.yaml", "update.lrr=1"],
        ["varfast", "train", "configs/digits.yaml", "update.lrr=1"],
        ["varfast.train", "configs/digits.yaml", "kernels.conv3x3=cudnn"],
        ["varfast.train", "configs/digits.yaml", "--sweep", "update.lrr=1,2"],
        ["varfast.train", "configs/digits.yml"],
        ["varfast.train", "--help", "rollout"],
        ["varfast.pretrain", "configs/digits.yaml", "pretrain.var_step=1"],
        ["varfast.roofline", "configs/digits.yaml", "devise=H100"],
        ["varfast.sample", "checkpoint=x", "guidance_scale=4"],
        ["varfast.evaluate", "checkpoint=x", "num_samples=4"],
        ["varfast.export", "runs/x", "out=x.bin"],
        ["varfast.report"],
        ["varfast.env", "cuda"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", AS_MODULES, json.dumps(lines)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {" ".join(line): answer for line, answer in zip(lines, json.loads(done.stdout), strict=True)}


def test_help_and_typos_import_neither_torch_nor_numpy(answers):
    for line, (_, _, _, heavy) in answers.items():
        assert heavy == [], line


@pytest.mark.parametrize("name", ["train", "sample", "evaluate", "report", "export", "pretrain", "roofline", "env"])
def test_help_of_every_command_ends_with_0_and_names_its_keys(answers, name):
    code, out, error, _ = answers[f"varfast.{name} --help"]
    assert (code, error) == (0, "")
    assert out.startswith(f"usage: python -m varfast.{name}")
    assert max(map(len, out.splitlines())) <= 100
    assert answers[f"varfast {name} -h"][:3] == [0, out, ""]
    shown = {"train": "update.lr", "sample": "cfg", "evaluate": "fid_reference", "report": "runs", "export": "out",
             "pretrain": "pretrain.var_steps", "roofline": "device", "env": ""}[name]  # fmt: skip
    assert f"  {shown}  " in out or not shown


def test_help_of_one_section_shows_type_default_and_meaning(answers):
    _, out, _, _ = answers["varfast.train --help rollout"]
    assert "rollout.group_size  a whole number from 2 to 10**6; default 16\n      G, images a label" in out
    assert "update.lr" not in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("varfast trian configs/digits.yaml", "no command 'trian'; did you mean train?"),
        ("varfast configs/digits.yaml", "did you mean varfast train configs/digits.yaml?"),
        ("varfast.train configs/digits.yaml update.lrr=1", "update.lrr: unknown key; did you mean update.lr?"),
        ("varfast train configs/digits.yaml update.lrr=1", "update.lrr: unknown key; did you mean update.lr?"),
        ("varfast.train configs/digits.yaml kernels.conv3x3=cudnn", "want auto, triton, library or reference"),
        ("varfast.train configs/digits.yaml --sweep update.lrr=1,2", "did you mean update.lr?"),
        ("varfast.train configs/digits.yml", "config configs/digits.yml: No such file"),
        ("varfast.pretrain configs/digits.yaml pretrain.var_step=1", "did you mean pretrain.var_steps?"),
        ("varfast.roofline configs/digits.yaml devise=H100", "devise: unknown key; did you mean device?"),
        ("varfast.sample checkpoint=x guidance_scale=4", "guidance_scale: unknown key; did you mean cfg?"),
        ("varfast.evaluate checkpoint=x num_samples=4", "did you mean samples_per_label?"),
        ("varfast.export runs/x out=x.bin", "want a name that ends with .safetensors or .pth"),
        ("varfast.report", "runs is missing"),
        ("varfast.env cuda", "env takes none"),
    ],
)
def test_typos_are_answered_in_words_with_2(answers, line, message):
    code, out, error, _ = answers[line]
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_version_and_the_list_of_commands(answers):
    from varfast import __version__

    assert answers["varfast --version"][:2] == [0, f"varfast {__version__}\n"]
    assert answers["varfast.train --version"][:2] == [0, f"varfast {__version__}\n"]
    code, out, _, _ = answers["varfast"]
    assert code == 0
    for name in ("train", "sample", "evaluate", "report", "export", "pretrain", "roofline", "env"):
        assert f"\n  {name} " in out
