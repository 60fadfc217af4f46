"""How the API reference reads the source."""

from __future__ import annotations

import re
from typing import Any

from griffe import Alias, Extension, GriffeLoader, Module, Object

_SECTION = re.compile(r"^(?P<name>Args|Attributes|Returns|Raises|Source|Sources|Axes|Yields): (?P<text>\S.*)$")


class Source(Extension):
    """Reads this project's docstrings: a section may stand on one line, as `Returns: (B, L) float32.`"""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **kwargs: Any) -> None:
        """`varfast.kernels.rms_norm` is the function, not the module of the same name, as after an import."""
        kernels = pkg.members["kernels"]
        for name, module in list(kernels.members.items()):
            if isinstance(module, Module) and name in (kernels.exports or ()):
                kernels.members[name] = Alias(name, module.members[name], parent=kernels)

    def on_object(self, *, obj: Object, loader: GriffeLoader, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """Sections that begin on the line of their name as a paragraph each, with the lines that go on below, indented."""
    lines: list[str] = []
    inside = False
    for line in docstring.splitlines():
        found = _SECTION.match(line)
        if found:
            lines += ["", f"**{found['name']}:** {found['text']}"]
        elif inside and line.startswith("    "):
            lines[-1] += f" {line.strip()}"
            continue
        else:
            if inside and line:
                lines.append("")
            lines.append(re.sub(r"(?<=\w)::$", ":", line))
        inside = found is not None
    return "\n".join(lines)
