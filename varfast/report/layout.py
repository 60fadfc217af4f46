"""The page, in this order: what changed, whether the run is healthy, curves, samples, evaluation, settings."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from varfast.evaluation.metrics import Estimate, difference_interval
from varfast.report.axes import AXES, Axis, chosen, positions
from varfast.report.charts import SMOOTHED, charts
from varfast.report.elements import Markup, brief, html_table, masked, text
from varfast.report.evaluation import evaluations, shown
from varfast.report.pictures import Extremes
from varfast.report.reading import Sample
from varfast.report.run import Run, domain_of
from varfast.report.spent import charts_of_samples, side_by_side, spent_sentence
from varfast.report.style import SCRIPT, STYLE
from varfast.report.verdicts import HEALTHY, badge, last_tenth, mean, verdict


def page(runs: Sequence[Run], over: Axis | Literal["auto"] = "auto") -> str:
    """The report as HTML. over: what curves are drawn over at first."""
    drawn, numbers = _curves(runs, chosen(runs, over))
    sections = [("What changed", _changed(runs)), ("At what cost", side_by_side(runs))]
    sections += [("Is it healthy?", _health(runs)), *drawn]
    sections += [
        ("Best and worst samples", "".join(map(_extremes, runs))),
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
        f"<header><h1>{text(names)}</h1></header><main>{body}</main>"
        f'<script type="application/json" id="numbers">{_script_safe(numbers)}</script>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _script_safe(content: Any) -> str:
    """JSON that cannot close the script element around it. Letters beyond ASCII are escaped."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


# ---------------------------------------------------------------------------------------------------------------------
# What changed


def _changed(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        name = f"<h3>{text(brief(run.name))}</h3>" if len(runs) > 1 else ""
        parts.append(f'{name}<div class="run"><div>{_headline(run)}</div>{_before_after_pictures(run)}</div>')
    return "".join(parts)


def _headline(run: Run) -> str:
    """Before and after on fresh samples, with the interval of the difference; or why it was not measured."""
    steps = _steps(run)
    if not run.summary:
        reason = "Not measured: before and after are written when a run is complete"
        reason += ", and this one has eval.samples_per_label=0." if run.number("eval.samples_per_label") == 0 else "."
        return f"<p>{reason}</p>{_first_to_last(run)}<p>{text(steps)}</p>"
    changes = {name: _change(run, name) for name in _of_summary(run)}
    first = "reward" if "reward" in changes else next(iter(changes))
    before, after = (run.summary.get(when, {}).get(first) for when in ("before", "after"))
    difference = shown(changes[first], "+") if changes[first] is not None else ""
    headline = f"{text(_reward_name(run, first))} <b>{text(brief(before))} \u2192 {text(brief(after))}</b>"
    about = "Means over images; no interval, since before_after.json does not hold the images' values."
    if run.pairs:
        images = len(next(iter(run.pairs["after"].values())))
        kind, whose = ("prompts", " of the prompts trained on") if run.prompts else ("labels", "")
        about = (
            f"{images} fresh images{whose}, before and after with the same {kind} and random numbers; intervals: 95 %, "
            "over pairs of images."
        )
    rows = [
        (
            _reward_name(run, name),
            [*(run.summary.get(when, {}).get(name) for when in ("before", "after")), shown(c, "+")],
        )
        for name, c in changes.items()
    ]
    detail = html_table(["before", "after", "difference"], rows)
    top = f'<p class="headline">{headline} <small>{text(difference)}</small></p>'
    return f"{top}{detail}<p>{about}</p><p>{text(steps)}</p>"


def _of_summary(run: Run) -> list[str]:
    """Names of the table's rows. A single reward is skipped if it equals the total reward."""
    names = list(dict.fromkeys(name for numbers in run.summary.values() for name in numbers))
    components = [name for name in names if name.startswith("reward/")]
    several = len({domain_of(name)[0] for name in components}) > 1
    return [name for name in names if name not in components or several or not _repeats(run, name)]


def _repeats(run: Run, component: str) -> bool:
    total = f"reward{domain_of(component)[1]}"
    return all(numbers.get(total) == numbers.get(component) for numbers in run.summary.values())


def _reward_name(run: Run, name: str) -> str:
    components = {domain_of(n)[0] for numbers in run.summary.values() for n in numbers if n.startswith("reward/")}
    only = next(iter(components)) if len(components) == 1 else ""
    named = f"reward ({only.removeprefix('reward/')})"
    whole, domain = domain_of(name)
    return f"{named}{domain}" if whole == "reward" and only and _repeats(run, f"{only}{domain}") else name


def _change(run: Run, name: str) -> Estimate | None:
    if run.pairs:
        return difference_interval(run.pairs["before"][name], run.pairs["after"][name])
    before, after = (run.summary.get(when, {}).get(name) for when in ("before", "after"))
    return None if before is None or after is None else Estimate(after - before)


def _steps(run: Run) -> str:
    done, asked = run.metrics.last_step, run.number("run.steps")
    said = f"{done} of {asked:g} steps." if asked is not None and done <= asked else f"{done} steps."
    if asked is not None and done > asked:
        said = f"{done} steps are done; the config now asks for {asked:g}."
    if run.measured_step is not None and run.summary and run.measured_step != done:
        said += f' "After" was sampled after step {run.measured_step}.'
    return f"{said} {spent_sentence(run)}".strip()


def _first_to_last(run: Run) -> str:
    values = run.series("reward_mean")[1]
    if not values:
        return ""
    first = mean(values[: max(1, len(values) // 10)])
    return (
        f'<p class="headline">reward_mean <b>{first:.4g} \u2192 {last_tenth(values):.4g}</b></p>'
        "<p>In training: means of the first and the last tenth of the steps, each over samples of its own.</p>"
    )


def _before_after_pictures(run: Run) -> str:
    """The first sample grid beside the later ones, all with the same labels and random numbers."""
    if not run.grids:
        return "<p>No sample grids.</p>"
    kind = "prompt" if run.prompts else "label"
    first, *later = run.grids
    when = "before" if first.step == 0 else "at first"
    left = (
        f"<figure><figcaption>{when}: step {first.step}</figcaption>"
        f'<img src="{first.uri}" alt="grid of samples at step {first.step}, {when}" width="{first.width}" '
        f'height="{first.height}"></figure>'
    )
    if not later:
        return f'<div class="grids pair">{left}</div>'
    images = "".join(
        f'<img src="{grid.uri}" alt="grid of the same samples at step {grid.step}" data-step="{grid.step}" '
        f'width="{grid.width}" height="{grid.height}"{"" if grid is later[-1] else " hidden"}>'
        for grid in later
    )
    last = later[-1].step
    slider = (
        f'<label>step <output>{last}</output> <input type="range" min="0" max="{len(later) - 1}" '
        f'value="{len(later) - 1}" aria-label="step of the grid on the right"></label>'
        if len(later) > 1
        else ""
    )
    hidden = f"; {len(run.grids)} of {run.num_grids} grids are shown" if len(run.grids) < run.num_grids else ""
    return (
        f'<div class="grids pair">{left}<figure><figcaption>after: step <output>{last}</output></figcaption>{images}'
        f"</figure>{slider}<p>A row a {kind}; the same random numbers at every step{hidden}.</p>{_grid_rows(run)}</div>"
    )


def _grid_rows(run: Run) -> str:
    """The prompts of the grids, whole: the pictures have space for their beginnings. Labels are written there."""
    if not run.prompts or not run.grid_rows:
        return ""
    rows = "".join(f"<li>{text(row)}</li>" for row in run.grid_rows)
    return f'<ol class="rows" aria-label="prompts of the rows, from the top">{rows}</ol>'


# ---------------------------------------------------------------------------------------------------------------------
# Is it healthy?


def _health(runs: Sequence[Run]) -> str:
    rows = []
    for metric, (good, _) in HEALTHY.items():
        found = [verdict(run, metric) for run in runs]
        if any(found):
            cells = [Markup(f"{text(v.value)} {badge(v)}") if v else "" for v in found]
            rows.append((metric, [*cells, good]))
    if not rows:
        return "<p>No step is complete yet.</p>"
    columns = [run.name for run in runs] if len(runs) > 1 else ["found"]
    return html_table([*columns, "healthy is"], rows) + _glance(runs)


def _glance(runs: Sequence[Run]) -> str:
    """Means of the first and last tenth of the steps, for the metrics that people look at first."""

    def first_to_last(run: Run, metric: str) -> str:
        values = run.series(metric)[1]
        tenth = max(1, len(values) // 10)
        return f"{mean(values[:tenth]):.4g} \u2192 {last_tenth(values):.4g}" if values else ""

    names = ("reward_mean", "kl", "entropy", "pair_accuracy", "implicit_margin", "images_per_s")
    rows = [(name, [first_to_last(run, name) for run in runs]) for name in names]
    rows = [(name, cells) for name, cells in rows if any(cells)]
    columns = [run.name for run in runs] if len(runs) > 1 else ["first \u2192 last"]
    arrows = "<p>In training: from the mean of the first tenth of the steps to that of the last.</p>"
    return f"<details><summary>Numbers of the steps</summary>{html_table(columns, rows)}{arrows}</details>"


def _curves(runs: Sequence[Run], over: Axis) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """Sections of charts, and the numbers of all charts in the order of the page."""
    numbers: list[dict[str, Any]] = []
    sections: list[tuple[str, str]] = []
    long = any(len(steps) > SMOOTHED for run in runs for steps, _ in run.metrics.columns.values())
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
        if title == "Reward" and long:
            body = "<p>Lines: moving mean over a twentieth of the steps. Bands: minimum to maximum.</p>" + body
        if title == "Other metrics":
            body = f"<details><summary>show</summary>{body}</details>"
        sections.append((title, body if sections else _choice(runs, over) + body))
    return sections, numbers


def _choice(runs: Sequence[Run], over: Axis) -> str:
    """What curves are drawn over; nothing to choose where no run says what it has spent."""
    axes: list[Axis] = ["step", *(axis for axis in AXES if any(axis in positions(run, []) for run in runs))]
    if len(axes) == 1:
        return ""
    checked = {axis: " checked" if axis == over else "" for axis in axes}
    choices = "".join(
        f'<label><input type="radio" name="over" value="{axis}"{checked[axis]}> {AXES[axis]}</label>' for axis in axes
    )
    return f'<fieldset class="over"><legend>All curves over</legend>{choices}</fieldset>'


# ---------------------------------------------------------------------------------------------------------------------
# Samples, evaluation, settings


def _extremes(run: Run) -> str:
    found = run.extremes
    if found is None:
        return f"<h3>{text(brief(run.name))}</h3><p>No samples.</p>"
    rows = [f"<h3>{text(brief(run.name))}, step {found.step}</h3>{_tied(found)}"]
    for title, samples in (("best", found.samples.best), ("worst", found.samples.worst)):
        cells = [
            f'<figure><img src="{uri}" alt="{title} {place}: {text(run.label(sample.label))}, reward '
            f'{text(brief(sample.reward))}"><figcaption>{_sample_caption(run, sample)}</figcaption></figure>'
            for place, (sample, uri) in enumerate(zip(samples, found.uris[title], strict=True), start=1)
        ]
        rows.append(f'<h4>{title} of the step, by reward</h4><div class="samples">{"".join(cells)}</div>')
    return "".join(rows)


def _tied(found: Extremes) -> str:
    """A note for ties: which of the equal samples are shown says nothing about the images."""
    best, worst = found.samples.best, found.samples.worst
    rewards = {sample.reward for sample in (*best, *worst)}
    if len(rewards) == 1:
        return f"<p>All samples shown have the reward {text(brief(rewards.pop()))}: none is better than another.</p>"
    notes = []
    for title, samples in (("best", best), ("worst", worst)):
        ties = found.samples.ties.get(title, 0)
        if len({sample.reward for sample in samples}) == 1 and ties > len(samples):
            of_step = f"{ties} of the step's {brief(found.samples.images) or 'samples'} have the {title} reward"
            notes.append(f"{of_step}; {len(samples)} of them are shown, of as many labels as possible.")
    return "".join(f"<p>{text(note)}</p>" for note in notes)


def _sample_caption(run: Run, sample: Sample) -> str:
    shown = f"{text(run.label(sample.label))}<br>{text(brief(sample.reward))}"
    if len(sample.rewards) > 1:
        shown += "".join(f"<br><small>{text(brief(n, 60))} {text(brief(v))}</small>" for n, v in sample.rewards.items())
    return shown


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
