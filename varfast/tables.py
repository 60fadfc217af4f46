"""Tables of text, and numbers, for a terminal."""

from __future__ import annotations

import math
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


def three_digits(x: float) -> str:
    """Three digits at least, and a decimal in any case: 1220.4, 0.00731."""
    decimals = 1 if x == 0.0 else max(1, 2 - math.floor(math.log10(abs(x))))
    return f"{x:.{decimals}f}"
