"""Write one page about one or several runs: curves, samples, evaluation, settings, environment.

    python -m varfast.report runs/x [runs/y ...] [out=report.html]

The page is one file: styles, script, numbers and pictures are in it. Curves are drawn here, as SVG, and are there
without the script too, which adds the values under the pointer and the slider over the grids. A content security policy
lets nothing else run and nothing be fetched.
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a typo are answered before the imports below, which take 6 s
    from varfast.command import run_command

    run_command("report")

import base64
import hashlib
import html
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from varfast.config import ReportConfig, parse_arguments
from varfast.files import leaves, read_leaves, save_text
from varfast.log import GAP_PX
from varfast.types import InputError

# A curve of more steps is drawn as its moving mean over a twentieth of the run, in a band from minimum to maximum.
_POINTS = 200
# A run of 40 000 steps has 400 grids of 8 MB; of those as many are shown, at most as wide, as JPEG.
_GRIDS = 24
_WIDEST_PX = 1024
_AS_IT_IS_BYTES = 200_000

# What the README says under "Read the numbers": healthy, and otherwise.
HEALTHY = {
    "ratio_gap_max": (
        "at rounding: 1e-5 in float32, a few hundredths in bfloat16",
        "rollout and update disagree about the policy; nothing else can be trusted",
    ),
    "kl": ("grows, then levels off", "still growing steeply: raise kl_beta, and look at the grids"),
    "groups_without_signal": (
        "well below labels_per_step",
        "all samples of a label earn the same, nothing to learn from",
    ),
    "clip_fraction": ("below about 0.1", "steps are too large: lower update.lr"),
}
_UNITS = {
    "reward_mean": "reward",
    "reward_std": "reward",
    "kl": "nats a token",
    "entropy": "nats a token",
    "clip_fraction": "share of tokens",
    "ratio_mean": "new / old probability",
    "ratio_gap_mean": "|ratio - 1|",
    "ratio_gap_max": "|ratio - 1|, log scale",
    "groups_without_signal": "labels of a step",
    "images_per_s": "images/s",
    "step_s": "s",
    "mfu": "share of peak FLOP/s",
    "skipped_steps": "optimizer steps",
}
_LOG_SCALE = ("ratio_gap_max",)
# Their own range says more than their distance from 0.
_OWN_RANGE = ("reward_mean", "entropy", "ratio_mean", "loss", "advantage_mean")
_SPEED = ("images_per_s", "mfu", "step_s")
_POLICY = ("kl", "entropy", "clip_fraction", "ratio_gap_max", "groups_without_signal")
_COLOURS = 6
# Of a cell of a table; a list of 1000 labels stands whole under "config.yaml, resolved".
_LONGEST = 300


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        name: how the page calls it.
        path: of the folder.
        config: the resolved config, as text.
        settings: the same by key, as update.lr.
        metrics: a line each of metrics.jsonl, in the order of the steps.
        unreadable: lines of metrics.jsonl that are none.
    """

    name: str
    path: Path
    config: str
    settings: dict[str, Any]
    metrics: list[dict[str, Any]]
    unreadable: int

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps, and values at them, that are finite numbers."""
        found = [(row["step"], row[metric]) for row in self.metrics if _finite(row.get(metric))]
        return [step for step, _ in found], [float(value) for _, value in found]

    def left_out(self) -> list[str]:
        """What of metrics.jsonl the curves do not show, a sentence each."""
        lines = [f"{self.unreadable} lines of metrics.jsonl, cut off or damaged"] if self.unreadable else []
        bad = Counter(name for row in self.metrics for name, value in row.items() if not _finite(value))
        return [*lines, *(f"{count} values of {name} that are no finite number" for name, count in bad.items())]

    def note(self, name: str) -> dict[str, Any]:
        """The leaves of a JSON file of the folder; empty if it is not there or cannot be read."""
        return read_leaves(self.path / name)


def load_run(path: Path, name: str) -> Run:
    """Read a run folder; of a run that goes on or was killed, what is there.

    Raises: InputError if it is none, naming what is missing.
    """
    if not path.is_dir():
        raise InputError(f"{path} is no run folder: {'a file' if path.exists() else 'it does not exist'}")
    needed = ("config.yaml", "metrics.jsonl")
    missing = [file for file in needed if not (path / file).is_file()]
    if missing:
        raise InputError(f"{path} is no run folder, or its run has no step yet: {' and '.join(missing)} missing")
    try:
        config, lines = ((path / file).read_text(encoding="utf-8", errors="replace") for file in needed)
        settings = yaml.safe_load(config)
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}/config.yaml holds no settings")
    by_step, unreadable = {}, 0
    for line in lines.split("\n"):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:  # a run killed while it wrote
            row = "cut off"
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            by_step[row["step"]] = row
        elif row is not None:
            unreadable += 1
    return Run(name, path, config, leaves(settings), [by_step[step] for step in sorted(by_step)], unreadable)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---------------------------------------------------------------------------------------------------------------------
# Curves


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: in the legend.
        style: number of its colour and dashes.
        points: (step, value, lowest, highest); the last two over the steps that the point stands for.
    """

    name: str
    style: int
    points: list[tuple[int, float, float, float]]

    @property
    def css(self) -> str:
        return f"c{self.style % _COLOURS} d{self.style % 3}"


def curve(name: str, style: int, steps: Sequence[int], values: Sequence[float]) -> Curve:
    """Up to 200 steps as they are; more as moving means over a twentieth of the steps, at 200 places."""
    if len(steps) <= _POINTS:
        return Curve(name, style, [(step, value, value, value) for step, value in zip(steps, values, strict=True)])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    reach = len(values) // 40
    points = []
    for bucket in np.array_split(np.arange(len(values)), _POINTS):
        middle = int(bucket[len(bucket) // 2])
        first, end = max(0, middle - reach), min(len(values), middle + reach + 1)
        part = [values[i] for i in bucket]
        points.append((steps[middle], float(sums[end] - sums[first]) / (end - first), min(part), max(part)))
    return Curve(name, style, points)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers in [low, high], 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))
    return [k * apart for k in range(math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9) + 1)]


@dataclass(frozen=True)
class Chart:
    """Curves over the same axes.

    Attributes:
        title: the metric's name, or what several have in common.
        unit: of the values.
        curves: not empty.
        log: the axis of the values is logarithmic.
        from_zero: it begins at 0, or below.
        legend: name the curves.
        cut: values beyond three times what 90 % of a curve stay below are cut off: a first step that compiles.
        note: a line beneath the title.
    """

    title: str
    unit: str
    curves: list[Curve]
    log: bool = False
    from_zero: bool = True
    legend: bool = False
    cut: bool = False
    note: str = ""

    def draw(self, number: int) -> tuple[str, dict[str, Any]]:
        """The chart as HTML, and what the script needs to show values: {"x": [low, high], "curves": [...]}."""
        points = [point for line in self.curves for point in line.points]
        tiniest = min((low for _, _, low, _ in points if low > 0), default=1.0)

        def height(value: float) -> float:
            return math.log10(max(value, tiniest)) if self.log else value

        low, high = min(height(p[2]) for p in points), max(height(p[3]) for p in points)
        notes = [self.note] if self.note else []
        usual = max(float(np.percentile([p[3] for p in line.points], 90)) for line in self.curves)
        if self.cut and high > 3.0 * usual > 0.0:
            notes.append(f"Cut off at the top; the highest is {high:.4g}.")
            high = 1.5 * usual
        if self.log:
            low, high = math.floor(low), math.ceil(high)
        elif self.from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # all values are equal
            low, high = low - 0.5 * (low != 0.0), high + 0.5
        if not self.log:
            high += 0.04 * (high - low)
            low -= 0.0 if low == 0.0 else 0.04 * (high - low)
        first, last = min(p[0] for p in points), max(p[0] for p in points)

        def x(step: float) -> float:
            return 1000.0 * (step - first) / (last - first) if last > first else 500.0

        def y(value: float) -> float:
            return 1000.0 - 1000.0 * (height(value) - low) / (high - low)

        marks = [t for t in ticks(low, high) if not self.log or t == round(t)]
        labels = [f"1e{t:.0f}" if self.log else f"{t:.6g}" for t in marks]
        levels = [(1000.0 - 1000.0 * (t - low) / (high - low)) for t in marks]
        steps = [t for t in ticks(first, last) if t == round(t)]
        parts = [f'<path class="rule" d="{"".join(f"M0 {level:.1f}H1000" for level in levels)}"/>']
        for line in self.curves:
            if any(p[2] != p[3] for p in line.points):
                upper = " ".join(f"{x(p[0]):.1f},{y(p[3]):.1f}" for p in line.points)
                lower = " ".join(f"{x(p[0]):.1f},{y(p[2]):.1f}" for p in reversed(line.points))
                parts.append(f'<path class="band {line.css}" d="M{upper} {lower}Z"/>')
            path = " ".join(f"{x(p[0]):.1f},{y(p[1]):.1f}" for p in line.points)
            parts.append(f'<path class="line {line.css}" d="M{path}{"h.1" if len(line.points) == 1 else ""}"/>')
        drawn = (
            f'<figure class="chart"><figcaption><b>{_text(self.title)}</b> <span>{_text(self.unit)}</span>'
            f"{''.join(f'<p>{_text(note)}</p>' for note in notes)}</figcaption>"
            f'<div class="plot" data-chart="{number}" tabindex="0" role="img" aria-label="{_text(self._spoken())}">'
            f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'
            + "".join(
                f'<span class="y" style="top:{level / 10:.1f}%">{_text(label)}</span>'
                for level, label in zip(levels, labels, strict=True)
            )
            + "".join(f'<span class="x" style="left:{x(step) / 10:.1f}%">{step:.0f}</span>' for step in steps)
            + '<i class="cross" hidden></i><output hidden></output><span class="axis">step</span></div>'
            + (_legend(self.curves) if self.legend else "")
            + "</figure>"
        )
        rounded = [
            {"name": line.name, "points": [[p[0], *(float(f"{v:.4g}") for v in p[1:])] for p in line.points]}
            for line in self.curves
        ]
        return drawn, {"x": [first, last], "curves": rounded}

    def _spoken(self) -> str:
        ends = [f"{line.name}: {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in self.curves]
        return f"{self.title} over steps; {'; '.join(ends)}"


def _legend(curves: Sequence[Curve]) -> str:
    key = '<svg viewBox="0 0 24 8" aria-hidden="true"><path class="line {}" d="M0 4H24"/></svg>'
    return f'<ul class="legend">{"".join(f"<li>{key.format(c.css)}{_text(c.name)}</li>" for c in curves)}</ul>'


def _metric_chart(runs: Sequence[Run], metric: str) -> Chart | None:
    """One metric, a curve a run; None if no run has it."""
    curves = [curve(run.name, i, *run.series(metric)) for i, run in enumerate(runs) if run.series(metric)[0]]
    if not curves:
        return None
    unit = _UNITS.get(metric, "reward" if metric.startswith("reward/") else "")
    unit = unit or {"ms": "ms", "share": "share of the limit"}.get(metric.rpartition("_")[2], "")
    healthy = "Healthy: {}. Otherwise: {}.".format(*HEALTHY[metric]) if metric in HEALTHY else ""
    own_range = metric in _OWN_RANGE or metric.startswith("reward/")
    legend, time = len(runs) > 1, unit in ("ms", "s")
    return Chart(metric, unit, curves, metric in _LOG_SCALE, not own_range, legend, time, healthy)


def _stage_charts(runs: Sequence[Run], metrics: Sequence[str], suffix: str, unit: str) -> list[Chart]:
    """All stages of one run in one chart; of several runs, a chart a stage."""
    chosen = [metric for metric in metrics if metric.endswith(suffix)]
    if len(runs) > 1:
        return [chart for metric in chosen if (chart := _metric_chart(runs, metric))]
    lines = [curve(m, i, *runs[0].series(m)) for i, m in enumerate(chosen) if runs[0].series(m)[0]]
    return [Chart(f"stages, *{suffix}", unit, lines, legend=True, cut=unit == "ms")] if lines else []


def charts(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """The charts of the runs, by section. Every number of metrics.jsonl is in one of them."""
    metrics = list(dict.fromkeys(name for run in runs for row in run.metrics for name in row if name != "step"))
    rewards = ["reward_mean", "reward_std", *(m for m in metrics if m.startswith("reward/"))]
    stages = [m for m in metrics if m.endswith(("_ms", "_share"))]
    others = [m for m in metrics if m not in (*rewards, *_POLICY, *_SPEED, *stages)]
    groups = {"Reward": rewards, "Policy": _POLICY, "Speed": _SPEED, "Other metrics": others}
    found = {title: [c for name in group if (c := _metric_chart(runs, name))] for title, group in groups.items()}
    found["Speed"] += _stage_charts(runs, metrics, "_ms", "ms")
    found["Speed"] += _stage_charts(runs, metrics, "_share", "share of the limit")
    return {title: group for title, group in found.items() if group}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def _data_uri(picture: Image.Image, content: bytes | None = None) -> str:
    """A picture as the value of src: the PNG `content` itself if it is small, else a JPEG at most 1024 pixels wide."""
    kind = "png"
    if content is None and picture.width <= 128:
        content = _encoded(picture, "PNG")
    if content is None or len(content) > _AS_IT_IS_BYTES:
        picture = picture.convert("RGB")
        picture.thumbnail((_WIDEST_PX, 100_000))
        kind, content = "jpeg", _encoded(picture, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _encoded(picture: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _steps(folder: Path, suffix: str) -> list[Path]:
    found = [p for p in folder.glob(f"step_*{suffix}") if p.stem.removeprefix("step_").isdecimal()]
    return sorted(found, key=_step_of)


def _grids(run: Run) -> str:
    """The sample grids as a slider over training."""
    paths = _steps(run.path / "grids", ".png")
    chosen = sorted({round(i * (len(paths) - 1) / (_GRIDS - 1)) for i in range(_GRIDS)}) if paths else []
    frames = []
    for index in chosen:
        try:
            content = paths[index].read_bytes()
            with Image.open(io.BytesIO(content)) as picture:
                frames.append((_step_of(paths[index]), _data_uri(picture, content), picture.size))
        except (OSError, Image.DecompressionBombError):
            continue
    if not frames:
        return f"<h3>{_text(run.name)}</h3><p>No sample grids in {_text(run.path / 'grids')}.</p>"
    images = "".join(
        f'<img src="{uri}" alt="samples at step {step}" data-step="{step}" width="{size[0]}" height="{size[1]}"'
        f"{'' if index == len(frames) - 1 else ' hidden'}>"
        for index, (step, uri, size) in enumerate(frames)
    )
    left_out = f"; {len(frames)} of {len(paths)} grids are shown" if len(frames) < len(paths) else ""
    return (
        f'<div class="grids"><h3>{_text(run.name)}</h3>'
        f'<label>step <output>{frames[-1][0]}</output> <input type="range" min="0" max="{len(frames) - 1}" '
        f'value="{len(frames) - 1}" aria-label="step of the grid"></label>{images}'
        f"<p>A row a label, the same random numbers at every step{left_out}.</p></div>"
    )


def _extremes(run: Run) -> str:
    """Best and worst samples of the last step that kept them."""
    for path in reversed(_steps(run.path / "samples", ".json")):
        try:
            noted = json.loads(path.read_text(encoding="utf-8"))
            with Image.open(path.with_suffix(".png")) as picture:
                return f"<h3>{_text(run.name)}, step {_step_of(path)}</h3>" + _sample_rows(noted, picture)
        except (OSError, ValueError, KeyError, TypeError, Image.DecompressionBombError):
            continue  # half of a pair: the run was killed between the two
    return f"<h3>{_text(run.name)}</h3><p>No samples in {_text(run.path / 'samples')}.</p>"


def _sample_rows(noted: dict[str, Any], picture: Image.Image) -> str:
    columns = len(noted["best"])
    width, height = (picture.width + GAP_PX) // columns, (picture.height + GAP_PX) // 2
    rows = []
    for row, title in enumerate(("best", "worst")):
        cells = []
        for column, sample in enumerate(noted[title]):
            left, top = column * width, row * height
            cell = picture.crop((left, top, left + width - GAP_PX, top + height - GAP_PX))
            parts = sample["rewards"]
            shown = f"label {_text(sample['label'])}<br>{_text(_number(sample['reward']))}"
            if len(parts) > 1:
                shown += "".join(f"<br><small>{_text(n)} {_text(_number(v))}</small>" for n, v in parts.items())
            cells.append(f'<figure><img src="{_data_uri(cell)}" alt=""><figcaption>{shown}</figcaption></figure>')
        rows.append(f'<h4>{title} of the step, by reward</h4><div class="samples">{"".join(cells)}</div>')
    return "".join(rows)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else str(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _table(columns: Iterable[str], rows: Iterable[tuple[str, Sequence[Any]]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in columns)
    body = "".join(
        f'<tr><th scope="row">{_text(name)}</th>{"".join(f"<td>{_text(_number(v))}</td>" for v in values)}</tr>'
        for name, values in rows
    )
    return f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _notes_table(runs: Sequence[Run], notes: Sequence[dict[str, Any]]) -> str:
    names = dict.fromkeys(name for note in notes for name in note)
    return _table([run.name for run in runs], [(name, [note.get(name) for note in notes]) for name in names])


def _glance(runs: Sequence[Run]) -> str:
    """First and last tenth of the metrics that are looked at first."""

    def first_to_last(run: Run, metric: str) -> str:
        values = run.series(metric)[1]
        tenth = max(1, len(values) // 10)
        return f"{_mean(values[:tenth])} → {_mean(values[-tenth:])}" if values else ""

    def largest(run: Run, metric: str) -> str:
        return _number(max(run.series(metric)[1], default=None))

    done = [run.metrics[-1]["step"] if run.metrics else 0 for run in runs]
    rows = [("steps", [f"{step} of {run.settings.get('run.steps')}" for step, run in zip(done, runs, strict=True)])]
    rows += [(name, [first_to_last(run, name) for run in runs]) for name in ("reward_mean", "kl", "entropy")]
    rows += [(f"{name}, largest", [largest(run, name) for run in runs]) for name in ("clip_fraction", "ratio_gap_max")]
    rows += [(name, [first_to_last(run, name) for run in runs]) for name in ("groups_without_signal", "images_per_s")]
    arrows = "<p>Arrows: from the mean of the first tenth of the steps to that of the last.</p>"
    return _table([run.name for run in runs], rows) + arrows


def _mean(values: Sequence[float]) -> str:
    return f"{math.fsum(values) / len(values):.4g}"


def _settings(runs: Sequence[Run]) -> str:
    parts = []
    if len(runs) > 1:
        keys = dict.fromkeys(key for run in runs for key in run.settings if key != "run.dir")
        rows = [(key, [run.settings.get(key, "not set") for run in runs]) for key in keys]
        rows = [(key, values) for key, values in rows if any(value != values[0] for value in values)]
        parts.append(_table([run.name for run in runs], rows) if rows else "<p>The runs have the same settings.</p>")
    for run in runs:
        parts.append(
            f"<details{' open' if len(runs) == 1 else ''}><summary>{_text(run.name)}: config.yaml, resolved</summary>"
            f"<pre>{_text(run.config)}</pre></details>"
        )
    return "".join(parts)


def _evaluation(runs: Sequence[Run]) -> str:
    parts = []
    summaries = [run.note("summary.json") for run in runs]
    if any(summaries):
        # Keys are before.reward, after.reward: a column each.
        when = dict.fromkeys(key.partition(".")[0] for summary in summaries for key in summary)
        names = dict.fromkeys(key.partition(".")[2] for summary in summaries for key in summary)
        prefixes = [f"{run.name} " if len(runs) > 1 else "" for run in runs]
        columns = [prefix + time for prefix in prefixes for time in when]
        rows = [(name, [summary.get(f"{time}.{name}") for summary in summaries for time in when]) for name in names]
        title = "<h3>summary.json: fresh samples of each label, the same random numbers before and after</h3>"
        parts.append(title + _table(columns, rows))
    parts += [_measured(run) for run in runs]
    return "".join(parts) or "<p>No summary.json yet: it is written when a run is complete.</p>"


def _measured(run: Run) -> str:
    """The table and the pictures of `python -m varfast.evaluate`, whose folder lies in the run's; empty without one."""
    folder = run.path / "evaluation"
    try:
        found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        rows = [
            (row["name"] if row["labels"] == "all" else f"{row['name']}, {row['labels']} labels", row)
            for row in found["rows"]
        ]
        sides = [side for side in ("reference", "checkpoint", "difference") if any(row[side] for _, row in rows)]
        table = _table(sides, [(name, [_estimate(row[side]) for side in sides]) for name, row in rows])
        about = f"{found['images']} images a model, of {found['labels']} labels. Intervals: {found['intervals']}."
        with Image.open(folder / "pictures.png") as picture:
            uri = _data_uri(picture.convert("RGB"), (folder / "pictures.png").read_bytes())
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"<p>{_text(run.name)}: evaluation left out, it cannot be read ({_text(type(error).__name__)}).</p>"
    columns = " | ".join(dict.fromkeys(column["of"] for column in found["pictures"]["columns"]))
    caption = f"<figcaption>A row a label; of each seed {_text(columns)}.</figcaption>"
    return (
        f"<h3>{_text(run.name)}: varfast.evaluate</h3>{table}<p>{_text(about)}</p>"
        f'<figure><img src="{uri}" alt="">{caption}</figure>'
    )


def _estimate(found: dict[str, float | None] | None) -> str:
    if found is None or found["value"] is None:
        return ""
    value, low, high = found["value"], found["low"], found["high"]
    return f"{value:.4g}" if low is None or high is None else f"{value:.4g} [{low:.4g}, {high:.4g}]"


def page(runs: Sequence[Run]) -> str:
    """The report as HTML."""
    numbers: list[dict[str, Any]] = []
    left_out = "".join(f"<p>{_text(run.name)}: left out: {_text(note)}.</p>" for run in runs for note in run.left_out())
    sections = [("At a glance", _glance(runs) + left_out)]
    found = charts(runs)
    long = any(len(run.metrics) > _POINTS for run in runs)
    for title, group in found.items():
        drawn = []
        for chart in group:
            figure, values = chart.draw(len(numbers))
            numbers.append(values)
            drawn.append(figure)
        body = f'<div class="charts">{"".join(drawn)}</div>'
        if long and title == "Reward":
            body = "<p>Lines: moving mean over a twentieth of the steps. Bands: minimum to maximum.</p>" + body
        if title == "Other metrics":
            body = f"<details><summary>show</summary>{body}</details>"
        sections.append((title, body))
    if not found:
        sections.append(("Curves", "<p>No step is complete yet.</p>"))
    sections += [
        ("Samples over training", "".join(_grids(run) for run in runs)),
        ("Best and worst samples", "".join(_extremes(run) for run in runs)),
        ("Evaluation", _evaluation(runs)),
        ("Settings", _settings(runs)),
        ("Environment", _notes_table(runs, [run.note("environment.json") for run in runs])),
    ]
    names = ", ".join(run.name for run in runs)
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>varfast: {_text(names)}</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{_text(names)}</h1></header><main>{body}</main>"
        f'<script type="application/json" id="numbers">{_script_safe(numbers)}</script>'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _script_safe(content: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


# Colours: Okabe and Ito's, told apart with any colour vision; dashes tell neighbours apart without colour.
_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--paper:#fff;--panel:#f6f8fa;--rule:#d5dae0;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#e69f00;--c5:#56b4e9}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaef;--soft:#9aa5b1;--paper:#12161b;--panel:#1b2128;--rule:#39424d;
--c0:#56b4e9;--c1:#e69f00;--c2:#009e73;--c3:#cc79a7;--c4:#f0e442;--c5:#d55e00}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1400px;padding:12px 16px 48px;background:var(--paper);color:var(--ink);
font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.4rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .6rem;padding-bottom:.2rem;border-bottom:1px solid var(--rule)}
h3{font-size:1rem;margin:1rem 0 .4rem;overflow-wrap:anywhere}
h4{font-size:.9rem;margin:.8rem 0 .3rem;font-weight:600}
p{margin:.4rem 0;color:var(--soft)}
summary{cursor:pointer;color:var(--soft);overflow-wrap:anywhere}
pre{overflow:auto;max-height:36rem;padding:10px;background:var(--panel);border-radius:6px;font-size:13px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:3px 12px 3px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
th[scope=row]{font-weight:400;color:var(--soft)}
td{min-width:5rem;max-width:28rem;overflow-wrap:break-word}
.charts{display:grid;gap:18px 24px;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.chart{margin:0;padding:10px 12px;background:var(--panel);border-radius:8px;display:flex;flex-direction:column}
.chart figcaption{flex:1;overflow-wrap:anywhere}
.chart figcaption span{color:var(--soft);font-size:13px}
.chart figcaption p{margin:0;font-size:12.5px;line-height:1.35}
.plot{position:relative;height:190px;margin:12px 10px 34px 52px;touch-action:pan-y}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:hidden;border-left:1px solid var(--soft);
border-bottom:1px solid var(--soft)}
.plot span{position:absolute;font-size:12px;line-height:1;color:var(--soft);white-space:nowrap}
.plot .y{right:100%;margin-right:6px;transform:translateY(-50%)}
.plot .x{top:100%;margin-top:6px;transform:translateX(-50%)}
.plot .axis{top:100%;right:0;margin-top:20px}
.rule{stroke:var(--rule);stroke-width:1;fill:none;vector-effect:non-scaling-stroke}
.line{stroke-width:2;fill:none;stroke-linecap:round;stroke-linejoin:round;vector-effect:non-scaling-stroke}
.band{stroke:none;opacity:.18}
.d1{stroke-dasharray:7 5}.d2{stroke-dasharray:2 5}
.c0{stroke:var(--c0);--fill:var(--c0)}.c1{stroke:var(--c1);--fill:var(--c1)}.c2{stroke:var(--c2);--fill:var(--c2)}
.c3{stroke:var(--c3);--fill:var(--c3)}.c4{stroke:var(--c4);--fill:var(--c4)}.c5{stroke:var(--c5);--fill:var(--c5)}
.band{stroke:none;fill:var(--fill)}
.cross{position:absolute;top:0;bottom:0;width:1px;background:var(--soft);pointer-events:none}
.plot output{position:absolute;top:0;z-index:1;max-width:75%;padding:4px 8px;border:1px solid var(--rule);
border-radius:6px;background:var(--paper);font-size:12.5px;white-space:pre-line;pointer-events:none;overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;margin:0;padding:0;list-style:none;font-size:12.5px}
.legend li{overflow-wrap:anywhere}
.legend svg{width:24px;height:8px;margin-right:6px}
.grids{display:inline-block;vertical-align:top;max-width:100%;margin:0 24px 12px 0}
.grids label{display:flex;gap:8px;align-items:center;font-variant-numeric:tabular-nums;margin-bottom:8px}
.grids label output{min-width:3.5em}
.grids input{flex:1;min-width:120px}
.grids img{display:block;max-width:100%;height:auto;background:#fff;padding:4px}
.grids img[hidden]{display:none}
.samples{display:grid;gap:10px;grid-template-columns:repeat(auto-fill,minmax(clamp(72px,8vw,128px),1fr));max-width:1100px}
.samples figure{margin:0;font-size:12.5px;line-height:1.3;overflow-wrap:anywhere}
.samples img{width:100%;image-rendering:auto;display:block;margin-bottom:3px}
[hidden]{display:none}
""".strip()

_SCRIPT = """
"use strict";
const numbers = JSON.parse(document.getElementById("numbers").textContent);
const text = value => value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential() : String(value);
const nearest = (values, wanted) =>
  values.reduce((best, value, i) => Math.abs(value - wanted) < Math.abs(values[best] - wanted) ? i : best, 0);
for (const plot of document.querySelectorAll(".plot")) {
  const chart = numbers[plot.dataset.chart], [low, high] = chart.x;
  const cross = plot.querySelector(".cross"), shown = plot.querySelector("output");
  const steps = [...new Set(chart.curves.flatMap(curve => curve.points.map(point => point[0])))].sort((a, b) => a - b);
  let at = -1;
  const show = index => {
    at = Math.min(Math.max(index, 0), steps.length - 1);
    const lines = ["step " + steps[at]];
    for (const curve of chart.curves) {
      const own = curve.points.map(point => point[0]);
      if (steps[at] < own[0] || steps[at] > own[own.length - 1]) continue;
      const [, value, least, most] = curve.points[nearest(own, steps[at])];
      const band = least === most ? "" : " (" + text(least) + " to " + text(most) + ")";
      lines.push((chart.curves.length > 1 ? curve.name + ": " : "") + text(value) + band);
    }
    const place = high > low ? (steps[at] - low) / (high - low) : 0.5;
    cross.style.left = 100 * place + "%";
    shown.style.left = place < 0.5 ? "calc(" + 100 * place + "% + 8px)" : "auto";
    shown.style.right = place < 0.5 ? "auto" : "calc(" + 100 * (1 - place) + "% + 8px)";
    shown.textContent = lines.join("\\n");
    cross.hidden = shown.hidden = false;
  };
  const hide = () => { cross.hidden = shown.hidden = true; };
  const point = event => {
    const box = plot.getBoundingClientRect();
    show(nearest(steps, low + (high - low) * (event.clientX - box.left) / box.width));
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (by) { show(at + by); event.preventDefault(); }
  });
}
for (const grids of document.querySelectorAll(".grids")) {
  const images = [...grids.querySelectorAll("img")], slider = grids.querySelector("input");
  const step = grids.querySelector("output");
  const turn = () => {
    images.forEach((image, index) => { image.hidden = index !== Number(slider.value); });
    step.textContent = images[slider.value].dataset.step;
  };
  slider.addEventListener("input", turn);
  turn();
}
""".strip()


def main(arguments: list[str]) -> int:
    """python -m varfast.report runs/x [runs/y ...] [out=report.html]"""
    config = parse_arguments(arguments, ReportConfig)
    paths, out = [Path(run).expanduser() for run in config.runs], Path(config.out).expanduser()
    by_name = len({path.resolve().name for path in paths}) == len(paths)
    # Bytes of a path that are no text are shown as question marks.
    names = [str(path.resolve().name if by_name else path).encode("utf-8", "replace").decode() for path in paths]
    save_text(out, page([load_run(path, name) for path, name in zip(paths, names, strict=True)]))
    print(f"{out}: {len(paths)} {'run' if len(paths) == 1 else 'runs'}, {out.stat().st_size / 1e6:.1f} MB")
    return 0
