"""Curves over steps, or over what was spent by then, as SVG. The script of the page redraws them over another axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from varfast.report.axes import AXES, Axis, number, places, positions, ticks
from varfast.report.elements import brief, text
from varfast.report.run import Run
from varfast.report.verdicts import HEALTHY, badge, healthy, mean, sign, verdict

# A curve of more points than this is smoothed, and drawn pale as it is behind that. With more than 300 steps, a curve
# has 300 points, each the mean of some steps, in a band from their minimum to their maximum.
SMOOTHED = 20
_POINTS = 300
# Of the exponential moving average, as TensorBoard's; the page's slider changes it.
SMOOTHING = 0.6
_UNITS = {
    "reward_mean": "reward",
    "reward_std": "reward",
    "kl": "nats a token",
    "entropy": "nats a token",
    "entropy_norm": "entropy / ln of the vocabulary",
    "entropy_coef": "weight of the bonus",
    "clip_fraction": "share of tokens",
    "ratio_mean": "new / old probability",
    "ratio_gap_mean": "|ratio - 1|, log scale",
    "ratio_gap_max": "|ratio - 1|, log scale",
    "groups_without_signal": "labels of a step",
    "images_per_s": "images/s",
    "step_s": "s",
    "mfu": "share of peak FLOP/s",
    "skipped_steps": "optimizer steps",
    "grad_norm": "before clipping, log scale",
    "pair_accuracy": "share of pairs in the right order",
    "pairs": "pairs of a step",
    "reward_margin": "reward, preferred less rejected",
    "reward_chosen": "reward",
    "reward_rejected": "reward",
    "implicit_margin": "beta (log policy - log reference), preferred less rejected",
    "implicit_chosen": "beta (log policy - log reference), nats",
    "implicit_rejected": "beta (log policy - log reference), nats",
    "logp_chosen": "nats an image",
    "logp_rejected": "nats an image",
    "update_images": "images of a step with a gradient, in each epoch",
    "reference_images": "images of a step that the reference reads",
    "drift/label_accuracy": "share of a grid's pictures that are read as their label",
    "drift/brightness": "mean luma of a grid",
    "drift/dark": "share of pixels with a luma below 0.05",
    "drift/bright": "share of pixels with a luma above 0.95",
    "drift/colour": "largest minus smallest channel",
    "drift/edges": "difference of luma between neighbours",
    "drift/colour_entropy": "bits of the colours' histogram",
    "drift/diversity": "distance from the mean of a label's samples",
    "spent_images": "images sampled",
    "spent_flop": "model FLOP of the policy",
    "spent_hours": "h of steps",
}
_LOG_SCALE = ("ratio_gap_max", "ratio_gap_mean", "grad_norm")
# Metrics whose axis need not begin at 0: their changes matter more than their distance from 0.
_OWN_RANGE = (
    "reward_mean", "entropy", "entropy_norm", "ratio_mean", "loss", "advantage_mean", "pair_accuracy", "logp_chosen",
    "logp_rejected", "reward_chosen", "reward_rejected",
)  # fmt: skip
_SPEED = ("images_per_s", "mfu", "step_s")
_POLICY = ("kl", "entropy", "entropy_norm", "entropy_coef", "clip_fraction", "ratio_gap_max", "groups_without_signal")
# Of DPO: one chart a metric, and the preferred and the rejected image on one.
_PAIRS = ("pair_accuracy", "implicit_margin", "reward_margin", "pairs")
_PAIRED = {
    "implicit rewards of pairs": ("implicit_chosen", "implicit_rejected"),
    "rewards of pairs": ("reward_chosen", "reward_rejected"),
    "log-probabilities of pairs": ("logp_chosen", "logp_rejected"),
}
COLOURS = 6

Point = tuple[int, float, float, float]


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: in the legend.
        style: index of its colour and dashes.
        points: (step, value, lowest, highest), the last two over the steps that a point stands for.
        spent: by axis, what the run had spent at each point.
    """

    name: str
    style: int
    points: list[Point]
    spent: dict[Axis, list[float]] = field(default_factory=dict)

    @property
    def css(self) -> str:
        return f"c{self.style % COLOURS} d{self.style % 3}"

    def at(self, axis: Axis) -> Sequence[float] | None:
        """The places of the points on an axis; None: the run does not say what it has spent."""
        return [point[0] for point in self.points] if axis == "step" else self.spent.get(axis)


def curve(name: str, style: int, steps: Sequence[int], values: Sequence[float]) -> Curve:
    """Up to 300 steps as they are; more of them as means of as many parts, with their lowest and highest values."""
    if len(steps) <= _POINTS:
        return Curve(name, style, [(step, value, value, value) for step, value in zip(steps, values, strict=True)])
    points = []
    for part in np.array_split(np.arange(len(values)), _POINTS):
        of_part = values[part[0] : part[-1] + 1]
        points.append((steps[int(part[len(part) // 2])], mean(of_part), min(of_part), max(of_part)))
    return Curve(name, style, points)


def smoothed(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """The exponential moving average of TensorBoard, whose first values are not drawn towards 0.

    Few values are left as they are.
    """
    if len(values) <= SMOOTHED:
        return list(values)
    found, last = [], 0.0
    for count, value in enumerate(values, 1):
        last = weight * last + (1.0 - weight) * value
        found.append(last / (1.0 - weight**count))
    return found


@dataclass(frozen=True)
class _Heights:
    """The vertical axis: maps a value to a height in [low, high], and that to thousandths of the plot from its top."""

    low: float
    high: float
    log: bool
    tiniest: float

    def height(self, value: float) -> float:
        return math.log10(max(value, self.tiniest)) if self.log else value

    def place(self, height: float) -> float:
        return min(max(1000.0 - 1000.0 * (height - self.low) / (self.high - self.low), -1e6), 1e6)

    def y(self, value: float) -> float:
        return self.place(self.height(value))

    def labels(self) -> list[tuple[float, str]]:
        marks = [t for t in ticks(self.low, self.high) if not self.log or t == round(t)]
        return [(self.place(t), f"1e{t:.0f}" if self.log else number(t)) for t in marks]


@dataclass(frozen=True)
class Chart:
    """Curves over the same axes.

    Attributes:
        title: the metric's name, or what several metrics have in common.
        unit: of the values.
        curves: at least one.
        log: whether the vertical axis is logarithmic.
        from_zero: whether it begins at 0 or below.
        legend: whether the curves are named.
        cut: whether values above three times a curve's 90 % quantile are cut off, as of a first step that compiles.
        notes: lines beneath the title, HTML.
        over: the horizontal axis; of curves that do not have it, steps.
    """

    title: str
    unit: str
    curves: list[Curve]
    log: bool = False
    from_zero: bool = True
    legend: bool = False
    cut: bool = False
    notes: tuple[str, ...] = ()
    over: Axis = "step"

    def draw(self, place: int) -> tuple[str, dict[str, Any]]:
        """The chart as HTML, and what the script needs to draw it again: {"x": [low, high], "curves": [...], ...}.

        A curve without the axis is drawn over steps if no curve has it, and else not at all.

        Args:
            place: of the chart among those of the page.
        """
        heights, cut = self._axis()
        over: Axis = self.over if any(line.at(self.over) for line in self.curves) else "step"
        drawn_at = [line.at(over) for line in self.curves]
        everywhere = [at for places_ in drawn_at if places_ for at in places_]
        first, last = min(everywhere), max(everywhere)

        def x(at: float) -> float:
            return 1000.0 * (at - first) / (last - first) if last > first else 500.0

        labels = heights.labels()
        rules = "".join(f"M0 {level:.1f}H1000" for level, _ in labels)
        lines = [
            _paths(line_of, line, [x(at) for at in drawn or ()], heights.y)
            for line_of, (line, drawn) in enumerate(zip(self.curves, drawn_at, strict=True))
        ]
        parts = [f'<path class="rule" d="{rules}"/>', *lines]
        marks = places(first, last, over)
        notes = "".join(f"<p>{note}</p>" for note in self.notes)
        drawn = (
            f'<figure class="chart"><figcaption><b>{text(brief(self.title))}</b> <span>{text(self.unit)}</span>'
            f'{notes}<p class="cut"{"" if cut else " hidden"}>{cut}</p></figcaption>'
            f'<div class="plot" data-chart="{place}" tabindex="0" role="img" aria-label="{text(self._spoken(over))}">'
            f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'
            + "".join(f'<span class="y" style="top:{level / 10:.1f}%">{text(label)}</span>' for level, label in labels)
            + "".join(f'<span class="x" style="left:{x(at) / 10:.1f}%">{label}</span>' for at, label in marks)
            + f'<i class="cross" hidden></i><output hidden></output><span class="axis">{AXES[over]}</span></div>'
            + (_legend(self.curves) if self.legend else "")
            + "</figure>"
        )
        how = {"log": self.log, "zero": self.from_zero, "cut": self.cut}
        return drawn, {"x": [first, last], "curves": list(map(_numbers, self.curves)), "how": how}

    def _axis(self) -> tuple[_Heights, str]:
        """The vertical axis, and a note if it cuts something off. The script does the same (script.py)."""
        points = [point for line in self.curves for point in line.points]
        positive = [low for _, _, low, _ in points if low > 0]
        log, tiniest = self.log and bool(positive), min(positive, default=1.0)
        whole = _Heights(0.0, 1.0, log, tiniest)
        low, high = min(whole.height(p[2]) for p in points), max(whole.height(p[3]) for p in points)
        note = ""
        usual = max(float(np.percentile([p[3] for p in line.points], 90)) for line in self.curves)
        if self.cut and not log and high > 3.0 * usual > 0.0:
            note = f"Cut off at the top; the highest is {number(high, 4)}."
            high = 1.5 * usual
        if log:
            low, high = math.floor(low), math.ceil(high)
        elif self.from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-290):  # all values are equal
            apart = max(0.5, 1e-3 * abs(high))
            low, high = low - apart * (low != 0.0), high + apart
        if not log:
            margin = 0.04 * (high - low)
            low, high = low - margin * (low != 0.0), high + margin
        return _Heights(low, high, log, tiniest), note

    def _spoken(self, over: Axis) -> str:
        ends = [f"{line.name}: {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in self.curves]
        return brief(f"{self.title} over {AXES[over]}; {'; '.join(ends)}")


def _numbers(line: Curve) -> dict[str, Any]:
    """A curve as the script reads it; a point whose lowest and highest value are its value has two numbers."""
    points = [
        [p[0], float(f"{p[1]:.4g}")] if p[1] == p[2] == p[3] else [p[0], *(float(f"{v:.4g}") for v in p[1:])]
        for p in line.points
    ]
    spent = {axis: [float(f"{place:.6g}") for place in at] for axis, at in line.spent.items()}
    return {"name": brief(line.name), "points": points} | ({"spent": spent} if spent else {})


def _paths(place: int, line: Curve, x: Sequence[float], y: Callable[[float], float]) -> str:
    """A curve as SVG: its band if it has one, the values as they are if they are smoothed, and the line.

    Args:
        place: of the curve in its chart.
        x: of each point, in thousandths; none: the curve is not drawn over this axis.
    """
    values = [p[1] for p in line.points]
    drawn = smoothed(values)
    raw = _path(x, map(y, values)) if len(values) > SMOOTHED else ""
    band = ""
    if x and any(p[2] != p[3] for p in line.points):
        upper = _path(x, (y(p[3]) for p in line.points))
        band = f"{upper} {_path(x[::-1], (y(p[2]) for p in reversed(line.points)))[1:]}Z"
    return "".join(
        f'<path class="{kind} {line.css}" data-curve="{place}" d="{d}"/>'
        for kind, d in (("band", band), ("raw", raw), ("line", _path(x, map(y, drawn))))
    )


def _path(x: Sequence[float], y: Iterable[float]) -> str:
    points = " ".join(f"{at:.1f},{height:.1f}" for at, height in zip(x, y, strict=False))
    return f"M{points}{'h.1' if len(x) == 1 else ''}" if points else ""


def _legend(curves: Sequence[Curve]) -> str:
    key = '<svg viewBox="0 0 24 8" aria-hidden="true"><path class="line {}" d="M0 4H24"/></svg>'
    return f'<ul class="legend">{"".join(f"<li>{key.format(c.css)}{text(brief(c.name))}</li>" for c in curves)}</ul>'


def curve_of(run: Run, name: str, style: int, metric: str) -> Curve:
    """The curve of a run's metric, of which it has at least one value."""
    drawn = curve(name, style, *run.series(metric))
    return replace(drawn, spent=positions(run, [point[0] for point in drawn.points]))


def _metric_chart(runs: Sequence[Run], metric: str, over: Axis) -> Chart | None:
    """A chart of one metric with a curve for each run; None if no run has it."""
    curves = [curve_of(run, run.name, i, metric) for i, run in enumerate(runs) if run.series(metric)[0]]
    if not curves:
        return None
    unit = _UNITS.get(metric, "reward" if metric.startswith("reward/") else "")
    unit = unit or {"ms": "ms", "share": "share of the limit"}.get(metric.rpartition("_")[2], "")
    own_range = metric in _OWN_RANGE or metric.startswith(("reward/", "eval/"))
    notes = _notes(runs, metric)
    legend, time = len(runs) > 1, unit in ("ms", "s")
    return Chart(metric, unit, curves, metric in _LOG_SCALE, not own_range, legend, time, notes, over)


def _notes(runs: Sequence[Run], metric: str) -> tuple[str, ...]:
    if metric not in HEALTHY:
        return ()
    means = "Healthy: {}. Otherwise: {}.".format(*map(text, healthy(metric, runs)))
    found = [(run, v) for run in runs if (v := verdict(run, metric)) is not None]
    if len(runs) == 1:
        return (means, *(badge(v) for _, v in found))
    signs = " ".join(f"{sign(v.level)} {text(brief(run.name))}" for run, v in found)  # the limits stand in the table
    return (means, signs) if found else (means,)


def _together(
    runs: Sequence[Run], metrics: Sequence[str], title: str, unit: str, over: Axis, from_zero: bool = True
) -> list[Chart]:
    """One run: a chart with all these metrics. Several runs: a chart for each metric."""
    if len(runs) > 1:
        return [chart for metric in metrics if (chart := _metric_chart(runs, metric, over))]
    lines = [curve_of(runs[0], m, i, m) for i, m in enumerate(metrics) if runs[0].series(m)[0]]
    cut = unit == "ms"
    return [Chart(title, unit, lines, legend=True, cut=cut, from_zero=from_zero, over=over)] if lines else []


def charts(runs: Sequence[Run], over: Axis = "step") -> dict[str, list[Chart]]:
    """The charts by section. Every metric is in one of them, except a reward that repeats reward_mean."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics.columns))
    components = [m for m in metrics if m.startswith("reward/") or (m.startswith("eval/") and "reward/" in m)]
    repeating = [m for m in components if all(map(partial(_repeats_the_total, component=m), runs))]
    distances = [m for m in metrics if m.startswith("distance/")]  # of rewards of sets
    stages = [m for m in metrics if m.endswith(("_ms", "_share"))]
    looks = [m for m in metrics if m.startswith("drift/")]  # of the grids' pictures: runs/appearance.py
    fresh = [m for m in metrics if m.startswith("eval/") and m not in repeating]
    rewards = [m for m in components if m.startswith("reward/") and m not in repeating]
    groups: dict[str, Sequence[str]] = {
        "Reward": ["reward_mean", "reward_std", *rewards, *distances],
        "Fresh samples during training": fresh,
        "Policy": _POLICY,
        "Pairs": _PAIRS,
        "What pictures look like": looks,
        "Speed": _SPEED,
    }
    grouped = {*components, *stages, *(m for group in (*groups.values(), *_PAIRED.values()) for m in group)}
    groups["Other metrics"] = [m for m in metrics if m not in grouped]
    found = {title: [c for name in group if (c := _metric_chart(runs, name, over))] for title, group in groups.items()}
    for title, names in _PAIRED.items():
        found["Pairs"] += _together(runs, names, title, _UNITS[names[0]], over, from_zero=title.startswith("implicit"))
    for suffix, unit in (("_ms", "ms"), ("_share", "share of the limit")):
        of_stages = [metric for metric in stages if metric.endswith(suffix)]
        found["Speed"] += _together(runs, of_stages, f"stages, *{suffix}", unit, over)
    return {title: group for title, group in found.items() if group}


def _repeats_the_total(run: Run, component: str) -> bool:
    """Whether a reward's mean is the total's in each step, or the run does not have it."""
    steps, values = run.series(component)
    before = component.rpartition("reward/")[0]  # "", "eval/" or "eval/held_out/"
    total = dict(zip(*run.series(f"{before}reward" if before else "reward_mean"), strict=True))
    return all(math.isclose(total.get(step, math.nan), v, rel_tol=1e-6) for step, v in zip(steps, values, strict=True))
