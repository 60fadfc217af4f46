"""The page, in this order: what happened, before beside after, verdicts; numbers, curves, samples, settings."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from varfast.report.axes import AXES, Axis, chosen, positions
from varfast.report.by_label import by_label
from varfast.report.charts import COLOURS, SMOOTHED, SMOOTHING, charts
from varfast.report.elements import Markup, brief, html_table, masked, text
from varfast.report.evaluation import evaluations
from varfast.report.outcome import about, best_of, headline, table
from varfast.report.run import Run
from varfast.report.samples import before_after, extremes, over_training
from varfast.report.script import SCRIPT
from varfast.report.spent import charts_of_samples, side_by_side
from varfast.report.style import STYLE
from varfast.report.verdicts import CHECKS, HEALTHY, Verdict, healthy, last_tenth, mean, sign, verdicts, worst


def page(runs: Sequence[Run], over: Axis | Literal["auto"] = "auto") -> str:
    """The report as HTML. over: what curves are drawn over at first."""
    over = chosen(runs, over)
    curves, numbers = _curves(runs, over)
    found = [verdicts(run) for run in runs]
    sections = [
        ("In numbers", _numbers(runs)),
        ("Verdicts", _verdicts_side_by_side(runs, found)),
        ("Curves", _controls(runs, over) + curves if curves else ""),
        ("Samples over training", _over_training(runs)),
        ("Best and worst samples", "".join(map(extremes, runs))),
        ("Evaluation", evaluations(runs)),
        ("Settings", _settings(runs)),
        ("Environment", _environment(runs)),
        ("Left out", _left_out(runs)),
    ]
    names = ", ".join(brief(run.name) for run in runs)
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>varfast: {text(names)}</title><style>{STYLE}</style></head><body>"
        f"{_first_screen(runs, found)}<main>{body}</main>"
        f'<script type="application/json" id="numbers">{_script_safe(numbers)}</script>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _script_safe(content: Any) -> str:
    """JSON that cannot close the script element around it. Letters beyond ASCII are escaped."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


# ---------------------------------------------------------------------------------------------------------------------
# The first screen


def _first_screen(runs: Sequence[Run], found: Sequence[dict[str, Verdict]]) -> str:
    if len(runs) > 1:
        best = best_of(runs)
        top = f'<p class="headline">{best}.</p>' if best else ""
        pairs = "".join(_one_of_several(run, place) for place, run in enumerate(runs))
        return (
            f"<header><h1>{len(runs)} runs</h1>{top}{side_by_side(runs, list(map(_summed_up, found)))}</header>"
            f'<div class="several">{pairs}</div>'
        )
    (run,) = runs
    return (
        f'<header><h1>{text(brief(run.name))}</h1><p class="headline">{headline(run)}.</p>'
        f"<p>{text(about(run))}</p></header>"
        f'<div class="first">{before_after(run, 0)}<div class="verdicts"><h2>{_summed_up(found[0])}</h2>'
        f"{_verdict_list(run, found[0])}</div></div>"
    )


def _one_of_several(run: Run, place: int) -> str:
    title = f"<h2>{_key(place)}{text(brief(run.name))}</h2>"
    return f"<section>{title}<p>{headline(run)}.</p>{before_after(run, place, alone=False)}</section>"


def _key(place: int) -> str:
    """The line of a run, as in the charts."""
    css = f"line c{place % COLOURS} d{place % 3}"
    return f'<svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path class="{css}" d="M0 4H24"/></svg>'


def _summed_up(found: dict[str, Verdict]) -> Markup:
    """The worst verdict of a run, and what it is about."""
    level = worst(list(found.values()))
    about = ", ".join(CHECKS[check] for check, v in found.items() if v.level == level and level != "healthy")
    judged = sum(v.level is not None for v in found.values())
    return Markup(f"{sign(level)} {text(about[:1] + about[1:].lower()) or f'in all {judged} checks'}")


def _verdict_list(run: Run, found: dict[str, Verdict]) -> str:
    items = []
    for check, v in found.items():
        told = check in HEALTHY and v.level in ("look", "broken")
        advice = f" Otherwise: {healthy(check, [run])[1]}." if told else ""
        items.append(
            f"<li>{sign(v.level)}<div><b>{CHECKS[check]}</b> {text(v.value)}"
            f"<small>{text(v.rule)}{'.' if v.rule and advice else ''}{text(advice)}</small></div></li>"
        )
    return f"<ul>{''.join(items)}</ul>"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def _numbers(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        if found := table(run):
            parts.append(f"<div>{f'<h3>{text(brief(run.name))}</h3>' if len(runs) > 1 else ''}{found}</div>")
    if found := by_label(runs):
        parts.append(f"<div>{found}</div>")
    return f'<div class="beside">{"".join(parts)}</div>{_glance(runs)}' if parts else _glance(runs)


def _glance(runs: Sequence[Run]) -> str:
    """Means of the first and last tenth of the steps, for the metrics that people look at first."""

    def first_to_last(run: Run, metric: str) -> str:
        values = run.series(metric)[1]
        tenth = max(1, len(values) // 10)
        return f"{mean(values[:tenth]):.4g} \u2192 {last_tenth(values):.4g}" if values else ""

    names = ("reward_mean", "kl", "entropy", "pair_accuracy", "implicit_margin", "images_per_s")
    rows = [(name, [first_to_last(run, name) for run in runs]) for name in names]
    rows = [(name, cells) for name, cells in rows if any(cells)]
    if not rows:
        return ""
    columns = [run.name for run in runs] if len(runs) > 1 else ["first \u2192 last"]
    arrows = "<p>In training: from the mean of the first tenth of the steps to that of the last.</p>"
    return f"<details><summary>Numbers of the steps</summary>{html_table(columns, rows)}{arrows}</details>"


def _verdicts_side_by_side(runs: Sequence[Run], found: Sequence[dict[str, Verdict]]) -> str:
    """Of several runs: a row for each check, a column for each run."""
    if len(runs) < 2:
        return ""
    rows = []
    for check, title in CHECKS.items():
        of_runs = [of_run.get(check) for of_run in found]
        judged = [v for v in of_runs if v is not None]
        if judged:
            # The limits are the same for all runs, but for some checks the rule is the reason.
            common = {v.rule for v in judged if v.level is not None}
            rule = common.pop() if len(common) == 1 else ""
            means = f"{healthy(check, runs)[0]}. " if check in HEALTHY else ""
            rows.append(
                (title, [*(_cell(v, rule) for v in of_runs), Markup(f"{text(means)}<small>{text(rule)}</small>")])
            )
    return html_table([*(run.name for run in runs), "healthy is"], rows)


def _cell(found: Verdict | None, rule: str) -> Markup:
    if found is None:
        return Markup("")
    why = f" <small>{text(found.rule)}</small>" if found.rule != rule else ""
    return Markup(f"{sign(found.level)} {text(found.value)}{why}")


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def _curves(runs: Sequence[Run], over: Axis) -> tuple[str, dict[str, Any]]:
    """Groups of charts, and what the script needs of them, in the order of the page."""
    numbers: list[dict[str, Any]] = []
    parts: list[str] = []
    groups = charts(runs, over)
    if samples := charts_of_samples(runs, over):
        groups = {"Fresh samples": samples} | groups
    for title, group in groups.items():
        drawn = []
        for chart in group:
            figure, values = chart.draw(len(numbers))
            numbers.append(values)
            drawn.append(figure)
        body = f'<div class="charts">{"".join(drawn)}</div>'
        closed = f"<details><summary>{title}</summary>{body}</details>"
        parts.append(closed if title == "Other metrics" else f"<h3>{title}</h3>{body}")
    return "".join(parts), {"charts": numbers, "smoothed": SMOOTHED}


def _controls(runs: Sequence[Run], over: Axis) -> str:
    """What the script can change about all curves. Without it, they are not shown."""
    axes: list[Axis] = ["step", *(axis for axis in AXES if any(axis in positions(run, []) for run in runs))]
    parts = [_choice("over", "Over", {axis: AXES[axis] for axis in axes}, over)] if len(axes) > 1 else []
    parts.append(
        f'<label>Smoothing <input type="range" name="smoothing" min="0" max="0.99" step="0.01" value="{SMOOTHING}" '
        f'autocomplete="off"> <output>{SMOOTHING:.2f}</output></label>'
    )
    parts.append(_choice("scale", "y axes", {"auto": "auto", "linear": "linear", "log": "log"}, "auto"))
    if len(runs) > 1:
        boxes = "".join(
            f'<label><input type="checkbox" name="run" value="{text(brief(run.name))}" checked autocomplete="off">'
            f"{_key(place)}{text(brief(run.name))}</label>"
            for place, run in enumerate(runs)
        )
        parts.append(f"<fieldset><legend>Runs</legend>{boxes}</fieldset>")
    about = (
        f"<p>A curve of more than {SMOOTHED} points is smoothed by an exponential moving average, as in TensorBoard; "
        "its values as they are stand pale behind it.</p>"
    )
    return f'<div class="controls" hidden>{"".join(parts)}</div>{about}'


def _choice(name: str, title: str, choices: dict[Any, str], at_first: str) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="{name}" value="{value}"{" checked" if value == at_first else ""} '
        f'autocomplete="off"> {shown}</label>'
        for value, shown in choices.items()
    )
    return f"<fieldset><legend>{title}</legend>{buttons}</fieldset>"


# ---------------------------------------------------------------------------------------------------------------------
# Samples and settings


def _over_training(runs: Sequence[Run]) -> str:
    parts = []
    for place, run in enumerate(runs):
        if found := over_training(run, place):
            parts.append((f"<h3>{text(brief(run.name))}</h3>" if len(runs) > 1 else "") + found)
    return "".join(parts)


def _settings(runs: Sequence[Run]) -> str:
    parts = []
    if len(runs) > 1:
        keys = dict.fromkeys(key for run in runs for key in run.settings if key != "run.dir")
        rows = [(key, [run.settings.get(key, "not set") for run in runs]) for key in keys]
        rows = [(key, values) for key, values in rows if any(value != values[0] for value in values)]
        parts.append(
            html_table([run.name for run in runs], rows) if rows else "<p>The runs have the same settings.</p>"
        )
    for run in runs:
        if run.config:
            title = f"<summary>{text(brief(run.name))}: config.yaml, resolved</summary>"
            parts.append(f"<details>{title}<pre>{text(run.config)}</pre></details>")
    return "".join(parts)


def _environment(runs: Sequence[Run]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.environment)
    rows = [(name, [run.environment.get(name) for run in runs]) for name in names]
    return html_table([run.name for run in runs], rows) if rows else ""


def _left_out(runs: Sequence[Run]) -> str:
    notes = [f"{run.name}: {note}" for run in runs for note in run.left_out[:100]]
    return "".join(f"<p>{text(masked(note))}</p>" for note in notes)
