"""From the numbers of each image to a table of two models, or of one, with one guidance or several.

Axes: N image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from varfast.evaluation.features import RealImages
from varfast.evaluation.judge import columns_of
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
INTERVALS_OF_PROMPTS = (
    "95 %: normal over prompts, of each of which the mean of its images counts, Wilson's for shares; of a difference, "
    "the same over prompts, whose images have the same seeds, Bonett and Price's for shares; of a mean over tags, from "
    "those of the tags; none for FID, inception score and what compares neighbours"
)
_OF_LABELS = ("seen", "unseen")


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: of the number.
        labels: "all", or those that the run was trained on ("seen"), or the others ("unseen"). Of prompts "train",
            "held_out" or "out_of_domain", or a kind of them, as "tag:counting".
        baseline: of the model that is compared with, which arguments and files call "reference"; None without one.
        checkpoint: of the model that is evaluated.
        difference: checkpoint - baseline.
        features: what the images are compared by; None for numbers of each image.
        cfg: guidance of the images; None if it is not known.
    """

    name: str
    labels: str
    baseline: Estimate | None
    checkpoint: Estimate
    difference: Estimate | None
    features: str | None = None
    cfg: float | None = None

    def as_json(self) -> dict[str, Any]:
        """As evaluation.json holds it."""
        return {"reference" if name == "baseline" else name: value for name, value in asdict(self).items()}


def tabulate(
    baseline: Numbers | None,
    checkpoint: Numbers,
    labels_N: np.ndarray,
    groups: Mapping[str, set[int]],
    real: Mapping[str, RealImages | None],
    cfg: float | None = None,
    of_prompts: bool = False,
) -> list[Row]:
    """The table of two models' numbers, or of one's.

    Args:
        baseline, checkpoint: arrays of N rows by name, as Judge names them; image by image of the same label and seed.
        labels_N: of the images, or the ids of their prompts.
        groups: labels or ids by the name of their group, for which rows are added.
        real: by the name of the features, the images that they are compared with, if there are any.
        cfg: guidance of the images.
        of_prompts: the images of a prompt, of which there are equally many each, are one observation: they are less
            unlike than those of several.
    """
    rows_of = {"all": np.ones(len(labels_N), dtype=bool)}
    found = {group: np.isin(labels_N, sorted(ids)) for group, ids in groups.items()}
    rows_of |= {group: rows_N for group, rows_N in found.items() if rows_N.any()}
    models = (baseline, checkpoint)
    rows = []
    for name in [n for n in checkpoint if n.startswith("score/") or n in ("top1", "top5")]:
        for group, rows_N in rows_of.items():
            values = [None if numbers is None else numbers[name][rows_N] for numbers in models]
            if of_prompts:
                values = [None if each is None else mean_of_each(each, labels_N[rows_N]) for each in values]
            rows.append(_paired_row(name, group, *values))
    for network, images in real.items():
        columns = columns_of(network, list(real))
        rows += [replace(row, features=network) for row in _of_features(*models, labels_N, *columns, images)]
    return [replace(row, cfg=cfg) for row in rows]


def mean_of_each(values_N: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """(labels,) means of the images of each label or prompt, ascending."""
    _, rows_N = np.unique(labels_N, return_inverse=True)
    means: np.ndarray = np.bincount(rows_N, values_N.astype(np.float64)) / np.bincount(rows_N)
    return means


def _paired_row(name: str, group: str, before: np.ndarray | None, after: np.ndarray | None) -> Row:
    assert after is not None
    if before is None:
        return Row(name, group, None, mean_interval(after), None)
    return Row(name, group, mean_interval(before), mean_interval(after), difference_interval(before, after))


def _of_features(
    baseline: Numbers | None,
    checkpoint: Numbers,
    labels_N: np.ndarray,
    features: str,
    logits: str | None,
    real: RealImages | None,
) -> list[Row]:
    """The rows of one network. features, logits: names of its arrays."""
    models, rows = (baseline, checkpoint), []
    spread = [None if numbers is None else diversity(numbers[features], labels_N) for numbers in models]
    if spread[1] is not None and len(spread[1]):
        rows.append(_paired_row("diversity", "all", *spread))
    before, after = (
        None if numbers is None else _of_the_set(numbers[features], None if logits is None else numbers[logits], real)
        for numbers in models
    )
    assert after is not None
    for name, value in after.items():
        old = None if before is None else Estimate(before[name])
        rows.append(Row(name, "all", old, Estimate(value), old and Estimate(value - old.value)))
    return rows


def _of_the_set(features_ND: np.ndarray, logits_NK: np.ndarray | None, real: RealImages | None) -> dict[str, float]:
    """Numbers that a set of images has, and no single image."""
    found = {} if logits_NK is None else {"inception_score": inception_score(logits_NK)}
    if real is not None:
        found["fid"] = fid(real.statistics, statistics(features_ND))
        if real.features_MD is not None:
            found |= neighbours(real.features_MD, features_ND)
    return found


def row_title(name: str, labels: str, features: str | None) -> str:
    """Of a row. features: where several are side by side."""
    kind, colon, value = labels.partition(":")
    of = f"{labels} labels" if labels in _OF_LABELS else f"{kind.replace('_', ' ')} {value if colon else 'prompts'}"
    parts = [name, features and f"{features} features", None if labels == "all" else of]
    return ", ".join(part for part in parts if part)


def table(rows: list[Row]) -> str:
    """Text: name, guidance where there are several, reference, checkpoint, difference, with intervals."""
    paired = any(row.baseline for row in rows)
    guided = len({row.cfg for row in rows}) > 1
    several = len({row.features for row in rows} - {None}) > 1
    header = ["", "reference", "checkpoint", "difference"] if paired else ["", "checkpoint"]
    lines = [[*header[:1], *(["cfg"] if guided else []), *header[1:]]]
    for row in rows:
        name = printable(row_title(row.name, row.labels, row.features if several else None))
        cells = [
            row.baseline.text() if row.baseline else "",
            row.checkpoint.text(),
            row.difference.text("+") if row.difference else "",
        ]
        lines.append([name, *([f"{row.cfg:g}"] if guided else []), *(cells if paired else cells[1:2])])
    return "\n".join(text_table(lines, "<" * len(lines[0])))


def about(result: dict[str, Any]) -> str:
    """What the table is of, in a few lines, from the content of evaluation.json."""
    guidance = result["settings"]["cfg"]
    each = "a model and guidance" if isinstance(guidance, list) else "a model"
    of = "prompts" if result.get("prompts") else "labels"
    lines = [f"{result['images']} images {each}, of {result['labels']} {of}."]
    if result["features"]:
        features = result["features"] if isinstance(result["features"], list) else [result["features"]]
        lines.append(
            f"Features: {', '.join(features)}. FID falls as samples grow in number: compare equal numbers alone."
        )
    few = {name: width for name, width in result["feature_widths"].items() if result["images"] <= width}
    if few:
        listed = ", ".join(f"{width} of {name}" for name, width in few.items())
        lines.append(f"Fewer images than features ({listed}): their covariance is singular, and that FID far too high.")
    real = result["real_images"]
    counts = set(real.values() if isinstance(real, dict) else [real]) - {None}
    if counts:
        lines.append(f"{' or '.join(map(str, sorted(counts)))} real images; {NEIGHBOURS} nearest neighbours.")
    return "\n".join([*lines, f"Intervals: {result['intervals']}."])
