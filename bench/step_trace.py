"""One step of d16 at full size under the profiler, and what the device did in it: busy share, kernels by time, gaps.

python bench/step_trace.py OUT_DIR        # trains 4 steps of random d16 with --profile; writes OUT_DIR/trace.json.gz
python bench/step_trace.py --read TRACE   # of a trace that is there
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
GAP_US = 20.0


def summary(events: list[dict[str, Any]], top: int = 30) -> list[str]:
    """Lines about the device's work: union of all its streams."""
    work = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") in DEVICE_WORK)
    if not work:
        return ["no work of a device in this trace"]
    begin, end = work[0][0], max(stop for _, stop, _ in work)
    busy, until, gaps = 0.0, begin, []
    for start, stop, name in work:
        if start > until:
            gaps.append((start - until, start - begin, name))
        busy += max(0.0, stop - max(start, until))
        until = max(until, stop)
    by_name: dict[str, list[float]] = defaultdict(list)
    for start, stop, name in work:
        by_name[name].append(stop - start)
    long = [gap for gap in gaps if gap[0] >= GAP_US]
    lines = [
        f"device: {(end - begin) / 1e3:.1f} ms from first to last, busy {busy / (end - begin):.1%}, {len(work)} pieces",
        f"gaps of {GAP_US:.0f} us and more: {len(long)}, {sum(gap for gap, _, _ in long) / 1e3:.1f} ms together; "
        f"shorter ones {sum(gap for gap, _, _ in gaps if gap < GAP_US) / 1e3:.1f} ms",
        "longest gaps, ms, at ms, before:",
        *(f"  {gap / 1e3:8.3f} {at / 1e3:9.1f}  {name[:90]}" for gap, at, name in sorted(gaps, reverse=True)[:12]),
        "kernels by time, ms, share, count:",
    ]
    totals = sorted(((sum(times), len(times), name) for name, times in by_name.items()), reverse=True)
    all_us = sum(total for total, _, _ in totals)
    for total, count, name in totals[:top]:
        lines.append(f"  {total / 1e3:8.2f} {total / all_us:6.1%} {count:6}  {name[:110]}")
    return lines


def read(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return json.loads(data)["traceEvents"]


def record(out: Path) -> Path:
    """Train a few steps; returns the compressed trace."""
    run = Path(tempfile.mkdtemp()) / "run"  # with its checkpoint of 4 GB
    overrides = (
        f"run.dir={run}", "run.steps=4", "run.device=cuda", "policy.checkpoint=random", "policy.vqvae_checkpoint=null",
        "eval.samples_per_label=0", "log.tensorboard=false", "log.checkpoint_every=1000", "log.grid_labels=1",
        "log.grid_samples=1",
    )  # fmt: skip
    command = [sys.executable, "-m", "varfast.train", "configs/d16_brightness.yaml", "--profile", *overrides]
    try:
        subprocess.run(command, cwd=ROOT, check=True)
        print((run / "metrics.jsonl").read_text())
        return packed(run / "profile" / "trace.json", out / "trace.json.gz")
    finally:
        shutil.rmtree(run.parent, ignore_errors=True)


def packed(plain: Path, target: Path) -> Path:
    with plain.open("rb") as source, gzip.open(target, "wb", compresslevel=6) as file:
        shutil.copyfileobj(source, file)
    return target


def main(arguments: list[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "--read":
        trace = Path(arguments[1])
    elif len(arguments) == 1:
        trace = record(Path(arguments[0]))
    else:
        print(__doc__)
        return 2
    print("\n".join(summary(read(trace))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
