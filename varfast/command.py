"""The commands: reads their arguments, prints their --help, runs them, and turns an InputError into a short message.

`varfast train ...`, `python -m varfast train ...` and `python -m varfast.train ...` are the same. Importing PyTorch
takes seconds, so nothing here imports it: `--help` and typos are answered at once.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import math
import os
import select
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel

import varfast
from varfast.config import Config, RooflineConfig
from varfast.evaluation.config import EvaluateConfig, SampleConfig
from varfast.features.config import StatisticsConfig
from varfast.perf.allocator import expand_segments
from varfast.printable import printable
from varfast.report.config import ReportConfig
from varfast.rewards.function import FunctionReward, missing
from varfast.runs.config import ExportConfig
from varfast.runs.named import runs_in
from varfast.settings import arguments as command_line
from varfast.settings import reference
from varfast.settings.loading import load_as, parse_arguments
from varfast.settings.paths import expanded
from varfast.types import InputError

_LONGEST_MESSAGE = 20_000  # characters of an error; a config with a hundred wrong keys has 10 000

# torchrun ends all processes as soon as one has ended: those that say nothing wait for the one that says why.
_PATIENCE_S = 10.0

_AnyConfig = TypeVar("_AnyConfig", bound=Config)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


@dataclass(frozen=True)
class Runs:
    """What `train` was asked to do: one run, or the runs of a sweep.

    Attributes:
        configs: one for each run.
        beside: folder of the config file, where a user's reward is looked for too; None: the config is no file.
        parent: the folder that holds the run folders of a sweep; None: no sweep.
        profile: write a trace of one step.
        of_folder: a run folder was named instead of a config.
    """

    configs: list[Config]
    beside: Path | None
    parent: str | None
    profile: bool
    of_folder: bool


def read_train(arguments: list[str]) -> Runs:
    """Arguments of `train`. Every run of a sweep is checked before the first one starts. Raises: InputError."""
    found = command_line.sort(arguments, Config, ["--profile"], ["--sweep"])
    path, overrides, profile = _config_path(found.paths, "train"), found.overrides, "--profile" in found.flags
    if not found.options:
        return read_run(path, overrides, profile=profile)
    sweeps = [_swept(text) for _, text in found.options]
    if math.prod(map(len, sweeps)) > 1000:
        raise InputError(f"--sweep: {math.prod(map(len, sweeps))} runs, want at most 1000; name fewer values")
    choices = list(itertools.product(*sweeps))
    first = read_run(path, [*overrides, *choices[0]], profile=profile)
    parent = first.configs[0].run.dir
    names = command_line.file_names([",".join(choice) for choice in choices])
    configs = [
        _load(Config, path, [*overrides, *choice], {"run.dir": f"{parent.rstrip('/') or '/'}/{name}"})
        for choice, name in zip(choices, names, strict=True)
    ]
    return replace(first, configs=configs, parent=parent)


def read_run(
    path: str, overrides: list[str], rewards: Mapping[str, Any] = MappingProxyType({}), profile: bool = False
) -> Runs:
    """One run of a config file, or of the config in a run folder.

    rewards: if there are any, in place of all that the config names.
    Raises: InputError.
    """
    of_folder, values = _is_run_folder(path), {"reward": dict(rewards)} if rewards else {}
    config = _load(Config, path, overrides, values)
    for name, reward in config.reward.items():
        if isinstance(reward, FunctionReward) and reward.is_missing:
            raise InputError(f"{path}: {missing(f'reward.{name}', reward.function)}")
    if of_folder:
        _refuse_what_reaches_outside(path, config, [*overrides, *(f"{key}=" for key in values)])
    beside = expanded(path)
    return Runs([config], beside if os.path.isdir(beside) else beside.parent, None, profile, of_folder)


def _swept(text: str) -> list[str]:
    """The overrides of `--sweep key=a,b`."""
    key, equals, values = text.partition("=")
    split = command_line.split_values(values)
    if not equals or not key or not all(value.strip() for value in split):
        raise InputError(
            f"--sweep wants key=value,value, as in --sweep grpo.kl_beta=0,0.05,0.2; usage: {_usage('train')}"
        )
    return [f"{key}={value}" for value in split]


def read_config(arguments: list[str], name: str = "pretrain") -> Config:
    """Arguments of a command that takes a config and overrides. Raises: InputError."""
    found = command_line.sort(arguments, Config)
    return _load(Config, _config_path(found.paths, name), found.overrides)


def read_roofline(arguments: list[str]) -> tuple[str, RooflineConfig]:
    """Arguments of `roofline`: the config's path, and what it says. Raises: InputError."""
    found = command_line.sort(arguments, RooflineConfig)
    path = _config_path(found.paths, "roofline")
    return path, _load(RooflineConfig, path, found.overrides)


def _config_path(paths: list[str], name: str) -> str:
    if not paths:
        raise InputError(f"usage: {_usage(name)}; the examples are in configs/")
    if len(paths) > 1:
        raise InputError(f"arguments {paths[0]!r} and {paths[1]!r}: want one config; usage: {_usage(name)}")
    _refuse_missing(paths[0])
    return paths[0]


def _refuse_missing(path: str) -> None:
    """Raises: InputError for what is no file and no run folder, with the nearest config there is."""
    given = expanded(path)
    if given.is_dir() and not _is_run_folder(path):
        runs = runs_in(given)
        held = f"; it holds the runs {', '.join(runs)}" if runs else ""
        raise InputError(f"config {path} is a folder and no run folder{held}; want a YAML file, or a run folder")
    if given.exists() or given.is_symlink():
        return
    near = [folder / f"{given.name}{suffix}" for folder in (given.parent, Path("configs")) for suffix in ("", ".yaml")]
    there = [str(p) for p in sorted(given.parent.glob("*.yaml"))] if given.parent.is_dir() else []
    meant = [str(p) for p in near if p.is_file()] or difflib.get_close_matches(path, there, n=1, cutoff=0.8)
    hint = f"did you mean {meant[0]}?" if meant else "the examples are in configs/"
    raise InputError(f"config {path}: No such file or directory; {hint}")


def _load(
    model: type[_AnyConfig], path: str, overrides: list[str], values: Mapping[str, Any] = MappingProxyType({})
) -> _AnyConfig:
    """Load a config file, or the config in a run folder, with the folder's present path as run.dir.

    values: by dotted key, whatever the file and the overrides say.
    """
    of_folder = _is_run_folder(path)
    if of_folder and not any(o.startswith(("run.dir=", "run=")) for o in overrides):
        values = {"run.dir": path, **values}
    return load_as(model, expanded(path) / "config.yaml" if of_folder else path, overrides, values)


def _is_run_folder(path: str) -> bool:
    return os.path.isfile(expanded(path) / "config.yaml")


def _refuse_what_reaches_outside(folder: str, config: Config, overrides: list[str]) -> None:
    """A run folder may come from somebody else: naming it does not approve what its config runs (docs/security.md).

    overrides: of the user, who approves what they name.
    """
    named = []
    if not any(override.startswith("reward=") for override in overrides):
        outside = {name: reward.reaches_outside() for name, reward in config.reward.items()}
        named = [f"reward.{printable(name, 80)} ({printable(why)})" for name, why in outside.items() if why]
    for name in config.log.trackers:
        if not any(override.startswith(("log=", f"log.{name}=")) for override in overrides):
            project = printable(getattr(config.log, name), 80)
            named.append(f"log.{name} (sends the run's metrics to {project})")
    if named:
        raise InputError(
            f"the config in {folder} does more than compute on the images: {', '.join(named)}. If you trust it, pass "
            f"it as a file: {folder}/config.yaml run.dir={folder}"
        )


def read_nothing(arguments: list[str]) -> None:
    if arguments:
        raise InputError(f"argument {arguments[0]!r}: env takes none; usage: {_usage('env')}")


# Where each shell looks for the script of a command.
_SCRIPTS = {
    "bash": "~/.local/share/bash-completion/completions/varfast",
    "zsh": '"${fpath[1]}/_varfast"',
    "fish": "~/.config/fish/completions/varfast.fish",
}
SHELLS = tuple(_SCRIPTS)


def read_shell(arguments: list[str]) -> str:
    """The argument of `completion`. Raises: InputError."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        shell = os.path.basename(os.environ.get("SHELL", ""))
        hint = f"; yours is {shell}" if shell in SHELLS else ""
        raise InputError(f"want the name of a shell: {', '.join(SHELLS)}{hint}; usage: {_usage('completion')}")
    return arguments[0]


# ---------------------------------------------------------------------------------------------------------------------
# The commands


@dataclass(frozen=True)
class Command:
    """A command of varfast.

    Attributes:
        about: one line, for the list of commands.
        usage: the arguments after its name.
        read: checks its arguments, without importing PyTorch; raises InputError.
        schema: of its keys; None: it has no keys.
        options: what it takes besides keys, with what each does.
        sections: which sections its --help shows; default: all.
    """

    about: str
    usage: str
    read: Callable[[list[str]], object]
    schema: type[BaseModel] | None = None
    options: tuple[tuple[str, str], ...] = ()
    sections: tuple[str, ...] = ()


_CONFIG = ("CONFIG", "a YAML file, as configs/digits.yaml, or a run folder; KEY=VALUE changes what it says")

COMMANDS = {
    "train": Command(
        "fine-tune a model with GRPO or DPO; the same command goes on with an unfinished run",
        "CONFIG [--profile] [--sweep KEY=A,B ...] [KEY=VALUE ...]",
        read_train,
        Config,
        (
            _CONFIG,
            ("--profile", "write a trace and the memory use of one step into the run folder"),
            ("--sweep KEY=A,B", "one run for each value, one after another; several sweeps: for each combination"),
        ),
    ),
    "sample": Command(
        "write a grid of samples of a run, or of any checkpoint",
        "RUN|CHECKPOINT [KEY=VALUE ...]",
        partial(parse_arguments, model=SampleConfig),
        SampleConfig,
    ),
    "evaluate": Command(
        "sample, and measure FID, accuracy and rewards against the base",
        "RUN|CHECKPOINT [KEY=VALUE ...]",
        partial(parse_arguments, model=EvaluateConfig),
        EvaluateConfig,
    ),
    "statistics": Command(
        "mean and covariance of real images' features, for the reward loo_fid and for FID",
        "IMAGES out=FILE.npz [KEY=VALUE ...]",
        partial(parse_arguments, model=StatisticsConfig),
        StatisticsConfig,
    ),
    "report": Command(
        "write one page about one or several runs",
        "RUN [RUN ...] [out=report.html]",
        partial(parse_arguments, model=ReportConfig),
        ReportConfig,
    ),
    "export": Command(
        "write a run's model in the format of the public checkpoints: as files, as a folder, or to the hub",
        "RUN out=model.safetensors|model/|hub=OWNER/NAME [KEY=VALUE ...]",
        partial(parse_arguments, model=ExportConfig),
        ExportConfig,
    ),
    "pretrain": Command(
        "make the base model of a config, or find it in the cache",
        "CONFIG [KEY=VALUE ...]",
        read_config,
        Config,
        (_CONFIG,),
        ("run", "policy", "pretrain"),
    ),
    "roofline": Command(
        "predict a config's time and memory on a GPU, from counts",
        "CONFIG [device=H200] [KEY=VALUE ...]",
        read_roofline,
        RooflineConfig,
        (_CONFIG,),
    ),
    "env": Command("show versions, hardware, and which kernels run here and why", "", read_nothing),
    "completion": Command(
        "print a script that lets a shell complete commands, keys, values and paths",
        "|".join(SHELLS),
        read_shell,
        options=tuple((shell, f"varfast completion {shell} > {file}") for shell, file in _SCRIPTS.items()),
    ),
}
HELP = "the same as COMMAND --help, or as --help"


def _usage(name: str) -> str:
    return f"python -m varfast.{name} {COMMANDS[name].usage}".rstrip()


# ---------------------------------------------------------------------------------------------------------------------
# Help


def help_text(name: str, only: list[str], width: int = 100) -> str:
    """What `varfast NAME --help` prints; `only`: names of sections. Raises: InputError for an unknown section."""
    command = COMMANDS[name]
    lines = [f"usage: {_usage(name)}", f"       {f'varfast {name} {command.usage}'.rstrip()}", "", command.about]
    lines += [""] if command.options else []
    options = list(command.options)
    if command.schema is not None and "run" in command.schema.model_fields and not only:
        options.append(("--help SECTION", "the keys of one section alone, as --help rollout"))
    for option, meaning in options:
        lines += textwrap.wrap(f"{option:16} {meaning}", width, initial_indent="  ", subsequent_indent=" " * 19)
    if command.schema is None:
        return "\n".join(lines).rstrip()
    keys = reference.terminal(command.schema, only or command.sections, width)
    if not keys:
        raise InputError(
            f"{name} has no section {' '.join(only)}; the sections: {', '.join(command.schema.model_fields)}"
        )
    return "\n".join([*lines, "", keys])


def overview() -> str:
    """What `varfast` alone prints."""
    lines = [f"varfast {varfast.__version__}: {(varfast.__doc__ or '').partition(': ')[2]}", ""]
    lines += ["usage: varfast COMMAND [arguments]", "       varfast COMMAND --help", ""]
    lines += [f"  {name:10} {command.about}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "first: varfast train configs/digits.yaml"])


def key_reference() -> str:
    """docs/config.md: `python -m varfast --markdown > docs/config.md`."""
    lines = ["# Every key", ""]
    lines += ["Made by `python -m varfast --markdown > docs/config.md`; the same text as `--help`.", ""]
    lines += ["A config is a YAML file with these sections. On the command line a key is dotted: `update.lr=3e-5`.", ""]
    lines.append(reference.markdown(Config))
    for name in ("sample", "evaluate", "statistics", "report", "export"):
        schema = COMMANDS[name].schema
        assert schema is not None
        lines += [reference.markdown(schema).replace("## Sections", f"## `varfast {name}`", 1)]
    return "\n".join(lines).rstrip() + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Running


def run_command(name: str, arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit with its code; for bad input with 2 and a message, without a traceback.

    Arguments are checked here before the command's module, and with it PyTorch, is imported.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = _run(name, arguments)
    except InputError as error:
        if _tells(error):
            _complain(f"error: {error}", error)
        else:
            time.sleep(_PATIENCE_S)
        code = 2
    except KeyboardInterrupt as error:
        _complain(str(error) or "interrupted", error)
        code = getattr(error, "code", 130)  # of another signal than Ctrl-C
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        code = 141  # as of a process that SIGPIPE ends
    sys.exit(code)


def _reader_is_gone() -> bool:
    """Whether what reads standard output, such as `head`, has ended; then nothing more is written to it."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


def _run(name: str, arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        only = [a for a in arguments if not a.startswith("-") and "=" not in a and not os.path.exists(a)]
        return _print(help_text(name, only, min(100, max(60, shutil.get_terminal_size().columns))))
    if "--version" in arguments:
        return _print(f"varfast {varfast.__version__}")
    try:
        COMMANDS[name].read(arguments)
    except InputError as error:
        if not arguments and "usage: " not in str(error):
            error.add_note(f"usage: {_usage(name)}")
        error.told_by = "machine"
        raise
    expand_segments()
    code: int = importlib.import_module(f"varfast.{name}").main(arguments)
    return code


def _tells(error: InputError) -> bool:
    """Whether this process is one that prints the error: torchrun starts many, which may all have the same one."""
    variable = {"first": "RANK", "machine": "LOCAL_RANK"}.get(error.told_by)
    return variable is None or os.environ.get(variable, "") in ("", "0")


def _print(text: str) -> int:
    """Print; a pipe whose reader has gone is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _reader_is_gone()
    return 0


def main() -> NoReturn:
    """`varfast COMMAND ...`, which is also `python -m varfast COMMAND ...`."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what to complete
        importlib.import_module("varfast.completion").answer()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        run_command(name, arguments)
    if name == "help" and arguments:
        name, *arguments = arguments if arguments[0] not in Config.model_fields else ["train", *arguments]
        if name in COMMANDS:
            run_command(name, ["--help", *arguments])
    shown = {
        "-h": overview,
        "--help": overview,
        "help": overview,
        "--version": lambda: f"varfast {varfast.__version__}",
        "--markdown": lambda: key_reference().rstrip("\n"),
    }
    if name in shown:
        sys.exit(_print(shown[name]()))
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
    if name.endswith((".yaml", ".yml")):
        hint = f"did you mean varfast train {name}?"
    elif os.path.isdir(name):
        hint = f"did you mean varfast report {name}, or sample, evaluate, export, train?"
    print(f"error: varfast has no command {name!r}; {hint}", file=sys.stderr)
    sys.exit(2)


def _complain(text: str, error: BaseException) -> None:
    # An error may quote a server, a file or a folder from somebody else: escape what would control the terminal.
    for part in (text, *getattr(error, "__notes__", [])):
        print(printable(part, _LONGEST_MESSAGE, lines=True), file=sys.stderr)
