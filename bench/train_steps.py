"""Run the trainer at full size until it has enough steady steps, and note each stage as the steps come.

    python bench/train_steps.py d16|d30 --record PATH [--steady 5] [--flat] [a.b=c ...]

Random weights, 512 images a step, the brightness reward; no evaluation, grids or checkpoints. The first two steps
compile and capture: the record has the medians of those after. It is written after every steady step, so that a run
that is cut or dies leaves what it had, with its memory per step under `checks`. With --flat it fails (exit code 1)
where the most memory allocated or reserved in a step still grows by over 1 % after the first quarter of the steps.

This process puts nothing on the GPU, so that the trainer has its memory: where the record has no ceilings yet, a
process that ends before the trainer starts measures them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import from_metrics
import harness

from varfast.config import load_config
from varfast.perf.devices import Ceilings

ROOT = Path(__file__).parent.parent
CONFIG = "configs/d30.yaml"
WARM_UP = 2  # steps that compile and capture
MEMORY = ("memory_allocated_bytes", "memory_reserved_bytes", "memory_unused_bytes")
Metrics = list[dict[str, Any]]


def overrides_of(model: str) -> list[str]:
    return [
        f"policy.preset={model}", "policy.checkpoint=random", "policy.vqvae_checkpoint=null",
        "reward={bright: {type: brightness}}", "run.dtype=bfloat16",
    ]  # fmt: skip


def command_of(model: str, folder: Path, steps: int, overrides: list[str]) -> list[str]:
    quiet = [
        f"run.dir={folder}", f"run.steps={steps}", "eval.samples_per_label=0", "log.tensorboard=false",
        "log.grid_every=100000", "log.checkpoint_every=100000", "log.grid_labels=1", "log.grid_samples=1",
    ]  # fmt: skip
    return [sys.executable, "-m", "varfast.train", CONFIG, *overrides_of(model), *quiet, *overrides]


def read_metrics(path: Path) -> Metrics:
    """The whole lines: the last may be half written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def note(record: harness.Record, model: str, lines: Metrics) -> None:
    """Put the medians of the steady steps, and the memory of every step, into the record in place of older ones."""
    memory = [{name: line[name] for name in MEMORY if name in line} for line in lines]
    record.note("checks", f"{model} memory of each step", memory)
    if len(lines) <= WARM_UP:
        return
    config = load_config(str(ROOT / CONFIG), overrides_of(model))
    ceilings = Ceilings(**record.content["ceilings"])
    record.replace(from_metrics.rows(lines[WARM_UP:], config, model, ceilings, []))


def growth(lines: Metrics) -> dict[str, float]:
    """By how much the most memory of a later step exceeds that of the first quarter, as a part of it.

    Raises: ValueError where the metrics do not tell the memory.
    """
    names = MEMORY[:2]
    if not all(name in line for line in lines for name in names):
        raise ValueError(f"metrics.jsonl does not have {' and '.join(names)} in every step: a run on a GPU logs them")
    first = max(WARM_UP + 1, len(lines) // 4)
    if len(lines) <= first:
        raise ValueError(f"{len(lines)} steps do not show whether memory grows: more than {first} are needed")
    return {name: max(x[name] for x in lines[first:]) / max(x[name] for x in lines[:first]) - 1 for name in names}


def watch(command: list[str], metrics: Path, record: harness.Record, model: str) -> tuple[int, Metrics]:
    """Run the trainer; note every step when it is there. Returns: its exit code and the lines."""
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    seen: Metrics = []
    try:
        while True:
            code = process.poll()
            lines = read_metrics(metrics)
            if len(lines) > len(seen):
                seen = lines
                print(f"{model} step {len(lines)}: {lines[-1]['step_s']:.2f} s", flush=True)
                note(record, model, lines)
            if code is not None:
                return code, seen
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("d16", "d30"))
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--steady", type=int, default=5)
    parser.add_argument("--flat", action="store_true")
    parser.add_argument("overrides", nargs="*", help="of the config, beside those above")
    arguments = parser.parse_intermixed_args(given)
    path = arguments.record.resolve()
    if not path.exists() or not json.loads(path.read_text())["ceilings"]:
        measure = f"import pathlib, harness; harness.Record(pathlib.Path({str(path)!r})).ceilings"
        subprocess.run([sys.executable, "-c", measure], cwd=ROOT / "bench", check=True)
    record = harness.Record(path)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = command_of(arguments.model, run, WARM_UP + arguments.steady, arguments.overrides)
        code, lines = watch(command, run / "metrics.jsonl", record, arguments.model)
    if code == 0 and arguments.flat:
        found = growth(lines)
        record.note("checks", f"{arguments.model} growth of memory", found)
        print(f"growth of memory: {found}", flush=True)
        return int(max(found.values()) > 0.01)
    return code


if __name__ == "__main__":
    sys.exit(main())
