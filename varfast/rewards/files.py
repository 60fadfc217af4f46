"""Files that rewards read, from a path, the hub or a web address; checked against a SHA-256 where one is known."""

from __future__ import annotations

import hashlib
import http.client
from pathlib import Path
from urllib.parse import unquote

from varfast.files import read_bytes
from varfast.printable import printable
from varfast.types import InputError
from varfast.weights.files import resolve

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


def read_names(address: str, key: str) -> list[str]:
    """The lines of a text file: one name each.

    Raises: InputError if it is no file of at most 10 MB in UTF-8.
    """
    try:
        content = read_bytes(Path(address).expanduser(), _LONGEST_TEXT_BYTES)
        text = content.decode("utf-8-sig")  # Windows begins a text with U+FEFF
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
    from torch import hub

    path = Path(hub.get_dir()) / "checkpoints" / file_name(address)
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            hub.download_url_to_file(address, str(path), progress=False)
        except (OSError, http.client.HTTPException, ValueError, RuntimeError) as error:
            raise InputError(
                f"{key}={address} cannot be fetched, and {path} does not exist: {printable(error)}\n"
                f"  without a network, put the file there, or set {key} to its path"
            ) from error
    return path
