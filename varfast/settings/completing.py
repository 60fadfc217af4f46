"""What may stand in place of an unfinished key or value of a command line: for completion in a shell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from varfast.settings import reference, schema
from varfast.settings.schema import Value


def keys(model: type[BaseModel], begun: str, data: Mapping[str, Any]) -> dict[str, str]:
    """Keys that begin with `begun`, one level at a time, each with its meaning: "rollout." and "run.steps=".

    data: what the config and the command line hold so far. It has the names that the user chose, and chooses among
        sections of several types.
    """
    *parents, last = begun.split(".")
    prefix = "".join(f"{parent}." for parent in parents)
    found = {f"{prefix}{name}": about for name, about in _below(model, parents, data).items() if name.startswith(last)}
    if len(found) == 1 and next(iter(found)).endswith(".") and next(iter(found)) != begun:
        # Shells put a space after the only completion, so a section alone is answered by what it holds.
        return keys(model, next(iter(found)), data) or found
    return found


def values(model: type[BaseModel], key: str, data: Mapping[str, Any]) -> tuple[list[str], bool]:
    """The words that a key takes, for types that list them, and whether it takes a path."""
    at = _at(model, key.split("."), data)
    words = [word for value in at for word in _words(value)]
    return list(dict.fromkeys(words)), any(_takes_path(value) for value in at)


def _words(value: Value) -> list[str]:
    told = [word for v in (value, *value.members()) for mark in schema.marks(v) for word in mark.words]
    switches = ["true", "false"] if any(member.annotation is bool for member in value.members()) else []
    return [*told, *schema.choices(value), *switches, *(["null"] if value.optional else [])]


def _takes_path(value: Value) -> bool:
    return any(mark.path for v in (value, *value.members()) for mark in schema.marks(v))


def _below(model: type[BaseModel], parents: list[str], data: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    node = _node(data, parents)
    for value in _at(model, parents, data):
        for member in value.members():
            if isinstance(member.annotation, type) and issubclass(member.annotation, BaseModel):
                for name, field in member.annotation.model_fields.items():
                    holds = bool(Value.of(field).sections()) or _is_named(Value.of(field))
                    found.setdefault(f"{name}{'.' if holds else '='}", reference.about(field))
            elif get_origin(member.annotation) is dict and isinstance(node, Mapping):
                found |= {f"{name}.": "" for name in node if "." not in str(name)}
    return found


def _is_named(value: Value) -> bool:
    """Whether it holds sections by names that the user chooses."""
    members = [member.annotation for member in value.members() if get_origin(member.annotation) is dict]
    return any(Value.of(get_args(annotation)[1]).sections() for annotation in members)


def _at(model: type[BaseModel], path: list[str], data: Mapping[str, Any]) -> list[Value]:
    """The types at a key; of sections of several types those that `data` chooses, or all if it does not say."""
    at = [Value(model)]
    for depth, part in enumerate(path):
        at = _chosen(at, _node(data, path[:depth]), path[:depth], part)
        at = [value for a in at for value in a.below(part)]
    return _chosen(at, _node(data, path), path, "")


def _chosen(at: list[Value], node: Any, path: list[str], part: str) -> list[Value]:
    sections = [section for value in at for section in value.sections()]
    if len(sections) < 2 or part in schema.TAG_KEYS:
        return at
    tag = next((node[key] for key in schema.TAG_KEYS if isinstance(node, Mapping) and key in node), None)
    if tag is None and path == ["policy"]:  # as the config itself has it
        tag = "var"
    chosen = [Value(section) for section in sections if isinstance(tag, str) and tag in schema.tags_of(section)]
    return chosen or at


def _node(data: Any, path: list[str]) -> Any:
    for part in path:
        data = data.get(part) if isinstance(data, Mapping) else None
    return data
