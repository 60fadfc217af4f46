"""Checkpoints as the package transformers lays them out: a folder, or a repository of the hub, in which the weights are
one file of a fixed name, or several and an index (JSON) that says which tensor is in which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from torch import Tensor

from varfast.files import read_json
from varfast.types import InputError
from varfast.weights.containers import read_checkpoint
from varfast.weights.files import regular_file, resolve, shown
from varfast.weights.hub import fetch_from_hub, is_missing_entry, names_repository, one_line

# In the order in which they are looked for.
MODEL_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_INDEX = ".index.json"
# An index names every tensor; the largest models have some thousands, in some hundred files.
_MOST_SHARDS = 1000


class _Index(BaseModel):
    """What is read of an index."""

    weight_map: dict[str, str] = Field(min_length=1)


def is_index(path: Path | str) -> bool:
    """Whether a file names others that hold the weights."""
    return str(path).endswith(_INDEX)


def model_file(folder: Path) -> Path | None:
    """The file of the weights, or their index, in a folder as transformers writes it; None: it is no such folder."""
    return next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)


def names_model(address: str | Path) -> bool:
    """Whether an address is a folder, a repository or an index as transformers writes them, and no run folder.

    A run folder may hold a model.safetensors that was exported into it: its config.yaml says what it is.
    """
    if isinstance(address, str) and address.startswith("hf://"):
        return names_repository(address) or is_index(address)
    path = Path(address).expanduser()
    return not (path / "config.yaml").is_file() and (is_index(address) or model_file(path) is not None)


def shards(path: Path) -> list[Path]:
    """The files that hold the tensors: those that an index names, which lie beside it, or the file itself.

    Raises: InputError if the index cannot be read.
    """
    return [path.parent / name for name in _shard_names(path)] if is_index(path) else [path]


def stored_bytes(path: Path) -> int:
    """Of all files that hold the tensors."""
    return sum(each.stat().st_size for each in shards(path))


def index_of(out: Path) -> Path:
    """The index of the files into which `out` is split."""
    return out.with_name(out.name + _INDEX)


def split_state(state: Mapping[str, Tensor], most_gb: float | None) -> list[list[str]]:
    """Names of tensors, in order, in parts of at most so many GB; one that is larger is a part of its own.

    most_gb: None: all are one part.
    """
    parts: list[list[str]] = [[]]
    held_bytes = 0
    for name, tensor in state.items():
        if most_gb is not None and parts[-1] and held_bytes + tensor.nbytes > most_gb * 1e9:
            parts.append([])
            held_bytes = 0
        parts[-1].append(name)
        held_bytes += tensor.nbytes
    return parts


def _shard_names(path: Path) -> list[str]:
    named = f"checkpoint {shown(path)}"
    try:
        found = _Index.model_validate(read_json(path)).weight_map
    except ValueError as error:  # pydantic's too
        raise InputError(
            f"{named} is no index of a checkpoint in several files: it has no weight_map; give the index that "
            "transformers wrote, or one file with all weights"
        ) from error
    names = sorted(set(found.values()))
    wrong = [name for name in names if Path(name).name != name or not name.endswith((".safetensors", ".bin"))]
    if wrong or len(names) > _MOST_SHARDS:
        what = f"{one_line(wrong[0], 80)!r}" if wrong else f"{len(names)} files"
        raise InputError(f"{named} names {what}; want .safetensors or .bin files in its own folder")
    return names


def resolve_model(address: str) -> Path:
    """The local file of a model, or its index, with all files that it names.

    Args:
        address: a file or an index, or a folder that has one of MODEL_FILES; likewise hf://owner/repo/file, or
            hf://owner/repo, with @revision if wanted, which are fetched once.
    Raises: InputError if one of the files cannot be had.
    """
    of_hub = address.startswith("hf://")
    if of_hub and names_repository(address):
        address = address.rstrip("/")
        found = _of_repository(address)
    elif not of_hub and Path(address).expanduser().is_dir():
        address = address.rstrip("/")
        inside = model_file(Path(address).expanduser())
        if inside is None:
            raise InputError(f"checkpoint {shown(address)} is a folder without weights; want {', '.join(MODEL_FILES)}")
        found = inside
    else:
        found, address = resolve(address), address.rpartition("/")[0]
    if is_index(found):
        for name in _shard_names(found):
            if of_hub:
                fetch_from_hub(f"{address}/{name}")
            else:
                regular_file(str(found.parent / name))
    return found


def _of_repository(address: str) -> Path:
    for name in MODEL_FILES:
        try:
            return fetch_from_hub(f"{address}/{name}")
        except InputError as error:
            if not is_missing_entry(error):
                raise
    raise InputError(f"checkpoint {address} has none of {', '.join(MODEL_FILES)}; give the file, as {address}/FILE")


def read_model(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Any:
    """The content of a file of weights, or of all files of an index as one dictionary, tensors on the CPU.

    Args:
        wanted: of names; what it refuses need not be read.
    Raises: InputError as read_checkpoint, and for a tensor that is in two files.
    """
    if not is_index(path):
        return read_checkpoint(path, wanted)
    found: dict[str, Any] = {}
    for shard in shards(path):
        content = read_checkpoint(regular_file(str(shard)), wanted)
        if not isinstance(content, dict):
            raise InputError(f"checkpoint {shown(shard)} holds no named tensors; {shown(path)} names it as a part")
        if twice := next((name for name in content if name in found), None):
            raise InputError(f"checkpoint {shown(path)}: {one_line(twice, 80)} is in two of its files")
        found |= content
    return found
