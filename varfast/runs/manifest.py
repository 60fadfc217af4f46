"""manifest.json, which makes a folder of tensor files a checkpoint, and the folders that hold checkpoints.

A checkpoint is complete when manifest.json and, written after it, manifest.sha256 are there: the first lists every file
with its size and SHA-256, the second holds the SHA-256 of the first. Somebody may have edited or made up all of it, so
it is validated before it is used.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from varfast.config import Config
from varfast.files import parse_json, read_bytes, reason, remove_tree
from varfast.settings.reading import dump_yaml
from varfast.types import InputError

FORMAT = 2
# The files that complete a checkpoint, in the order in which they are written.
SEAL = ("manifest.json", "manifest.sha256")


class TensorFile(BaseModel):
    """Size and content of a file of tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class SpentFields(BaseModel):
    """What the steps have spent: see varfast.perf.spent.Spent."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    images: Annotated[int, Field(ge=0)]
    flop: Annotated[float, Field(ge=0)]
    hours: Annotated[float, Field(ge=0)]


# The names that a checkpoint's writer uses; none of them leads out of the checkpoint's folder.
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,200}\.safetensors$")]


class Manifest(BaseModel):
    """Content of manifest.json. `optimizer` holds the settings of its parameter groups; None before its first step."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[2]
    varfast: str
    step: int
    config_sha256: str
    config: dict[str, Any]
    environment: dict[str, Any]
    before: dict[str, float]
    spent: SpentFields | None = None  # None: of a version that did not count it
    reward_mean: float | None
    optimizer: list[dict[str, Any]] | None
    files: dict[_FileName, TensorFile]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises: InputError that says what is wrong with it."""
    try:
        text, checksum = (read_bytes(folder / name) for name in SEAL)
    except OSError as error:
        raise InputError(f"{Path(error.filename or folder).name}: {reason(error)}") from error
    if checksum != checksum_of(text):
        raise InputError("manifest.json is damaged: its SHA-256 is another one")
    try:
        manifest = Manifest.model_validate(parse_json(text))
    except (ValidationError, ValueError, RecursionError) as error:
        raise InputError(f"manifest.json is not of this version of varfast (format {FORMAT})") from error
    if manifest.step != step_of(folder):
        raise InputError(f"it is of step {manifest.step}; somebody renamed it")
    return manifest


def checksum_of(manifest: bytes) -> bytes:
    """Content of manifest.sha256, which `sha256sum -c manifest.sha256` can check."""
    return f"{hashlib.sha256(manifest).hexdigest()}  manifest.json\n".encode()


def dump_config(config: Config) -> str:
    """The whole config, defaults included, as YAML that RunFolder.load_config reads."""
    return dump_yaml(config.model_dump(mode="json", exclude_none=True))


def checkpoint_folders(path: Path) -> list[Path]:
    """The folders step_N of a run's checkpoints, whole or damaged, by ascending step."""
    try:
        return sorted((f for f in path.iterdir() if re.fullmatch(r"step_[0-9]{6,}", f.name)), key=step_of)
    except OSError:  # a folder that cannot be read cannot be written either, and the write reports why
        return []


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint so that, killed at any moment, no half of it counts as one. Raises: OSError."""
    half = folder.with_name(folder.name + ".old.part")  # beside step_N.part, which may be about to take its place
    remove_tree(half)
    try:
        os.rename(folder, half)
    except OSError:  # an overlay file system refuses to rename folders: without its seal it is no checkpoint either
        with suppress(OSError):
            (folder / SEAL[-1]).unlink()
        half = folder
    remove_tree(half)
