"""Text of others, made safe to print: what a server, a file, a folder or a foreign exception says.

Such text may hold escape sequences that clear a terminal, set its title or hide a line, marks that turn the writing
direction, lone surrogates that no encoding takes, and a megabyte where a word was wanted.
"""

from __future__ import annotations


def printable(value: object, most: int = 200, *, lines: bool = False) -> str:
    """`value` as text of printable characters and bounded length.

    What str.isprintable() refuses (control characters, marks of direction, lone surrogates) is written as in a Python
    string: \\x1b, \\u202e. A longer text is cut, and its length told.

    Args:
        value: bytes are read as UTF-8; anything else by str().
        most: characters of the text that are kept.
        lines: whether line breaks stay, as in a message of several lines.
    """
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    shown = "".join(c if c.isprintable() or (lines and c == "\n") else _escaped(c) for c in text[:most])
    return shown if len(text) <= most else f"{shown}... ({len(text)} characters)"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
