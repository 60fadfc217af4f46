"""The text of errors, one line a key: what came, what is wanted, what to write instead."""

from __future__ import annotations

import difflib
import re
import reprlib
from typing import Any

from pydantic import BaseModel, ValidationError

from varfast.settings import schema
from varfast.settings.aliases import ALIASES

_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxlevel = 120, 120, 8, 6, 3


def explain(model: type[BaseModel], error: ValidationError) -> list[str]:
    """One line for each key whose value cannot be used, even where several members of a union were tried."""
    problems: list[dict[str, Any]] = [dict(problem) for problem in error.errors(include_url=False)]
    inside = [problem["loc"][:-1] for problem in problems]
    lines = [_explain(model, p) for p in problems if not (p["type"] == "too_short" and p["loc"] in inside)]
    return list(dict.fromkeys(lines))


def _explain(model: type[BaseModel], problem: dict[str, Any]) -> str:
    location, kind = tuple(problem["loc"]), problem["type"]
    if kind == "invalid_key" or location[-1:] == ("[key]",):
        _, path = schema.find(model, location[: -2 if kind != "invalid_key" else -1])
        return f"{'.'.join(map(name, path)) or 'config'}: got the key {show(problem['input'])}; want a name"
    if kind == "extra_forbidden":
        _, path = schema.find(model, location[:-1])
        path.append(str(location[-1]))
        key = ".".join(map(name, path))
        if "." not in path[-1] and schema.exists(model, ".".join(path)):  # of another member of a union
            return f"{key}: unknown key beside {location[-2]}, which has other keys"
        return f"{key}: {unknown_key(model, path)}"
    values, path = schema.find(model, location)
    key = ".".join(map(name, path))
    if kind == "missing":
        return f"{key} is missing; want {_any_of(values)}"
    if kind in ("value_error", "assertion_error"):
        message = problem["msg"].removeprefix("Value error, ")
        return ": ".join([*([key] if key and not message.startswith(key) else []), message])
    given = problem["input"]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _explain_type(values, key, given)
    return f"{key or 'config'}: got {show(given)}; want {_any_of(values)}{_hint(values, given)}"


def _any_of(values: list[schema.Value]) -> str:
    return " or ".join(dict.fromkeys(map(schema.wanted, values))) or "another value"


def _hint(values: list[schema.Value], given: Any) -> str:
    """For a value of the wrong type: what the user probably meant."""
    kinds = {member.annotation for value in values for member in value.members()}
    if isinstance(given, str):
        if bool in kinds and given.lower() in ("yes", "no", "on", "off", "true", "false"):
            return f"; write {str(given.lower() in ('yes', 'on', 'true')).lower()}, without quotes"
        if kinds & {int, float} and re.fullmatch(r"[-+]?[\d_]+(\.[\d_]*)?([eE][-+]?\d+)?", given):
            return f"; write {given.replace('_', '')}, without quotes"
    elif int in kinds and isinstance(given, float) and given.is_integer() and abs(given) < 2**53:
        return f"; write {int(given)}"
    elif str in kinds and isinstance(given, int | float):
        return "; in quotes it is text"
    return _near([choice for value in values for choice in schema.choices(value)], given)


def _explain_type(values: list[schema.Value], key: str, given: Any) -> str:
    """The error for a section whose `type`, or `family`, is unknown or missing."""
    sections = [section for value in values for section in value.sections()]
    tag = next(tag for tag in schema.TAG_KEYS if tag in sections[0].model_fields)
    known = [name for section in sections for name in schema.tags_of(section)]
    wanted = f"want {schema.listed(known)}"
    if "function" in known:
        wanted += "; function or http takes any other model"
    if not isinstance(given, dict) or tag not in given:
        return f"{key}.{tag} is missing; {wanted}"
    return f"{key}.{tag}: got {show(given[tag])}; {wanted}{_near(known, given[tag])}"


def _near(known: list[str], given: Any) -> str:
    if not isinstance(given, str):
        return ""
    begun = [word for word in known if len(given) > 2 and word.startswith(given.lower())]
    found = begun or difflib.get_close_matches(given.lower(), known, n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def unknown_key(model: type[BaseModel], path: list[str]) -> str:
    """What to say about an unknown key.

    The first that applies: our name for another trainer's key, the same key in another section, the nearest key, or
    the list of all keys of the section.
    """
    *parents, last = path
    meanings = [(key, note) for key, note in ALIASES.get(last.lower().replace("-", "_"), ()) if key]
    meanings = [(key, note) for key, note in meanings if schema.exists(model, key)]
    if meanings:
        found = dict(meanings)
        note = "; ".join(f"{key}: {text}" if len(found) > 1 else text for key, text in found.items() if text)
        return f"unknown key; did you mean {schema.listed(list(found))}?{f' ({note})' if note else ''}"
    if "." in last and schema.exists(model, ".".join(path)):
        section, _, rest = last.partition(".")
        return f"unknown key; in a file write {section}: {{{rest}: ...}}"
    at, _ = schema.find(model, parents)
    known = [field for value in at for section in value.sections() for field in section.model_fields]
    near = difflib.get_close_matches(last, known, n=1, cutoff=0.7)
    if near:
        return f"unknown key; did you mean {'.'.join([*map(name, parents), near[0]])}?"
    everywhere = [key for key, _ in schema.leaves(model)]
    same = [key for key in everywhere if key.split(".")[-1] == last]
    notes = [note for key, note in ALIASES.get(last.lower(), ()) if not key]
    if same:
        return f"unknown key; did you mean {schema.listed(same[:3])}?"
    if notes:
        return f"unknown key; {notes[0]}"
    near = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
    if near:
        return f"unknown key; did you mean {'.'.join([*map(name, parents), near[0]])}?"
    by_name = {key.split(".")[-1]: key for key in reversed(everywhere)}
    near = difflib.get_close_matches(last, by_name, n=1, cutoff=0.8)
    return f"unknown key; did you mean {by_name[near[0]]}?" if near else f"unknown key; known: {', '.join(known)}"


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
