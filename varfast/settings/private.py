"""The settings of a config as strangers may see them: without the folders, the servers and the people of this machine.

A model card is handed on with the config that made the model. A path in it would mean nothing to its reader, and says
who works where.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from varfast.settings import schema
from varfast.settings.paths import check_local, check_source

# Folders of one machine, of which not even the name says anything about a model.
_LEFT_OUT = ("dir", "cache_dir")
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+://")
_HOME = re.compile(r"(?<![\w.])(?:(?:/home|/Users)/[^/\s'\"`,;|)\]]+|/root(?![\w-]))")
# A file by its suffix, in a value that no schema describes.
_FILE = re.compile(r"\S+/\S+\.[A-Za-z]\w{1,11}")
_SERVER = "a-server-of-ours"


def public_settings(model: type[BaseModel], data: dict[str, Any]) -> dict[str, Any]:
    """A dumped config: of a path only its last part is left, and of an address neither a local host nor a password.

    Args:
        model: the schema of `data`, which says what is a path.
    """
    found: dict[str, Any] = _public(model, data, ())
    return found


def _public(model: type[BaseModel], node: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(node, dict):
        kept = {key: child for key, child in node.items() if key not in _LEFT_OUT or not isinstance(child, str)}
        return {key: _public(model, child, (*keys, str(key))) for key, child in kept.items()}
    if isinstance(node, list | tuple):
        return [_public(model, child, keys) for child in node]
    return public_text(node, _is_path(model, keys)) if isinstance(node, str) else node


def _is_path(model: type[BaseModel], keys: tuple[str, ...]) -> bool:
    values, _ = schema.find(model, keys)
    marks = [mark for value in values for member in value.members() for mark in member.metadata]
    return any(getattr(mark, "func", None) in (check_local, check_source) for mark in marks)


def public_text(text: str, is_path: bool = False) -> str:
    """A value without what names this machine. is_path: it is one, whatever it looks like."""
    if _ADDRESS.match(text):
        return _public_address(text)
    path, colon, name = text.rpartition(":") if re.fullmatch(r"[^\s:]+\.py:\w+", text) else (text, "", "")
    looks_like_one = path.startswith(("/", "~", "./", "../")) or _FILE.fullmatch(path) is not None
    if not looks_like_one and not (is_path and os.sep in path):
        return text
    return f"{PurePath(path).name or 'a path'}{colon}{name}"


def _public_address(text: str) -> str:
    if not re.match("https?:", text):
        return text if text.startswith("hf://") else f"{text.partition(':')[0]}://{_SERVER}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", f":{parts.port}" if parts.port else ""
    except ValueError:
        return f"https://{_SERVER}"
    shown = f"{host}{port}" if _is_public(host) else _SERVER
    return f"{parts.scheme}://{shown}{parts.path}"


def _is_public(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return "." in host and not host.endswith((".local", ".internal", ".lan", ".localdomain", ".corp"))


def without_homes(text: str) -> str:
    """Any text with ~ in place of home folders, whose names say who made the model."""
    own = os.path.expanduser("~")
    if own not in ("/", "~"):
        text = re.sub(rf"{re.escape(own)}(?=[/\s]|$)", "~", text)
    return _HOME.sub("~", text)
