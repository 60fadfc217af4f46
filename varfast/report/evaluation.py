"""What `python -m varfast.evaluate` measured, in the folder evaluation/ of the runs: of one run, and of several."""

from __future__ import annotations

from collections.abc import Sequence

from varfast.evaluation.metrics import Estimate, interval_text
from varfast.evaluation.table import row_title
from varfast.report.elements import brief, html_table, text
from varfast.report.reading import Estimated, Evaluation, EvaluationRow
from varfast.report.run import Run

# Groups of prompts by domain, and how the page calls them. Others are tags, as "tag:counting".
DOMAINS = {"all": "all prompts", "train": "trained on", "held_out": "held out", "out_of_domain": "out of domain"}
_TAG = "tag:"


def evaluations(runs: Sequence[Run]) -> str:
    """The tables of each run, after one of all runs if there are several."""
    measured = [run for run in runs if run.evaluation is not None]
    together = _side_by_side(measured) if len(measured) > 1 else ""
    return together + "".join(map(_measured, measured))


def shown(estimate: Estimate | Estimated | None, sign: str = "") -> str:
    return "" if estimate is None else interval_text(estimate.value, estimate.low, estimate.high, sign)


def _measured(run: Run) -> str:
    """Table and pictures of a run."""
    found = run.evaluation
    assert found is not None
    sides = [side for side in ("reference", "checkpoint", "difference") if any(getattr(r, side) for r in found.rows)]

    def cells(row: EvaluationRow) -> list[str]:
        return [shown(getattr(row, side), "+" if side == "difference" else "") for side in sides]

    tags = [row for row in found.rows if found.prompts is not None and row.labels.startswith(_TAG)]
    rows = [(_title(found, row), cells(row)) for row in found.rows if row not in tags]
    each = "a model and guidance" if len({row.cfg for row in found.rows}) > 1 else "a model"
    about = f"{found.images} images {each}, of {_number_of(found)}. Intervals: {brief(found.intervals, 1000)}."
    parts = [f"<h3>{text(brief(run.name))}: varfast.evaluate</h3>{html_table(sides, rows)}"]
    if tags:
        parts.append(f"<h4>By tag</h4>{html_table(sides, [(_title(found, row), cells(row)) for row in tags])}")
    parts.append(f"<p>{text(about)}</p>")
    if run.evaluation_picture is not None:
        pictures, kind = found.pictures, "label" if found.prompts is None else "prompt"
        columns = ", then ".join(dict.fromkeys(brief(column.of, 60) for column in pictures.columns)) if pictures else ""
        of_rows = pictures.titles if pictures else None
        if pictures and not of_rows:
            of_rows = [run.label(row).removeprefix("label ") for row in pictures.rows]
        named = ", ".join(brief(title, 200) for title in (of_rows or [])[:20])
        rows_are = f"A row a {kind} ({named})" if named else f"A row a {kind}"
        caption = f"{rows_are}; from the left: {columns or 'the models'}, the same seeds."
        parts.append(
            f'<figure class="measured"><img src="{run.evaluation_picture}" alt="{text(caption)}"><figcaption>'
            f"{text(caption)}</figcaption></figure>"
        )
    return "".join(parts)


def _number_of(found: Evaluation) -> str:
    return f"{found.labels} labels" if found.prompts is None else f"{found.prompts} prompts"


def _title(found: Evaluation, row: EvaluationRow) -> str:
    """Of a row of the table: the number, the group that it is of, and what else tells rows apart."""
    several = len({other.features for other in found.rows} - {None}) > 1
    guided = len({other.cfg for other in found.rows}) > 1 and row.cfg is not None
    title = row_title(row.name, _group(found, row.labels), row.features if several else None)
    return title + (f", cfg {brief(row.cfg)}" if guided else "")


def _group(found: Evaluation, labels: str) -> str:
    if found.prompts is None or labels == "all":
        return labels
    return DOMAINS.get(labels, labels.removeprefix(_TAG))


def _side_by_side(runs: Sequence[Run]) -> str:
    """What each run's model reaches, by number and group of prompts, as far as at least two of them have it."""
    found: dict[str, dict[str, str]] = {}
    for run in runs:
        assert run.evaluation is not None
        for row in run.evaluation.rows:
            if row.checkpoint is not None:
                found.setdefault(_title(run.evaluation, row), {})[run.name] = shown(row.checkpoint)
    rows = [
        (title, [of_runs.get(run.name, "") for run in runs]) for title, of_runs in found.items() if len(of_runs) > 1
    ]
    return f"<h3>Side by side</h3>{html_table([run.name for run in runs], rows)}" if rows else ""
