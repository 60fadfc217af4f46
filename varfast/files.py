"""Files that hold the old content or the new one, never a part; and reading of files that anybody may have made.

A run's folder gets copied, damaged, filled to the last byte and handed on. So a file is replaced in one step, and what
is read must be a regular file of bounded size, whose content is checked before it is used.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from varfast.printable import printable
from varfast.types import InputError

if TYPE_CHECKING:
    from typing_extensions import Buffer

# A file is first written beside its place, as NAME.<12 hex digits>.incomplete, so that no two writers use the same.
INCOMPLETE = ".incomplete"
# The small files of a run have some kB. metrics.jsonl may be larger; it is read line by line.
_MOST_BYTES = 64 * 2**20
# Nesting that a file written by varfast can have: rewards in a config, their sections, and their arguments.
_MOST_LEVELS = 100
# Sections and values of a small file: a config has about 200.
_MOST_NODES = 100_000
# fsync of a folder makes a rename durable. CIFS, vboxsf and FUSE refuse it for folders (EINVAL, ENOTSUP, EACCES and
# others), which matters only at a power failure. These errors say that the disk itself fails.
_OF_THE_DISK = (errno.EIO, errno.ENOSPC, errno.EDQUOT)


class WriteError(InputError):
    """A file could not be written. A caller may go on without a file that only people look at."""


def reason(error: OSError) -> str:
    """What happened, in words; shutil raises OSErrors that have none."""
    return error.strerror or str(error) or type(error).__name__


def advice(error: OSError) -> str:
    """What can be done about a write that failed."""
    code = error.errno
    if code == errno.ENOSPC:
        return "Free space there, or choose another folder"
    if code == errno.EDQUOT:
        return "Free space there (your quota is used up), or choose another folder"
    if code == errno.EFBIG:
        return (
            "The limit is on the size of a file (ulimit -f, or of that file system): raise it, or choose another folder"
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Mend its rights, or choose another folder"
    if code in (errno.EMFILE, errno.ENFILE):
        return "Raise the limit on open files (ulimit -n)"
    if code == errno.EIO:
        return "The disk reports a fault, see dmesg; choose another folder"
    return "Choose another folder"


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Create or replace `path` in one step: it holds the old content or the new, never a part of it.

    Args:
        path: its folder is created.
        write: gets a file opened for writing.
    Raises: WriteError, an InputError, if it cannot be written; what stood at `path` is still there.
    """
    # The name is cut because file names have at most 255 bytes.
    beside = path.with_name(f"{path.name[:40]}.{uuid.uuid4().hex[:12]}{INCOMPLETE}")
    replaced, raw = False, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is a folder or a device, not a file")
        raw = _Recorded(beside, "xb")
        with io.BufferedWriter(raw) as file:
            write(file)
            file.flush()
            sync_file(file.fileno())
        os.replace(beside, path)
        replaced = True
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError.
        failed = raw.failed if isinstance(error, RuntimeError) and raw is not None else error
        if not isinstance(failed, OSError):
            raise
        whole = "; the earlier one is whole" if not replaced and os.path.isfile(path) else ""
        raise WriteError(f"cannot write {path}: {reason(failed)}{whole}. {advice(failed)}") from error
    finally:
        if raw is not None and not replaced:
            with suppress(OSError):
                beside.unlink()


class _Recorded(io.FileIO):
    """A file that remembers why it could not be written."""

    failed: OSError | None = None

    def write(self, content: Buffer) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.failed = error
            raise


def save_tensors(path: Path, content: Any) -> None:
    """Write what torch.save can write, atomically. Raises: WriteError as write_atomically."""
    import torch

    write_atomically(path, lambda file: torch.save(content, file))


def save_text(path: Path, text: str) -> None:
    """Write a text file, atomically. Raises: WriteError as write_atomically."""
    # JSON may hold half of a surrogate pair, which UTF-8 cannot represent.
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def append(path: Path, content: bytes) -> None:
    """Append all of `content` to a regular file, or nothing. Raises: OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        try:
            while content:
                content = content[os.write(descriptor, content) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, status.st_size)  # half a line would spoil the next one
            raise
    finally:
        os.close(descriptor)


def sync_file(descriptor: int) -> None:
    """Flush a file to the disk, where its file system supports that. Raises: OSError if the disk fails."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def sync_folder(folder: Path) -> None:
    """Flush what was created and renamed in a folder to the disk, where its file system supports that.

    Raises: OSError if the disk is full or faulty.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _OF_THE_DISK:
            raise


def move_folder(folder: Path, to: Path, last: tuple[str, ...] = ()) -> None:
    """Rename a folder of files; where that is refused (EXDEV on overlay file systems), move it file by file.

    Args:
        last: names of the files to move last, in this order: the folder counts as complete only with them.
    Raises: OSError.
    """
    try:
        os.rename(folder, to)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
            raise
        to.mkdir()
        for file in sorted(folder.iterdir(), key=lambda file: last.index(file.name) if file.name in last else -1):
            if file.name in last:
                sync_folder(to)
            os.rename(file, to / file.name)
        folder.rmdir()


def remove_tree(path: Path) -> None:
    """Remove a folder and its content, or a file; of a symbolic link only the link. Raises: OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in a folder. Call it only while holding the folder's lock."""
    with suppress(OSError):
        for path in folder.glob(f"*{INCOMPLETE}"):
            remove_tree(path)


def free_space(path: Path) -> str:
    """How much space is free on the disk of `path`, in words."""
    try:
        mount = path.resolve()
        while not mount.exists() or not os.path.ismount(mount):
            mount = mount.parent
        return f"{shutil.disk_usage(mount).free / 2**20:.0f} MiB free on the disk at {mount}"
    except (OSError, RuntimeError):  # symbolic links in a circle
        return "free space unknown"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def open_regular(path: Path, follow: bool = True) -> io.BufferedReader:
    """Open a regular file, or if `follow` a link to one.

    Raises: OSError; also for a FIFO or a device, without waiting for it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return open(descriptor, "rb")


def read_bytes(path: Path, most: int = _MOST_BYTES) -> bytes:
    """The content of a small file. Raises: OSError; also if it has more than `most` bytes."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    return content


def read_text(path: Path) -> str:
    """The content of a small text file. Raises: InputError that names the file."""
    try:
        return read_bytes(path).decode()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged: byte {error.start} is not of a text in UTF-8") from error


def read_json(path: Path) -> Any:
    """The content of a small JSON file. Raises: InputError that names the file."""
    try:
        return parse_json(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged: it is not JSON as varfast writes it ({printable(error)})") from error


def parse_json(text: str | bytes) -> Any:
    """JSON whose numbers fit into floats and whose strings can be encoded. Raises: ValueError, RecursionError."""
    content = json.loads(text, parse_int=_number)
    _check(content, 0)
    return content


def _number(digits: str) -> int | float:
    # Python reads integers of any length, but math.isfinite and others raise for large ones.
    return int(digits) if len(digits) <= 19 else float(digits)


def _check(node: Any, level: int) -> None:
    if level > _MOST_LEVELS:
        raise ValueError(f"nested more than {_MOST_LEVELS} deep")
    if isinstance(node, str):
        node.encode()  # UnicodeEncodeError, a ValueError, for half of a surrogate pair
    elif isinstance(node, dict):
        for name, child in node.items():
            _check(name, level)
            _check(child, level + 1)
    elif isinstance(node, list):
        for child in node:
            _check(child, level + 1)


def read_leaves(path: Path) -> dict[str, Any]:
    """The leaves of a JSON file; empty if it is not there or cannot be read."""
    try:
        content = read_json(path)
    except InputError:
        return {}
    return leaves(content) if isinstance(content, dict) else {}


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a nested dictionary by dotted key, as update.lr; a part of them if it is too deep or too large."""
    found: dict[str, Any] = {}
    waiting = [(prefix, node, 0)]
    for _ in range(_MOST_NODES):
        if not waiting:
            break
        name, child, level = waiting.pop()
        if isinstance(child, dict) and level < _MOST_LEVELS:
            waiting += [(f"{name}.{key}".strip("."), value, level + 1) for key, value in reversed(child.items())]
        elif not isinstance(child, dict):
            found[name] = child
    return found
