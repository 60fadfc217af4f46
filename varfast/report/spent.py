"""What runs reached, and what they had spent by then: a table, and curves of fresh samples over compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from varfast.report.axes import AXES, SPENT, Axis
from varfast.report.charts import Chart, Curve
from varfast.report.elements import Markup, html_table, text
from varfast.report.evaluation import DOMAINS
from varfast.report.outcome import before_to_after, spent_on
from varfast.report.run import Run, domain_of


def side_by_side(runs: Sequence[Run], verdicts: Sequence[Markup]) -> str:
    """The table of several runs: what fresh samples earn, the verdict, steps, and what they spent."""
    axes = [axis for axis in SPENT if any(axis in run.spent for run in runs)]
    names = list(dict.fromkeys(name for run in runs for name in _of_samples(run)))
    columns = ["verdict", *(f"{name}, before \u2192 after" for name in names), "steps"]
    columns += ["time" if axis == "hours" else AXES[axis] for axis in axes]
    columns += ["ended by"] if any(run.ended_by for run in runs) else []
    rows = [
        (
            run.name,
            [verdict, *(before_to_after(run, name) for name in names), run.metrics.last_step]
            + [spent_on(run, axis) for axis in axes]
            + ([run.ended_by] if "ended by" in columns else []),
        )
        for run, verdict in zip(runs, verdicts, strict=True)
    ]
    about = (
        "FLOP are model FLOP of the policy: sampling, decoding, reference, forward and backward of images that have "
        "a gradient; rewards and evaluations are not among them. The time is that of the steps."
    )
    return html_table(columns, rows) + (f"<p><small>{text(about)}</small></p>" if axes else "")


def _of_samples(run: Run) -> list[str]:
    """Names in the table of before and after: total reward and accuracy, of each domain of prompts."""
    return [name for name in run.summary.get("after", {}) if domain_of(name)[0] in ("reward", "accuracy")]


def charts_of_samples(runs: Sequence[Run], over: Axis) -> list[Chart]:
    """Of several runs, from the base at 0 to the end of each: what fresh samples and evaluations measured."""
    if len(runs) < 2:
        return []
    found: dict[str, list[Curve]] = {}
    for style, run in enumerate(runs):
        for title, before, after in _ends(run):
            step = run.metrics.last_step if run.measured_step is None else run.measured_step
            points = [(0, before, before, before), (step, after, after, after)]
            spent = {axis: [0.0, run.spent[axis]] for axis in SPENT if axis in run.spent}
            if step > 0 and spent:
                found.setdefault(title, []).append(Curve(run.name, style, points, spent))
    notes = ("From the base to the end of each run, on fresh samples.",)
    return [
        Chart(title, "", curves, from_zero=False, legend=True, notes=notes, over=over)
        for title, curves in found.items()
        if len(curves) > 1
    ]


def _ends(run: Run) -> Iterator[tuple[str, float, float]]:
    """Number, before and after: of the table of before and after, and by domain of an evaluation of prompts."""
    before, after = (run.summary.get(when, {}) for when in ("before", "after"))
    for name in _of_samples(run):
        if name in before:
            yield f"{name} of samples", before[name], after[name]
    found = run.evaluation
    for row in found.rows if found is not None else ():
        ends = [side.value if side is not None else None for side in (row.reference, row.checkpoint)]
        if ends[0] is not None and ends[1] is not None and row.labels in DOMAINS and row.features is None:
            group = "" if row.labels == "all" else f", {DOMAINS[row.labels]}"
            yield f"{row.name}{group}", ends[0], ends[1]
