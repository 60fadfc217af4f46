"""Which paths and addresses a config or a command line may hold.

`~` and `~user` are expanded where a path is used; $NAME is refused. A config is kept in the run folder and shared with
it, so a variable would have another value, or disclose one, on somebody else's machine.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from varfast.types import InputError

_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[^}]*\}?)")


def expanded(text: str) -> Path:
    """A path with `~` expanded. Raises: InputError for an unknown user, and for text that cannot be a path."""
    try:
        check_source(text)
    except ValueError as error:
        raise InputError(f"path {text[:60]!r}: {error}") from error
    return Path(text).expanduser()


def check_source(text: str) -> str:
    """A path or an address (hf://, https://). Raises: ValueError."""
    if not text.strip() or "\0" in text:
        raise ValueError(f"got {text!r}, want a path")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise ValueError(f"got {text[:60]!r}: it holds bytes that are not UTF-8")
    if re.match(r"[A-Za-z][\w+.-]+://", text):  # a signed address may have a part of 1000 letters
        return text
    variable = _VARIABLE.search(text)
    if variable:
        raise ValueError(
            f"got {text!r}: {variable[0]} is not expanded here; write the path itself, or give it unquoted on the "
            "command line, where the shell expands it"
        )
    if text.startswith("~") and os.path.expanduser(text).startswith("~"):
        raise ValueError(f"got {text!r}: there is no user {text.split('/')[0][1:]!r} on this machine; write the path")
    if len(text.encode()) > 4000 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError(f"got {text[:60]!r}...: a path has at most 4000 characters, and 255 bytes a name")
    return text


def check_local(text: str) -> str:
    """A path on this machine. Raises: ValueError."""
    if re.match(r"[A-Za-z][\w+.-]+://", text):
        raise ValueError(f"got {text!r}, want a path on this machine; mount or download what the address names")
    return check_source(text)


def address_parts(url: str) -> SplitResult:
    """The parts of an http:// or https:// URL. Raises: ValueError, with the reason, if it cannot be requested."""
    url.encode("ascii")
    if unprintable := next((c for c in url if not c.isprintable() or c == " "), None):
        raise ValueError(f"it holds {unprintable!r}")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("want http://host/ or https://host/")
    if ":" not in parts.hostname:  # no address of IPv6
        labels = parts.hostname.removesuffix(".").split(".")
        if not all(0 < len(label) < 64 for label in labels) or len(parts.hostname) > 253:
            raise ValueError("the host's name, or a part of it, is empty or too long")
    if parts.port == 0:
        raise ValueError("there is no port 0")
    return parts
