"""Results of a benchmark's official evaluator, put into the table of the evaluation that exported the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from varfast.evaluation.arguments import out_folder
from varfast.evaluation.asked import read_asked
from varfast.evaluation.benchmarks import BENCHMARKS
from varfast.evaluation.config import EvaluateConfig
from varfast.evaluation.metrics import Estimate
from varfast.evaluation.official import read_results, rows_of
from varfast.evaluation.table import Row
from varfast.files import read_json, save_text
from varfast.printable import printable
from varfast.types import InputError

FILE = "results.json"
# Arguments that say which evaluation is meant, and what is read.
_OF_RESULTS = {"checkpoint", "out", "results"}


def add_results(config: EvaluateConfig) -> list[Row]:
    """Read what an evaluator wrote into evaluation.json and results.json of an evaluation that is complete.

    Returns: all rows of its table.
    Raises: InputError if there is no such evaluation, or the results are not of its images.
    """
    assert config.results is not None
    out = out_folder(config)
    path = out / "evaluation.json"
    if not path.is_file():
        raise InputError(
            f"results: {out} holds no complete evaluation; first run evaluate with export={'|'.join(BENCHMARKS)}, "
            "and its evaluator on the images"
        )
    result = read_json(path)
    try:
        settings, exported = result["settings"], list(result["exported"])
        benchmark, samples = settings["export"], int(settings["samples_per_prompt"])
        guidance = float(settings["cfg"]) if not isinstance(settings["cfg"], list) else None
        kept = [row for row in map(_row, result["rows"]) if row.name.partition("/")[0] not in BENCHMARKS]
        if benchmark not in BENCHMARKS:
            raise ValueError(f"export={benchmark}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"results: {path} is of an evaluation without export ({printable(error)})") from error
    _refuse_other_settings(config, settings, out)
    if unknown := [name for name in config.results if name not in exported]:
        raise InputError(
            f"results.{printable(unknown[0])}: {out} has no such images; it has {printable(', '.join(exported))}"
        )
    prompts = read_asked(out)
    found = {
        name: read_results(benchmark, files, prompts, samples, name) for name, files in config.results.items()
    }  # fmt: skip
    rows = []
    for name, measured in found.items():
        side, _, cfg = name.partition("_cfg_")
        if side == "checkpoint":
            reference = found.get(name.replace("checkpoint", "reference", 1))
            rows += rows_of(reference, measured, float(cfg) if cfg else guidance)
    if not rows:
        raise InputError(f"results: {', '.join(found)} alone; give those of checkpoint too")
    save_text(out / FILE, json.dumps({"rows": [row.as_json() for row in rows]}, indent=2) + "\n")
    result["rows"] = [row.as_json() for row in [*kept, *rows]]
    save_text(path, json.dumps(result, indent=2) + "\n")
    return [*kept, *rows]


def kept_rows(out: Path) -> list[Row]:
    """Rows that were read into an evaluation before. Raises: InputError if they are damaged."""
    path = out / FILE
    if not path.is_file():
        return []
    try:
        return [_row(row) for row in read_json(path)["rows"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged: {printable(error)}; delete it, and read the results again") from error


def _row(row: dict[str, Any]) -> Row:
    """What Row.as_json wrote. Raises: KeyError, TypeError, ValueError, AttributeError for anything else."""
    texts = [row["name"], row["labels"], *([row["features"]] if row["features"] is not None else [])]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a row has a name that is no text")
    cfg = None if row["cfg"] is None else float(row["cfg"])
    checkpoint = _estimate(row["checkpoint"])
    if checkpoint is None:
        raise TypeError("a row has no number")
    return Row(row["name"], row["labels"], _estimate(row["reference"]), checkpoint, _estimate(row["difference"]),
               row["features"], cfg)  # fmt: skip


def _estimate(found: dict[str, Any] | None) -> Estimate | None:
    if found is None:
        return None
    low, high = (None if found[side] is None else float(found[side]) for side in ("low", "high"))
    return Estimate(float(found["value"]), low, high)


def _refuse_other_settings(config: EvaluateConfig, settings: dict[str, Any], out: Path) -> None:
    """Arguments that were given beside the results, and are not those of the evaluation."""
    given = config.model_dump(mode="json", include=config.model_fields_set - _OF_RESULTS)
    for name in ("export", "samples_per_prompt", "seed", "save", "dtype"):
        if name in given and given[name] != settings.get(name):
            raise InputError(
                f"results: {out} holds an evaluation with {name}={printable(settings.get(name))}, not {given[name]}; "
                "leave it out, or name another out folder"
            )
