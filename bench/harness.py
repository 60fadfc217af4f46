"""How things are timed here: interleaved, in one process, on random data, medians; beside ceilings of the same run.

On a GPU with device events, after a warm-up, with a cold L2 cache. A
session on a GPU writes one record, bench/records/<date>_<gpu>.json, from which `python bench/table.py` makes the
README's table.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from varfast.log import environment
from varfast.roofline import Ceilings

RECORDS = Path(__file__).parent / "records"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@dataclass
class Row:
    """One measurement of ours, with its peers.

    Attributes:
        op, shape, direction: what was timed.
        ms: median time, milliseconds.
        peers_ms: medians of the same work by others, from the same interleaved run.
        flop, io_bytes: what the op must compute and move at least, counted in bench_kernels.py.
        share: of the ceiling that bounds it, 0 to 1.
        peak_bytes: most memory in use meanwhile, on a GPU.
    """

    op: str
    shape: str
    direction: str
    ms: float
    peers_ms: dict[str, float] = field(default_factory=dict)
    flop: float = 0.0
    io_bytes: float = 0.0
    share: float = 0.0
    peak_bytes: int = 0

    def line(self) -> str:
        ratios = ", ".join(f"{ms / self.ms:.2f}x {name}" for name, ms in self.peers_ms.items())
        return f"{self.op} {self.direction} {self.shape}: {self.ms:.4f} ms, {self.share:.0%} of the ceiling; {ratios}"


def time_interleaved(calls: dict[str, Callable[[], object]], budget_s: float = 1.0) -> dict[str, float]:
    """Median milliseconds of each call; the calls take turns, so that a drift of the machine meets all of them."""
    for call in calls.values() if CUDA else ():  # on a CPU the first of three samples is the slow one
        for _ in range(3):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + budget_s * len(calls)
    while len(next(iter(samples.values()))) < 3 or time.perf_counter() < deadline:
        for name, call in calls.items():
            samples[name].append(_time_once(call))
    return {name: statistics.median(times) for name, times in samples.items()}


# Between two calls the L2 cache (60 MB on an H200) is overwritten; then the device waits 2 ms, so that the host has
# queued the call before the first event: else a short op's time would be that of its launch.
_FLUSH = torch.empty(2**28 if CUDA else 0, dtype=torch.uint8, device=DEVICE)
_HEAD_START_CYCLES = 4_000_000


def _time_once(call: Callable[[], object]) -> float:
    if not CUDA:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    _FLUSH.zero_()
    torch.cuda._sleep(_HEAD_START_CYCLES)
    begin_event.record()
    call()
    end_event.record()
    torch.cuda.synchronize()
    return begin_event.elapsed_time(end_event)


def measure_ceilings() -> Ceilings:
    """Measured now: bf16 product of side 8192 and copy of 2 GiB on a GPU; float32 of side 1024 and 128 MiB on a CPU."""
    side, dtype, size = (8192, torch.bfloat16, 2**31) if CUDA else (1024, torch.float32, 2**27)
    a, b = torch.randn(2, side, side, device=DEVICE).to(dtype)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    ms = time_interleaved({"product": lambda: a @ b, "copy": lambda: target.copy_(source)})
    return Ceilings(2 * side**3 / ms["product"] * 1e3, 2 * size / ms["copy"] * 1e3)


def measure(
    benchmark: Any, rows: list[Row], ceilings: Ceilings, row: Row, calls: dict[str, Callable[[], object]]
) -> None:
    """Time ours and the peers in turns, note share and ratios, and let pytest-benchmark time ours too."""
    ms = time_interleaved(calls, budget_s=1.0 if CUDA else 0.2)
    row.ms, row.peers_ms = ms.pop("ours"), ms
    floor_s = max(row.flop / ceilings.flop_per_s, row.io_bytes / ceilings.byte_per_s)
    row.share = floor_s * 1e3 / row.ms
    rows.append(row)
    benchmark.extra_info |= {"peers_ms": row.peers_ms, "share": round(row.share, 3)}

    def once():
        calls["ours"]()
        if CUDA:
            torch.cuda.synchronize()

    if row.ms > 1000:  # pytest-benchmark's own five rounds would take minutes
        benchmark.pedantic(once, rounds=1, iterations=1)
    else:
        benchmark(once)


def write_record(rows: list[Row], ceilings: Ceilings) -> Path:
    """One file with hardware, commit, ceilings and every row."""
    now = datetime.now(UTC)
    name = torch.cuda.get_device_name().replace(" ", "-") if CUDA else "cpu"
    path = RECORDS / f"{now:%Y-%m-%d_%H%M}_{name}.json"
    path.parent.mkdir(exist_ok=True)
    content = {
        "date": now.isoformat(timespec="seconds"),
        "command": "pytest bench --benchmark-only",
        "environment": environment(),
        "ceilings": asdict(ceilings),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
