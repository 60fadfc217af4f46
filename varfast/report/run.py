"""A run folder as the page shows it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from varfast.evaluation.metrics import Numbers
from varfast.report.elements import brief
from varfast.report.pictures import Extremes, Grid, picture_uri, read_extremes, read_grids
from varfast.report.reading import (
    CONFIG_BYTES,
    METRICS_BYTES,
    PROMPTS_BYTES,
    Ended,
    Evaluation,
    Label,
    Metrics,
    Prompted,
    Unreadable,
    finite,
    parse_metrics,
    parse_prompts,
    parse_settings,
    read_bytes,
    read_json,
    text_leaves,
    validated,
)
from varfast.runs.before_after import FILE as BEFORE_AFTER
from varfast.runs.before_after import as_numbers, means
from varfast.runs.log import ENDED
from varfast.runs.log import GRID_ROWS as ROWS
from varfast.types import InputError

# One of these is in every run folder.
_OF_A_RUN = ("config.yaml", "metrics.jsonl", "summary.json", BEFORE_AFTER, "grids", "samples", "evaluation")


@dataclass
class Run:
    """What a run folder holds, as far as it can be used.

    Attributes:
        name: of the run, on the page.
        path: of the folder.
        config: the resolved config, as text.
        settings: its values as text, by dotted key, as update.lr.
        metrics: the columns of metrics.jsonl.
        summary: "before" and "after": means by name.
        pairs: "before" and "after": values of every image, by name, from which intervals are computed.
        pair_labels: for each suffix of the names in `pairs` ("", or a domain of prompts), the label of every image.
        measured_step: the step after which "after" was sampled.
        complete: whether the run reached its end, and no step came after it.
        ended: a signal or an error that ended it before that, if it is known.
        spent: images, flop and hours at the end of the run, or after its last step.
        ended_by: the setting that ended the run, as run.budget_flop=1e15; "" if that is not known.
        names: names of labels, by number.
        prompts: of a model that is conditioned on text, by the number that stands for a label.
        grid_rows: what each row of the sample grids shows.
        environment: content of environment.json, by dotted key.
        evaluation, evaluation_picture: result of varfast.evaluate.
        grids, num_grids, extremes: sample grids that are shown, how many there are, best and worst samples.
        left_out: what is not shown and why, one sentence for each file.
    """

    name: str
    path: Path
    config: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    summary: dict[str, dict[str, float]] = field(default_factory=dict)
    pairs: dict[str, Numbers] = field(default_factory=dict)
    pair_labels: dict[str, list[int]] = field(default_factory=dict)
    measured_step: int | None = None
    complete: bool = False
    ended: Ended | None = None
    spent: dict[str, float] = field(default_factory=dict)
    ended_by: str = ""
    names: dict[int, str] = field(default_factory=dict)
    prompts: list[Prompted] = field(default_factory=list)
    grid_rows: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    evaluation_picture: str | None = None
    grids: list[Grid] = field(default_factory=list)
    num_grids: int = 0
    extremes: Extremes | None = None
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, file: str, why: object) -> None:
        """Note a file that is not shown."""
        self.left_out.append(f"{brief(file, 100)}: {brief(str(why))}")

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps, and the values of a metric at them."""
        return self.metrics.columns.get(metric, ([], []))

    def number(self, setting: str) -> float | None:
        """A setting as a number; None if it is not one."""
        try:
            return finite(float(self.settings[setting]))
        except (KeyError, ValueError):
            return None

    def label(self, label: int | str) -> str:
        """A label with its name, if that is known; "label 3 cat", or the text of a prompt, in quotes."""
        if isinstance(label, int) and 0 <= label < len(self.prompts):
            return f"\u201c{brief(self.prompts[label].prompt)}\u201d"
        named = self.names.get(label) if isinstance(label, int) else None
        return f"label {brief(label, 60)}" + (f" {named}" if named and named != str(label) else "")

    @property
    def anything(self) -> bool:
        """Whether there is something to show."""
        found = (self.settings, self.metrics.columns, self.metrics.last_step, self.summary, self.grids)
        return any(map(bool, (*found, self.extremes, self.evaluation)))

    @contextmanager
    def reading(self, file: str) -> Iterator[None]:
        """Around the use of a file: one that cannot be used is noted in left_out, a missing one is skipped silently."""
        try:
            yield
        except FileNotFoundError:
            pass
        except Unreadable as error:
            self.leave_out(file, error)


def read_run(path: Path, name: str) -> Run:
    """Read a run folder; if its run is going on, was killed or is damaged, what can be used of it.

    Raises: InputError if it is not a run folder, or nothing in it can be shown.
    """
    run = Run(name, path)
    try:
        is_folder, exists = path.is_dir(), path.exists()
        present = [file for file in _OF_A_RUN if os.path.lexists(path / file)]
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte in the name, or links in a circle
        raise InputError(f"{path} is no run folder: {error}") from error
    if not is_folder:
        raise InputError(f"{path} is no run folder: {'a file' if exists else 'it does not exist'}")
    if not present:
        raise InputError(f"{path} is no run folder, or its run has not begun: it holds none of {', '.join(_OF_A_RUN)}")
    parts: tuple[Callable[[Run], None], ...] = (
        _config, _metrics, _appearance, _summary, _pairs, _ended, _names, _prompts, _rows, _environment, _evaluation
    )  # fmt: skip
    for read in parts:
        read(run)
    run.grids, run.num_grids = read_grids(path, run.leave_out)
    run.extremes = read_extremes(path, run.leave_out)
    if not run.anything:
        reasons = "; ".join(run.left_out[:5])
        raise InputError(f"{path} holds nothing to show" + (f": {reasons}" if reasons else ""))
    return run


def _config(run: Run) -> None:
    with run.reading("config.yaml"):
        run.config, run.settings = parse_settings(read_bytes(run.path, "config.yaml", CONFIG_BYTES))


def _metrics(run: Run) -> None:
    with run.reading("metrics.jsonl"):
        run.metrics = parse_metrics(read_bytes(run.path, "metrics.jsonl", METRICS_BYTES))
        run.left_out += run.metrics.left_out
    if run.number("grpo.kl_beta") == 0.0 and not any(run.series("kl")[1]):
        run.metrics.columns.pop("kl", None)  # an earlier version wrote 0 where it measured nothing
    for name in ("images", "flop", "hours"):
        if values := run.series(f"spent_{name}")[1]:
            run.spent[name] = values[-1]


def _summary(run: Run) -> None:
    with run.reading("summary.json"):
        content = _object(read_json(run.path, "summary.json"))
        for when in ("before", "after"):
            numbers = _object(content.get(when, {}))
            found = {brief(name, 100): finite(value) for name, value in list(numbers.items())[:1000]}
            run.summary[when] = {name: value for name, value in found.items() if value is not None}
            if len(run.summary[when]) < len(numbers):
                run.leave_out("summary.json", f"values of {when} that are no finite number")
        if not any(run.summary.values()):
            run.summary = {}
        # Of a version that did not write the step, the file alone says that the run is complete.
        run.complete = content.get("step", run.metrics.last_step) == run.metrics.last_step
        run.ended_by = brief(content.get("ended_by"), 100) if run.complete else ""


def _pairs(run: Run) -> None:
    """Values of each image, before and after, with the same labels and random numbers."""
    with run.reading(BEFORE_AFTER):
        content = _object(read_json(run.path, BEFORE_AFTER))
        try:
            found = {when: as_numbers(_object(content[when])) for when in ("before", "after") if when in content}
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise Unreadable(f"no lists of finite numbers ({type(error).__name__})") from error
        if {len(values) for numbers in found.values() for values in numbers.values()} == {0} or len(found) < 2:
            return
        before, after = found["before"], found["after"]
        sizes = [{name: len(values) for name, values in numbers.items()} for numbers in (before, after)]
        if sizes[0] != sizes[1] or 0 in sizes[0].values():  # of prompts, those of each domain have a size of their own
            raise Unreadable("before and after are not of the same images")
        if any(abs(values).max() > 1e100 for values in (*before.values(), *after.values())):
            raise Unreadable("numbers beyond 1e100")
        run.pairs = found
        run.summary = {when: means(numbers) for when, numbers in found.items()}
        step = content.get("step")
        run.measured_step = step if isinstance(step, int) and not isinstance(step, bool) else None
        run.pair_labels = _of_pairs(content.get("labels"), after)


def _of_pairs(labels: Any, after: Numbers) -> dict[str, list[int]]:
    """The labels of the images by the suffix of their numbers' names; {} if they are not known."""
    sizes = {
        domain_of(name)[1]: len(values) for name, values in after.items()
    }  # in the order in which they are sampled
    if not isinstance(labels, list) or len(labels) != sum(sizes.values()):
        return {}
    if not all(isinstance(label, int) and not isinstance(label, bool) and label >= 0 for label in labels):
        return {}
    found, first = {}, 0
    for suffix, count in sizes.items():
        found[suffix] = labels[first : first + count]
        first += count
    return found


def _ended(run: Run) -> None:
    with run.reading(ENDED):
        run.ended = None if run.complete else validated(Ended, read_json(run.path, ENDED))


def _appearance(run: Run) -> None:
    """What the base's grids look like is the point at step 0 of the curves of those of the policy."""
    with run.reading("appearance.json"):
        for name, value in _object(read_json(run.path, "appearance.json")).items():
            steps, values = run.series(f"drift/{name}")
            of_base = finite(value)
            if of_base is not None and steps and steps[0] > 0:
                steps.insert(0, 0)
                values.insert(0, of_base)


def _names(run: Run) -> None:
    with run.reading("labels.json"):
        content = read_json(run.path, "labels.json")
        rows = content.get("labels") if isinstance(content, dict) else content
        if not isinstance(rows, list):
            raise Unreadable("it holds no list of labels")
        labels = [validated(Label, row) for row in rows[:100_000]]
        run.names = {row.label: brief(row.name or row.folder or "", 60) for row in labels}


def _prompts(run: Run) -> None:
    with run.reading("prompts.jsonl"):
        run.prompts = parse_prompts(read_bytes(run.path, "prompts.jsonl", PROMPTS_BYTES))


def _rows(run: Run) -> None:
    with run.reading(ROWS):
        rows = read_json(run.path, ROWS)
        if not isinstance(rows, list):
            raise Unreadable("it holds no list")
        run.grid_rows = [brief(row) for row in rows[:1000]]


def _environment(run: Run) -> None:
    with run.reading("environment.json"):
        run.environment = text_leaves(_object(read_json(run.path, "environment.json")))


def _evaluation(run: Run) -> None:
    """What `python -m varfast.evaluate` measured, whose folder lies in the run's."""
    with run.reading("evaluation/evaluation.json"):
        run.evaluation = validated(Evaluation, read_json(run.path, "evaluation/evaluation.json"))
    if run.evaluation is not None:
        with run.reading("evaluation/pictures.png"):
            run.evaluation_picture, _ = picture_uri(run.path, "evaluation/pictures.png")


def domain_of(name: str) -> tuple[str, str]:
    """A name of the table of before and after, and " (held out)" or another domain of prompts, which may follow it."""
    domain = next((end for end in (" (held out)", " (out of domain)") if name.endswith(end)), "")
    return name.removesuffix(domain), domain


def _object(content: Any) -> dict[Any, Any]:
    if not isinstance(content, dict):
        raise Unreadable(f"it holds {brief(type(content).__name__)}, want an object")
    return content
