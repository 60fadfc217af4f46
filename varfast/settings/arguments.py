"""Sorts a command line into paths, overrides a.b=c, and flags."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from varfast.settings import problems, schema
from varfast.types import InputError

KEY = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")
# What may follow a switch as its value; of these, only the first two are taken, and the others refused by name.
_SWITCHED = ("true", "false", "True", "False", "yes", "no", "on", "off", "0", "1")
_HYDRA = re.compile(r"(?:\+\+?|~)[A-Za-z_][\w.]*(?:=.*)?", re.DOTALL)


@dataclass
class Arguments:
    """A command line, sorted.

    Attributes:
        paths: the arguments that are not key=value.
        overrides: "a.b=c" each.
        flags: those of the command's flags that were given.
        options: options that take a value, with it, as ("--sweep", "a.b=c,d").
    """

    paths: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    options: list[tuple[str, str]] = field(default_factory=list)


def sort(
    arguments: Sequence[str], model: type[BaseModel], flags: Sequence[str] = (), options: Sequence[str] = ()
) -> Arguments:
    """Sort a command line. `--a.b=c` and `--a.b c` are a.b=c; a switch alone, as --overwrite, is overwrite=true.

    Raises: InputError for an unknown option, and for an argument that looks like key=value but is not valid as one.
    """
    found, words = Arguments(), list(arguments)
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if word in flags:
            found.flags.add(word)
        elif option in options:
            found.options.append((option, value if equals else words.pop(0) if words else ""))
        elif option == "--config" and not schema.exists(model, "config"):
            found.paths.append(value if equals else words.pop(0) if words else "")
        elif word.startswith("--"):
            found.overrides.append(_dashed(word, words, model, [*flags, *options, "--help", "--version"]))
        elif word.startswith("-") and not _exists(word):
            _refuse_option(word, [*flags, *options, "--help", "--version"])
        elif _HYDRA.fullmatch(word) and not _exists(word):
            plain = word.lstrip("+~").partition("=")[0]
            raise InputError(f"argument {word!r}: want {plain}=value; every key has a value already, so none is added")
        elif is_path(word, model):
            _refuse_half(word, words, model)
            found.paths.append(word)
        else:
            found.overrides.append(word)
    return found


def is_path(word: str, model: type[BaseModel]) -> bool:
    """Whether an argument is a path rather than key=value. Both can hold "=": sweeps name their folders key=value."""
    key, equals, _ = word.partition("=")
    if not equals or not KEY.fullmatch(key):
        return bool(word.strip("=")) and bool(key)
    if word.endswith((".yaml", ".yml")) and os.path.isfile(word):
        return True
    return not schema.exists(model, key.split(".")[0]) and _exists(word)


def _exists(word: str) -> bool:
    """As Path.exists, which however raises for names that are too long and for unknown users."""
    return os.path.exists(os.path.expanduser(word))


def _refuse_half(word: str, words: list[str], model: type[BaseModel]) -> None:
    """Refuse a key without "=", with spaces around the "=", or with a part missing, which is a path otherwise."""
    key, equals, _ = word.partition("=")
    if equals and re.fullmatch(r"[\w.]+", key) and not _exists(word):
        raise InputError(f"argument {word!r}: {key!r} is no key; want key=value, as in update.lr=3e-5")
    key = word.partition(":")[0].rstrip(".")
    if KEY.fullmatch(key) and schema.exists(model, key) and not _exists(word):
        values, _ = schema.find(model, key.split("."))
        inside = [name for v in values for section in v.sections() for name in section.model_fields]
        key = f"{key}.{inside[0]}" if inside else key
        value = word.partition(":")[2] or "".join(w for w in words[:2] if w != "=")[:40] or "value"
        raise InputError(
            f"argument {word!r}: want key=value, without spaces, as in {key}={problems.name(value.removeprefix('='))}"
        )


def _dashed(word: str, words: list[str], model: type[BaseModel], options: list[str]) -> str:
    """`--a.b=c`, `--a.b c` or `--switch` as an override."""
    key, equals, value = word[2:].partition("=")
    key = key.replace("-", "_")
    if not KEY.fullmatch(key):
        _refuse_option(word, options)
    if equals:
        return f"{key}={value}"
    if not schema.exists(model, key):
        near = difflib.get_close_matches(word, options, n=1, cutoff=0.75)
        hint = f"did you mean {near[0]}?" if near else problems.unknown_key(model, key.split("."))
        raise InputError(f"argument {word!r}: {hint.replace('unknown key', 'unknown option')}")
    follows = words[0] if words else "--"
    values, _ = schema.find(model, key.split("."))
    if any(member.annotation is bool for v in values for member in v.members()) and follows not in _SWITCHED:
        return f"{key}=true"
    if follows.startswith("--"):
        raise InputError(f"argument {word!r} has no value; want {key}=value")
    return f"{key}={words.pop(0)}"


def _refuse_option(word: str, options: list[str]) -> None:
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(options)}, and key=value"
    raise InputError(f"argument {word!r}: unknown option; {hint}")


def split_values(text: str) -> list[str]:
    """Split the values of a sweep at commas, except at those inside of brackets or quotes."""
    found, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not found[-1]:
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0 and not quote:
            found.append("")
        else:
            found[-1] += letter
    return found


def file_names(texts: Sequence[str]) -> list[str]:
    """A folder name for each of these texts: without "/", not hidden, at most 200 bytes long, all different."""
    names: list[str] = []
    for text in texts:
        name = re.sub(r"[/\0\n\\]+", "_", text).lstrip(".~ ") or "_"
        while len(name.encode()) > 200:
            name = name[:-1]
        number = 2
        unique = name
        while unique in names:
            unique = f"{name}_{number}"
            number += 1
        names.append(unique)
    return names
