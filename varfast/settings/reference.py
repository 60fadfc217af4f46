"""Lists every key of a schema with its type, default and meaning, for `--help` and docs/config.md."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from varfast.settings import schema
from varfast.settings.problems import show


@dataclass
class _Row:
    key: str
    wanted: str
    default: str
    meaning: str


@dataclass
class _Section:
    title: str
    about: str
    rows: list[_Row] = field(default_factory=list)


def _sections(model: type[BaseModel], prefix: str = "", about: str = "") -> Iterator[_Section]:
    """A section's own keys, then those of the sections inside it; below names that the user chooses, one per `type`."""
    own = _Section(prefix.removesuffix("."), about or _first_paragraph(model))
    deeper: list[_Section] = []
    for key, info in model.model_fields.items():
        value = schema.Value.of(info)
        if not (prefix == "" and value.sections() and not info.description):
            own.rows.append(_Row(f"{prefix}{key}", schema.wanted(value), _default(info), info.description or ""))
        alone = len(value.sections()) == 1
        for section in value.sections():
            for found in _sections(section, f"{prefix}{key}."):
                title = found.title if alone else f"{found.title}, {schema.tag(section)}"
                deeper.append(_Section(title, found.about, found.rows))
        for member in value.members():
            elsewhere = any(mark.elsewhere for mark in schema.marks(value))
            if get_origin(member.annotation) is dict and not elsewhere:
                chosen = schema.Value.of(get_args(member.annotation)[1])
                for section in chosen.sections():
                    deeper += [
                        _Section(f"{prefix}{key}.NAME, {schema.tag(section)}", found.about, found.rows)
                        for found in _sections(section, f"{prefix}{key}.NAME.")
                    ]
    yield own
    yield from deeper


def _first_paragraph(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def about(info: FieldInfo) -> str:
    """A key's default and meaning, in a line of at most 90 characters."""
    return textwrap.shorten("; ".join(filter(None, [_default(info), info.description])), 90, placeholder=" ...")


def _default(info: Any) -> str:
    """The default in words; empty where the meaning says it already."""
    if info.is_required():
        return "required"
    default = info.get_default(call_default_factory=True)
    if default is PydanticUndefined or isinstance(default, BaseModel):
        return ""
    if default is None:
        return "" if "efault:" in (info.description or "") else "default null"
    if isinstance(default, tuple):
        return f"default {list(default)}"
    return f"default {default if isinstance(default, str) and default else show(default)}"


def terminal(model: type[BaseModel], only: Sequence[str] = (), width: int = 100) -> str:
    """Lines of at most `width` characters, section by section; `only`: the sections of these names and below."""
    lines: list[str] = []
    for section in _sections(model):
        name = section.title.partition(",")[0].removesuffix(".NAME")
        if not section.rows or (only and not any(f"{name}.".startswith(f"{o}.") for o in only)):
            continue
        if section.title:
            lines += ["", *textwrap.wrap(f"{section.title}: {section.about}", width)]
        for row in section.rows:
            head = f"{row.key}  {'; '.join(filter(None, [row.wanted, row.default]))}"
            lines += textwrap.wrap(head, width, initial_indent="  ", subsequent_indent=" " * 6)
            lines += textwrap.wrap(row.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines).strip("\n")


def markdown(model: type[BaseModel]) -> str:
    """One table for each section."""
    lines: list[str] = []
    for section in _sections(model):
        if section.rows:
            lines += [f"## {section.title or 'Sections'}", "", section.about, ""]
            lines += ["| key | wants | default | meaning |", "| --- | --- | --- | --- |"]
            for row in section.rows:
                cells = [f"`{row.key}`", row.wanted, row.default.removeprefix("default "), row.meaning]
                cells = [re.sub(r"([|*<])", r"\\\1", cell) for cell in cells]
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)
