"""Everything a run is, on disk: checkpoints that are whole or absent, and the folder they live in.

A checkpoint is a folder of safetensors, one set a process, written and read through torch.distributed.checkpoint, so
that another number of processes can go on from it. Beside them stands manifest.json: step, config, environment and
the SHA-256 of each file. Nothing in it is unpickled: PyTorch's own format keeps its metadata as a pickle, which would
run code from a folder that somebody handed on.

A run's randomness is a function of seed and step (varfast.randomness), so there are no generator states to keep.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from varfast.config import Config, parse_config
from varfast.files import (
    INCOMPLETE,
    advice,
    free_space,
    leaves,
    move_folder,
    open_regular,
    parse_json,
    read_bytes,
    read_text,
    reason,
    remove_leftovers,
    remove_tree,
    save_text,
    sync_file,
    sync_folder,
)
from varfast.runs.lock import LOCK_NAME, FolderLock
from varfast.printable import printable
from varfast.settings.reading import dump_yaml, read_yaml
from varfast.types import InputError

_FORMAT = 2
# The writer holds one more copy of the file at hand: smaller files, less memory.
_FILE_BYTES = 2**30
# Settings that do not change what the run computes, or only how far it goes.
_FREE_TO_CHANGE = (
    "run.dir",
    "run.steps",
    "run.parallel",
    "run.timeout_s",
    "run.max_bad_rollouts",
    "log",
    "eval",
    "kernels",
    "grpo.kl_every",
    "rollout.micro_batch",
    "rollout.cuda_graph",
    "update.micro_batch",
    "update.checkpointing",
    "update.cuda_graph",
    "pretrain.cache_dir",
    "pretrain.num_workers",
)
# Frozen weights are those of the base, which the run has noted: a checkpoint of an adapter holds the adapter.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
_T = TypeVar("_T")
# What makes a folder of tensors a checkpoint, in the order in which it is written.
_SEAL = ("manifest.json", "manifest.sha256")

# One process is what we mean then, and the warning comes from a thread, where it cannot be caught.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    bytes: Annotated[int, Field(ge=0)]
    sha256: str


# Of files in the checkpoint's own folder, as its writer names them.
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,200}\.safetensors$")]


class _Manifest(BaseModel):
    """manifest.json of a checkpoint. `optimizer` holds the settings of its groups; None: it has not stepped yet."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[2]
    varfast: str
    step: int
    config_sha256: str
    config: dict[str, Any]
    environment: dict[str, Any]
    before: dict[str, float]
    reward_mean: float | None
    optimizer: list[dict[str, Any]] | None
    files: dict[_FileName, _File]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were found whole.

    Attributes:
        path: its folder.
        step: steps done.
        before: evaluation of the base model.
        reward_mean: of the last step; None if there is none.
        config: of the run when it was written, as a nested dictionary.
    """

    path: Path
    step: int
    before: dict[str, float]
    reward_mean: float | None
    config: dict[str, Any]
    _optimizer: list[dict[str, Any]] | None

    def load(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        further: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        """Put the saved weights into `model`, the saved state into `optimizer` and `further` tensors, sharded or not.

        further: by kind and name, as they were saved; written in place.
        Raises: InputError if they do not fit; the model may then hold some of the saved weights.
        """
        if optimizer is not None and self._optimizer is not None:
            state: Any = get_optimizer_state_dict(model, optimizer)
            for group, saved in itertools.zip_longest(state["param_groups"], self._optimizer):
                if group is None or saved is None or not _fits(group, saved):
                    raise InputError(f"{self.path} is of another optimizer; take the settings under update back")
                group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
            self._read(_named("optimizer", state["state"]), "optimizer.")
            set_optimizer_state_dict(model, optimizer, state)
        elif optimizer is not None and self._saved("optimizer."):
            raise InputError(f"{self.path} holds an optimizer's state without its settings; use another checkpoint")
        weights = get_model_state_dict(model, options=_TRAINED)
        self._read(_named("model", weights), "model.")
        set_model_state_dict(model, weights, options=_TRAINED)
        for kind, tensors in (further or {}).items():
            self._read(_named(kind, dict(tensors)), f"{kind}.")

    def load_result(self, model: torch.nn.Module) -> None:
        """Put into `model` what the run delivers: the average of the weights where it keeps one, else the weights.

        Raises: InputError as load.
        """
        self.load(model)
        if averaged := self._saved("ema."):
            parameters = {f"ema.{name}": p.detach() for name, p in model.named_parameters()}
            self._read({name: p for name, p in parameters.items() if name in averaged}, "ema.")

    def _read(self, tensors: dict[str, Any], prefix: str) -> None:
        saved = self._saved(prefix)
        wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if saved != wanted:
            name = next(n for n in [*wanted, *saved] if saved.get(n) != wanted.get(n))
            raise InputError(
                f"{self.path} does not fit the configured model: {name} is {saved.get(name, 'missing')} there, "
                f"{wanted.get(name, 'missing')} here"
            )
        try:
            load(tensors, storage_reader=HuggingFaceStorageReader(str(self.path)), no_dist=not dist.is_initialized())
        except CheckpointException as error:
            raise InputError(f"{self.path} cannot be read: {printable(_cause(error))}") from error

    def _saved(self, prefix: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the tensors whose names begin so."""
        try:
            there = HuggingFaceStorageReader(str(self.path)).read_metadata().state_dict_metadata
        # The files are as the manifest says, but somebody may have made both: headers of any content.
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise InputError(f"{self.path} cannot be read: {printable(error)}") from error
        return {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in there.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }


class Checkpoints:
    """The checkpoints of a run: checkpoints/step_000050 and so on. A context manager; leaving it waits for the last.

    A save copies the state and returns; a thread writes the copy. At most one is in flight. It is written beside, as
    step_000050.part, and renamed when all of it is on the disk, so that a run killed at any moment leaves whole ones.

    A disk that is full costs that checkpoint and no more: the run says so and tries again when the next one is due.
    Only `wait`, at the end of a run, raises.

    All processes of a run make and call it alike; they see one file system.

    Args:
        path: the folder "checkpoints" of a run.
        config: the run's; log.checkpoint_every, checkpoint_minutes, keep_last and keep_best are read here.
        environment: versions and hardware, for the manifest.
        say: prints a line.
    """

    def __init__(self, path: Path, config: Config, environment: dict[str, Any], say: Callable[[str], None]) -> None:
        self._path, self._config, self._environment, self._say = path, config, environment, say
        self._first = not dist.is_initialized() or dist.get_rank() == 0
        # A group of its own: the thread's messages must not meet those of the step.
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[str | None] | None = None
        self._last_step = -1
        self._last_s = time.monotonic()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown()
            if self._group is not None:  # its threads must not outlive the interpreter
                dist.destroy_process_group(self._group)
                self._group = None

    def due(self, step: int) -> bool:
        """Whether `step` steps, or the minutes since the last one, ask for a checkpoint."""
        log = self._config.log
        late = _of_first(lambda: time.monotonic() - self._last_s >= 60.0 * log.checkpoint_minutes)
        return late or step % log.checkpoint_every == 0

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        before: dict[str, float],
        reward_mean: float | None = None,
        further: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        """Save the state after `step` steps, unless the last save was of that step.

        further: tensors by kind and name, saved as KIND.NAME beside model.NAME; kinds are not "model" or "optimizer".

        Returns when the state is copied; what comes after may change it. Raises: whatever but a failing disk ended the
        save before this one.
        """
        if step == self._last_step:
            return
        if self._pending is not None:
            self._pending.result()
        tensors = _named("model", get_model_state_dict(model, options=_TRAINED))
        groups = None
        # Before the first step there is no state, and asking for it would take a step.
        if optimizer.state:
            state: Any = get_optimizer_state_dict(model, optimizer)
            tensors |= _named("optimizer", state["state"])
            groups = [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]
        for kind, more in (further or {}).items():
            tensors |= _named(kind, dict(more))
        part = self._path / f"step_{step:06d}.part"
        writer = HuggingFaceStorageWriter(str(part), fqn_to_index_mapping=_files(tensors), save_distributed=True)
        written = async_save(
            tensors, storage_writer=writer, process_group=self._group, no_dist=not dist.is_initialized()
        )
        assert isinstance(written, Future)
        notes = {"step": step, "before": before, "reward_mean": reward_mean, "optimizer": groups}
        self._pending = self._thread.submit(self._finish, written, part, notes)
        self._last_step, self._last_s = step, time.monotonic()

    def wait(self) -> None:
        """Return when the last save is on the disk. Raises: InputError if it could not be written."""
        failure = None if self._pending is None else self._pending.result()
        if failure is not None:
            self._last_step = -1
            raise InputError(failure)

    def _finish(self, written: Future[Any], part: Path, notes: dict[str, Any]) -> str | None:
        """Wait for the tensors, seal the folder and drop old ones. What stopped it, if the disk did."""
        try:
            try:
                written.result()
                if self._first:
                    self._seal(part, notes)
            except CheckpointException as error:
                cause = _cause(error)
                if not isinstance(cause, OSError):
                    raise
                raise cause from error
        except OSError as error:
            if self._first:
                with suppress(OSError):
                    remove_tree(part)
            whole = [folder.name for folder in _folders(self._path)]
            earlier = f"{whole[-1]} is whole" if whole else "there is no earlier one"
            failure = (
                f"checkpoint {part.stem} could not be written: {reason(error)}, {free_space(self._path)}; {earlier}. "
                f"{advice(error)}"
            )
            if self._first:
                self._say(f"{failure}; the run goes on and tries again when the next one is due")
            return failure
        if self._first:
            try:
                self._drop_old()
            except OSError as error:
                self._say(f"{part.stem} is written, but an older checkpoint cannot be removed: {reason(error)}")
        return None

    def _seal(self, part: Path, notes: dict[str, Any]) -> None:
        config = dump_config(self._config)
        manifest = _Manifest(
            format=_FORMAT,
            varfast=self._environment["varfast"],
            config_sha256=hashlib.sha256(config.encode()).hexdigest(),
            config=read_yaml(config, "the config"),
            environment=self._environment,
            files={
                file.name: _File(bytes=file.stat().st_size, sha256=_sha256(file)) for file in sorted(part.iterdir())
            },
            **notes,
        )
        text = json.dumps(manifest.model_dump(), indent=1).encode() + b"\n"
        for name, content in zip(_SEAL, (text, _sum_of(text)), strict=True):
            with (part / name).open("wb") as file:
                file.write(content)
                file.flush()
                sync_file(file.fileno())
        sync_folder(part)
        final = part.with_suffix("")
        if os.path.lexists(final):
            _remove(final)
        move_folder(part, final, _SEAL)
        sync_folder(self._path)

    def _drop_old(self) -> None:
        """Keep the last ones, and the one with the highest reward."""
        log = self._config.log
        folders = _folders(self._path)
        kept = folders[-log.keep_last :]
        if log.keep_best:
            rewards = {}
            for folder in folders:
                try:
                    rewards[folder] = _manifest(folder).reward_mean
                except InputError:  # damaged meanwhile: not the best
                    continue
            kept += sorted((f for f, r in rewards.items() if r is not None), key=lambda f: rewards[f] or 0.0)[-1:]
        for folder in folders:
            if folder not in kept:
                _remove(folder)


def newest_checkpoint(path: Path, say: Callable[[str], object] = print) -> Checkpoint | None:
    """The newest checkpoint in a folder whose files are all as they were written; None if there is none at all.

    Args:
        say: told which damaged ones were passed over.
    Raises: InputError if there are some and all are damaged.
    """
    damaged: list[str] = []
    for folder in reversed(_folders(path)):
        try:
            found = _verified(folder)
        except (InputError, OSError) as error:
            damaged.append(f"{folder.name}: {reason(error) if isinstance(error, OSError) else error}")
            continue
        if damaged:
            say(f"{'; '.join(damaged)}. Using {folder.name}, the one before")
        return found
    if damaged:
        raise InputError(
            "\n  ".join([f"no checkpoint in {path} is whole:", *damaged])
            + f"\n  bring one back from a copy, or delete {path} to start again from step 0"
        )
    return None


def _verified(folder: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises: InputError or OSError that says what is wrong with it."""
    manifest = _manifest(folder)
    found = {file.name for file in folder.iterdir() if file.suffix == ".safetensors"}
    if strange := found - manifest.files.keys():
        raise InputError(f"{min(strange)} does not belong to it")
    for name, noted in manifest.files.items():
        try:
            with open_regular(folder / name) as file:
                size = os.fstat(file.fileno()).st_size
                if size != noted.bytes:
                    raise InputError(f"{name} has {size} of {noted.bytes} bytes")
                if hashlib.file_digest(file, "sha256").hexdigest() != noted.sha256:
                    raise InputError(f"{name} is damaged: its SHA-256 is another one")
        except OSError as error:
            raise InputError(f"{name}: {reason(error)}") from error
    return Checkpoint(folder, manifest.step, manifest.before, manifest.reward_mean, manifest.config, manifest.optimizer)


def _manifest(folder: Path) -> _Manifest:
    try:
        text, noted = (read_bytes(folder / name) for name in _SEAL)
    except OSError as error:
        raise InputError(f"{Path(error.filename or folder).name}: {reason(error)}") from error
    if noted != _sum_of(text):
        raise InputError("manifest.json is damaged: its SHA-256 is another one")
    try:
        manifest = _Manifest.model_validate(parse_json(text))
    except (ValidationError, ValueError, RecursionError) as error:
        raise InputError(f"manifest.json is not of this version of varfast (format {_FORMAT})") from error
    if manifest.step != _step(folder):
        raise InputError(f"it is of step {manifest.step}; somebody renamed it")
    return manifest


def _folders(path: Path) -> list[Path]:
    """Those of checkpoints, whole or damaged, by step."""
    try:
        return sorted((f for f in path.iterdir() if re.fullmatch(r"step_[0-9]{6,}", f.name)), key=_step)
    except OSError:  # what keeps a folder from being read keeps it from being written too, which says why
        return []


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _remove(folder: Path) -> None:
    # Renamed first: killed half-way, it is no checkpoint any more. Nor is it without its seal, where an overlay refuses
    # to rename a folder.
    half = folder.with_name(folder.name + ".part")
    remove_tree(half)
    try:
        os.rename(folder, half)
    except OSError:
        with suppress(OSError):
            (folder / _SEAL[-1]).unlink()
        half = folder
    remove_tree(half)


def _named(kind: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """One flat dictionary: model.NAME, optimizer.NAME.exp_avg, ema.NAME."""
    flat: dict[str, Any] = {}
    for name, entry in tensors.items():
        if isinstance(entry, dict):
            flat |= _named(f"{kind}.{name}", entry)
        else:
            flat[f"{kind}.{name}"] = entry
    return flat


def _files(tensors: dict[str, Any]) -> dict[str, int]:
    """Which file each tensor goes into, from 1; the same on every process, as it goes by whole sizes."""
    number, size, files = 1, 0, {}
    for name, tensor in tensors.items():
        grown = size + tensor.numel() * tensor.element_size()
        if size and grown > _FILE_BYTES:
            number, grown = number + 1, grown - size
        files[name], size = number, grown
    return files


def _cause(error: CheckpointException) -> BaseException:
    """What failed on the first process that failed."""
    return min(error.failures.items())[1][0]


def _fits(group: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Whether saved settings of an optimizer's group are of its kind: the same names, and values of the same types."""

    def kind(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [kind(entry) for entry in value]
        return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value)

    return {k: kind(v) for k, v in group.items() if k != "params"} == {k: kind(v) for k, v in saved.items()}


def _of_first(decide: Callable[[], _T]) -> _T:
    """What the first process finds, on all of them; its InputError too."""
    if not dist.is_initialized():
        return decide()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = decide()
        except InputError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise InputError(box[1])
    return box[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sum_of(manifest: bytes) -> bytes:
    """What manifest.sha256 holds; `sha256sum -c manifest.sha256` reads it."""
    return f"{hashlib.sha256(manifest).hexdigest()}  manifest.json\n".encode()


# Of a run folder, what a run that goes on writes anew or can do without.
_REWRITTEN = (
    "before_after.json", "config.yaml", "environment.json", "labels.json", "metrics.jsonl", "summary.json", "var.pth"
)  # fmt: skip


class RunFolder:
    """The files of a run. Raises: InputError if the folder cannot be used.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.checkpoints = self.path / "checkpoints"
        self.weights = self.path / "var.pth"
        self.config = self.path / "config.yaml"
        self.base = self.path / "base.json"
        self.adapter = self.path / "adapter"

    @contextmanager
    def held(self) -> Iterator[FolderLock]:
        """Keep other runs out of the folder in the body. The first process of a run holds the lock for all of them.

        Raises: InputError if another run has it, that says which.
        """
        lock = FolderLock(self.path, f"run.dir={self.path}", "choose another run.dir")
        _of_first(lock.take)
        try:
            yield lock
        finally:
            lock.release()

    def prepare(self, config: Config) -> Checkpoint | None:
        """Make the folder, held, ready for this config; the checkpoint to go on from, if there is one.

        What killed saves left behind is removed; a damaged checkpoint is set aside as step_000050.damaged, and so is a
        pipe, a device or a folder in the place of a file that the run writes again.

        Raises: InputError if the folder cannot be written, holds something else, or holds a run with another config,
            or checkpoints of which none is whole.
        """
        return _of_first(lambda: self._prepare(config))

    def _prepare(self, config: Config) -> Checkpoint | None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = sorted(path.name for path in self.path.iterdir() if not _is_ours(path))
        except OSError as error:
            raise InputError(f"run.dir={self.path} cannot be used: {reason(error)}; choose another run.dir") from error
        if names and not self.config.exists() and not _folders(self.checkpoints):
            shown = ", ".join([*names[:3], "..."] if len(names) > 3 else names)
            raise InputError(
                f"run.dir={self.path} holds other files and no run ({shown}); choose another run.dir, or move them"
            )
        self._refuse_old_format()
        found = newest_checkpoint(self.checkpoints)
        if found is not None:
            self._refuse_other_config(found, config)
        self._tidy(found)
        save_text(self.config, dump_config(config))
        return found

    def load_config(self) -> Config:
        """The resolved config of the run in this folder. Raises: InputError if there is none, or it is damaged."""
        if not os.path.lexists(self.config):
            raise InputError(f"{self.path} is no run folder: {self.config.name}: {os.strerror(errno.ENOENT)}")
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

    def _tidy(self, found: Checkpoint | None) -> None:
        for folder in (self.path, self.checkpoints, self.adapter, self.path / "grids", self.path / "samples"):
            remove_leftovers(folder)
        try:
            for path in (self.path / name for name in _REWRITTEN):
                if os.path.lexists(path) and not path.is_file():
                    os.rename(path, path.with_name(path.name + ".damaged"))
            for part in self.checkpoints.glob("step_*.part"):
                remove_tree(part)
            for folder in _folders(self.checkpoints) if found is not None else ():
                if found is not None and _step(folder) > found.step:
                    aside = folder.with_name(folder.name + ".damaged")
                    remove_tree(aside)
                    move_folder(folder, aside)
        except OSError as error:
            raise InputError(f"{self.checkpoints} cannot be written: {reason(error)}. {advice(error)}") from error

    def _refuse_other_config(self, found: Checkpoint, config: Config) -> None:
        """Compare with what the checkpoint was made with: config.yaml may be damaged, or edited."""
        there = parse_config(found.config, f"{found.path}/manifest.json: config")
        differences = [
            f"  {key}: {old} there, {new} here"
            for key, (old, new) in _differences(there, config).items()
            if not any(key == free or key.startswith(free + ".") for free in _FREE_TO_CHANGE)
        ]
        if config.update.lr_schedule != "constant" and there.run.steps != config.run.steps:
            differences.append(f"  run.steps: update.lr_schedule={config.update.lr_schedule} depends on it")
        if differences:
            raise InputError(
                "\n".join([f"run.dir={self.path} holds a run with another config:", *differences])
                + "\n  choose another run.dir, or take these back"
            )


def _is_ours(path: Path) -> bool:
    """Whether a file in a run folder without a run is no reason to refuse it.

    The lock and what a killed first write left behind, and a log of this very run that a shell redirects into it.
    """
    if path.name == LOCK_NAME or path.name.endswith(INCOMPLETE):
        return True
    if path.suffix in (".log", ".out", ".err") or path.name in ("log", "stdout", "stderr"):
        return True  # of a tee or a queue, whose files this process does not hold
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return True
    return False


def dump_config(config: Config) -> str:
    """The whole config, defaults included, as YAML that load_config reads."""
    return dump_yaml(config.model_dump(mode="json", exclude_none=True))


def _differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    before, after = leaves(old.model_dump(mode="json")), leaves(new.model_dump(mode="json"))
    keys = [*before, *(k for k in after if k not in before)]
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}
