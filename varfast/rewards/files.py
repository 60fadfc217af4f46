"""Weights of the rewards: a path, the hub, or a web address; checked by hash where one is known."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import stat
from pathlib import Path
from typing import IO
from urllib.parse import unquote

import torch

from varfast.models.weights import resolve
from varfast.printable import printable
from varfast.types import InputError

_LONGEST_TEXT_BYTES = 10_000_000


def file_name(address: str) -> str:
    """Last part of a path or address, without escapes: sac%2Blogos.pth -> sac+logos.pth."""
    return unquote(address).rpartition("/")[2]


def fetch(address: str, key: str, sha256: str = "") -> Path:
    """The local file of an address; https files are kept in torch.hub's folder (TORCH_HOME), hf:// in the hub's.

    Args:
        address: a path, hf://owner/repo/file or https://host/file.
        key: where it stands in the config, for errors.
        sha256: what the file's SHA-256 must begin with; "": not known.
    Raises: InputError that names the key and the address if the file cannot be had, or has another hash.
    """
    path = _download(address, key) if address.startswith("https://") else _resolve(address, key)
    if sha256:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(sha256):
            raise InputError(
                f"{key}={address}: {path} has SHA-256 {found}, the public file has {sha256}; it is damaged, or another "
                "file of that name. Delete it and fetch it again; a file of your own needs another name"
            )
    return path


def open_regular(path: Path, most_bytes: int, follow: bool = True) -> IO[bytes]:
    """Open a file for reading that is a file: a device or a pipe might never end, nor even open.

    Args:
        most_bytes: a larger file is refused.
        follow: whether `path` may be a link.
    Raises: OSError, with the reason in strerror.
    """
    # O_NONBLOCK: to open a pipe would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    status = os.fstat(descriptor)
    reason = None
    if not stat.S_ISREG(status.st_mode):
        reason = "it is a folder, a device or a pipe, not a file"
    elif status.st_size > most_bytes:
        reason = f"it has {status.st_size} bytes, more than {most_bytes}"
    if reason is not None:
        os.close(descriptor)
        raise OSError(errno.EINVAL, reason)
    return os.fdopen(descriptor, "rb")


def read_names(address: str, key: str) -> list[str]:
    """The lines of a text file: one name each.

    Raises: InputError if it is no file of at most 10 MB in UTF-8.
    """
    try:
        with open_regular(Path(address).expanduser(), _LONGEST_TEXT_BYTES) as file:
            text = file.read().decode("utf-8-sig")  # Windows begins a text with U+FEFF
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{key}={address} cannot be read: {printable(error)}; want a file with one name a line"
                         ) from error  # fmt: skip
    return text.rstrip("\n").split("\n")


def _resolve(address: str, key: str) -> Path:
    try:
        return resolve(address)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


def _download(address: str, key: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name(address)
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(path), progress=False)
        except (OSError, http.client.HTTPException, ValueError, RuntimeError) as error:
            raise InputError(
                f"{key}={address} cannot be fetched, and {path} does not exist: {printable(error)}\n"
                f"  without a network, put the file there, or set {key} to its path"
            ) from error
    return path
