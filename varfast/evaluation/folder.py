"""The out folder of an evaluation. Somebody may have handed it on, so everything that is read back is checked."""

from __future__ import annotations

import json
import math
import re
import struct
import time
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from varfast.evaluation.metrics import Numbers
from varfast.evaluation.plan import Plan
from varfast.files import open_regular, parse_json, read_bytes, save_text, write_atomically
from varfast.printable import printable
from varfast.runs.folder import differences, refuse_differences
from varfast.types import InputError

# What zipfile, zlib and the checks of a chunk raise for a file that is not such an archive.
_ARCHIVE_ERRORS = (
    OSError, ValueError, EOFError, RuntimeError, ArithmeticError, LookupError, struct.error, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip
# Settings that say where weights are. Their content is identified by the hash in every chunk, so a run folder that was
# moved can go on with its evaluation.
_PLACES = ("checkpoint", "reference", "vqvae")
_MOST_DIFFERENCES = 40
# Other processes that have written nothing for so long are taken for dead.
_PATIENCE_S = 1800.0


class EvaluationFolder:
    """The files of an evaluation.

    Attributes:
        path: the folder.
        columns: names of the arrays that a chunk holds, as `judge.column_names` gives them.
        image_size: pixels a side.
    """

    def __init__(self, path: str | Path, columns: Iterable[str] = (), image_size: int = 0) -> None:
        self.path = Path(path).expanduser()
        self.columns = list(columns)
        self.image_size = image_size

    def prepare(self, settings: dict[str, Any], rank: int) -> None:
        """Save the settings, one file for each process.

        Raises: InputError if the folder holds an evaluation with other settings, or something else.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = sorted(p.name for p in self.path.iterdir())
        except OSError as error:
            raise InputError(f"out={self.path} cannot be used: {error.strerror}; choose another folder") from error
        saved = [name for name in names if name.startswith("settings_")]
        if names and not saved:
            raise InputError(f"out={self.path} holds other files and no evaluation; choose another folder")
        for name in names:
            if (self.path / name).is_symlink():
                raise InputError(f"out={self.path}: {printable(name)} is a link, through which other files would be "
                                 "written; delete it, or choose another folder")  # fmt: skip
        for name in saved:
            if name.endswith(".json"):
                self._refuse_other_settings(_read_settings(self.path / name), settings)
        save_text(self.path / f"settings_{rank}.json", json.dumps(settings, indent=2) + "\n")

    def _refuse_other_settings(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        lines = [
            line
            for name, line in differences(there, here, printable).items()
            if not (name in _PLACES and there.get(name) and here.get(name))
        ]
        what = f"out={self.path} holds an evaluation with other settings"
        refuse_differences(lines[:_MOST_DIFFERENCES], what, "choose another folder")

    def chunk(self, images: str, number: int) -> Path:
        """The file of a chunk. images: name of the set of images, as "reference" or "checkpoint_cfg_1.5"."""
        return self.path / "chunks" / f"{images}_{number:05d}.npz"

    def save_chunk(self, images: str, number: int, arrays: Numbers) -> None:
        """Write a chunk. Raises: InputError if the disk does not let it."""
        arrays = {name: np.ascontiguousarray(array) if array.ndim else array for name, array in arrays.items()}
        write_atomically(self.chunk(images, number), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]

    def weights(self, images: str, number: int) -> str:
        """The hash of the weights that sampled a chunk. Raises: InputError if it cannot be read."""
        return str(self._read(images, number, ["weights"])["weights"])

    def levels(self, images: str, number: int, plan: Plan, whole: bool = False) -> np.ndarray:
        """The images that a chunk keeps, (N, H, W, 3) uint8: all of them, or those of the picture.

        Args:
            whole: refuse a chunk that keeps only those of the picture.
        Raises: InputError as weights.
        """
        chunk = plan.chunks[number]
        levels = self._read(images, number, ["levels"])["levels"]
        counts = (len(chunk),) if whole else (len(chunk), sum(plan.shown(index) for index in chunk))
        if levels.dtype != np.uint8 or levels.shape[1:] != (self.image_size, self.image_size, 3):
            self._refuse(images, number, f"its images are {levels.dtype} {levels.shape}")
        if len(levels) not in counts:
            self._refuse(images, number, f"it holds {len(levels)} images")
        return levels

    def gather(self, images: str, plan: Plan) -> Numbers:
        """The arrays of all chunks except the images, in the order of the plan. Raises: InputError as weights."""
        parts: list[Numbers] = []
        for number, chunk in enumerate(plan.chunks):
            part = self._read(images, number, self.columns)
            for name, array in part.items():
                shape = (len(chunk), *(parts[0][name].shape[1:] if parts else array.shape[1:]))
                axes = 2 if name.partition("/")[0] in ("features", "logits") else 1
                kind = "b" if name in ("top1", "top5") else "f"
                if array.ndim != axes or array.shape != shape or array.dtype.kind != kind:
                    self._refuse(images, number, f"{printable(name)} is {array.dtype} {array.shape}")
                if kind == "f" and not np.isfinite(array).all():
                    self._refuse(images, number, f"{printable(name)} holds numbers that are not finite")
            parts.append(part)
        return {name: np.concatenate([part[name] for part in parts]) for name in self.columns}

    def wait(self, sets: Iterable[str], plan: Plan) -> None:
        """Until the other processes' chunks are there. Raises: InputError if none has come for half an hour."""
        paths = [self.chunk(images, number) for images in sets for number in range(len(plan.chunks))]
        missing, since_s = len(paths) + 1, time.monotonic()
        while left := [path for path in paths if not path.exists()]:
            if len(left) < missing:
                print(f"waiting for {len(left)} chunks of other processes")
                missing, since_s = len(left), time.monotonic()
            if time.monotonic() - since_s > _PATIENCE_S:
                raise InputError(
                    f"{len(left)} chunks of other processes are missing, {left[0].name} first, and none has come for "
                    f"{_PATIENCE_S:.0f} s. Run the same command again: what is there is kept"
                )
            time.sleep(0.5)

    def _read(self, images: str, number: int, names: list[str]) -> Numbers:
        path = self.chunk(images, number)
        try:
            with open_regular(path, follow=False) as file, zipfile.ZipFile(file) as archive:
                return {name: _read_array(archive, name) for name in names}
        except _ARCHIVE_ERRORS as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else printable(error)
            self._refuse(images, number, reason or type(error).__name__)

    def _refuse(self, images: str, number: int, reason: str) -> NoReturn:
        raise InputError(f"{self.chunk(images, number)} cannot be read ({reason}); delete it and run the command again")


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array as numpy.savez wrote it. Raises: ValueError for anything else.

    numpy.load is not used: it evaluates the header, and allocates what the header promises.
    """
    members = [member for member in archive.infolist() if member.filename == f"{name}.npy"]
    if len(members) != 1:
        raise ValueError(f"it holds {name} {len(members)} times")
    if members[0].compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which no chunk is")
    with archive.open(members[0]) as member:
        content = member.read()
    header = re.match(rb"\x93NUMPY\x01\x00..\{'descr': '([<|][biufU]\d{1,3})', 'fortran_order': False, 'shape': "
                      rb"\(([\d, ]{0,80})\), \} *\n", content[:1000], re.S)  # fmt: skip
    if header is None:
        raise ValueError(f"{name} is no array of numbers")
    dtype = np.dtype(header[1].decode())
    shape = tuple(int(side) for side in header[2].split(b",") if side.strip())
    if math.prod(shape) * dtype.itemsize != len(content) - header.end():
        raise ValueError(f"{name} is {len(content) - header.end()} bytes for {dtype} {shape}")
    return np.frombuffer(content, dtype, offset=header.end()).reshape(shape)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = parse_json(read_bytes(path))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else printable(error)
        raise InputError(f"{path} cannot be read ({reason}); delete it and run the command again") from error
    return settings
