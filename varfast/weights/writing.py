"""Writing tensors as .safetensors or .pth, in one file or in several and their index."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import IO

from varfast.files import save_tensors, save_text, write_atomically
from varfast.printable import printable
from varfast.types import InputError
from varfast.weights.shards import index_of, shards, split_state
from varfast.weights.state import State


def save_state(state: State, path: Path) -> None:
    """Write tensors on the CPU as .safetensors, or by torch.save, atomically. Raises: WriteError."""
    if path.suffix == ".safetensors":
        write_atomically(path, lambda file: _save_safetensors(state, file))
    else:
        save_tensors(path, state)


def save_shards(state: State, path: Path, shard_gb: float | None = None) -> list[str]:
    """Write one file, or several of at most `shard_gb` and their index, under the names that transformers gives them.

    An earlier index there, and what it names, is replaced: a reader would take it for this model's.

    Returns: names of the files. Raises: WriteError.
    """
    parts, weight_map, index = split_state(state, shard_gb), dict[str, str](), index_of(path)
    stale = {index, *_indexed(index)}
    if len(parts) == 1:
        names = [path.name]
        save_state(state, path)
    else:
        for number, part in enumerate(parts, 1):
            name = f"{path.stem}-{number:05d}-of-{len(parts):05d}{path.suffix}"
            save_state({tensor: state[tensor] for tensor in part}, path.with_name(name))
            weight_map |= dict.fromkeys(part, name)
        names = [*dict.fromkeys(weight_map.values()), index.name]
        total = {"total_size": sum(tensor.nbytes for tensor in state.values())}
        save_text(index, json.dumps({"metadata": total, "weight_map": weight_map}, indent=2) + "\n")
    for file in stale:
        if file.name not in names:
            file.unlink(missing_ok=True)
    return names


def _indexed(index: Path) -> list[Path]:
    """The files that an index names; none if there is no index, or a damaged one."""
    try:
        return shards(index) if index.is_file() else []
    except InputError:
        return []


def _save_safetensors(state: State, file: IO[bytes]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        # By file name, since safetensors.torch.save would hold the whole file in memory.
        save_file(state, file.name, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # the text of an error from Rust
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else printable(error)) from error
