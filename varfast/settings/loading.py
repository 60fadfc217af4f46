"""From a config file or a command line to a validated section, or to one InputError that names every problem."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ValidationError

from varfast.settings.arguments import sort as arguments_of
from varfast.settings.paths import expanded
from varfast.settings.problems import explain
from varfast.settings.reading import apply_override, plain, read_config, set_key
from varfast.types import InputError

_Model = TypeVar("_Model", bound=BaseModel)


def load_as(
    model: type[_Model], path: str | Path, overrides: list[str], values: Mapping[str, Any] = MappingProxyType({})
) -> _Model:
    """Read a YAML file and apply overrides.

    Args:
        model: what the file must be valid as.
        path: the YAML file. Its key `base` may name another, from the same folder, whose sections it changes; `reward`
            replaces the base's as a whole.
        overrides: "a.b=c" each; c is read as YAML, so `true`, `3`, `[1, 2]` and `null` mean what they mean there.
        values: by dotted key, as they are; after the overrides.
    Raises: InputError if the file is missing or not valid YAML, for unknown keys (with the nearest known one), wrong
        types and values out of range, all of them in one message.
    """
    data = read_config(expanded(str(path)))
    for override in overrides:
        apply_override(data, override)
    for key, value in values.items():
        set_key(data, key, value, str(path))
    return validate(model, data, str(path))


def parse_arguments(arguments: list[str], model: type[_Model]) -> _Model:
    """A command's arguments, `a.b=c` or `--a.b c` each; a word alone is the first that it needs. Raises: InputError."""
    found, data = arguments_of(arguments, model), dict[str, Any]()
    for override in found.overrides:
        apply_override(data, override)
    key = first_needed(model)
    if get_origin(model.model_fields[key].annotation) is list:
        if found.paths:
            data[key] = found.paths
    elif len(found.paths) > 1:
        other = found.paths[1]
        meant = f"; did you mean out={other}?" if "out" in model.model_fields and not expanded(other).exists() else ""
        raise InputError(f"arguments {found.paths[0]!r} and {other!r}: want one {key}; the others as key=value{meant}")
    elif found.paths:
        if key in data:
            raise InputError(f"argument {found.paths[0]!r} and {key}={data[key]}: want one of the two")
        data[key] = found.paths[0]
    return validate(model, data, "arguments")


def first_needed(model: type[BaseModel]) -> str:
    """The key that a word alone on the command line stands for."""
    return next(key for key, field in model.model_fields.items() if field.is_required())


def validate(model: type[_Model], data: Any, source: str) -> _Model:
    """Nested dictionaries as a section; `source` names them in errors. Raises: InputError, as load_as."""
    data = plain(data, source)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InputError("\n  ".join([f"{source} cannot be used:", *explain(model, error, data)])) from error
