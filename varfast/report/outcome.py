"""What happened, in a sentence and a table: before and after on fresh samples, or why that was not measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from varfast.evaluation.metrics import Estimate, difference_interval
from varfast.progress import duration
from varfast.report.axes import AXES, SPENT, Axis, number
from varfast.report.elements import brief, html_table, text
from varfast.report.evaluation import shown
from varfast.report.run import Run, domain_of
from varfast.report.verdicts import last_tenth, mean, percent

_ARROW = "\u2192"


def headline(run: Run) -> str:
    """One sentence, HTML: "Earns the reward: <b>7.6 % → 96.2 %</b>; read as their label: <b>99.0 % → 96.6 %</b>"."""
    if run.summary:
        names = [name for name in _of_summary(run) if domain_of(name)[0] in ("reward", "accuracy")]
        found = [part for name in names or _of_summary(run)[:1] if (part := _change_of(run, name))]
        return "; ".join(found)[:1].upper() + "; ".join(found)[1:]
    values = run.series("reward_mean")[1]
    if not values:
        return "No step is complete yet" if not run.metrics.last_step else f"{run.metrics.last_step} steps"
    first, last = mean(values[: max(1, len(values) // 10)]), last_tenth(values)
    return f"Reward in training, first and last tenth of the steps: <b>{first:.4g} {_ARROW} {last:.4g}</b>"


def _change_of(run: Run, name: str) -> str:
    numbers = before_to_after(run, name)
    whole, domain = domain_of(name)
    if not numbers:
        return ""
    what = (
        "read as their label" if whole == "accuracy" else "earns the reward" if is_share(run, name) else "mean reward"
    )
    only = _only_reward(run)
    if whole == "reward" and only and _repeats(run, f"{only}{domain}"):
        what += f" ({brief(only.removeprefix('reward/'), 60)})"
    if domain and whole in run.summary.get("after", {}):  # it follows what is trained on
        what = domain.strip(" ()")
    return f"{text(what)}: <b>{text(numbers)}</b>"


def before_to_after(run: Run, name: str) -> str:
    """ "7.6 % → 96.2 %", or "5.1 → 6.3" of what is no share; "" if it was not measured."""
    before, after = (run.summary.get(when, {}).get(name) for when in ("before", "after"))
    if before is None or after is None:
        return ""
    ends = [percent(end) if is_share(run, name) else brief(end) for end in (before, after)]
    return f"{ends[0]} {_ARROW} {ends[1]}"


def is_share(run: Run, name: str) -> bool:
    """Whether the values of all images are 0 or 1, so that their mean is a share of them."""
    if domain_of(name)[0] == "accuracy":
        return True
    values = [run.pairs[when][name] for when in ("before", "after") if name in run.pairs.get(when, {})]
    return bool(values) and all(bool(np.isin(of_images, (0, 1)).all()) for of_images in values)


def about(run: Run) -> str:
    """How far the run is, what it spent, and how many images the sentence is about."""
    parts = [_steps(run), _spent(run)]
    if not run.summary:
        reason = "Fresh samples are compared when a run is complete"
        reason += ", but this one has eval.samples_per_label=0" if run.number("eval.samples_per_label") == 0 else ""
        parts.append(f"{reason}.")
    elif run.pairs:
        images = len(next(iter(run.pairs["after"].values())))
        kind, whose = ("prompts", " of the prompts trained on") if run.prompts else ("labels", "")
        parts.append(f"{images} fresh images{whose}, before and after with the same {kind} and random numbers.")
    return " ".join(part for part in parts if part)


def _spent(run: Run) -> str:
    """ "Spent: 1024 images, 2.1e15 FLOP, 18 min 3 s of steps. Ended by run.budget_flop=2e15."; "" if not known."""
    units = AXES | {"hours": ""}
    parts = [f"{spent_on(run, axis)} {units[axis]}".strip() for axis in SPENT if axis in run.spent]
    ended = f" Ended by {run.ended_by}." if run.ended_by.startswith("run.budget") else ""
    return f"Spent: {', '.join(parts)} of steps.{ended}" if parts else ""


def spent_on(run: Run, axis: Axis) -> str:
    """What a run had spent at its end, as text; "" if it is not known."""
    if axis not in run.spent:
        return ""
    if axis == "hours":
        return duration(3600 * min(run.spent[axis], 1e9))
    return number(run.spent[axis], 3 if axis != "images" else 9)


def _steps(run: Run) -> str:
    done, asked = run.metrics.last_step, run.number("run.steps")
    said = f"{done} of {asked:g} steps." if asked is not None and done <= asked else f"{done} steps."
    if asked is not None and done > asked:
        said = f"{done} steps are done; the config now asks for {asked:g}."
    if run.measured_step is not None and run.summary and run.measured_step != done:
        said += f' "After" was sampled after step {run.measured_step}.'
    return said


def table(run: Run) -> str:
    """All numbers of before and after, with the interval of the difference; "" if nothing was measured."""
    if not run.summary:
        return ""
    rows = []
    for name in _of_summary(run):
        change = _change(run, name)
        ends = [run.summary.get(when, {}).get(name) for when in ("before", "after")]
        rows.append((_title(run, name), [*ends, "" if change is None else shown(change, "+")]))
    said = "Intervals: 95 %, over pairs of images."
    if not run.pairs:
        said = "Means over images; no interval, since before_after.json does not hold the images' values."
    return f"{html_table(['before', 'after', 'difference'], rows)}<p>{said}</p>"


def _of_summary(run: Run) -> list[str]:
    """Names of the table's rows. A single reward is skipped if it equals the total reward."""
    names = list(dict.fromkeys(name for numbers in run.summary.values() for name in numbers))
    components = [name for name in names if name.startswith("reward/")]
    several = len({domain_of(name)[0] for name in components}) > 1
    return [name for name in names if name not in components or several or not _repeats(run, name)]


def _repeats(run: Run, component: str) -> bool:
    total = f"reward{domain_of(component)[1]}"
    return all(numbers.get(total) == numbers.get(component) for numbers in run.summary.values())


def _only_reward(run: Run) -> str:
    components = {domain_of(n)[0] for numbers in run.summary.values() for n in numbers if n.startswith("reward/")}
    return next(iter(components)) if len(components) == 1 else ""


def _title(run: Run, name: str) -> str:
    only = _only_reward(run)
    whole, domain = domain_of(name)
    if whole == "reward" and only and _repeats(run, f"{only}{domain}"):
        return f"reward ({only.removeprefix('reward/')}){domain}"
    return name


def _change(run: Run, name: str) -> Estimate | None:
    if run.pairs:
        return difference_interval(run.pairs["before"][name], run.pairs["after"][name])
    before, after = (run.summary.get(when, {}).get(name) for when in ("before", "after"))
    return None if before is None or after is None else Estimate(after - before)


def best_of(runs: Sequence[Run]) -> str:
    """Of several runs with the same reward, a sentence about the one whose fresh samples earn most; "" else."""
    rewards = [{k: v for k, v in run.settings.items() if k.startswith("reward.")} for run in runs]
    measured = [run for run in runs if run.complete and "reward" in run.summary.get("after", {})]
    if len(measured) < 2 or any(found != rewards[0] for found in rewards):
        return ""
    best = max(measured, key=lambda run: run.summary["after"]["reward"])
    return f"Of {len(runs)} runs {text(brief(best.name))} earns most. {headline(best)}"
