"""What the fresh samples of each label, of each tag of prompts or of each domain earn, before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from varfast.report.axes import number
from varfast.report.elements import Markup, brief, html_table, text
from varfast.report.outcome import is_share
from varfast.report.run import Run
from varfast.report.verdicts import percent

# Of more labels than this, those that gain least and those that gain most are shown.
_MOST_ROWS = 24
_DOMAINS = {"": "trained on", " (held out)": "held out", " (out of domain)": "out of domain"}


@dataclass(frozen=True)
class _Column:
    """A run's number, by group of images.

    Attributes:
        title: of the column.
        means: of before and after, by group.
        low, high: where its bars begin and end.
        shown: writes a mean.
    """

    title: str
    means: dict[str, tuple[float, float]]
    low: float
    high: float
    shown: Callable[[float], str]

    def cell(self, group: str) -> Markup | str:
        """A bar from before (a ring) to after (a dot), and the numbers."""
        if group not in self.means:
            return ""
        before, after = self.means[group]
        left, right = sorted(100.0 * (mean - self.low) / (self.high - self.low) for mean in (before, after))
        dot, ring = (left, right) if after < before else (right, left)
        return Markup(
            f'<span class="range" aria-hidden="true"><i style="left:{left:.1f}%;width:{right - left:.1f}%"></i>'
            f'<i class="ring" style="left:{ring:.1f}%"></i><i class="dot" style="left:{dot:.1f}%"></i></span>'
            f"<span>{text(self.shown(before))} \u2192 {text(self.shown(after))}</span>"
        )


def by_label(runs: Sequence[Run]) -> str:
    """A table with a row for each group of images; "" if no run has the values of every image and their labels.

    Of one run its reward and its accuracy; of several runs the reward of each.
    """
    columns, kinds = [], set()
    for run in runs:
        for name in ("reward", "accuracy") if len(runs) == 1 else ("reward",):
            means, kind = _groups(run, name)
            if len(means) > 1:
                columns.append(_column(run, name, means, run.name if len(runs) > 1 else name))
                kinds.add(kind)
    if not columns or len(kinds) > 1:
        return ""
    groups = list(dict.fromkeys(group for column in columns for group in column.means))
    shown = _most_telling(groups, columns[0])
    few = "" if len(shown) == len(groups) else f" The {len(shown)} of {len(groups)} that gain least, and most."
    rows = [(group, [column.cell(group) for column in columns]) for group in shown]
    kind = kinds.pop()
    about = f"Means over the fresh images of each {kind}: ring before, dot after.{few}"
    table = html_table([column.title for column in columns], rows)
    return f'<h3>By {kind}</h3><div class="by-label">{table}</div><p>{about}</p>'


def _most_telling(groups: list[str], column: _Column) -> list[str]:
    if len(groups) <= _MOST_ROWS:
        return groups

    def gain(group: str) -> float:
        before, after = column.means.get(group, (0.0, 0.0))
        return after - before

    ordered = sorted(groups, key=gain)
    return ordered[: _MOST_ROWS // 2] + ordered[-_MOST_ROWS // 2 :]


def _groups(run: Run, name: str) -> tuple[dict[str, tuple[float, float]], str]:
    """Means before and after by group, and what a group is: a label, or a tag or a domain of prompts."""
    found: dict[str, list[tuple[float, float]]] = {}
    tagged = bool(run.prompts) and any(prompt.tag for prompt in run.prompts)
    kind = ("tag" if tagged else "domain") if run.prompts else "label"
    for suffix, labels in run.pair_labels.items():
        ends = [run.pairs.get(when, {}).get(f"{name}{suffix}") for when in ("before", "after")]
        if ends[0] is None or ends[1] is None or len(ends[0]) != len(labels):
            continue
        for label, before, after in zip(labels, ends[0].tolist(), ends[1].tolist(), strict=True):
            found.setdefault(_group(run, label, suffix, kind), []).append((before, after))
    return {group: (float(m[0]), float(m[1])) for group, pairs in found.items() for m in [np.mean(pairs, axis=0)]}, kind


def _group(run: Run, label: int, suffix: str, kind: str) -> str:
    if kind == "label":
        return run.label(label).removeprefix("label ")
    domain = _DOMAINS.get(suffix, suffix.strip(" ()"))
    if kind == "domain":
        return domain
    tag = brief(run.prompts[label].tag, 60) if label < len(run.prompts) else ""
    return f"{tag or 'no tag'}, {domain}" if len(run.pair_labels) > 1 else tag or "no tag"


def _column(run: Run, name: str, means: dict[str, tuple[float, float]], title: str) -> _Column:
    if is_share(run, name):
        return _Column(title, means, 0.0, 1.0, percent)
    every = [mean for ends in means.values() for mean in ends]
    low, high = min(every), max(every)
    return _Column(title, means, low, high if high > low else low + 1.0, lambda mean: number(mean, 3))
