"""Write one page about one or several runs: what changed, whether it went well, curves, samples, settings.

    python -m varfast.report runs/x [runs/y ...] [out=report.html]

The page is one file that contains styles, script, numbers and pictures. Curves are drawn here, as SVG, so they are
visible without the script, which adds the values under the pointer and the slider over the grids. A content security
policy lets nothing else run and nothing be fetched.

A run folder may be damaged, or crafted by somebody else: a file that cannot be used is skipped, and the page and the
command say which one and why. That is the task of `reading`; what it returns has known types and bounded sizes.
"""

import importlib
from typing import Any

_PLACES = {"read_run": "run", "main": "command", "page": "layout"}
__all__ = ["main", "page", "read_run"]


def __getattr__(name: str) -> Any:
    """Import the package's functions on first use: --help and a typo are answered before imports that take 6 s."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"varfast.report.{_PLACES[name]}"), name)
