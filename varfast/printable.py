"""Text from outside, made safe to print: of a server, a file, a folder's name, or a library's exception.

Such text may hold escape sequences that clear a terminal, set its title or hide a line, marks that change the writing
direction, lone surrogates that cannot be encoded, and a megabyte where a word was expected.
"""

from __future__ import annotations


def printable(value: object, most: int = 200, *, lines: bool = False) -> str:
    """`value` as text of printable characters and bounded length.

    Characters for which str.isprintable() is false (control characters, direction marks, lone surrogates) are written
    as in a Python string: \\x1b, \\u202e. A longer text is cut, followed by its length.

    Args:
        value: bytes are read as UTF-8; anything else by str().
        most: how many characters of the text are kept.
        lines: whether line breaks are kept.
    """
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    shown = "".join(c if c.isprintable() or (lines and c == "\n") else _escaped(c) for c in text[:most])
    return shown if len(text) <= most else f"{shown}... ({len(text)} characters)"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
