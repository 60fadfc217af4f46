"""Files of weights: where they are, and what they are by their first bytes. Nothing is loaded here.

Whatever is no file of weights is refused by the name of what it is.
"""

from __future__ import annotations

import lzma
import os
import pickle
import re
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from varfast.types import InputError
from varfast.weights.hub import fetch_from_hub, one_line

Kind = Literal["torch", "legacy torch", "safetensors", "npz"]

# Exceptions that zipfile, pickle, NumPy and torch raise for damaged bytes. Found by flipping bits
# (tests/fuzz/test_weights.py).
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
# Beginnings of files that are no weights, and what to do with them.
UNPACK = "unpack it"
DOWNLOAD = "download the file itself again"
CONVERT = "save the model's state_dict with torch.save or as safetensors where it was made"
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "a gzip archive", UNPACK),
    (b"BZh", "a bzip2 archive", UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", UNPACK),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes", CONVERT),
    (b"GGUF", "a GGUF file of llama.cpp", CONVERT),
    (b"\x93NUMPY", "a single NumPy array (.npy)", CONVERT),
    (b"\x89PNG", "a PNG image", DOWNLOAD),
    (b"\xff\xd8\xff", "a JPEG image", DOWNLOAD),
    (b"%PDF", "a PDF document", DOWNLOAD),
    (b"\x7fELF", "a program", DOWNLOAD),
    (b"SQLite format 3", "an SQLite database", DOWNLOAD),
    (b"PAR1", "a Parquet table", DOWNLOAD),
)
_TORCH_LEGACY = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # behind the protocol: torch's magic number


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


def resolve(address: str) -> Path:
    """The local file of a path or of hf://owner/repo/file (downloaded once, then from the hub's cache).

    Raises: InputError if there is no such file that can be read, or if the hub cannot be reached and the file is not in
        its cache.
    """
    if not address.startswith("hf://"):
        if found := re.fullmatch(r"https?://(?:www\.)?huggingface\.co/([^/]+/[^/]+)/(?:resolve|blob)/([^/]+)/([^?]+).*",
                                 address):  # fmt: skip
            at = "" if found[2] == "main" else f"@{found[2]}"
            raise InputError(f"checkpoint {shown(address)}: give it as hf://{found[1]}{at}/{found[3]}")
        return regular_file(address)
    return fetch_from_hub(address)


@contextmanager
def damage_named(path: Path, what: str) -> Iterator[None]:
    """Turn whatever damaged bytes raise in the body into one InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        detail = one_line(str(error).partition("\n")[0] or type(error).__name__)
        if isinstance(error, OSError) and error.strerror:
            detail = error.strerror
        raise InputError(
            f"{what} {shown(path)} ({size_of(path)} bytes) is truncated or damaged; fetch it again. Detail: {detail}"
        ) from error


def size_of(path: Path) -> int:
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
    with damage_named(path, what), path.open("rb") as file:
        head = file.read(4096)
    size = size_of(path)
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
        return "empty (0 bytes), no checkpoint", DOWNLOAD
    if found := re.match(rb"version https?://(?:git-lfs|hawser)\.github\.com/spec/v\d", head):
        full = re.search(rb"\nsize (\d+)", head[found.end() :])
        of = f", which stands for {int(full[1][:20])} bytes" if full else ""
        return f"a git-lfs pointer of {size} bytes{of}", "run 'git lfs pull' in its repository, or " + DOWNLOAD
    if b".git/annex/objects" in head[:500] or head.startswith(b"/annex/objects/"):
        return "a git-annex pointer", "run 'git annex get' on it"
    if head.startswith(b"# xet version"):
        return "a pointer to a file of the hub's Xet storage", "fetch it with hf download"
    for magic, name, advice in _MAGIC:
        if head.startswith(magic):
            return name, advice
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it; if torch before 0.1.10 wrote it, " + CONVERT
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        return "a pickle that torch.save did not write; loading it could run code, so it was not loaded", CONVERT
    if not head.strip(b"\0"):
        return f"nothing but zeros at its beginning ({size} bytes): a download that was not finished", DOWNLOAD
    return _named_text(head, size)


def _named_text(head: bytes, size: int) -> tuple[str, str]:
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = head.decode(encoding, "ignore")
    lost = len(head) - len(text.encode(encoding, "ignore"))
    printable = sum(c.isprintable() or c in "\t\r\n\f\x1b" for c in text)
    if lost > 8 or not text.strip() or printable < len(text):
        begins = head[:8].hex(" ")
        return f"truncated or no checkpoint: {size} bytes of no known format, which begin with {begins}", DOWNLOAD
    begins = f"which begins {one_line(text.strip(), 60)!r}"
    start = text.lstrip()[:200].lower()
    if re.match(r"<!doctype html|<html|<head|<body", start):
        title = re.search(r"<title[^>]*>(.*?)</title", text, re.DOTALL | re.IGNORECASE)
        named = f" ({one_line(title[1], 80)!r})" if title else ""
        return f"an HTML page{named}, no checkpoint: what a server showed in place of the file", DOWNLOAD
    if start.startswith("<?xml") or start.startswith("<error"):
        return f"XML text, {begins}, no checkpoint: what a server answered in place of the file", DOWNLOAD
    if start.startswith(("{", "[")):
        if '"weight_map"' in text:
            return "the index of a checkpoint in several files", "give one file with all weights"
        return f"JSON text, {begins}, no checkpoint: a server's answer, or settings", DOWNLOAD
    return f"a text file, {begins}, no checkpoint", "give the file of the weights"


def _kind_of_zip(path: Path, what: str) -> Kind:
    with damage_named(path, what), zipfile.ZipFile(path) as archive:
        names = [info.filename for info in archive.infolist()]
    inside = {name.partition("/")[2] for name in names}
    beside = f"{what} {shown(path)}"
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise InputError(f"{beside} is a TorchScript archive, which is code, so it was not loaded; {CONVERT}")
    if "data.pkl" in inside:
        return "torch"
    if any(name.endswith(".npy") for name in names):
        return "npz"
    if any(name.startswith(".data/") for name in inside):
        raise InputError(f"{beside} is an archive of torch.package, which is code, so it was not loaded; {CONVERT}")
    if "archive_format" in inside:
        raise InputError(f"{beside} is a program of torch.export (.pt2), no weights; {CONVERT}")
    held = one_line(", ".join(names[:4]) or "nothing", 100)
    raise InputError(f"{beside} is a zip archive without torch's data, it holds {held}; {UNPACK}, or {DOWNLOAD}")
