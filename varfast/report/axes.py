"""What curves are drawn over: steps, or what a run had spent by then."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from varfast.report.run import Run

Axis = Literal["step", "images", "flop", "hours"]
# Names on the page.
AXES: dict[Axis, str] = {"step": "step", "images": "images", "flop": "FLOP", "hours": "hours"}
SPENT: tuple[Axis, ...] = ("images", "flop", "hours")


def positions(run: Run, steps: Sequence[int]) -> dict[Axis, list[float]]:
    """What the run had spent after each of these steps, by axis; without those that its metrics do not have.

    Between steps that say it, and before the first of them (a run that an earlier version began), it is taken to have
    grown evenly, from 0 at step 0.
    """
    found: dict[Axis, list[float]] = {}
    for axis in SPENT:
        known, values = run.series(f"spent_{axis}")
        if known and all(a <= b for a, b in zip([0.0, *values], values, strict=False)):
            found[axis] = np.interp(steps, [0, *known], [0.0, *values]).tolist()
    return found


def chosen(runs: Sequence[Run], wanted: Axis | Literal["auto"]) -> Axis:
    """auto: FLOP for several runs that all count them, as runs of unlike steps are compared; else steps."""
    if wanted != "auto":
        return wanted
    return "flop" if len(runs) > 1 and all("flop" in positions(run, []) for run in runs) else "step"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers in [low, high], 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    if not rough > 1e-300:  # equal, or so close that the power of ten below underflows
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(m * power for m in (1.0, 2.0, 5.0, 10.0, 20.0) if m * power >= rough * (1 - 1e-9))
    return [k * apart for k in range(math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9) + 1)]


def places(low: float, high: float, axis: Axis) -> list[tuple[float, str]]:
    """Marks of a horizontal axis and their labels; of steps and images whole numbers alone."""
    whole = axis in ("step", "images")
    return [(mark, number(mark)) for mark in ticks(low, high) if not whole or mark == round(mark)]


def number(value: float, digits: int = 6) -> str:
    """As short as can be: "250", "0.02", "2e9"."""
    shown, _, power = f"{value:.{digits}g}".partition("e")
    return f"{shown}e{int(power)}" if power else shown
