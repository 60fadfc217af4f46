"""What a command answers before PyTorch is imported, and how it reads its arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from varfast import InputError, command
from varfast.config import Config
from varfast.evaluation.config import SampleConfig
from varfast.features.config import StatisticsConfig
from varfast.report.config import ReportConfig
from varfast.runs import named
from varfast.runs.config import ExportConfig
from varfast.settings import schema
from varfast.settings.loading import parse_arguments

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
    commands = ("train", "sample", "evaluate", "statistics", "report", "export", "pretrain", "roofline", "env")
    commands += ("completion",)
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
        ["varfast", "completion", "tcsh"],
        ["varfast", "completion", "fish"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", AS_MODULES, json.dumps(lines)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {" ".join(line): answer for line, answer in zip(lines, json.loads(done.stdout), strict=True)}


def test_help_and_typos_import_neither_torch_nor_numpy(answers):
    for line, (_, _, _, heavy) in answers.items():
        assert heavy == [], line


@pytest.mark.parametrize(
    "name", ["train", "sample", "evaluate", "statistics", "report", "export", "pretrain", "roofline", "env"]
)
def test_help_of_every_command_ends_with_0_and_names_its_keys(answers, name):
    code, out, error, _ = answers[f"varfast.{name} --help"]
    assert (code, error) == (0, "")
    assert out.startswith(f"usage: python -m varfast.{name}")
    assert max(map(len, out.splitlines())) <= 100
    assert answers[f"varfast {name} -h"][:3] == [0, out, ""]
    shown = {"train": "update.lr", "sample": "cfg", "evaluate": "fid_reference", "statistics": "images",
             "report": "runs", "export": "out", "pretrain": "pretrain.var_steps", "roofline": "device",
             "env": ""}[name]  # fmt: skip
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
        ("varfast completion tcsh", "want the name of a shell: bash, zsh, fish"),
    ],
)
def test_typos_are_answered_in_words_with_2(answers, line, message):
    code, out, error, _ = answers[line]
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_a_reader_that_has_ended_is_no_error():
    """As in `varfast env | head -1`."""
    code = (
        "import os, sys, types\n"
        "sys.modules['varfast.env'] = types.SimpleNamespace(main=lambda _: [print('x' * 9999) for _ in range(99)])\n"
        "from varfast.command import run_command\n"
        "run_command('env', [])\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_version_and_the_list_of_commands(answers):
    from varfast import __version__

    assert answers["varfast --version"][:2] == [0, f"varfast {__version__}\n"]
    assert answers["varfast.train --version"][:2] == [0, f"varfast {__version__}\n"]
    code, out, _, _ = answers["varfast"]
    assert code == 0
    for name in ("train", "sample", "evaluate", "statistics", "report", "export", "pretrain", "roofline", "env"):
        assert f"\n  {name} " in out


def test_key_reference_is_up_to_date():
    assert (ROOT / "docs" / "config.md").read_text() == command.key_reference(), (
        "python -m varfast --markdown > docs/config.md"
    )


def test_help_names_every_key_of_the_config():
    text = command.help_text("train", [])
    for key, _ in schema.leaves(Config):
        if key.split(".")[0] != key:
            assert f"\n  {key}  " in text
    for reward in (
        "brightness",
        "function",
        "aesthetic",
        "clip",
        "hpsv2",
        "pickscore",
        "imagereward",
        "classifier",
        "http",
        "vlm",
    ):
        assert f"reward.NAME, type: {reward}: " in text


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


CONFIG = "run: {dir: r, steps: 3}\npolicy: {preset: d16, checkpoint: random}\nreward: {bright: {type: brightness}}\n"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The working directory, with a config, and one in a folder that a sweep made."""
    for folder in (".", "grpo.kl_beta=0.1", "s/grpo.kl_beta=0.1"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "path",
    ["config.yaml", "s/grpo.kl_beta=0.1/config.yaml", "./grpo.kl_beta=0.1/config.yaml", "grpo.kl_beta=0.1/config.yaml"],
)
def test_a_config_may_lie_in_a_folder_that_a_sweep_made(workplace, path):
    for read in (
        lambda a: command.read_train(a).configs[0],
        command.read_config,
        lambda a: command.read_roofline(a)[1],
    ):
        assert read([path, "run.steps=5"]).run.steps == 5
        assert read(["run.steps=5", str(workplace / path)]).run.steps == 5


def test_a_missing_config_with_an_equals_sign_is_called_missing(workplace):
    with pytest.raises(InputError, match=r"config s/grpo.kl_beta=7/config.yaml: No such file"):
        command.read_train(["s/grpo.kl_beta=7/config.yaml"])


def test_a_run_folder_stands_for_its_config_wherever_it_is_now(workplace):
    assert command.read_train(["s/grpo.kl_beta=0.1"]).configs[0].run.dir == "s/grpo.kl_beta=0.1"
    assert command.read_train(["s/grpo.kl_beta=0.1", "run.dir=new"]).configs[0].run.dir == "new"


@pytest.mark.parametrize("form", [["update.lr=0.5"], ["--update.lr=0.5"], ["--update.lr", "0.5"]])
def test_dashes_are_taken(workplace, form):
    config = command.read_train(["config.yaml", *form, "--log.tensorboard=false"]).configs[0]
    assert (config.update.lr, config.log.tensorboard) == (0.5, False)
    assert command.read_train(["--config", "config.yaml", *form]).configs[0].update.lr == 0.5


def test_switches_need_no_value_and_words_stand_for_the_first_key():
    parsed = parse_arguments(["runs/x", "--out", "m.pth", "--overwrite"], ExportConfig)
    assert (parsed.checkpoint, parsed.out, parsed.overwrite) == ("runs/x", "m.pth", True)
    parsed = parse_arguments(["s/grpo.kl_beta=0", "--samples-per-label", "3", "labels=3"], SampleConfig)
    assert (parsed.checkpoint, parsed.samples_per_label, parsed.labels) == ("s/grpo.kl_beta=0", 3, [3])
    parsed = parse_arguments(["digits", "out=d.npz"], StatisticsConfig)
    assert (parsed.images, parsed.features) == ("digits", "inception")
    parsed = parse_arguments(["runs/x", "runs/y=1", "out=p.html"], ReportConfig)
    assert (parsed.runs, parsed.out) == (["runs/x", "runs/y=1"], "p.html")


def test_folders_called_as_a_key_are_folders_where_there_is_no_such_key(workplace):
    assert parse_arguments(["grpo.kl_beta=0.1"], ReportConfig).runs == ["grpo.kl_beta=0.1"]
    assert parse_arguments(["grpo.kl_beta=0.1"], SampleConfig).checkpoint == "grpo.kl_beta=0.1"
    assert command.read_train(["config.yaml", "grpo.kl_beta=0.1"]).configs[0].grpo.kl_beta == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python -m varfast.train"),
        (["config.yaml", "config.yaml"], "want one config"),
        (["config.yaml", "+update.lr=1"], "want update.lr=value; every key has a value already"),
        (["config.yaml", "~update.lr"], "want update.lr=value"),
        (["config.yaml", "-m"], "argument '-m': unknown option"),
        (["config.yaml", "--profil"], "did you mean --profile?"),
        (["config.yaml", "--learning-rate", "1"], "unknown option; did you mean update.lr?"),
        (["config.yaml", "--update.lr"], "'--update.lr' has no value; want update.lr=value"),
        (["config.yaml", "update.lr", "=", "1"], "want key=value, without spaces, as in update.lr=1"),
        (["config.yaml", "update.lr:1"], "want key=value, without spaces, as in update.lr=1"),
        (["config.yaml", "=1"], "want key=value"),
        (["config.yaml", "run."], "want key=value, without spaces, as in run.dir=value"),
        (["config.yaml", "run..steps=1"], "'run..steps' is no key; want key=value, as in update.lr=3e-5"),
        (["config.yaml", "--dry-run"], "varfast roofline predicts time and memory"),
    ],
)
def test_arguments_that_are_none_are_answered_in_a_line(workplace, arguments, message):
    with pytest.raises(InputError) as caught:
        command.read_train(arguments)
    assert message in str(caught.value)


def test_two_checkpoints_are_one_too_many():
    with pytest.raises(InputError, match="want one checkpoint; the others as key=value"):
        parse_arguments(["a", "b"], SampleConfig)
    with pytest.raises(InputError, match="'a' and checkpoint=b: want one of the two"):
        parse_arguments(["a", "checkpoint=b"], SampleConfig)
    with pytest.raises(InputError, match="want one checkpoint; .*; did you mean out=m.pth?"):
        parse_arguments(["runs/x", "m.pth"], ExportConfig)


def folders(*sweeps: str) -> list[str]:
    arguments = [word for sweep in sweeps for word in ("--sweep", sweep)]
    return [config.run.dir for config in command.read_train(["config.yaml", *arguments]).configs]


def test_sweeps_make_folders_side_by_side(workplace):
    assert folders("grpo.kl_beta=0,0.1") == ["r/grpo.kl_beta=0", "r/grpo.kl_beta=0.1"]
    addresses = "policy.checkpoint=hf://a/b.pth,hf://a/c.pth"
    found = command.read_train(["config.yaml", "policy.vqvae_checkpoint=x", "--sweep", addresses]).configs
    assert [config.run.dir for config in found] == [
        "r/policy.checkpoint=hf:_a_b.pth",
        "r/policy.checkpoint=hf:_a_c.pth",
    ]
    assert [config.policy.checkpoint for config in found] == ["hf://a/b.pth", "hf://a/c.pth"]


def test_sweeps_take_lists_and_keep_their_folders_apart(workplace):
    assert folders("rollout.labels=[0,1],[2,3]") == ["r/rollout.labels=[0,1]", "r/rollout.labels=[2,3]"]
    assert folders("log.wandb=a/b,a_b") == ["r/log.wandb=a_b", "r/log.wandb=a_b_2"]
    long = folders(f"log.wandb={'x' * 300},{'x' * 301}")
    assert len(set(long)) == 2
    assert all(len(Path(folder).name) < 256 for folder in long)


def test_a_checkpoint_that_does_not_exist_is_called_so(tmp_path):
    from varfast import sample

    for word in ("nope", f"checkpoint={tmp_path}/nope"):
        with pytest.raises(InputError, match=r"nope does not exist; want a run folder, or a transformer's weights"):
            sample.main([word, "device=cpu"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("own", "config own: No such file or directory; did you mean own.yaml?"),
        ("digits", "did you mean configs/digits.yaml?"),
        ("configs/digit.yaml", "did you mean configs/digits.yaml?"),
        ("s", "config s is a folder and no run folder; it holds the runs s/grpo.kl_beta=0.1; want a YAML file"),
        ("nothing/like/it", "the examples are in configs/"),
    ],
)
def test_a_config_that_is_not_there_is_answered_with_the_nearest(workplace, path, message):
    (workplace / "configs").mkdir()
    for name in ("own.yaml", "configs/digits.yaml"):
        (workplace / name).write_text(CONFIG)
    with pytest.raises(InputError) as caught:
        command.read_train([path])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nope.pth", "does not exist; want a run folder, or a transformer's weights"),
        ("s", "is no run folder; it holds the runs s/grpo.kl_beta=0.1"),
        ("s/grpo.kl_beta=0.1/var.pth", "is a file of a run; did you mean s/grpo.kl_beta=0.1?"),
        ("grid.png", "is no file of weights (.pth, .pt, .ckpt, .bin or .safetensors)"),
        ("hf://nope", "is no address; want a run folder, or a transformer's weights, as hf://owner/repo/file"),
        ("hf://a/b/c.pth", None),
        ("weights.safetensors", None),
        ("https://example.org/x.pth", None),
    ],
)
def test_an_address_that_names_no_model_is_told_what_it_is(workplace, address, message):
    for name in ("grid.png", "weights.safetensors", "s/grpo.kl_beta=0.1/var.pth"):
        (workplace / name).write_text("")
    found = named.fault(address)
    assert found == message or (found is not None and message is not None and found.startswith(message))


def test_help_of_a_section_and_a_run_folder_as_a_command(monkeypatch, capsys, workplace):
    def answer(*words):
        monkeypatch.setattr("sys.argv", ["varfast", *words])
        with pytest.raises(SystemExit) as caught:
            command.main()
        return caught.value.code, "".join(capsys.readouterr())

    assert "rollout.group_size" in answer("help", "rollout")[1]
    assert "update.lr  " not in answer("help", "rollout")[1]
    assert answer("help", "sampel") == (2, "error: varfast has no command 'sampel'; did you mean sample?\n")
    assert "did you mean varfast report s, or sample" in answer("s")[1]
    assert "usage: python -m varfast.sample" in answer("sample")[1]


def test_a_process_that_says_nothing_waits_for_the_one_that_does(monkeypatch, capsys, workplace):
    """torchrun ends all of them as soon as one has ended."""
    waited = []
    monkeypatch.setattr(command.time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit):
            command.run_command("train", ["config.yaml", "update.lrr=1"])
        assert bool(waited) == (rank == "1")
        assert ("unknown key" in capsys.readouterr().err) == (rank == "0")
