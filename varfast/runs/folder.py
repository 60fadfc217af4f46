"""The folder of a run: who may use it, which config it belongs to, and where its files are."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from varfast.config import Config, parse_config
from varfast.distributed import decided_by_first
from varfast.files import (
    INCOMPLETE,
    advice,
    leaves,
    move_folder,
    read_text,
    reason,
    remove_leftovers,
    remove_tree,
    save_text,
    write_atomically,
)
from varfast.printable import printable
from varfast.runs.checkpoint import Checkpoint, newest_checkpoint
from varfast.runs.lock import LOCK_NAME, FolderLock
from varfast.runs.manifest import checkpoint_folders, dump_config, step_of
from varfast.runs.named import runs_in
from varfast.settings.reading import read_yaml
from varfast.types import InputError

# Settings that say how far a run goes, beside run.steps.
_LENGTH = ("run.budget_images", "run.budget_flop", "run.budget_hours")
# Settings that do not change what a run computes, or only how far it goes: they may differ when it is resumed.
_FREE_TO_CHANGE = (
    "run.dir",
    "run.steps",
    *_LENGTH,
    "run.parallel",
    "run.timeout_s",
    "run.max_bad_rollouts",
    "run.allow_change",
    "run.stop_when_idle",
    "log",
    "eval",
    "kernels",
    "grpo.kl_every",
    "dpo.kl_every",
    "dpo.save_pairs",
    "rollout.micro_batch",
    "rollout.cuda_graph",
    "update.micro_batch",
    "update.checkpointing",
    "update.cuda_graph",
    "pretrain.cache_dir",
    "pretrain.num_workers",
)
# Files that a resumed run writes again or can do without.
_REWRITTEN = (
    "appearance.json", "before_after.json", "config.yaml", "ended.json", "environment.json", "grid_rows.json",
    "labels.json", "metrics.jsonl", "prompts.jsonl", "summary.json", "tokenizer.json",
)  # fmt: skip


class RunFolder:
    """The files of a run. Raises: InputError if the folder cannot be used.

    Attributes:
        path: the folder.
        checkpoints, config, base, adapter: paths of what lies in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.checkpoints = self.path / "checkpoints"
        self.config = self.path / "config.yaml"
        self.base = self.path / "base.json"
        self.adapter = self.path / "adapter"

    def weights(self, config: Config) -> Path:
        """The file of the trained model, once the run is complete: var.pth, for VAR."""
        return self.path / f"{config.policy.parts[0]}.pth"

    @contextmanager
    def held(self) -> Iterator[FolderLock]:
        """Keep other runs out of the folder in the body. The first process of a run holds the lock for all of them.

        Raises: InputError, which names the holder, if another run has it.
        """
        lock = FolderLock(self.path, f"run.dir={self.path}", "choose another run.dir")
        decided_by_first(lock.take)
        try:
            yield lock
        finally:
            lock.release()

    def prepare(self, config: Config) -> Checkpoint | None:
        """Make the folder, whose lock is held, ready for this config. Returns the checkpoint to go on from, if any.

        What killed saves left behind is removed. A damaged checkpoint is renamed to step_000050.damaged, and so is a
        pipe, a device or a folder in the place of a file that the run writes again.

        Raises: InputError if the folder cannot be written, holds something else, holds a run with another config, or
            holds checkpoints of which none is whole.
        """
        return decided_by_first(lambda: self._prepare(config))

    def _prepare(self, config: Config) -> Checkpoint | None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = sorted(path.name for path in self.path.iterdir() if not _may_precede_a_run(path))
        except OSError as error:
            raise InputError(f"run.dir={self.path} cannot be used: {reason(error)}; choose another run.dir") from error
        if names and not self.config.exists() and not checkpoint_folders(self.checkpoints):
            shown = ", ".join([*names[:3], "..."] if len(names) > 3 else names)
            raise InputError(
                f"run.dir={self.path} holds other files and no run ({shown}); choose another run.dir, or move them"
            )
        self._refuse_old_format()
        found = newest_checkpoint(self.checkpoints)
        if found is not None:
            self._refuse_other_config(found, config)
        self._tidy(found, config)
        save_text(self.config, dump_config(config))
        return found

    def save_adapter(self, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Write the adapter alone, as peft reads it. Raises: WriteError."""
        save_text(self.adapter / "adapter_config.json", json.dumps(settings, indent=2) + "\n")
        content = safetensors.torch.save(tensors, metadata={"format": "pt"})
        write_atomically(self.adapter / "adapter_model.safetensors", lambda file: file.write(content))

    def load_config(self) -> Config:
        """The resolved config of the run in this folder. Raises: InputError if there is none, or it is damaged."""
        if not os.path.lexists(self.config):
            runs = runs_in(self.path)
            held = f"; it holds the runs {', '.join(runs)}" if runs else ""
            raise InputError(f"{self.path} is no run folder: {self.config.name}: {os.strerror(errno.ENOENT)}{held}")
        text = read_text(self.config)
        try:
            data = read_yaml(text, self.config.name)
        except InputError as error:
            what = printable(" ".join(str(error).split()))
            raise InputError(
                f"{self.config} is damaged: it is not YAML as varfast writes it ({what}); the command that started the "
                "run writes it again"
            ) from error
        return parse_config(data, str(self.config))

    def newest(self) -> Checkpoint:
        """The newest whole checkpoint. Raises: InputError if there is none yet, or if all are damaged."""
        self._refuse_old_format()
        found = newest_checkpoint(self.checkpoints)
        if found is None:
            raise InputError(f"{self.path} holds no checkpoint yet; its run has not reached log.checkpoint_every steps")
        return found

    def _refuse_old_format(self) -> None:
        if (self.path / "checkpoint.pt").exists():
            raise InputError(
                f"{self.path} holds checkpoint.pt, as varfast wrote it before checkpoints/; choose another run.dir, or "
                "go on with the commit in its environment.json"
            )

    def _tidy(self, found: Checkpoint | None, config: Config) -> None:
        """Remove what killed writers left; rename what is damaged. `found`: the checkpoint to go on from."""
        for folder in (
            self.path,
            self.checkpoints,
            self.adapter,
            self.path / "grids",
            self.path / "samples",
            self.path / "pairs",
        ):
            remove_leftovers(folder)
        try:
            for path in (self.weights(config), *(self.path / name for name in _REWRITTEN)):
                if os.path.lexists(path) and not path.is_file():
                    os.rename(path, path.with_name(path.name + ".damaged"))
            for part in self.checkpoints.glob("step_*.part"):
                remove_tree(part)
            for folder in checkpoint_folders(self.checkpoints) if found is not None else ():
                if found is not None and step_of(folder) > found.step:
                    aside = folder.with_name(folder.name + ".damaged")
                    remove_tree(aside)
                    move_folder(folder, aside)
        except OSError as error:
            raise InputError(f"{self.checkpoints} cannot be written: {reason(error)}. {advice(error)}") from error

    def _refuse_other_config(self, found: Checkpoint, config: Config) -> None:
        """Compare with the config in the checkpoint's manifest: config.yaml may be damaged, or edited."""
        then = parse_config(found.config, f"{found.path}/manifest.json: config")
        before, now = (leaves(each.model_dump(mode="json")) for each in (then, config))
        different = {
            key: line for key, line in differences(before, now).items() if not _is_one_of(key, _FREE_TO_CHANGE)
        }
        if depends := config.update.depends_on_steps:
            scheduled = f"update.{depends}={getattr(config.update, depends)} depends on it"
            keys = (key for key in ("run.steps", *_LENGTH) if before.get(key) != now.get(key))
            different |= {key: f"  {key}: {scheduled}" for key in keys}
        allowed = [different.pop(key) for key in list(different) if _is_one_of(key, config.run.allow_change)]
        refuse_differences(
            list(different.values()),
            f"run.dir={self.path} holds a run with another config",
            "choose another run.dir, name what may change in run.allow_change",
        )
        if allowed:
            print("\n".join([f"from step {found.step} on, as run.allow_change says:", *allowed]))


def _is_one_of(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], shown: Callable[[Any], str] = str) -> dict[str, str]:
    """A line for each setting that has another value here than where a folder was begun, by the setting's name.

    Args:
        shown: turns names and values into text.
    """
    keys = [*there, *(key for key in here if key not in there)]
    pairs = {key: (there.get(key), here.get(key)) for key in keys}
    return {
        key: f"  {shown(key)}: {shown(old)} there, {shown(new)} here" for key, (old, new) in pairs.items() if old != new
    }


def refuse_differences(lines: list[str], what: str, remedy: str) -> None:
    """Raises: InputError if there are any: `what` the folder holds, the differences, and what can be done."""
    if lines:
        raise InputError("\n".join([f"{what}:", *lines]) + f"\n  {remedy}, or take these back")


def _may_precede_a_run(path: Path) -> bool:
    """Whether a file in a folder without a run is no reason to refuse that folder.

    The lock, what a killed first write left behind, and a log of this very run that a shell redirects into the folder.
    """
    if path.name == LOCK_NAME or path.name.endswith(INCOMPLETE):
        return True
    if path.suffix in (".log", ".out", ".err") or path.name in ("log", "stdout", "stderr"):
        return True  # of a tee or a batch queue, which writes the file in a process of its own
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return True
    return False
