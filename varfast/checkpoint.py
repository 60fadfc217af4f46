"""Atomic save and load of everything a run is, and the folder it lives in.

A run's randomness is a function of seed and step (varfast.randomness), so weights, optimizer, step and config are all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from varfast.config import Config, parse_config
from varfast.models.weights import read_checkpoint
from varfast.types import InputError

_FORMAT = 1
# Settings that do not change what the run computes, or only how far it goes.
_FREE_TO_CHANGE = (
    "run.dir",
    "run.steps",
    "run.parallel",
    "run.timeout_s",
    "log",
    "eval",
    "kernels",
    "rollout.micro_batch",
    "update.micro_batch",
    "pretrain.cache_dir",
    "pretrain.num_workers",
)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Create or replace `path` in one step: it holds the old content or the new, never a part of it.

    Args:
        path: its folder is created.
        write: gets a file opened for writing.
    Raises: InputError if the disk is full or the folder cannot be written; what stood at `path` is still there.
    """
    beside = path.with_name(path.name + ".incomplete")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError that carries no errno.
        beside.unlink(missing_ok=True) if beside.parent.is_dir() else None
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        whole = "; the earlier one is whole" if path.is_file() else ""
        raise InputError(f"cannot write {path}: {reason}{whole}. Free space there, or choose another folder") from error


def save_tensors(path: Path, content: Any) -> None:
    """Write what torch.save can write, atomically. Raises: InputError as write_atomically."""
    write_atomically(path, lambda file: torch.save(content, file))


def save_text(path: Path, text: str) -> None:
    """Write a text file, atomically. Raises: InputError as write_atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


@dataclass(frozen=True)
class TrainState:
    """Everything a run is.

    Attributes:
        step: steps done.
        var, optimizer: state_dicts.
        before: evaluation of the base model.
    """

    step: int
    var: dict[str, Any]
    optimizer: dict[str, Any]
    before: dict[str, float]


class RunFolder:
    """The files of a run. Raises: InputError if the folder cannot be used.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.checkpoint = self.path / "checkpoint.pt"
        self.weights = self.path / "var.pth"
        self.config = self.path / "config.yaml"
        self.base = self.path / "base.json"

    def prepare(self, config: Config) -> TrainState | None:
        """Make the folder ready for this config; the state to go on from, if there is one.

        Raises: InputError if the folder cannot be written, holds something else, or holds a run with another config.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            occupied = any(self.path.iterdir())
        except OSError as error:
            raise InputError(f"run.dir={self.path} cannot be used: {error.strerror}; choose another run.dir") from error
        if occupied and not self.config.exists():
            raise InputError(f"run.dir={self.path} holds other files and no run; choose another run.dir")
        state = None
        if self.checkpoint.exists():
            self._refuse_other_config(config)
            state = self.load_state()
        save_text(self.config, dump_config(config))
        return state

    def load_config(self) -> Config:
        """The resolved config of the run in this folder."""
        try:
            data = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{self.path} is no run folder: {self.config.name}: {error.strerror}") from error
        return parse_config(data, str(self.config))

    def load_state(self) -> TrainState:
        """Raises: InputError if there is no checkpoint yet, or if it is damaged or of a later version."""
        if not self.checkpoint.exists():
            raise InputError(f"{self.path} holds no checkpoint yet; its run has not reached log.checkpoint_every steps")
        content = read_checkpoint(self.checkpoint)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise InputError(f"{self.checkpoint} is no checkpoint of this version of varfast (format {_FORMAT})")
        return TrainState(content["step"], content["var"], content["optimizer"], content["before"])

    def save_state(self, state: TrainState) -> None:
        """Replace the checkpoint. Raises: InputError as write_atomically."""
        content = {"format": _FORMAT, **vars(state)}
        save_tensors(self.checkpoint, content)

    def save_base(self, var: str, vqvae: str) -> None:
        """Note the files that the run started from: a resumed run must find the same reference."""
        save_text(self.base, json.dumps({"var": var, "vqvae": vqvae}, indent=2) + "\n")

    def load_base(self) -> tuple[str, str] | None:
        """The files that the run started from; None for random weights, which the config alone defines."""
        if not self.base.exists():
            return None
        noted = json.loads(self.base.read_text(encoding="utf-8"))
        return noted["var"], noted["vqvae"]

    def _refuse_other_config(self, config: Config) -> None:
        differences = [
            f"  {key}: {old} there, {new} here"
            for key, (old, new) in _differences(self.load_config(), config).items()
            if not any(key == free or key.startswith(free + ".") for free in _FREE_TO_CHANGE)
        ]
        if config.update.lr_schedule != "constant" and self.load_config().run.steps != config.run.steps:
            differences.append(f"  run.steps: update.lr_schedule={config.update.lr_schedule} depends on it")
        if differences:
            raise InputError(
                "\n".join([f"run.dir={self.path} holds a run with another config:", *differences])
                + "\n  choose another run.dir, or take these back"
            )


def dump_config(config: Config) -> str:
    """The whole config, defaults included, as YAML that load_config reads."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False)


def read_leaves(path: Path) -> dict[str, Any]:
    """The leaves of a JSON file; empty if it is not there or cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return leaves(content) if isinstance(content, dict) else {}


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """What a nested dictionary holds, by key, as update.lr."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for name, child in node.items() for k, v in leaves(child, f"{prefix}.{name}".strip(".")).items()}


def _differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    before, after = leaves(old.model_dump(mode="json")), leaves(new.model_dump(mode="json"))
    keys = [*before, *(k for k in after if k not in before)]
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}
