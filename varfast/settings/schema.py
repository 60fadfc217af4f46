"""Which keys a section has, and in words which values each of them takes."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Wanted:
    """A mark in a field's Annotated: in words what the field takes, for types that do not say it themselves.

    Attributes:
        elsewhere: --help and docs/config.md list the keys below this one with another section.
        words: those among the values that a shell may complete.
        path: it takes files or folders of this machine.
    """

    text: str
    elsewhere: bool = False
    words: tuple[str, ...] = ()
    path: bool = False


@dataclass(frozen=True)
class Value:
    """The type of a value: an annotation, and the bounds that Field(ge=...) and the like put on it."""

    annotation: Any
    metadata: tuple[Any, ...] = ()

    @classmethod
    def of(cls, field: FieldInfo | Any) -> Value:
        """Of a field, or of an annotation that may be Annotated."""
        if isinstance(field, FieldInfo):
            return cls.of_annotation(field.annotation, tuple(field.metadata))
        return cls.of_annotation(field, ())

    @classmethod
    def of_annotation(cls, annotation: Any, metadata: tuple[Any, ...]) -> Value:
        if get_origin(annotation) is not Annotated:
            return cls(annotation, metadata)
        inner, *marks = get_args(annotation)
        for mark in marks:
            metadata += tuple(mark.metadata) if isinstance(mark, FieldInfo) else (mark,)
        return cls.of_annotation(inner, metadata)

    @property
    def optional(self) -> bool:
        return type(None) in get_args(self.annotation)

    def members(self) -> list[Value]:
        """The types of a union, without None; for any other type, itself."""
        if get_origin(self.annotation) in (Union, types.UnionType):
            found = [a for a in get_args(self.annotation) if a is not type(None)]
            return [member for a in found for member in Value.of_annotation(a, self.metadata).members()]
        return [self]

    def sections(self) -> list[type[BaseModel]]:
        """The sections among the members."""
        return [m.annotation for m in self.members() if _is_section(m.annotation)]

    def below(self, part: str | int) -> list[Value]:
        """The types of the value under a key or an index; an empty list if there is no such key."""
        found = []
        for member in self.members():
            origin, inside = get_origin(member.annotation), get_args(member.annotation)
            if _is_section(member.annotation):
                field = member.annotation.model_fields.get(str(part))
                found += [Value.of(field)] if field is not None else []
            elif origin is dict:
                found.append(Value.of(inside[1]))
            elif origin in (list, tuple) and isinstance(part, int):
                found.append(Value.of(inside[min(part, len(inside) - 1)] if inside[-1] is not ... else inside[0]))
        return found

    def tagged(self, tag: str) -> list[Value]:
        """The members of a union of sections that this tag chooses."""
        return [Value(s) for s in self.sections() if tag in tags_of(s)]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


# Keys by whose value a section is chosen among several: of a reward, of a model.
TAG_KEYS = ("type", "family")


def tags_of(section: type[BaseModel]) -> tuple[str, ...]:
    """The values by which a section is chosen among several; none if it stands alone."""
    return next((get_args(section.model_fields[key].annotation) for key in TAG_KEYS if key in section.model_fields), ())


def tag(section: type[BaseModel]) -> str:
    """How a section is chosen among several, as type: brightness."""
    key = next(key for key in TAG_KEYS if key in section.model_fields)
    return f"{key}: {''.join(tags_of(section))}"


def find(model: type[BaseModel], location: Sequence[str | int]) -> tuple[list[Value], list[str]]:
    """The types at a location in a pydantic error, and that location as the user wrote it.

    pydantic adds the chosen member of a union, as "brightness" in ("reward", "bright", "brightness", "mode"). Such
    parts, which are not keys of the schema, are left out.
    """
    at, shown = [Value(model)], []
    for part in location:
        tagged = [value for a in at if len(a.sections()) > 1 for value in a.tagged(str(part))]
        below = [value for a in at for value in a.below(part)]
        if tagged:
            at = tagged
        elif below:
            at = below
            shown.append(str(part))
    return at, shown


def exists(model: type[BaseModel], key: str) -> bool:
    """Whether `a.b.c` is a key of the schema; below a name that the user chooses, a key of any member of the union."""
    at = [Value(model)]
    for part in key.split("."):
        at = [value for a in at for value in a.below(part)]
    return bool(at)


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Value]]:
    """Every key by its dotted name, sections included, but not the keys below names that the user chooses."""
    for name, field in model.model_fields.items():
        value = Value.of(field)
        yield f"{prefix}{name}", value
        for section in value.sections():
            yield from leaves(section, f"{prefix}{name}.")


def meaning(model: type[BaseModel], path: Sequence[str]) -> str:
    """What a key means, as its field says it; an empty text below names that the user chooses."""
    at, _ = find(model, path[:-1])
    fields = [section.model_fields.get(path[-1]) for value in at for section in value.sections()] if path else []
    return next((field.description for field in fields if field is not None and field.description), "")


def names(value: Value) -> list[str]:
    """The names of sections that are taken, where a field lists them."""
    keys = [get_args(m.annotation)[0] for m in value.members() if get_origin(m.annotation) is dict]
    return [str(name) for key in keys if get_origin(key) is Literal for name in get_args(key)]


def is_device(values: Sequence[Value]) -> bool:
    """Whether a GPU may be named."""
    return any("cuda" in mark.words for value in values for mark in marks(value))


def wanted(value: Value) -> str:
    """In words which values are taken, as "a number above 0, or null"."""
    texts = dict.fromkeys(_told(value) or _told(member) or _wanted(member) for member in value.members())
    return ", or ".join([*texts, *(["null"] if value.optional else [])])


def marks(value: Value) -> list[Wanted]:
    """What a field's Annotated tells of its values."""
    return [mark for mark in value.metadata if isinstance(mark, Wanted)]


def _told(value: Value) -> str:
    return "".join(mark.text for mark in marks(value))


def choices(value: Value) -> list[str]:
    """The words that are taken, for a type that lists them."""
    return [str(c) for m in value.members() if get_origin(m.annotation) is Literal for c in get_args(m.annotation)]


def _wanted(value: Value) -> str:
    annotation, inside = value.annotation, get_args(value.annotation)
    if get_origin(annotation) is Literal:
        return listed([str(choice) for choice in inside])
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        return _number(annotation, value.metadata)
    if annotation is str:
        return "text"
    if get_origin(annotation) in (tuple, list):
        if get_origin(annotation) is tuple and inside[-1] is not ...:
            return f"a list of {len(inside)}, each {wanted(Value.of(inside[0]))}"
        return f"a list, each {wanted(Value.of(inside[0]))}"
    if _is_section(annotation):
        if "family" in annotation.model_fields:
            return "a section"
        tagged = "type" in annotation.model_fields
        return "a section with a type, such as {type: brightness}" if tagged else "a section"
    return "sections by names of your choice" if get_origin(annotation) is dict else "any value"


def listed(words: Sequence[str], last: str = "or") -> str:
    """a, b or c"""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _number(kind: type, metadata: tuple[Any, ...]) -> str:
    noun, low, high = "a whole number" if kind is int else "a number", "", ""
    for mark in metadata:  # of the package annotated_types, which pydantic brings
        bounds = {name: getattr(mark, name) for name in ("multiple_of", "ge", "gt", "le", "lt") if hasattr(mark, name)}
        for name, bound in bounds.items():
            if name == "multiple_of":
                noun = f"a multiple of {bound}"
            elif name in ("ge", "gt"):
                low = f"{'from' if name == 'ge' else 'above'} {_digits(bound)}"
            else:
                high = f"{'to' if name == 'le' else 'to below'} {_digits(bound)}"
    if low and not high:
        return f"{noun} {low}{' on' if low.startswith('from') else ''}"
    if high.startswith("to ") and not low:
        high = high.replace("to below", "below") if "below" in high else high.replace("to", "up to", 1)
    return " ".join(filter(None, [noun, low, high]))


def _digits(number: Any) -> str:
    if isinstance(number, float) and abs(number) >= 10**6:
        return _digits(int(number))
    if number < 0:
        return f"-{_digits(-number)}"
    if isinstance(number, int) and number >= 2**20 and number & (number - 1) == 0:
        return f"2**{number.bit_length() - 1}"
    if isinstance(number, int) and number >= 10**6 and str(number).strip("0") == "1":
        return f"10**{len(str(number)) - 1}"
    return str(number) if isinstance(number, int) else f"{number:g}"
