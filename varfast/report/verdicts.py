"""Verdicts (healthy, look, broken) on a run, by thresholds that the page shows and docs/guide/numbers.md lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from varfast.evaluation.metrics import difference_interval, interval_text
from varfast.report.elements import brief, text
from varfast.report.run import Run, domain_of
from varfast.runs.alarm import WINDOW, Alarm, Idle

Level = Literal["healthy", "look", "broken"]

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
# Up to the first number healthy, up to the second one look, above it broken.
LIMITS = {
    "ratio_gap_max in float32": (1e-4, 1e-3),
    "ratio_gap_max in bfloat16": (0.1, 0.3),
    "kl": (0.2, 0.3),  # share of it that the last quarter of the steps adds; at a steady pace a quarter
    "groups_without_signal": (0.5, 0.8),  # share of labels_per_step
    "clip_fraction": (0.1, 0.2),
    "pair_accuracy": (-0.55, -0.5),  # negative: so much and above
    "implicit_chosen": (0.1, 1.0),  # fall, as a share of the margin to the rejected images
    "label_accuracy": (0.05, 0.2),  # fall from that of the base
    "diversity": (-0.5, -0.25),  # share of that of the base
}
# What is judged, in the order of the page, and how the page calls it.
CHECKS = {
    "end": "The run",
    "learning": "Learning",
    "reward": "Reward of fresh samples",
    "label_accuracy": "Shows what was asked",
    "diversity": "Diversity within a label",
    "groups_without_signal": "Groups without signal",
    "pair_accuracy": "Order of new pairs",
    "implicit_chosen": "Preferred images",
    "clip_fraction": "Clipped tokens",
    "kl": "Distance to the base",
    "ratio_gap_max": "Gap between sampling and learning",
}
_SIGNS = {"healthy": "\u2713", "look": "!", "broken": "\u2717"}
# With fewer values than this, the rise of a metric says nothing.
_ENOUGH_STEPS = 20
_SOLVED = "nearly all samples earn the reward now, and nothing is left to learn from it"
_LATE = "the mean of the last tenth of the steps"


@dataclass(frozen=True)
class Verdict:
    """A verdict on a run, or on one of its metrics.

    Attributes:
        level: "healthy", "look" or "broken"; None if there is no verdict.
        value: the number that was compared, as text.
        rule: the thresholds, or why there is no verdict.
    """

    level: Level | None
    value: str
    rule: str


def verdict(run: Run, check: str) -> Verdict | None:
    """The verdict on one of CHECKS; None if the run has nothing that it could be about."""
    if check in _OF_A_RUN:
        return _OF_A_RUN[check](run)
    values = run.series(check)[1]
    if check == "kl" and run.number("grpo.kl_beta") == 0.0 and not values:
        return Verdict(None, "not measured", "grpo.kl_beta=0 holds no base to compare with; grpo.kl_every=10 does")
    return _OF_METRICS[check](run, values) if values else None


def verdicts(run: Run) -> dict[str, Verdict]:
    """All that there are, in the order of the page."""
    return {check: found for check in CHECKS if (found := verdict(run, check)) is not None}


def worst(found: Sequence[Verdict]) -> Level:
    """Of several verdicts; healthy if there is none."""
    return max((v.level for v in found if v.level is not None), key=list(_SIGNS).index, default="healthy")


# ---------------------------------------------------------------------------------------------------------------------
# Of a whole run


def _end(run: Run) -> Verdict:
    done, asked = run.metrics.last_step, run.number("run.steps")
    of = f"{done} of {asked:g} steps" if asked is not None and done <= asked else f"{done} steps"
    if run.ended is not None and run.ended.step >= done:
        first = brief(run.ended.why.partition("\n")[0])
        if run.ended.diverged:
            return Verdict("broken", f"diverged after step {run.ended.step}", first)
        if run.ended.why.startswith("SIG") and run.ended.why.isalnum():
            return Verdict("look", f"stopped by {first}: {of}", "the same command goes on")
        return Verdict("broken", f"ended by an error after step {run.ended.step}", first)
    if not run.complete:
        return Verdict("look", f"not finished: {of}", "it is going on, or was killed; the same command goes on")
    if run.ended_by.startswith("run.stop_when_idle"):
        return Verdict("look", f"stopped after {done} steps", f"by {run.ended_by}: it did not learn")
    said = (
        f"ended by {run.ended_by}, after {done} steps" if run.ended_by.startswith("run.budget") else f"finished: {of}"
    )
    return Verdict("healthy", said, "")


def idle_steps(run: Run) -> tuple[Idle, int, int] | None:
    """The last thing that kept the run from learning, and the first and last of its steps; None: nothing did.

    By the alarm of training (varfast/runs/alarm.py), over metrics.jsonl, so a run of an earlier version has it too.
    """
    groups = run.number("rollout.labels_per_step")
    names = ("skipped_rollouts", "learning_rate", "reward_mean", "reward_std", "groups_without_signal", "grad_norm",
             "clip_fraction")  # fmt: skip
    lines: dict[int, dict[str, float]] = {}
    for name in names:
        for step, value in zip(*run.series(name), strict=True):
            lines.setdefault(step, {})[name] = value
    alarm = Alarm(math.inf if groups is None or groups < 1 else groups)
    found = None
    for step in sorted(lines):
        if (idle := alarm.holds(lines[step])) is not None:
            first = found[1] if found is not None and found[0].what == idle.what and found[2] == step - 1 else None
            found = idle, step - WINDOW + 1 if first is None else first, step
    return found


def _learning(run: Run) -> Verdict | None:
    if run.metrics.last_step == 0:
        return None
    if run.metrics.last_step < WINDOW:
        return Verdict(None, "", f"no verdict on fewer than {WINDOW} steps")
    found = idle_steps(run)
    if found is None:
        return Verdict("healthy", "rewards differ, and a gradient reaches the weights", "")
    idle, first, last = found
    if idle.what == "signal" and has_risen(run):
        steps = (
            f"not since step {max(first, 1)}" if last == run.metrics.last_step else f"not in steps {first} to {last}"
        )
        return Verdict("look", f"{steps}: {_SOLVED}", "a run may end here")
    if last == run.metrics.last_step:
        return Verdict("broken", f"not since step {max(first, 1)}", f"In the last {WINDOW} steps {idle.why}")
    return Verdict("look", f"not in steps {max(first, 1)} to {last}", f"In those steps {idle.why}")


def _reward(run: Run) -> Verdict | None:
    """Of fresh samples with the same labels and random numbers before and after."""
    if not run.pairs:
        return None
    name = "reward" if "reward" in run.pairs["after"] else next(iter(run.pairs["after"]))
    if name != "reward" and not name.startswith("reward"):
        return None
    change = difference_interval(run.pairs["before"][name], run.pairs["after"][name])
    value = interval_text(change.value, change.low, change.high, "+")
    if change.low is None or change.high is None:
        return Verdict(None, value, "no verdict on one image")
    level: Level = "healthy" if change.low > 0 else "broken" if change.high < 0 else "look"
    return Verdict(level, value, "healthy above 0, look if the interval holds 0")


def _label_accuracy(run: Run) -> Verdict | None:
    """Of fresh samples if it was measured there, else of the grids."""
    name = next((name for name in run.summary.get("after", {}) if domain_of(name)[0] == "accuracy"), "")
    ends = [run.summary.get(when, {}).get(name) for when in ("before", "after")]
    if ends[0] is None or ends[1] is None:
        ends = list(_first_and_last(run, "drift/label_accuracy"))
    if ends[0] is None or ends[1] is None:
        return None
    value = f"{percent(ends[0])} \u2192 {percent(ends[1])}"
    return _judged("label_accuracy", ends[0] - ends[1], value, "the fall from the base")


def _diversity(run: Run) -> Verdict | None:
    base, end = _first_and_last(run, "drift/diversity")
    if base is None or end is None or base <= 0.0:
        return None
    return _judged(
        "diversity", end / base, f"{100 * end / base:.0f} % of the base's", "of the grids, as a share of the base's"
    )


def _first_and_last(run: Run, metric: str) -> tuple[float | None, float | None]:
    """Of the base and of the last grid; None where the base was not measured."""
    steps, values = run.series(metric)
    return (values[0], values[-1]) if len(steps) > 1 and steps[0] == 0 else (None, None)


def percent(share: float) -> str:
    """ "96.2 %" """
    return f"{100 * share:.1f} %"


_OF_A_RUN: dict[str, Callable[[Run], Verdict | None]] = {
    "end": _end,
    "learning": _learning,
    "reward": _reward,
    "label_accuracy": _label_accuracy,
    "diversity": _diversity,
}

# ---------------------------------------------------------------------------------------------------------------------
# Of a metric


def _judged(limits: str, number: float, value: str, what: str) -> Verdict:
    """By LIMITS. what: the number is."""
    good, bad = LIMITS[limits]
    falls = good < 0
    worse = (-number if falls else number) - 1e-9  # 1 - 0.95 is a fall of 0.05
    level: Level = "healthy" if worse <= good else "look" if worse <= bad else "broken"
    way = "from" if falls else "up to"
    return Verdict(level, value, f"healthy {way} {abs(good):g}, look {way} {abs(bad):g}: {what}")


def _clipped(run: Run, values: Sequence[float]) -> Verdict:
    late = last_tenth(values)
    return _judged("clip_fraction", late, f"{late:.3g} at the end", _LATE)


def _without_signal(run: Run, values: Sequence[float]) -> Verdict:
    late, labels = last_tenth(values), run.number("rollout.labels_per_step")
    if not labels or labels < 1:
        return Verdict(None, f"{late:.3g} at the end", "rollout.labels_per_step is not known")
    value = f"{late:.3g} of {labels:g} at the end"
    found = _judged("groups_without_signal", late / labels, value, f"{_LATE}, as a share of labels_per_step")
    if found.level == "broken" and has_risen(run):
        return Verdict("look", f"{value}: {_SOLVED}", found.rule)
    return found


def has_risen(run: Run) -> bool:
    """Whether the reward has: then groups whose samples all earn the same are groups that have learned it."""
    values, spread = run.series("reward_mean")[1], run.series("reward_std")[1]
    if not values or not spread:
        return False
    tenth = max(1, len(values) // 10)
    return last_tenth(values) - mean(values[:tenth]) > 0.5 * mean(spread[:tenth]) > 0.0


def _rounding(run: Run, values: Sequence[float]) -> Verdict:
    largest, dtype = max(values), run.settings.get("run.dtype", "")
    value = f"{largest:.3g} at most"
    if f"ratio_gap_max in {dtype}" not in LIMITS:
        return Verdict(None, value, "run.dtype is not known")
    return _judged(f"ratio_gap_max in {dtype}", largest, value, f"the largest of all steps, in {dtype}")


def _levels_off(run: Run, values: Sequence[float]) -> Verdict:
    """By the part of the KL that the last quarter of the steps added: it is a quarter if the KL grows steadily."""
    late = last_tenth(values)
    if len(values) < _ENOUGH_STEPS:
        return Verdict(None, f"KL {late:.3g} at the end", f"no verdict on fewer than {_ENOUGH_STEPS} values")
    earlier = last_tenth(values[: len(values) - len(values) // 4])
    rise = (late - earlier) / late if late > 1e-12 else 0.0
    what = "the share of it that came in the last quarter of the steps; a quarter comes there at a steady pace"
    return _judged("kl", rise, f"KL {late:.3g} at the end, {100 * max(rise, 0.0):.0f} % of it late", what)


def _above_chance(run: Run, values: Sequence[float]) -> Verdict:
    late = last_tenth(values)
    if len(values) < _ENOUGH_STEPS:
        return Verdict(None, f"{late:.3g} at the end", f"no verdict on fewer than {_ENOUGH_STEPS} values")
    return _judged("pair_accuracy", late, f"{late:.3g} at the end", f"{_LATE}, on pairs that are new to the policy")


def _held_up(run: Run, chosen: Sequence[float]) -> Verdict:
    """By how far the preferred images have fallen, as a share of their distance from the rejected ones."""
    late, rejected = last_tenth(chosen), run.series("implicit_rejected")[1]
    margin = late - last_tenth(rejected) if rejected else 0.0
    value = f"{late:.3g} at the end, {margin:.3g} above the rejected"
    if margin <= 0.0:
        return Verdict(None, value, "no verdict without a margin between preferred and rejected images")
    what = "the fall of the preferred images as a share of the margin, means of the last tenth of the steps"
    return _judged("implicit_chosen", -late / margin, value, what)


_OF_METRICS: dict[str, Callable[[Run, Sequence[float]], Verdict]] = {
    "ratio_gap_max": _rounding,
    "kl": _levels_off,
    "groups_without_signal": _without_signal,
    "clip_fraction": _clipped,
    "pair_accuracy": _above_chance,
    "implicit_chosen": _held_up,
}


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


def sign(level: Level | None) -> str:
    """HTML: a sign and a word, readable without colour."""
    word = "no verdict" if level is None else f"{_SIGNS[level]} {level}"
    return f'<span class="badge {level or "none"}">{word}</span>'


def badge(found: Verdict) -> str:
    """HTML: sign, word, and the thresholds."""
    return f"{sign(found.level)} <small>{text(found.rule)}</small>"
