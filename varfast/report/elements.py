"""Pieces of HTML, and values as text of a bounded length. Whatever comes from a run folder passes through `text`."""

from __future__ import annotations

import html
import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# Letters of a cell of a table, or of a name. A list of 1000 labels stands whole under "config.yaml, resolved".
LONGEST = 300
_DEEPEST = 6


def printable(value: object) -> str:
    """Text in which control characters and halves of surrogate pairs are question marks: for a page or a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" else "?" for c in str(value))


def text(value: object) -> str:
    """Escaped for HTML."""
    return html.escape(printable(value), quote=True)


def brief(value: Any, most: int = LONGEST) -> str:
    """A value as people write it, cut off after so many letters; a float has four digits, None is empty.

    Never more of it is looked at than is shown: a file of 700 bytes can describe lists of 10^9 numbers.
    """
    if value is None:
        return ""
    shown = ""
    for piece in _pieces(value, _DEEPEST, most):
        shown += piece
        if len(shown) > most:
            return shown[:most] + " ..."
    return shown


def _pieces(value: Any, depth: int, most: int) -> Iterator[str]:
    if isinstance(value, float):
        yield f"{value:.4g}"
    elif isinstance(value, str):
        yield value[: most + 1]
    elif isinstance(value, int) and abs(value) >= 10**most:  # str() refuses more than 4300 digits
        yield "an integer of too many digits"
    elif not isinstance(value, dict | list | tuple):
        yield str(value)
    elif depth == 0:
        yield "..."
    elif isinstance(value, dict):
        for before, (key, child) in zip(itertools.chain(["{"], itertools.repeat(", ")), value.items(), strict=False):
            yield f"{before}{brief(key, most) if not isinstance(key, tuple) else '(...)'}: "
            yield from _pieces(child, depth - 1, most)
        yield "}" if value else "{}"
    else:
        for before, child in zip(itertools.chain(["["], itertools.repeat(", ")), value, strict=False):
            yield before
            yield from _pieces(child, depth - 1, most)
        yield "]" if value else "[]"


def table(columns: Iterable[str], rows: Iterable[tuple[str, Sequence[Any]]]) -> str:
    """A row's name, and its values under the columns, as `brief` writes them. A Markup stays as it is."""
    head = "".join(f"<th>{text(brief(name))}</th>" for name in columns)
    body = "".join(
        f'<tr><th scope="row">{text(brief(name))}</th>{"".join(f"<td>{_cell(value)}</td>" for value in values)}</tr>'
        for name, values in rows
    )
    return f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


class Markup(str):
    """HTML that is ours, its parts escaped."""

    __slots__ = ()


def _cell(value: Any) -> str:
    return value if isinstance(value, Markup) else text(brief(value))
