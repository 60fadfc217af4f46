"""The text of errors, one line a key: what came, what is wanted, what to write instead."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Sequence
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from varfast.printable import printable
from varfast.settings import schema
from varfast.settings.aliases import ALIASES

_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxlevel = 120, 120, 8, 6, 3


def explain(model: type[BaseModel], error: ValidationError, data: Any = None) -> list[str]:
    """One line for each key whose value cannot be used, even where several members of a union were tried.

    data: what was validated, by which names that the user chose are known.
    """
    problems: list[dict[str, Any]] = [dict(problem) for problem in error.errors(include_url=False)]
    inside = [problem["loc"][:-1] for problem in problems]
    lines = [_explain(model, p, data) for p in problems if not (p["type"] == "too_short" and p["loc"] in inside)]
    return list(dict.fromkeys(lines))


def _explain(model: type[BaseModel], problem: dict[str, Any], data: Any) -> str:
    location, kind = tuple(problem["loc"]), problem["type"]
    if kind == "invalid_key" or location[-1:] == ("[key]",):
        values, path = schema.find(model, location[: -2 if kind != "invalid_key" else -1])
        names = [name for value in values for name in schema.names(value)]
        wanted = f"{schema.listed(names)}{near(names, problem['input'])}" if names else "a name"
        return f"{'.'.join(map(name, path)) or 'config'}: got the key {show(problem['input'])}; want {wanted}"
    if kind == "extra_forbidden":
        _, path = schema.find(model, location[:-1])
        path.append(str(location[-1]))
        key = ".".join(map(name, path))
        if "." not in path[-1] and schema.exists(model, ".".join(path)):  # of another member of a union
            return f"{key}: unknown key beside {location[-2]}, which has other keys"
        return f"{key}: {unknown_key(model, path, location[:-1])}"
    values, path = schema.find(model, location)
    key = ".".join(map(name, path))
    if kind == "missing":
        return f"{key} is missing; want {_any_of(values)}"
    if kind in ("value_error", "assertion_error"):
        message = problem["msg"].removeprefix("Value error, ")
        return ": ".join([*([key] if key and not message.startswith(key) else []), message])
    given = problem["input"]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _explain_type(values, key, given, _siblings(data, path))
    wanted = _any_of(values)
    if wanted.startswith("text") and isinstance(given, bool | None):
        wanted = f"{wanted}: {schema.meaning(model, path)}"
    return f"{key or 'config'}: got {show(given)}; want {wanted}{_hint(values, given, key)}"


def _siblings(data: Any, path: list[str]) -> list[str]:
    """The names beside the last one of a path."""
    for part in path[:-1]:
        data = data.get(part) if isinstance(data, dict) else None
    return [str(name) for name in data if name != path[-1]] if isinstance(data, dict) else []


def _any_of(values: list[schema.Value]) -> str:
    return " or ".join(dict.fromkeys(map(schema.wanted, values))) or "another value"


def _hint(values: list[schema.Value], given: Any, key: str) -> str:
    """For a value of the wrong type: what the user probably meant."""
    members = [member for value in values for member in value.members()]
    kinds = {member.annotation for member in members}
    sections = [section for value in values for section in value.sections()]
    if sections and not isinstance(given, dict):
        return _section_hint(sections, given, key)
    if isinstance(given, str):
        text = given.lower()
        if text in ("none", "auto", "default") and any(value.optional for value in values):
            return "; write null, or leave it out"
        if bool in kinds and text in ("yes", "no", "on", "off", "true", "false"):
            return f"; write {str(text in ('yes', 'on', 'true')).lower()}, without quotes"
        if kinds & {int, float} and re.fullmatch(r"[-+]?[\d_]+(\.[\d_]*)?([eE][-+]?\d+)?", given):
            return f"; write {given.replace('_', '')}, without quotes"
        if kinds & {int, float} and len(given.split(",")) > 1 and "." in key:
            return f"; for a run with each of several values: varfast train CONFIG --sweep {key}={printable(given)}"
    elif bool in kinds and given in (0, 1):
        return f"; write {str(bool(given)).lower()}"
    elif int in kinds and isinstance(given, float) and given.is_integer() and abs(given) < 2**53:
        return f"; write {int(given)}"
    elif isinstance(given, int | float) and not isinstance(given, bool) and schema.is_device(values):
        return f"; did you mean cuda:{given}?"
    elif str in kinds and isinstance(given, int | float) and not isinstance(given, bool):
        return f"; quotes make it text: '{key}=\"{given}\"'"
    lists = [m for m in members if get_origin(m.annotation) in (list, tuple)]
    if lists and isinstance(given, str | int | float) and not isinstance(given, bool):
        return f"; in brackets, as {key}=[{printable(given)}]"
    return near([choice for value in values for choice in schema.choices(value)], given)


def _section_hint(sections: list[type[BaseModel]], given: Any, key: str) -> str:
    """For a value where a section must be: the key in it that takes the value, or which keys there are."""
    fields = [(name, field) for section in sections for name, field in section.model_fields.items()]
    taking = [
        name for name, field in fields if isinstance(given, str) and given in schema.choices(schema.Value.of(field))
    ]
    if taking:
        return f"; did you mean {key}.{taking[0]}={given}?"
    if len(sections) > 1:
        return ""
    needed = any(field.is_required() for field in sections[0].model_fields.values())
    known = [name for name, _ in fields[:12]] + ["..."] * (len(fields) > 12)
    return f"{'' if needed else '; {} has its defaults'}; its keys: {', '.join(known)}"


def _explain_type(values: list[schema.Value], key: str, given: Any, others: list[str]) -> str:
    """The error for a section whose `type`, or `family`, is unknown or missing. others: names of those beside it."""
    sections = [section for value in values for section in value.sections()]
    tag = next(tag for tag in schema.TAG_KEYS if tag in sections[0].model_fields)
    known = [name for section in sections for name in schema.tags_of(section)]
    wanted = f"want {schema.listed(known)}"
    if "function" in known:
        wanted += "; function or http takes any other model"
    if not isinstance(given, dict) or tag not in given:
        parent, _, last = key.rpartition(".")
        meant = difflib.get_close_matches(last, others, n=1, cutoff=0.7)
        return f"{key}.{tag} is missing; {wanted}" + (f"; did you mean {parent}.{meant[0]}?" if meant else "")
    return f"{key}.{tag}: got {show(given[tag])}; {wanted}{near(known, given[tag])}"


def near(known: list[str], given: Any) -> str:
    """The word that was probably meant, as "; did you mean png?", or an empty text."""
    if not isinstance(given, str):
        return ""
    begun = [word for word in known if len(given) > 2 and word.startswith(given.lower())]
    found = begun or difflib.get_close_matches(given.lower(), known, n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def unknown_key(model: type[BaseModel], path: list[str], location: Sequence[str | int] | None = None) -> str:
    """What to say about an unknown key.

    The first that applies: our name for another trainer's key, keys of the section that have it as a part, the same
    key in another section, the nearest key, or the list of all keys of the section.

    Args:
        path: of the key, as the user wrote it.
        location: of its section in pydantic's error, which says which member of a union was chosen.
    """
    *parents, last = path
    noted = ALIASES.get(last.lower().replace("-", "_"), ())
    found = {key: note for key, note in noted if key and schema.exists(model, key)}
    if found:
        note = "; ".join(f"{key}: {text}" if len(found) > 1 else text for key, text in found.items() if text)
        return f"unknown key; did you mean {schema.listed(list(found))}?{f' ({note})' if note else ''}"
    if "." in last and schema.exists(model, ".".join(path)):
        section, _, rest = last.partition(".")
        return f"unknown key; in a file write {section}: {{{rest}: ...}}"
    at, _ = schema.find(model, parents if location is None else location)
    fields = [
        (key, field) for value in at for section in value.sections() for key, field in section.model_fields.items()
    ]
    known = list(dict.fromkeys(key for key, _ in fields))
    notes = [note for key, note in noted if not key]
    meant = _meant(model, at, last, known, ".".join(map(name, parents)), bool(notes))
    if meant:
        return f"unknown key; did you mean {schema.listed(meant)}?"
    return f"unknown key; {notes[0] if notes else 'known: ' + ', '.join(known)}"


def _meant(
    model: type[BaseModel], at: list[schema.Value], last: str, known: list[str], parent: str, has_note: bool
) -> list[str]:
    """The keys that were probably meant. has_note: a note on the unknown key is better than what is far from it."""
    dot = f"{parent}." if parent else ""
    if parts := [key for key in known if f"_{last}_" in f"_{key}_"]:
        return [f"{dot}{key}" for key in parts[:4]]
    if close := difflib.get_close_matches(last, known, n=1, cutoff=0.7):
        return [f"{dot}{close[0]}"]
    below = [
        f"{dot}{key}"
        for value in at
        for section in value.sections()
        if parent
        for key, _ in schema.leaves(section)
        if key.split(".")[-1] == last
    ]
    everywhere = [key for key, _ in schema.leaves(model)]
    if same := list(dict.fromkeys(below)) or [key for key in everywhere if key.split(".")[-1] == last]:
        return same[:3]
    if has_note:
        return []
    if close := difflib.get_close_matches(last, known, n=1, cutoff=0.62):
        return [f"{dot}{close[0]}"]
    by_name = {key.split(".")[-1]: key for key in reversed(everywhere)}
    return [by_name[word] for word in difflib.get_close_matches(last, by_name, n=1, cutoff=0.8)]


def show(value: Any) -> str:
    """A value as YAML writes it, on one short line, with control characters escaped."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        return _SHORT.repr(value)
    except ValueError:  # an int of more than 4300 digits
        return "a number that is too long to show"


def name(key: str) -> str:
    """A key; quoted and escaped if it holds control characters, cut off if it is long."""
    text = key if key.isprintable() and key else repr(key)
    return text if len(text) <= 60 else f"{text[:60]}..."
