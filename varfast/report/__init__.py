"""Write one page about one or several runs: what changed, whether it went well, curves, samples, settings.

    python -m varfast.report runs/x [runs/y ...] [out=report.html]

The page is one file: styles, script, numbers and pictures are in it. Curves are drawn here, as SVG, and are there
without the script too, which adds the values under the pointer and the slider over the grids. A content security policy
lets nothing else run and nothing be fetched.

A run folder may be damaged, or crafted by somebody else: a file that cannot be used is left out, and the page and the
command say which one and why. `reading` takes care of that; what it returns has known types and bounded sizes.
"""

import importlib
from typing import Any

_PLACES = {"read_run": "run", "main": "command", "page": "layout"}
__all__ = ["main", "page", "read_run"]


def __getattr__(name: str) -> Any:
    """What the package offers, imported on first use: --help and a typo are answered before the imports take 6 s."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"varfast.report.{_PLACES[name]}"), name)
