"""Checkpoints: the state of a run on disk, either whole or absent.

A checkpoint is a folder of safetensors files, one set for each process, written and read through
torch.distributed.checkpoint, so that a run can go on with another number of processes. manifest.json beside them holds
step, config, environment and the SHA-256 of each file. Nothing is unpickled: PyTorch's own format keeps its metadata as
a pickle, and a pickle from a folder that somebody handed on could run their code.

A run's randomness is a function of seed and step (varfast.randomness), so no generator states are saved.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
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

from varfast.config import Config
from varfast.distributed import decided_by_first
from varfast.files import advice, free_space, move_folder, open_regular, reason, remove_tree, sync_file, sync_folder
from varfast.perf.spent import Spent
from varfast.printable import printable
from varfast.runs.manifest import (
    FORMAT,
    SEAL,
    Manifest,
    SpentFields,
    TensorFile,
    checkpoint_folders,
    checksum_of,
    dump_config,
    read_manifest,
    remove_checkpoint,
)
from varfast.settings.reading import read_yaml
from varfast.types import InputError

# The writer copies the file that it is writing in memory once more, so files are kept small.
_FILE_BYTES = 2**30
# Frozen weights are the base's, which base.json identifies, so a checkpoint of an adapter holds only the adapter.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
# Single-process use is intended. Filtered globally because the warning is raised in a thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have the sizes and SHA-256 that its manifest lists.

    Attributes:
        path: its folder.
        step: steps done.
        before: evaluation of the base model.
        reward_mean: of the last step; None before the first one.
        config: of the run when the checkpoint was written, as a nested dictionary.
        spent: by its steps; None if the version that wrote it did not count.
    """

    path: Path
    step: int
    before: dict[str, float]
    reward_mean: float | None
    config: dict[str, Any]
    _optimizer: list[dict[str, Any]] | None
    spent: Spent | None = None

    def load(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        further: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        """Load the saved weights into `model`, the saved state into `optimizer` and `further` tensors, sharded or not.

        Args:
            further: tensors by kind and name, as they were saved; they are written in place.
        Raises: InputError if something does not fit; the model may then hold a part of the saved weights.
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
        """Load into `model` what the run delivers: the average of its weights if it keeps one, else the weights.

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
        """Shape and dtype of the saved tensors whose names begin with `prefix`."""
        try:
            there = HuggingFaceStorageReader(str(self.path)).read_metadata().state_dict_metadata
        # The files agree with the manifest, but somebody may have made up both, so a header can hold anything.
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise InputError(f"{self.path} cannot be read: {printable(error)}") from error
        return {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in there.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }


class Checkpoints:
    """Writes the checkpoints of a run: checkpoints/step_000050 and so on. A context manager that waits for the last.

    A save copies the state and returns; a thread writes the copy, at most one at a time. The folder is first called
    step_000050.part and renamed when all of it is on the disk, so a run killed at any moment leaves only whole ones.

    A full disk costs one checkpoint: the run reports it and tries again when the next one is due. Only `wait`, at the
    end of a run, raises.

    All processes of a run create it and call it alike, and share one file system.

    Args:
        path: the folder "checkpoints" of a run.
        config: the run's; log.checkpoint_every, checkpoint_minutes, keep_last and keep_best are read here.
        environment: versions and hardware, for the manifest.
        say: prints a line.
        begun_from: the step whose checkpoint the run went on from, which need not be saved again; None: it is new.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        environment: dict[str, Any],
        say: Callable[[str], None],
        begun_from: int | None = None,
    ) -> None:
        self._path, self._config, self._environment, self._say = path, config, environment, say
        self._is_first = not dist.is_initialized() or dist.get_rank() == 0
        # A group of its own, so that the thread's messages cannot be mixed up with those of the training step.
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[str | None] | None = None
        self._last_step = -1 if begun_from is None else begun_from
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
            if self._group is not None:  # gloo's threads must not outlive the interpreter
                dist.destroy_process_group(self._group)
                self._group = None

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps, by log.checkpoint_every or log.checkpoint_minutes."""
        log = self._config.log
        late = decided_by_first(lambda: time.monotonic() - self._last_s >= 60.0 * log.checkpoint_minutes)
        return late or step % log.checkpoint_every == 0

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        before: dict[str, float],
        reward_mean: float | None = None,
        further: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
        spent: Spent | None = None,
    ) -> None:
        """Save the state after `step` steps, unless that step was saved last. Returns when the state is copied.

        Args:
            before: evaluation of the base model, for the manifest.
            reward_mean: of the last step; log.keep_best compares it.
            further: tensors by kind and name, saved as KIND.NAME beside model.NAME; a kind is not "model" or
                "optimizer".
            spent: by its steps.
        Raises: whatever ended the previous save, unless it was the disk.
        """
        if step == self._last_step:
            return
        if self._pending is not None:
            self._pending.result()
        tensors = _named("model", get_model_state_dict(model, options=_TRAINED))
        groups = None
        # Before the first step there is no state, and get_optimizer_state_dict would take a step to create it.
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
        fields = {"step": step, "before": before, "reward_mean": reward_mean, "optimizer": groups}
        fields["spent"] = None if spent is None else SpentFields(**asdict(spent))
        self._pending = self._thread.submit(self._finish, written, part, fields)
        self._last_step, self._last_s = step, time.monotonic()

    def wait(self) -> None:
        """Return when the last save is on the disk. Raises: InputError if it could not be written."""
        failure = None if self._pending is None else self._pending.result()
        if failure is not None:
            self._last_step = -1
            raise InputError(failure)

    def _finish(self, written: Future[Any], part: Path, fields: dict[str, Any]) -> str | None:
        """Wait for the tensors, complete the folder, drop old ones. Returns a message if the disk did not let it."""
        try:
            try:
                written.result()
                if self._is_first:
                    self._seal(part, fields)
            except CheckpointException as error:
                cause = _cause(error)
                if not isinstance(cause, OSError):
                    raise
                raise cause from error
        except OSError as error:
            if self._is_first:
                with suppress(OSError):
                    remove_tree(part)
            whole = [folder.name for folder in checkpoint_folders(self._path)]
            earlier = f"{whole[-1]} is whole" if whole else "there is no earlier one"
            failure = (
                f"checkpoint {part.stem} could not be written: {reason(error)}, {free_space(self._path)}; {earlier}. "
                f"{advice(error)}"
            )
            if self._is_first:
                self._say(f"{failure}; the run goes on and tries again when the next one is due")
            return failure
        if self._is_first:
            try:
                self._drop_old()
            except OSError as error:
                self._say(f"{part.stem} is written, but an older checkpoint cannot be removed: {reason(error)}")
        return None

    def _seal(self, part: Path, fields: dict[str, Any]) -> None:
        config = dump_config(self._config)
        manifest = Manifest(
            format=FORMAT,
            varfast=self._environment["varfast"],
            config_sha256=hashlib.sha256(config.encode()).hexdigest(),
            config=read_yaml(config, "the config"),
            environment=self._environment,
            files={f.name: TensorFile(bytes=f.stat().st_size, sha256=_sha256(f)) for f in sorted(part.iterdir())},
            **fields,
        )
        text = json.dumps(manifest.model_dump(), indent=1).encode() + b"\n"
        for name, content in zip(SEAL, (text, checksum_of(text)), strict=True):
            with (part / name).open("wb") as file:
                file.write(content)
                file.flush()
                sync_file(file.fileno())
        sync_folder(part)
        final = part.with_suffix("")
        if os.path.lexists(final):
            remove_checkpoint(final)
        move_folder(part, final, SEAL)
        sync_folder(self._path)

    def _drop_old(self) -> None:
        """Keep the last log.keep_last checkpoints and, with log.keep_best, the one with the highest reward."""
        log = self._config.log
        folders = checkpoint_folders(self._path)
        kept = folders[-log.keep_last :]
        if log.keep_best:
            rewards = {}
            for folder in folders:
                try:
                    rewards[folder] = read_manifest(folder).reward_mean
                except InputError:  # damaged meanwhile: not the best
                    continue
            kept += sorted((f for f, r in rewards.items() if r is not None), key=lambda f: rewards[f] or 0.0)[-1:]
        for folder in folders:
            if folder not in kept:
                remove_checkpoint(folder)


def newest_checkpoint(path: Path, say: Callable[[str], object] = print) -> Checkpoint | None:
    """The newest whole checkpoint in a folder; None if the folder holds no checkpoint at all.

    Args:
        say: called with a line about the damaged ones that were skipped.
    Raises: InputError if there are checkpoints and all of them are damaged.
    """
    damaged: list[str] = []
    for folder in reversed(checkpoint_folders(path)):
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
    manifest = read_manifest(folder)
    found = {file.name for file in folder.iterdir() if file.suffix == ".safetensors"}
    if strange := found - manifest.files.keys():
        raise InputError(f"{min(strange)} does not belong to it")
    for name, saved in manifest.files.items():
        try:
            with open_regular(folder / name) as file:
                size = os.fstat(file.fileno()).st_size
                if size != saved.bytes:
                    raise InputError(f"{name} has {size} of {saved.bytes} bytes")
                if hashlib.file_digest(file, "sha256").hexdigest() != saved.sha256:
                    raise InputError(f"{name} is damaged: its SHA-256 is another one")
        except OSError as error:
            raise InputError(f"{name}: {reason(error)}") from error
    spent = None if manifest.spent is None else Spent(**manifest.spent.model_dump())
    of_run = manifest.before, manifest.reward_mean, manifest.config, manifest.optimizer
    return Checkpoint(folder, manifest.step, *of_run, spent)


def _named(kind: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """A flat dictionary with names as model.NAME, optimizer.NAME.exp_avg, ema.NAME."""
    flat: dict[str, Any] = {}
    for name, entry in tensors.items():
        if isinstance(entry, dict):
            flat |= _named(f"{kind}.{name}", entry)
        else:
            flat[f"{kind}.{name}"] = entry
    return flat


def _files(tensors: dict[str, Any]) -> dict[str, int]:
    """The number, from 1, of each tensor's file. Computed from unsharded sizes, so it is the same on every process."""
    number, size, files = 1, 0, {}
    for name, tensor in tensors.items():
        grown = size + tensor.numel() * tensor.element_size()
        if size and grown > _FILE_BYTES:
            number, grown = number + 1, grown - size
        files[name], size = number, grown
    return files


def _cause(error: CheckpointException) -> BaseException:
    """The error of the lowest-numbered process that failed."""
    return min(error.failures.items())[1][0]


def _fits(group: dict[str, Any], saved: dict[str, Any]) -> bool:
    """Whether saved settings fit a parameter group of this optimizer: the same names, and values of the same types."""

    def kind(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [kind(entry) for entry in value]
        return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value)

    return {k: kind(v) for k, v in group.items() if k != "params"} == {k: kind(v) for k, v in saved.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
