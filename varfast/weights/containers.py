"""The one place where files of weights are opened: .pth, .pt, .ckpt, .safetensors, and .npz of arrays.

Nothing in a file is executed, and nothing is allocated before the sizes that a file declares have been compared with
its own size.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from varfast.types import InputError
from varfast.weights.files import CONVERT, DOWNLOAD, Kind, damage_named, kind_of, shown, size_of
from varfast.weights.hub import one_line

_CHUNK_BYTES = 2**22
# The pickle of a file names its tensors and holds what stands beside them: some 100 bytes a tensor. torch reads it in
# Python, a million operations a second.
_PICKLE_BYTES = 2**24
_HEADER_BYTES = 2**25  # of safetensors; some 100 bytes a tensor too
_MEMBERS = 200_000
_MSDOS_FOLDER = 0x10
# Deflate makes photographs 1.1 to 3 times smaller, and zeros 1000 times.
_MOST_COMPRESSED = 200

# Names in a pickle that make tensors and simple data. All others are refused by name before torch sees the file;
# bytearray too, which torch allows: a file of 50 bytes could allocate any amount of memory with it.
_HARMLESS = re.compile(
    r"collections\.(OrderedDict|Counter)|(__builtin__|builtins)\.(set|complex)|_codecs\.encode"
    r"|torch\.(Size|Tensor|device|nn\.parameter\.Parameter|serialization\._get_layout|\w*Storage)"
    r"|torch\.storage\.(Typed|Untyped)Storage|torch\.(bool|bfloat16|q?u?int\d+(x\d+)?|float\w*|complex\w*|per_\w+)"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
)
# What torch's own reader of pickles knows: protocol 2.
_OPCODES = re.compile(
    r"GLOBAL|NEWOBJ|REDUCE|BUILD|APPENDS?|SETITEMS?|MARK|TUPLE[123]?|NONE|NEWFALSE|NEWTRUE|EMPTY_(TUPLE|LIST|DICT|SET)"
    r"|BINPERSID|BININT[12]?|BINFLOAT|(LONG_)?BIN(GET|PUT)|BINUNICODE|SHORT_BINSTRING|LONG1|PROTO|STOP"
)


# ---------------------------------------------------------------------------------------------------------------------
# Zip containers: torch since 1.6, NumPy


def _check_torch_zip(path: Path) -> None:
    """Read a torch container once: sizes, names and the CRC of every member, which torch.load does not look at."""
    named = f"checkpoint {shown(path)}"
    with damage_named(path, "checkpoint"), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > _MEMBERS:
            raise InputError(f"{named} holds {len(members)} members, more than a model has; {CONVERT}")
        if len({info.filename for info in members}) < len(members):
            raise InputError(f"{named} holds two members of one name, as torch.save never writes; {DOWNLOAD}")
        declared, size = sum(info.file_size for info in members), size_of(path)
        if declared > size or any(info.compress_type != zipfile.ZIP_STORED for info in members):
            raise InputError(
                f"{named} declares {declared} bytes in a file of {size}: torch.save does not compress, so it is a zip "
                f"bomb or was packed again; {DOWNLOAD}"
            )
        for info in members:
            # torch reads no byte of a member with this bit set, and returns whatever was in memory.
            if info.external_attr & _MSDOS_FOLDER:
                raise InputError(f"{named} is damaged: {one_line(info.filename, 80)} is marked a folder; {DOWNLOAD}")
            if not info.CRC and info.file_size:  # torch.serialization.set_crc32_options(False) writes none
                del info.CRC  # then zipfile compares nothing
            if info.filename.partition("/")[2] == "data.pkl":
                _check_pickle_size(path, info.file_size)
                _check_pickle(path, archive.read(info))
                continue
            with archive.open(info) as member:
                while member.read(_CHUNK_BYTES):  # zipfile compares the CRC at the end: zlib computes 4 GB/s of it
                    pass


# ---------------------------------------------------------------------------------------------------------------------
# Pickles


def _check_pickle_size(path: Path, size: int) -> None:
    if size > _PICKLE_BYTES:
        raise InputError(
            f"checkpoint {shown(path)} holds {size} bytes beside its tensors, more than {_PICKLE_BYTES}, which were "
            f"not loaded; {CONVERT}"
        )


def _check_legacy(path: Path) -> None:
    """A file of torch before 1.6: four pickles (magic number, version, machine, content), then the bytes of tensors."""
    with damage_named(path, "checkpoint"), path.open("rb") as file:
        stream = io.BytesIO(file.read(_PICKLE_BYTES))
        for _ in range(4):
            _check_operations(path, stream)


def _check_pickle(path: Path, content: bytes) -> None:
    with damage_named(path, "checkpoint"):
        _check_operations(path, io.BytesIO(content))


def _check_operations(path: Path, stream: IO[bytes]) -> None:
    """Read a pickle's operations without carrying them out; refuse it by the name of what it would call."""
    strings: list[str] = []
    refused: dict[str, None] = {}  # in order
    unknown = ""
    for opcode, argument, _ in pickletools.genops(stream):
        name = ""
        if opcode.name in ("GLOBAL", "INST"):
            name = str(argument).replace(" ", ".", 1)
        elif opcode.name == "STACK_GLOBAL":  # its names are the two strings before it
            name = ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings = [*strings[-1:], argument]
        if name and not _HARMLESS.fullmatch(name):
            refused[name] = None
        if not _OPCODES.fullmatch(opcode.name):
            unknown = unknown or opcode.name
    if refused:
        raise InputError(
            f"checkpoint {shown(path)} holds more than tensors: {one_line(', '.join(list(refused)[:4]), 200)}. Loading "
            f"that could run code, so it was not loaded; {CONVERT}"
        )
    if unknown:
        raise InputError(
            f"checkpoint {shown(path)} was saved with another pickle protocol than torch.save's default, 2 "
            f"({unknown}), so it was not loaded; {CONVERT}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# safetensors


def _check_safetensors(path: Path) -> None:
    named, size = f"checkpoint {shown(path)}", size_of(path)
    with damage_named(path, "checkpoint"), path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise InputError(
                f"{named} is truncated: a safetensors file of {size} bytes whose header alone takes {length}; "
                f"{DOWNLOAD}"
            )
        if length > _HEADER_BYTES:
            raise InputError(f"{named} has a safetensors header of {length} bytes, more than any model's; {DOWNLOAD}")
        header = json.loads(file.read(length))
        end = 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin_bytes, end_bytes = entry["data_offsets"]
            numbers = math.prod(entry["shape"])
            end = max(end, end_bytes)
            if not 0 <= begin_bytes <= end_bytes or (numbers and end_bytes == begin_bytes):
                raise InputError(f"{named} is damaged: {one_line(name, 80)} has no place in the file; {DOWNLOAD}")
        if end != size - 8 - length:
            state = "is truncated" if end > size - 8 - length else "has bytes that belong to no tensor"
            raise InputError(f"{named} {state}: its header describes {end + 8 + length} bytes, it has {size}; "
                             f"{DOWNLOAD}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def check_file(path: Path) -> Kind:
    """What a file of weights is, if it is whole and would run no code. Nothing is loaded.

    Raises: InputError that names what is in the way, and what to do.
    """
    kind = kind_of(path)
    if kind == "torch":
        _check_torch_zip(path)
    elif kind == "legacy torch":
        _check_legacy(path)
    elif kind == "safetensors":
        _check_safetensors(path)
    else:
        raise InputError(f"checkpoint {shown(path)} holds NumPy arrays (.npz), no weights of torch; {CONVERT}")
    return kind


def read_checkpoint(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Any:
    """The content of a .safetensors or PyTorch file, tensors on the CPU; nothing in it is executed.

    Args:
        wanted: of names; of a safetensors file, the tensors that it refuses are not read.
    Raises: InputError if the file is truncated, damaged, no checkpoint, or a pickle that would run code.
    """
    kind = check_file(path)
    with damage_named(path, "checkpoint"):
        if kind == "safetensors":
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, framework="pt") as tensors:
                    names = [name for name in tensors.keys() if wanted(name)]  # noqa: SIM118 - it has no iterator
                    return {name: tensors.get_tensor(name) for name in names}
            except SafetensorError as error:
                raise ValueError(error) from error
        # What the pickle calls has been checked: an UnpicklingError is damage, and torch's advice is never shown.
        try:
            with path.open("rb") as file:  # by name, torch takes what is called .safetensors for that
                source: Any = file if path.suffix == ".safetensors" else path
                return torch.load(source, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(_said_by_torch(error)) from error


def _said_by_torch(error: pickle.UnpicklingError) -> str:
    """The cause that torch gives, without its advice to switch the guard off."""
    found = re.search(r"WeightsUnpickler error: (.*)|\n\n(.*)", str(error))
    return one_line((found[1] or found[2]) if found else "its pickle cannot be read", 120)


class Arrays:
    """The arrays of an .npz, of which only what is asked for is read, after its header. A context manager.

    Args:
        path: the file.
        what: what it is to hold, for errors, as "fid_reference".
    Raises: InputError, here and in every method, if it is no .npz, is damaged, or an array is not as wanted.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        self._named = f"{what} {shown(path)}"
        kind = kind_of(path, what)
        if kind != "npz":
            raise InputError(f"{self._named} holds weights of torch ({kind}), no arrays (.npz); give another file")
        with damage_named(path, what):
            self._archive = zipfile.ZipFile(path)
        self.names = {name.removesuffix(".npy") for name in self._archive.namelist()}

    def __enter__(self) -> Arrays:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any], bool]]:
        """The bytes of an array behind its header; its shape, dtype, and whether it is in Fortran's order."""
        with damage_named(self._path, self._what), self._archive.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(file)
            if dtype.hasobject:
                raise InputError(f"{self._named}: {name} holds Python objects, which could run code; save numbers")
            declared, info = math.prod(shape) * dtype.itemsize, self._archive.getinfo(f"{name}.npy")
            if not 0 <= declared <= info.file_size or info.file_size > _MOST_COMPRESSED * max(
                info.compress_size, 2**20
            ):
                raise InputError(
                    f"{self._named}: {name} declares {dtype} {shape}, {declared} bytes, in {info.compress_size} bytes "
                    "of the file: damaged, or a zip bomb; fetch it again"
                )
            yield file, shape, dtype, fortran_order

    def shape(self, name: str) -> tuple[int, ...]:
        """As the header of an array declares it."""
        with self.open(name) as (_, shape, _, _):
            return shape

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """An array of real numbers as float64. Raises: InputError too if it has another shape or is not finite."""
        with self.open(name) as (file, found, dtype, fortran_order):
            if found != shape:
                raise InputError(f"{self._named}: {name} is {found}, want {shape}")
            if dtype.kind not in "fiu":
                raise InputError(f"{self._named}: {name} is {dtype}, want real numbers")
            content = file.read(math.prod(shape) * dtype.itemsize)
            file.read(1)  # at its end zipfile compares the CRC
            array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C")
            wrong = int((~np.isfinite(array)).sum())
            if wrong:
                raise InputError(f"{self._named}: {name} holds {wrong} numbers that are not finite; make it anew")
            return array.astype(np.float64)
