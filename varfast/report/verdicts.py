"""Verdicts (good, watch, bad) on the health of a run, by thresholds that the page shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from varfast.report.elements import text
from varfast.report.run import Run

# The table of docs/guide/numbers.md: what is healthy, and what it means otherwise.
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
    # Of DPO.
    "pair_accuracy": (
        "above 0.5, and rises",
        "new pairs are ordered as by chance: raise update.lr, or sample more images a prompt",
    ),
    "implicit_chosen": (
        "near 0 or above",
        "the preferred images become less likely too: raise dpo.beta, or lower update.lr",
    ),
}
_SIGNS = {"good": "\u2713", "watch": "!", "bad": "\u2717"}
# With fewer values than this, the rise of a metric says nothing.
_ENOUGH_STEPS = 20


@dataclass(frozen=True)
class Verdict:
    """A verdict on a metric.

    Attributes:
        level: "good", "watch" or "bad"; None if there is no verdict.
        value: the number that was compared, as text.
        rule: the thresholds, or why there is no verdict.
    """

    level: Literal["good", "watch", "bad"] | None
    value: str
    rule: str


def verdict(run: Run, metric: str) -> Verdict | None:
    """The verdict on one of the metrics of HEALTHY; None if the run has no values of it."""
    values = run.series(metric)[1]
    if metric == "kl" and not values and run.number("grpo.kl_beta") == 0.0:
        return Verdict(None, "not measured", "grpo.kl_beta=0 holds no base to compare with; grpo.kl_every=10 does")
    if not values:
        return None
    if metric == "ratio_gap_max":
        return _rounding(values, run.settings.get("run.dtype", ""))
    if metric == "kl":
        return _levels_off(values)
    if metric == "pair_accuracy":
        return _above_chance(values)
    if metric == "implicit_chosen":
        return _held_up(values, run.series("implicit_rejected")[1])
    late = last_tenth(values)
    if metric == "clip_fraction":
        return _judged(late, f"{late:.3g} at the end", 0.1, 0.2, "the mean of the last tenth of the steps")
    labels = run.number("rollout.labels_per_step")
    if not labels or labels < 1:
        return Verdict(None, f"{late:.3g} at the end", "rollout.labels_per_step is not known")
    what = "the mean of the last tenth of the steps, as a share of labels_per_step"
    return _judged(late / labels, f"{late:.3g} of {labels:g} at the end", 0.5, 0.8, what)


def _judged(number: float, value: str, good: float, watch: float, what: str) -> Verdict:
    level: Literal["good", "watch", "bad"] = "good" if number <= good else "watch" if number <= watch else "bad"
    return Verdict(level, value, f"good up to {good:g}, watch up to {watch:g}: {what}")


def _rounding(values: Sequence[float], dtype: str) -> Verdict:
    largest = max(values)
    value = f"{largest:.3g} at most"
    if dtype == "float32":
        return _judged(largest, value, 1e-4, 1e-3, "the largest of all steps, in float32")
    if dtype == "bfloat16":
        return _judged(largest, value, 0.1, 0.3, "the largest of all steps, in bfloat16")
    return Verdict(None, value, "run.dtype is not known")


def _levels_off(values: Sequence[float]) -> Verdict:
    """By the part of the KL that the last quarter of the steps added: it is a quarter if the KL grows steadily."""
    late = last_tenth(values)
    if len(values) < _ENOUGH_STEPS:
        return Verdict(None, f"{late:.3g} at the end", f"no verdict on fewer than {_ENOUGH_STEPS} values")
    earlier = last_tenth(values[: len(values) - len(values) // 4])
    rise = (late - earlier) / late if late > 1e-12 else 0.0
    what = "the share of it that came in the last quarter of the steps; a quarter comes there at a steady pace"
    return _judged(rise, f"{late:.3g} at the end, {max(rise, 0.0):.0%} of it late", 0.2, 0.3, what)


def _above_chance(values: Sequence[float]) -> Verdict:
    late = last_tenth(values)
    if len(values) < _ENOUGH_STEPS:
        return Verdict(None, f"{late:.3g} at the end", f"no verdict on fewer than {_ENOUGH_STEPS} values")
    level: Literal["good", "watch", "bad"] = "good" if late >= 0.55 else "watch" if late >= 0.5 else "bad"
    rule = (
        "good from 0.55, watch from 0.5: the mean of the last tenth of the steps, on pairs that are new to the policy"
    )
    return Verdict(level, f"{late:.3g} at the end", rule)


def _held_up(chosen: Sequence[float], rejected: Sequence[float]) -> Verdict:
    """By how far the preferred images have fallen, as a share of their distance from the rejected ones."""
    late = last_tenth(chosen)
    margin = late - last_tenth(rejected) if rejected else 0.0
    value = f"{late:.3g} at the end, {margin:.3g} above the rejected"
    if margin <= 0.0:
        return Verdict(None, value, "no verdict without a margin between preferred and rejected images")
    what = "the fall of the preferred images as a share of the margin, means of the last tenth of the steps"
    return _judged(-late / margin, value, 0.1, 1.0, what)


def healthy(metric: str, runs: Sequence[Run]) -> tuple[str, str]:
    """What is healthy, and what it means otherwise, with the key of the loss that these runs have."""
    good, otherwise = HEALTHY[metric]
    of_dpo = all("dpo.beta" in run.settings for run in runs)
    return good, otherwise.replace("kl_beta", "dpo.beta") if of_dpo else otherwise


def last_tenth(values: Sequence[float]) -> float:
    """Mean of the last tenth of the values."""
    return mean(values[-max(1, len(values) // 10) :])


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def badge(found: Verdict) -> str:
    """HTML: a sign and a word, readable without colour, and the thresholds."""
    word = "no verdict" if found.level is None else f"{_SIGNS[found.level]} {found.level}"
    return f'<span class="badge {found.level or "none"}">{word}</span> <small>{text(found.rule)}</small>'
