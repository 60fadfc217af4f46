"""Pieces of HTML, and values as text of a bounded length. Everything from a run folder passes through `text`."""

from __future__ import annotations

import html
import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# Letters of a cell of a table, or of a name. (A list of 1000 labels is shown whole under "config.yaml, resolved".)
LONGEST = 300
_DEEPEST = 6


def masked(value: object) -> str:
    """Text for a page or a terminal, with "?" in place of control characters and halves of surrogate pairs."""
    return "".join(c if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" else "?" for c in str(value))


def text(value: object) -> str:
    """Escaped for HTML."""
    return html.escape(masked(value), quote=True)


def brief(value: Any, most: int = LONGEST) -> str:
    """A value as people write it, cut after `most` letters: a float with four digits, None as an empty text.

    No more of it is visited than is shown: YAML of 700 bytes can describe lists of 10^9 numbers.
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


def html_table(columns: Iterable[str], rows: Iterable[tuple[str, Sequence[Any]]]) -> str:
    """An HTML table. Names and values are written by `brief`, except Markup, which is used as it is.

    Args:
        columns: headings, without that of the column of names.
        rows: name and values of each row.
    """
    head = "".join(f"<th>{text(brief(name))}</th>" for name in columns)
    body = "".join(
        f'<tr><th scope="row">{text(brief(name))}</th>{"".join(f"<td>{_cell(value)}</td>" for value in values)}</tr>'
        for name, values in rows
    )
    return f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


class Markup(str):
    """HTML that this package wrote, whose parts are escaped already."""

    __slots__ = ()


def _cell(value: Any) -> str:
    return value if isinstance(value, Markup) else text(brief(value))
