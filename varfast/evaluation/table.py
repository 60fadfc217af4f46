"""From the numbers of each image to a table of two models, or of one.

Axes: N image.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from varfast.evaluation.features import RealImages
from varfast.evaluation.metrics import (
    NEIGHBOURS,
    Estimate,
    Numbers,
    difference_interval,
    diversity,
    fid,
    inception_score,
    mean_interval,
    neighbours,
    statistics,
)
from varfast.printable import printable
from varfast.tables import text_table

INTERVALS = (
    "95 %: normal over images, Wilson's for shares; of a difference, the same over images paired by label and seed, "
    "Bonett and Price's for shares; of diversity, over labels; none for FID, inception score and what compares "
    "neighbours"
)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: of the number.
        labels: "all", or those that the run was trained on ("seen"), or the others ("unseen").
        baseline: of the model that is compared with, which arguments and files call "reference"; None without one.
        checkpoint: of the model that is evaluated.
        difference: checkpoint - baseline.
    """

    name: str
    labels: str
    baseline: Estimate | None
    checkpoint: Estimate
    difference: Estimate | None

    def as_json(self) -> dict[str, Any]:
        """As evaluation.json holds it."""
        return {"reference" if name == "baseline" else name: value for name, value in asdict(self).items()}


def tabulate(
    baseline: Numbers | None, checkpoint: Numbers, labels_N: np.ndarray, seen: set[int] | None, real: RealImages | None
) -> list[Row]:
    """The table of two models' numbers, or of one's.

    Args:
        baseline, checkpoint: arrays of N rows by name, as Judge names them; image by image of the same label and seed.
        labels_N: of the images.
        seen: labels that the run was trained on, where that was not all of them: rows for seen and unseen labels are
            added.
        real: the images that features are compared with.
    """
    groups = {"all": np.ones(len(labels_N), dtype=bool)}
    if seen is not None:
        is_seen_N = np.isin(labels_N, sorted(seen))
        groups |= {name: rows_N for name, rows_N in (("seen", is_seen_N), ("unseen", ~is_seen_N)) if rows_N.any()}
    models = (baseline, checkpoint)
    rows = []
    for name in [n for n in checkpoint if n.startswith("score/") or n in ("top1", "top5")]:
        for group, rows_N in groups.items():
            values = [None if numbers is None else numbers[name][rows_N] for numbers in models]
            rows.append(_paired_row(name, group, *values))
    if "features" in checkpoint:
        spread = [None if numbers is None else diversity(numbers["features"], labels_N) for numbers in models]
        if spread[1] is not None and len(spread[1]):
            rows.append(_paired_row("diversity", "all", *spread))
        before = _of_the_set(baseline, real) if baseline is not None else None
        for name, value in _of_the_set(checkpoint, real).items():
            old = None if before is None else Estimate(before[name])
            rows.append(Row(name, "all", old, Estimate(value), old and Estimate(value - old.value)))
    return rows


def _paired_row(name: str, group: str, before: np.ndarray | None, after: np.ndarray | None) -> Row:
    assert after is not None
    if before is None:
        return Row(name, group, None, mean_interval(after), None)
    return Row(name, group, mean_interval(before), mean_interval(after), difference_interval(before, after))


def _of_the_set(numbers: Numbers, real: RealImages | None) -> dict[str, float]:
    """Numbers that a set of images has, and no single image."""
    found = {"inception_score": inception_score(numbers["logits"])}
    if real is not None:
        found["fid"] = fid(real.statistics, statistics(numbers["features"]))
        if real.features_MD is not None:
            found |= neighbours(real.features_MD, numbers["features"])
    return found


def table(rows: list[Row]) -> str:
    """Text: name, reference, checkpoint, difference, with intervals."""
    paired = any(row.baseline for row in rows)
    lines = [["", "reference", "checkpoint", "difference"] if paired else ["", "checkpoint"]]
    for row in rows:
        name = printable(row.name if row.labels == "all" else f"{row.name}, {row.labels} labels")
        cells = [
            row.baseline.text() if row.baseline else "",
            row.checkpoint.text(),
            row.difference.text("+") if row.difference else "",
        ]
        lines.append([name, *(cells if paired else cells[1:2])])
    return "\n".join(text_table(lines, "<" * len(lines[0])))


def about(result: dict[str, Any]) -> str:
    """What the table is of, in a few lines, from the content of evaluation.json."""
    lines = [f"{result['images']} images a model, of {result['labels']} labels."]
    if result["features"]:
        lines.append(
            f"Features: {result['features']}. FID falls as samples grow in number: compare equal numbers alone."
        )
    if result["real_images"]:
        lines.append(f"{result['real_images']} real images; {NEIGHBOURS} nearest neighbours.")
    return "\n".join([*lines, f"Intervals: {result['intervals']}."])
