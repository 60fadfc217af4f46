"""Make a record of stages and step from what a training run wrote: its metrics.jsonl.

    python bench/from_metrics.py runs/d16/metrics.jsonl configs/d30.yaml policy.preset=d16 update.micro_batch=32 \\
        --like bench/records/2026-11-26_NVIDIA-H100-80GB-HBM3_kernels.json --out bench/records/2026-11-26_..._d16.json

The config and overrides say what was run; FLOPs and bytes of a stage are counted from them. A time is the median of the
steps after the first two, which compile and capture, or of all after the first where there are no more than three.
Ceilings and environment are taken from a record of the same machine and day.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import Row

from varfast.config import Config, load_config
from varfast.perf.devices import Ceilings
from varfast.perf.limits import speed_of_light_s, stage_counts
from varfast.perf.plan import plan_memory
from varfast.perf.work import Work
from varfast.policies.families import family_of

# Rows of the README's table, from the stages of metrics.jsonl.
_NAMES = {"update": "forward and backward"}


def steady(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps that are neither compiled nor captured in."""
    return lines[2:] if len(lines) > 3 else lines[1:]


def rows(lines: list[dict[str, Any]], config: Config, model: str, ceilings: Ceilings, notes: list[str]) -> list[Row]:
    """A row a stage, and one of the step, of all images."""
    found, images = [], config.rollout.images
    work = Work.whole(config, family_of(config.policy).cost_of(config.policy, config.run.dtype))
    counts = stage_counts(work, plan_memory(work, None))
    whole = sum((speed_of_light_s(count, ceilings) for count in counts.values()), 0.0)
    for stage, count in counts.items():
        found.append(_row(_NAMES.get(stage, stage), [line[f"{stage}_ms"] for line in lines], model, images, notes))
        found[-1].flop, found[-1].io_bytes = count.flop, count.io_bytes
        found[-1].share = speed_of_light_s(count, ceilings) * 1e3 / found[-1].ms
    step = _row("step", [line["step_s"] * 1e3 for line in lines], model, images, notes)
    step.flop = sum(count.flop for count in counts.values())
    step.io_bytes = sum(count.io_bytes for count in counts.values())
    step.share = whole * 1e3 / step.ms
    step.peak_bytes = int(max(line.get("memory_allocated_bytes", 0) for line in lines))
    return [*found, step]


def _row(what: str, times_ms: list[float], model: str, images: int, notes: list[str]) -> Row:
    median = statistics.median(times_ms)
    spread = (max(times_ms) - min(times_ms)) / median
    return Row(what, f"{model}, {images} images", "forward", median, spread=spread, samples=len(times_ms), model=model,
               images=images, notes=list(notes))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--like", type=Path, required=True, help="a record of the same machine: ceilings, environment")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--note", action="append", default=[])
    arguments = parser.parse_args()
    like = json.loads(arguments.like.read_text())
    config = load_config(arguments.config, [*arguments.overrides, "run.dtype=bfloat16"])
    lines = steady([json.loads(line) for line in arguments.metrics.read_text().splitlines()])
    assert config.policy.preset is not None
    of_run = rows(lines, config, config.policy.preset, Ceilings(**like["ceilings"]), arguments.note)
    settings = " ".join([arguments.config, *arguments.overrides])
    content = {
        "date": like["date"],
        "command": f"python -m varfast.train {settings}",
        "environment": like["environment"],
        "ceilings": like["ceilings"],
        "rows": [asdict(row) for row in of_run],
        "checks": {},
        "tests": {},
    }
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
