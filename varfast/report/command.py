"""The command: reads the folders, writes the page, and says what could not be used."""

from __future__ import annotations

import sys
from pathlib import Path

from varfast.files import save_text
from varfast.report.config import ReportConfig
from varfast.report.elements import masked
from varfast.report.layout import page
from varfast.report.run import read_run
from varfast.settings.loading import parse_arguments
from varfast.types import InputError


def main(arguments: list[str]) -> int:
    """python -m varfast.report runs/x [runs/y ...] [out=report.html] [over=flop]

    Folders that hold nothing to show are named and skipped. Raises: InputError if none is left.
    """
    config = parse_arguments(arguments, ReportConfig)
    paths, out = [Path(run).expanduser() for run in config.runs], Path(config.out).expanduser()
    by_name = len({path.absolute().name for path in paths}) == len(paths)
    runs, refused = [], []
    for path in paths:
        try:
            runs.append(read_run(path, masked(path.absolute().name if by_name else path)))
        except InputError as error:
            refused.append(masked(error))
    if not runs:
        raise InputError("\n  ".join(refused))
    for reason in refused:
        print(f"left out: {reason}", file=sys.stderr)
    for run in runs:
        for note in run.left_out:
            print(masked(f"{run.name}: left out: {note}"), file=sys.stderr)
    save_text(out, page(runs, config.over))
    print(f"{out}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}, {out.stat().st_size / 1e6:.1f} MB")
    return 0
