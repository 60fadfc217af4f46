"""Numbers as tables and messages show them."""

from __future__ import annotations

import math


def three_digits(x: float) -> str:
    """Three digits at least, and a decimal in any case: 1220.4, 0.00731."""
    decimals = 1 if x == 0.0 else max(1, 2 - math.floor(math.log10(abs(x))))
    return f"{x:.{decimals}f}"
