"""Reading the files of a run folder that anybody may have made: each may be missing, cut off, malformed or huge.

A file that cannot be used becomes a sentence in `Run.left_out`. Nothing here waits for a FIFO, follows a link out of
the folder, or allocates what a file only claims to hold.
"""

from __future__ import annotations

import json
import stat
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, Field, ValidationError

from varfast.files import open_regular
from varfast.report.elements import brief

_Model = TypeVar("_Model", bound=BaseModel)

METRICS_BYTES = 256 * 2**20  # 40 000 steps are 40 MB
_LINE_BYTES = 2**20
# PyYAML reads about 0.1 MB/s; a config with 1000 labels and their names has 50 kB.
CONFIG_BYTES = 256 * 2**10
_JSON_BYTES = 64 * 2**20
PROMPTS_BYTES = 64 * 2**20
PICTURE_BYTES = 64 * 2**20
_MOST_METRICS = 300
_MOST_SETTINGS = 2000
# A sum of 10^6 numbers up to this size is finite.
_LARGEST = 1e300
_MOST_PROMPTS = 1_000_000
_LAST_STEP = 10**12
# What PyYAML raises for text that is not valid YAML.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


class Unreadable(Exception):
    """A file of a run folder that cannot be used; the text says why."""


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_bytes(folder: Path, name: str, most_bytes: int) -> bytes:
    """The content of a file of a run folder.

    Raises: FileNotFoundError if there is none; Unreadable for a link out of the folder, for anything that is not a
        regular file, for a file that is too large, or one that the system refuses to read.
    """
    path = folder / name
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise Unreadable(next((kind for is_kind, kind in _KINDS.items() if is_kind(mode)), "no file"))
        if not path.resolve().is_relative_to(folder.resolve()):
            raise Unreadable("a link that leads out of the run folder")
        with open_regular(path) as file:
            content = file.read(most_bytes + 1)
    except FileNotFoundError:
        if path.is_symlink():
            raise Unreadable("a link to nothing") from None
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: resolve() of links in a circle
        raise Unreadable(getattr(error, "strerror", None) or str(error)) from error
    if len(content) > most_bytes:
        raise Unreadable(f"more than {most_bytes / 2**20:.3g} MiB")
    return content


def read_json(folder: Path, name: str) -> Any:
    """The content of a JSON file. Raises: as read_bytes; Unreadable for what is not valid JSON."""
    content = read_bytes(folder, name, _JSON_BYTES)
    try:
        return json.loads(content)
    except RecursionError as error:
        raise Unreadable("nested too deeply") from error
    except ValueError as error:
        raise Unreadable(f"not valid JSON: {brief(str(error), 100)}") from error


def validated(model: type[_Model], content: Any) -> _Model:
    """JSON content as a pydantic model. Raises: Unreadable, which names the first place that does not fit."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(brief(part, 40) for part in first["loc"]) or "the top"
        raise Unreadable(f"{place}: {brief(first['msg'], 100)}") from error
    except (RecursionError, OverflowError) as error:
        raise Unreadable(f"cannot be read ({type(error).__name__})") from error


# ---------------------------------------------------------------------------------------------------------------------
# What some files hold


class Estimated(BaseModel):
    """A number and its 95 % interval, where it has one."""

    value: float | None
    low: float | None = None
    high: float | None = None


class EvaluationRow(BaseModel):
    name: str
    labels: str
    reference: Estimated | None
    checkpoint: Estimated | None
    difference: Estimated | None
    features: str | None = None
    cfg: float | None = None


class _Column(BaseModel):
    of: str
    sample: int


class _Pictures(BaseModel):
    columns: list[_Column] = Field(max_length=1000)
    rows: list[int] = Field(max_length=1000)
    titles: list[str] | None = Field(None, max_length=1000)


class Evaluation(BaseModel):
    """evaluation.json of `python -m varfast.evaluate`."""

    images: int
    labels: int
    prompts: int | None = None
    intervals: str
    rows: list[EvaluationRow] = Field(max_length=1000)
    pictures: _Pictures | None = None


class Sample(BaseModel):
    label: int | str
    reward: float
    rewards: dict[str, float] = Field(max_length=_MOST_METRICS)


class Samples(BaseModel):
    """samples/step_N.json, see RunLog.samples: a list for each row of the picture."""

    best: list[Sample] = Field(min_length=1, max_length=64)
    worst: list[Sample] = Field(min_length=1, max_length=64)
    ties: dict[str, int] = {}
    images: int | None = None


class Prompted(BaseModel):
    """A row of prompts.jsonl, whose number is the label of its images."""

    prompt: str = Field(max_length=100_000)
    tag: str | None = None
    domain: str = "train"


class Ended(BaseModel):
    """ended.json: what ended a run before it was complete."""

    step: int = Field(ge=0, le=_LAST_STEP)
    why: str = Field(max_length=100_000)
    diverged: bool = False


class Label(BaseModel):
    label: int
    name: str | None = None
    folder: str | None = None


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl by column.

    Attributes:
        columns: steps and values of each metric, ascending by step; of a step that is there twice, the later line.
        last_step: of all lines; 0 if there is none.
        left_out: what the columns do not hold, one sentence for each kind.
    """

    columns: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    last_step: int = 0
    left_out: list[str] = field(default_factory=list)


def parse_metrics(content: bytes) -> Metrics:
    """The columns of metrics.jsonl; damaged lines are counted."""
    steps = array("q")
    columns: dict[str, tuple[array[int], array[float]]] = {}  # line numbers, and values
    unreadable, bad, too_many = 0, Counter[str](), 0
    for line in content.decode("utf-8", "replace").split("\n"):  # json.loads guesses the encoding of bytes
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            unreadable += 1
            continue
        for name, value in row.items():
            if name == "step":
                continue
            number = finite(value)
            if name not in columns and (len(columns) == _MOST_METRICS or len(name) > 1000):
                too_many += 1
            elif number is None:
                bad[name] += 1
            else:
                lines, values = columns.setdefault(name, (array("q"), array("d")))
                lines.append(len(steps))
                values.append(number)
        steps.append(row["step"])
    notes = [f"{unreadable} lines of metrics.jsonl, cut off or damaged"] if unreadable else []
    notes += [f"{count} values of {brief(name, 60)} that are no finite number" for name, count in bad.most_common(20)]
    if too_many:
        notes.append(f"{too_many} values of metrics after the first {_MOST_METRICS}")
    return Metrics(_by_step(steps, columns), max(steps, default=0), notes)


def parse_prompts(content: bytes) -> list[Prompted]:
    """The prompts of a run, by label. Raises: Unreadable for a line that is none: labels after it are not known."""
    lines = content.decode("utf-8", "replace").split("\n")
    found = []
    for line in lines[:_MOST_PROMPTS]:
        if line.strip():
            try:
                found.append(validated(Prompted, json.loads(line) if len(line) <= _LINE_BYTES else None))
            except (ValueError, RecursionError) as error:
                raise Unreadable(f"line {len(found) + 1} is not valid JSON") from error
    return found


def _row(line: str) -> dict[str, Any] | None:
    if len(line) > _LINE_BYTES:
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # a run was killed while it wrote
        return None
    step = row.get("step") if isinstance(row, dict) else None
    is_step = isinstance(step, int) and not isinstance(step, bool) and 0 <= step <= _LAST_STEP
    return row if is_step else None


def _by_step(
    steps: array[int], columns: dict[str, tuple[array[int], array[float]]]
) -> dict[str, tuple[list[int], list[float]]]:
    if not len(steps):
        return {}
    steps_N = np.array(steps)
    # The last line of a step counts: a run that was killed does its last steps again.
    _, last = np.unique(steps_N[::-1], return_index=True)
    kept_N = np.zeros(len(steps_N), dtype=bool)
    kept_N[len(steps_N) - 1 - last] = True
    found = {}
    for name, (lines, values) in columns.items():
        lines_n, values_n = np.array(lines), np.array(values)
        lines_n, values_n = lines_n[kept_N[lines_n]], values_n[kept_N[lines_n]]
        order = np.argsort(steps_N[lines_n], kind="stable")
        if len(order):
            found[name] = (steps_N[lines_n][order].tolist(), values_n[order].tolist())
    return found


def finite(value: Any) -> float | None:
    """A number that a curve can show; None for anything else, and for more than 1e300 in either direction."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= _LARGEST else None


def parse_settings(content: bytes) -> tuple[str, dict[str, str]]:
    """config.yaml as text, and its values by dotted key, as update.lr. Values stay text: no objects are constructed.

    Raises: Unreadable if it holds no settings.
    """
    shown = content.decode("utf-8", "replace")
    try:
        settings = yaml.load(shown, Loader=yaml.BaseLoader)  # it constructs only strings, lists and dictionaries
    except _YAML_ERRORS as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else brief(str(error), 100)
        raise Unreadable(f"not valid YAML: {reason}") from error
    if not isinstance(settings, dict):
        raise Unreadable("it holds no settings")
    return shown, text_leaves(settings)


def text_leaves(content: dict[Any, Any]) -> dict[str, str]:
    """The values of nested dictionaries as text, by dotted key, as update.lr; at most 2000 of them, 8 levels deep."""
    found: dict[str, str] = {}
    waiting: list[tuple[str, Any, int]] = [("", content, 0)]
    while waiting and len(found) < _MOST_SETTINGS:
        key, node, depth = waiting.pop()
        if isinstance(node, dict) and depth < 8:
            children = [(f"{key}.{brief(name, 100)}".strip("."), node[name], depth + 1) for name in list(node)[:1000]]
            waiting = (waiting + children[::-1])[-_MOST_SETTINGS * 10 :]
        else:
            found[key] = brief(node)
    return found
