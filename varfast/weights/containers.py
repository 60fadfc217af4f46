"""The one place where files of weights are opened: .pth, .pt, .ckpt, .safetensors, and .npz of arrays.

What a file is, its first bytes say, not its name. What cannot be used is named as what it is. Nothing in a file is
executed, and nothing is allocated before the sizes that a file declares have been held against its own size.
"""

from __future__ import annotations

import io
import json
import lzma
import math
import os
import pickle
import pickletools
import re
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch

from varfast.types import InputError
from varfast.weights.hub import one_line

Kind = Literal["torch", "legacy torch", "safetensors", "npz"]

# What damaged bytes make zipfile, pickle, NumPy and torch raise. Found by flipping bits: tests/fuzz/test_weights.py.
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    pickle.UnpicklingError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
)
_CHUNK_BYTES = 2**22
# The pickle of a file names its tensors and holds what stands beside them: some 100 bytes a tensor. torch reads it in
# Python, a million operations a second.
_PICKLE_BYTES = 2**24
_HEADER_BYTES = 2**25  # of safetensors; some 100 bytes a tensor too
_MEMBERS = 200_000
_MSDOS_FOLDER = 0x10
# Deflate makes photographs 1.1 to 3 times smaller, and zeros 1000 times.
_MOST_COMPRESSED = 200

# Beginnings of files that are no weights, and what to do with them.
_UNPACK = "unpack it"
_DOWNLOAD = "download the file itself again"
_CONVERT = "save the model's state_dict with torch.save or as safetensors where it was made"
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes", _CONVERT),
    (b"GGUF", "a GGUF file of llama.cpp", _CONVERT),
    (b"\x93NUMPY", "a single NumPy array (.npy)", _CONVERT),
    (b"\x89PNG", "a PNG image", _DOWNLOAD),
    (b"\xff\xd8\xff", "a JPEG image", _DOWNLOAD),
    (b"%PDF", "a PDF document", _DOWNLOAD),
    (b"\x7fELF", "a program", _DOWNLOAD),
    (b"SQLite format 3", "an SQLite database", _DOWNLOAD),
    (b"PAR1", "a Parquet table", _DOWNLOAD),
)
_TORCH_LEGACY = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # behind the protocol: torch's magic number

# Names in a pickle that make tensors and plain data. All others are refused by name before torch sees the file;
# bytearray too, which torch allows and which takes any amount of memory from a file of 50 bytes.
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


def shown(path: Path | str) -> str:
    """A path as it may stand in a message."""
    return one_line(path, 250)


def regular_file(address: str, what: str = "checkpoint", want: str = "a .pth or .safetensors file, or hf://owner/repo/"
                 "file") -> Path:  # fmt: skip
    """The path of a file that can be read.

    Args:
        address: a path; ~ is expanded.
        what: what it is to hold, for errors.
        want: what would do, for errors.
    Raises: InputError if it is not there, is no file (a folder, a device, a pipe), or may not be read.
    """
    named = f"{what} {shown(address)}"
    if re.match(r"https?://", address):
        raise InputError(f"{named} is a web address; download the file, or give {want}")
    try:
        path = Path(address).expanduser()
    except RuntimeError as error:
        raise InputError(f"{named}: there is no such user; give the whole path") from error
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            path.open("rb").close()
            return path
    except FileNotFoundError as error:
        if path.is_symlink():
            raise InputError(
                f"{named} is a link to {shown(os.readlink(path))}, which does not exist; give {want}"
            ) from error
        raise InputError(f"{named} does not exist; give {want}") from error
    except OSError as error:
        raise InputError(f"{named} cannot be read: {error.strerror}; mend that, or give {want}") from error
    except ValueError as error:  # NUL, lone surrogates
        raise InputError(f"{named} is no path: {one_line(error)}; give {want}") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{named} is a folder, want a file{_of_folder(path)}; give {want}")
    kind = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
    raise InputError(f"{named} is {kind.get(stat.S_IFMT(mode), 'no regular file')}, want a file; give {want}")


def _of_folder(path: Path) -> str:
    """What to take of a folder that is well known."""
    for inside, advice in (
        ("var.pth", "the weights of this run are its var.pth"),
        ("checkpoints", "this run has no var.pth yet: python -m varfast.export makes a file of its last checkpoint"),
        ("adapter_config.json", "it holds an adapter, and no base"),
        ("manifest.json", "it is a checkpoint of a run: python -m varfast.export checkpoint=RUN makes a file of it"),
    ):
        if (path / inside).exists():
            return f" ({advice})"
    return ""


@contextmanager
def _damage_named(path: Path, what: str) -> Iterator[None]:
    """What damaged bytes raise inside becomes one InputError."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        detail = one_line(str(error).partition("\n")[0] or type(error).__name__)
        if isinstance(error, OSError) and error.strerror:
            detail = error.strerror
        raise InputError(
            f"{what} {shown(path)} ({_size(path)} bytes) is truncated or damaged; fetch it again. Detail: {detail}"
        ) from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def kind_of(path: Path, what: str = "checkpoint") -> Kind:
    """What holds the tensors of a file, by its first bytes.

    Args:
        what: what it is to hold, for errors.
    Raises: InputError that names what the file is, if it is nothing of that kind.
    """
    with _damage_named(path, what), path.open("rb") as file:
        head = file.read(4096)
    size = _size(path)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _kind_of_zip(path, what)
    if head[:1] == b"\x80" and head[2:].startswith(_TORCH_LEGACY):
        return "legacy torch"
    if len(head) > 8 and head[8:9] == b"{" and head[4:8] == b"\0\0\0\0":  # a header of less than 4 GiB
        return "safetensors"
    named, advice = _named(head, size)
    raise InputError(f"{what} {shown(path)} is {named}; {advice}")


def _named(head: bytes, size: int) -> tuple[str, str]:
    """What a file is that is no weights, and what to do."""
    if not size:
        return "empty (0 bytes), no checkpoint", _DOWNLOAD
    if found := re.match(rb"version https?://(?:git-lfs|hawser)\.github\.com/spec/v\d", head):
        full = re.search(rb"\nsize (\d+)", head[found.end() :])
        of = f", which stands for {int(full[1][:20])} bytes" if full else ""
        return f"a git-lfs pointer of {size} bytes{of}", "run 'git lfs pull' in its repository, or " + _DOWNLOAD
    if b".git/annex/objects" in head[:500] or head.startswith(b"/annex/objects/"):
        return "a git-annex pointer", "run 'git annex get' on it"
    if head.startswith(b"# xet version"):
        return "a pointer to a file of the hub's Xet storage", "fetch it with hf download"
    for magic, name, advice in _MAGIC:
        if head.startswith(magic):
            return name, advice
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it; if torch before 0.1.10 wrote it, " + _CONVERT
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        return "a pickle that torch.save did not write; loading it could run code, so it was not loaded", _CONVERT
    if not head.strip(b"\0"):
        return f"nothing but zeros at its beginning ({size} bytes): a download that was not finished", _DOWNLOAD
    return _named_text(head, size)


def _named_text(head: bytes, size: int) -> tuple[str, str]:
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = head.decode(encoding, "ignore")
    lost = len(head) - len(text.encode(encoding, "ignore"))
    printable = sum(c.isprintable() or c in "\t\r\n\f\x1b" for c in text)
    if lost > 8 or not text.strip() or printable < len(text):
        begins = head[:8].hex(" ")
        return f"truncated or no checkpoint: {size} bytes of no known format, which begin with {begins}", _DOWNLOAD
    begins = f"which begins {one_line(text.strip(), 60)!r}"
    start = text.lstrip()[:200].lower()
    if re.match(r"<!doctype html|<html|<head|<body", start):
        title = re.search(r"<title[^>]*>(.*?)</title", text, re.DOTALL | re.IGNORECASE)
        named = f" ({one_line(title[1], 80)!r})" if title else ""
        return f"an HTML page{named}, no checkpoint: what a server showed in place of the file", _DOWNLOAD
    if start.startswith("<?xml") or start.startswith("<error"):
        return f"XML text, {begins}, no checkpoint: what a server answered in place of the file", _DOWNLOAD
    if start.startswith(("{", "[")):
        if '"weight_map"' in text:
            return "the index of a checkpoint in several files", "give one file with all weights"
        return f"JSON text, {begins}, no checkpoint: a server's answer, or settings", _DOWNLOAD
    return f"a text file, {begins}, no checkpoint", "give the file of the weights"


# ---------------------------------------------------------------------------------------------------------------------
# Zip containers: torch since 1.6, NumPy


def _kind_of_zip(path: Path, what: str) -> Kind:
    with _damage_named(path, what), zipfile.ZipFile(path) as archive:
        names = [info.filename for info in archive.infolist()]
    inside = {name.partition("/")[2] for name in names}
    beside = f"{what} {shown(path)}"
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise InputError(f"{beside} is a TorchScript archive, which is code, so it was not loaded; {_CONVERT}")
    if "data.pkl" in inside:
        return "torch"
    if any(name.endswith(".npy") for name in names):
        return "npz"
    if any(name.startswith(".data/") for name in inside):
        raise InputError(f"{beside} is an archive of torch.package, which is code, so it was not loaded; {_CONVERT}")
    if "archive_format" in inside:
        raise InputError(f"{beside} is a program of torch.export (.pt2), no weights; {_CONVERT}")
    held = one_line(", ".join(names[:4]) or "nothing", 100)
    raise InputError(f"{beside} is a zip archive without torch's data, it holds {held}; {_UNPACK}, or {_DOWNLOAD}")


def _check_torch_zip(path: Path) -> None:
    """Read a torch container once: sizes, names and the CRC of every member, which torch.load does not look at."""
    named = f"checkpoint {shown(path)}"
    with _damage_named(path, "checkpoint"), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > _MEMBERS:
            raise InputError(f"{named} holds {len(members)} members, more than a model has; {_CONVERT}")
        if len({info.filename for info in members}) < len(members):
            raise InputError(f"{named} holds two members of one name, as torch.save never writes; {_DOWNLOAD}")
        declared, size = sum(info.file_size for info in members), _size(path)
        if declared > size or any(info.compress_type != zipfile.ZIP_STORED for info in members):
            raise InputError(
                f"{named} declares {declared} bytes in a file of {size}: torch.save does not compress, so it is a zip "
                f"bomb or was packed again; {_DOWNLOAD}"
            )
        for info in members:
            # torch reads no byte of a member with this bit set, and returns whatever was in memory.
            if info.external_attr & _MSDOS_FOLDER:
                raise InputError(f"{named} is damaged: {one_line(info.filename, 80)} is marked a folder; {_DOWNLOAD}")
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
            f"not loaded; {_CONVERT}"
        )


def _check_legacy(path: Path) -> None:
    """A file of torch before 1.6: four pickles (magic number, version, machine, content), then the bytes of tensors."""
    with _damage_named(path, "checkpoint"), path.open("rb") as file:
        stream = io.BytesIO(file.read(_PICKLE_BYTES))
        for _ in range(4):
            _check_operations(path, stream)


def _check_pickle(path: Path, content: bytes) -> None:
    with _damage_named(path, "checkpoint"):
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
            f"that could run code, so it was not loaded; {_CONVERT}"
        )
    if unknown:
        raise InputError(
            f"checkpoint {shown(path)} was saved with another pickle protocol than torch.save's default, 2 "
            f"({unknown}), so it was not loaded; {_CONVERT}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# safetensors


def _check_safetensors(path: Path) -> None:
    named, size = f"checkpoint {shown(path)}", _size(path)
    with _damage_named(path, "checkpoint"), path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise InputError(
                f"{named} is truncated: a safetensors file of {size} bytes whose header alone takes {length}; "
                f"{_DOWNLOAD}"
            )
        if length > _HEADER_BYTES:
            raise InputError(f"{named} has a safetensors header of {length} bytes, more than any model's; {_DOWNLOAD}")
        header = json.loads(file.read(length))
        end = 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin_bytes, end_bytes = entry["data_offsets"]
            numbers = math.prod(entry["shape"])
            end = max(end, end_bytes)
            if not 0 <= begin_bytes <= end_bytes or (numbers and end_bytes == begin_bytes):
                raise InputError(f"{named} is damaged: {one_line(name, 80)} has no place in the file; {_DOWNLOAD}")
        if end != size - 8 - length:
            state = "is truncated" if end > size - 8 - length else "has bytes that belong to no tensor"
            raise InputError(f"{named} {state}: its header describes {end + 8 + length} bytes, it has {size}; "
                             f"{_DOWNLOAD}")  # fmt: skip


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
        raise InputError(f"checkpoint {shown(path)} holds NumPy arrays (.npz), no weights of torch; {_CONVERT}")
    return kind


def read_checkpoint(path: Path) -> Any:
    """The content of a .safetensors or PyTorch file, tensors on the CPU; nothing in it is executed.

    Raises: InputError if the file is truncated, damaged, no checkpoint, or a pickle that would run code.
    """
    kind = check_file(path)
    with _damage_named(path, "checkpoint"):
        if kind == "safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                return load_file(path)
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
        with _damage_named(path, what):
            self._archive = zipfile.ZipFile(path)
        self.names = {name.removesuffix(".npy") for name in self._archive.namelist()}

    def __enter__(self) -> Arrays:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any], bool]]:
        """The bytes of an array behind its header; its shape, dtype, and whether it is in Fortran's order."""
        with _damage_named(self._path, self._what), self._archive.open(f"{name}.npy") as file:
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
