"""Write one page about one or several runs: what changed, whether it went well, curves, samples, settings.

    python -m varfast.report runs/x [runs/y ...] [out=report.html]

The page is one file: styles, script, numbers and pictures are in it. Curves are drawn here, as SVG, and are there
without the script too, which adds the values under the pointer and the slider over the grids. A content security policy
lets nothing else run and nothing be fetched.

A run folder may be damaged, or crafted by somebody else: a file that cannot be used is left out, and the page and the
command say which one and why. `reading` takes care of that; what it returns has known types and bounded sizes.
"""

from varfast.report.command import main
from varfast.report.page import page
from varfast.report.run import load_run

__all__ = ["load_run", "main", "page"]
