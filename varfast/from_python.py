"""Training called from a notebook or a script: `varfast.train(...)`, with rewards that are Python functions."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varfast.command import Runs, read_run
from varfast.config import Config, parse_config
from varfast.files import read_json
from varfast.perf.allocator import expand_segments
from varfast.policies.device import pick_device
from varfast.policies.driver import Driver
from varfast.report.command import main as write_report
from varfast.runs.folder import RunFolder
from varfast.runs.load import load_policy
from varfast.runs.signals import Stopped
from varfast.settings.problems import show
from varfast.settings.reading import apply_override
from varfast.train import train as run
from varfast.types import InputError

# A function, (function, weight), or a section of the config, whose type is `function` where it has none.
RewardGiven = Callable[..., Any] | str | tuple[Callable[..., Any] | str, float] | Mapping[str, Any]


@dataclass(frozen=True)
class TrainedRun:
    """A run that is complete.

    Attributes:
        folder: of the run, which `varfast.load_policy` and all commands take.
        step: rollouts that were done.
        before, after: means over the same number of fresh samples of the base and of the trained policy, by name:
            reward, reward/<name>, entropy, and accuracy where the config has a classifier.
    """

    folder: Path
    step: int
    before: dict[str, float]
    after: dict[str, float]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one a step; pandas.DataFrame(run.metrics) is a table of them."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def policy(self, device: str | None = None, dtype: str = "float32") -> Driver:
        """The trained policy, as `varfast.load_policy` loads it. device: default: that of the run."""
        folder = RunFolder(self.folder)
        return load_policy(self.folder, device=device or pick_device(folder.load_config().run.device), dtype=dtype)

    def report(self, out: str | Path | None = None) -> Path:
        """Write one page with all curves, grids and settings, which needs no network. out: default: in the folder."""
        path = self.folder / "report.html" if out is None else Path(out).expanduser()
        write_report([str(self.folder), f"out={path}"])
        return path

    def __repr__(self) -> str:
        change = [f"{name} {self.before[name]:.4g} -> {value:.4g}" for name, value in self.after.items()]
        return f"TrainedRun({str(self.folder)!r}, {self.step} steps{': ' if change else ''}{', '.join(change)})"


def train(
    config: str | Path | Mapping[str, Any] | Config,
    overrides: Sequence[str] = (),
    *,
    rewards: Mapping[str, RewardGiven] | None = None,
    profile: bool = False,
) -> TrainedRun:
    """Train, or go on with a run that is not complete. `varfast.train` is this function.

    Args:
        config: the path of a YAML file or of a run folder, a dict with the same sections, or a Config.
        overrides: as on the command line, ["run.steps=20", "update.lr=3e-5"].
        rewards: by names of your choice, in place of all rewards of the config. Each is a function (or method, class,
            nn.Module, anything that can be called) of (images, labels), or of what its parameters name; or (function,
            weight); or a dict with `function` and any of `weight`, `normalise` and `args`; or a dict as in YAML, as
            {"type": "classifier"}. Default: the rewards of the config.
        profile: write a trace and the memory use of one steady step into the run folder.
    Returns: the run, once it is complete. To go on with a run, give it the same rewards again.
    Raises: InputError for anything that cannot be used; what a reward raises, after a checkpoint; Stopped, a
        KeyboardInterrupt, for Ctrl-C, a notebook's stop button and the signals of a scheduler: within steps after a
        checkpoint, from which the same call goes on.
    """
    asked = _asked(config, [overrides] if isinstance(overrides, str) else list(overrides), rewards)
    expand_segments()
    (wanted,) = asked.configs
    code = run(wanted, profile, asked.beside, asked.of_folder)
    if code:
        raise Stopped(signal.Signals(code - 128))
    folder = RunFolder(wanted.run.dir).path
    summary = read_json(folder / "summary.json")
    return TrainedRun(folder, summary["step"], summary["before"], summary["after"])


def _asked(config: Any, overrides: list[str], rewards: Mapping[str, RewardGiven] | None) -> Runs:
    given = {} if rewards is None else _sections(rewards)
    if isinstance(config, str | Path):
        return read_run(str(config), overrides, given)
    if isinstance(config, Config):
        if not (overrides or given):
            return Runs([config], None, None, False, False)
        config = config.model_dump(exclude_unset=True)
    if not isinstance(config, Mapping):
        raise InputError(f"config is {show(config)}; want the path of a YAML file, a dict or a Config")
    data = _as_yaml(config)
    for override in overrides:
        apply_override(data, override)
    data |= {"reward": given} if given else {}
    return Runs([parse_config(data)], None, None, False, False)


def _sections(rewards: Any) -> dict[str, Any]:
    """The section `reward` of a config. Raises: InputError."""
    example = "rewards={'mine': function} or {'mine': (function, weight)}"
    if not isinstance(rewards, Mapping):
        raise InputError(f"rewards is {show(rewards)}; want names and functions, as {example}")
    if not rewards:
        raise InputError(f"rewards is empty; want {example}, or no rewards to take those of the config")
    sections = {}
    for name, given in rewards.items():
        if isinstance(given, tuple) and len(given) == 2:
            sections[name] = {"type": "function", "function": given[0], "weight": given[1]}
        elif isinstance(given, Mapping):
            sections[name] = {"type": "function", **_as_yaml(given)}
        elif callable(given) or isinstance(given, str):
            sections[name] = {"type": "function", "function": given}
        else:
            raise InputError(f"rewards[{name!r}] is {show(given)}; want a function, (function, weight), or a dict with "
                             "function, weight, normalise and args")  # fmt: skip
    return sections


def _as_yaml(value: Any) -> Any:
    """A copy with what YAML has in place of Python's tuples and paths."""
    if isinstance(value, Mapping):
        return {key: _as_yaml(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_as_yaml(inside) for inside in value]
    return str(value) if isinstance(value, Path) else value
