"""Tables of text, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Lines of cells in aligned columns, two spaces apart, without trailing spaces.

    Args:
        rows: cells of each line, the heading among them.
        align: "<" (left) or ">" (right) for each column.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    ]
