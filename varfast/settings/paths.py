"""What a path in a config or on a command line may be.

One rule for all of them: `~` and `~user` are expanded where the path is used, $NAME is refused. (A config stays in the
run folder and is handed on with it: a variable would mean something else, or tell something, elsewhere.)
"""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[^}]*\}?)")


def check_source(text: str) -> str:
    """A path or an address (hf://, https://). Raises: ValueError."""
    if not text.strip():
        raise ValueError("got an empty path")
    variable = _VARIABLE.search(text)
    if variable:
        raise ValueError(
            f"got {text!r}: {variable[0]} is not expanded here; write the path itself, or give it unquoted on the "
            "command line, where the shell expands it"
        )
    if text.startswith("~") and os.path.expanduser(text).startswith("~"):
        raise ValueError(f"got {text!r}: there is no user {text.split('/')[0][1:]!r} on this machine; write the path")
    if len(text) > 4000 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError(f"got {text[:60]!r}...: a path has at most 4000 characters, and 255 bytes a name")
    return text


def check_local(text: str) -> str:
    """A path on this machine. Raises: ValueError."""
    if re.match(r"[A-Za-z][\w+.-]+://", text):
        raise ValueError(f"got {text!r}, want a path on this machine; mount or download what the address names")
    return check_source(text)
