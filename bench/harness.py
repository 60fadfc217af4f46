"""How things are timed here: interleaved, in one process, on random data, medians; beside ceilings of the same run.

On a GPU with device events, after a warm-up, with a cold L2 cache. A session on a GPU writes a record,
bench/records/<date>_<gpu>.json, row by row, from which `python bench/table.py` makes the README's tables.

    VARFAST_BENCH_RECORD         the record to write, and to go on with if it is there; on a CPU too
    VARFAST_BENCH_COMPILE_ONLY   1: run every call once and time nothing
    VARFAST_BENCH_QUICK          1: leave out the peers that are compiled first; the row's notes name them
    VARFAST_BENCH_PEER_S         seconds a peer may take to start, compilation included (60): else it is left out
    VARFAST_COMMIT               the commit that is measured, where there is no checkout
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from varfast.perf.devices import Ceilings
from varfast.runs.environment import environment

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
        spread: of ours, from the first to the third quartile, as a part of the median.
        samples: how often ours was timed.
        ratios: of each peer's time to ours.
        peak_bytes: most memory in use meanwhile, on a GPU.
        model, images: of a stage or a step: which, and how many at a time.
        notes: peers that did not run here and why; what else must be known of the row.
    """

    op: str
    shape: str
    direction: str
    ms: float
    peers_ms: dict[str, float] = field(default_factory=dict)
    flop: float = 0.0
    io_bytes: float = 0.0
    share: float = 0.0
    spread: float = 0.0
    samples: int = 0
    ratios: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    model: str = ""
    images: int = 0
    notes: list[str] = field(default_factory=list)

    def line(self) -> str:
        ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in self.ratios.items())
        peak = f"; {self.peak_bytes / 2**30:.1f} GiB" if self.peak_bytes else ""
        notes = "".join(f"\n    {note}" for note in self.notes)
        return (
            f"{self.op} {self.direction} {self.shape}: {self.ms:.4f} ms (+- {self.spread / 2:.0%} of {self.samples}), "
            f"{self.share:.0%} of the ceiling; {ratios}{peak}{notes}"
        )


class Record:
    """What a session measures: hardware, commit, ceilings, rows, checks. On disk, if anywhere, after every row.

    Several processes may write: each adds to what it finds. A benchmark that was begun
    and neither done nor failed has ended its process.

    Args:
        path: of the file, or None: nothing is written.
    Attributes:
        alone: time ours without peers: with them the process ended before.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.alone = False
        self.content: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": os.environ.get("VARFAST_BENCH_COMMAND", "pytest bench --benchmark-only"),
            "environment": environment() | _commit(),
            "ceilings": None,
            "rows": [],
            "checks": {},
            "tests": {},
        }
        with self._on_disk():
            pass

    def replace(self, rows: list[Row]) -> None:
        """Add rows, each in place of an earlier one of the same op, shape, direction and model."""
        names = ("op", "shape", "direction", "model")
        new = [asdict(row) for row in rows]
        taken = {tuple(row[name] for name in names) for row in new}
        with self._on_disk():
            kept = [row for row in self.content["rows"] if tuple(row[name] for name in names) not in taken]
            self.content["rows"] = kept + new

    def note(self, section: str, key: str, value: object) -> None:
        """Set an entry of `checks` or `tests`."""
        with self._on_disk():
            self.content[section][key] = value

    def add(self, row: Row) -> None:
        with self._on_disk():
            self.content["rows"].append(asdict(row))

    @property
    def ceilings(self) -> Ceilings:
        """Measured when they are first asked for."""
        if self.content["ceilings"] is None:
            best = asdict(measure_ceilings())
            with self._on_disk():
                self.content["ceilings"] = best
        return Ceilings(**self.content["ceilings"])

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        """Around a change: what other processes have written is read before, and all written after."""
        if self.path is None:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.parent.joinpath(".record.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.path.exists():
                self.content = json.loads(self.path.read_text())
            yield
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.content, indent=1) + "\n")
            partial.replace(self.path)


def record_path() -> Path | None:
    """Where this session's record goes: on a CPU nowhere, unless it is said where."""
    if "VARFAST_BENCH_RECORD" in os.environ:
        return Path(os.environ["VARFAST_BENCH_RECORD"])
    if not CUDA or os.environ.get("VARFAST_BENCH_COMPILE_ONLY") == "1":
        return None
    return RECORDS / f"{datetime.now(UTC):%Y-%m-%d_%H%M}_{torch.cuda.get_device_name().replace(' ', '-')}.json"


def _commit() -> dict[str, str]:
    given = os.environ.get("VARFAST_COMMIT")
    return {"commit": given} if given else {}


@dataclass(frozen=True)
class Timed:
    """Median milliseconds, distance of the quartiles as a part of it, and of how many samples."""

    ms: float
    spread: float
    samples: int


def _timed(samples: list[float]) -> Timed:
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median,) * 3
    return Timed(median, (high - low) / median, len(samples))


def time_interleaved(calls: dict[str, Callable[[], object]], budget_s: float = 1.0) -> dict[str, Timed]:
    """Time each call, which has run before; they take turns, so that a drift of the machine meets all of them.

    Rounds go on for budget_s a call: at least 3; 2 where a round takes over 8 s, 1 over 40 s.
    """
    for call in calls.values() if CUDA else ():  # on a CPU the first of three samples is the slow one
        for _ in range(2):
            if seconds(call) > 1.0:  # of a call that long little is start-up
                break
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    rounds, wanted = 0, 3
    while rounds < wanted or time.perf_counter() - begin < budget_s * len(calls):
        for name, call in calls.items():
            samples[name].append(_time_once(call))
        rounds += 1
        if rounds == 1:
            round_s = time.perf_counter() - begin
            wanted = 1 if round_s > 40.0 else 2 if round_s > 8.0 else 3
    return {name: _timed(times) for name, times in samples.items()}


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begin


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


# Between two calls the L2 cache (60 MB on an H200) is overwritten; then the device waits 2 ms, so that the host has
# queued the call before the first event: else a short op's time would be that of its launch.
@functools.cache
def _flush() -> torch.Tensor:
    """Made when something is timed: a process that only writes a record leaves the device's memory to others."""
    return torch.empty(2**28, dtype=torch.uint8, device=DEVICE)


_HEAD_START_CYCLES = 4_000_000


def _time_once(call: Callable[[], object]) -> float:
    if not CUDA:
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    _flush().zero_()
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
    timed = time_interleaved({"product": lambda: a @ b, "copy": lambda: target.copy_(source)})
    return Ceilings(2 * side**3 / timed["product"].ms * 1e3, 2 * size / timed["copy"].ms * 1e3)


COMPILED_PEERS = ("torch.compile", "flex", "flex, tuned")


@contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after limit_s; an alarm that was set before (bench/conftest.py) goes on.

    A call that does not come back to Python, such as a kernel that hangs, is not reached: that alarm ends the process.
    """

    def expire(*_: object) -> None:
        raise TimeoutError(f"over its limit of {limit_s:g} s")

    begin, handler = time.monotonic(), signal.getsignal(signal.SIGALRM)
    before_s, _ = signal.getitimer(signal.ITIMER_REAL)
    if 0 < before_s <= limit_s:  # the process would be ended first
        yield
        return
    signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if before_s:
            signal.setitimer(signal.ITIMER_REAL, max(0.1, before_s - (time.monotonic() - begin)))


def runnable(calls: dict[str, Callable[[], object]]) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """Ours and the peers that run here, after one run; why the others do not. What ours raises, it raises here."""
    calls["ours"]()
    synchronize()
    found, notes = {"ours": calls["ours"]}, []
    quick, limit_s = os.environ.get("VARFAST_BENCH_QUICK") == "1", float(os.environ.get("VARFAST_BENCH_PEER_S", "60"))
    for name, call in calls.items():
        if name == "ours":
            continue
        if quick and name in COMPILED_PEERS:
            notes.append(f"{name} left out: it is compiled first")
            continue
        try:
            with time_limit(limit_s):
                call()
                synchronize()
        except Exception as error:  # noqa: BLE001 - a peer may refuse in any way: then it is left out, and said
            lines = str(error).strip().splitlines() or [""]
            notes.append(f"{name} did not run: {type(error).__name__}: {lines[0][:200]}")
            if CUDA:
                torch.cuda.empty_cache()
        else:
            found[name] = call
    return found, notes


def measure(
    benchmark: Any, record: Record, row: Row, calls: dict[str, Callable[[], object]], ceilings: Ceilings | None = None
) -> None:
    """Time ours and the peers in turns, note share and ratios, and let pytest-benchmark time ours too.

    Args:
        ceilings: other ones than the record's.
    """
    if record.alone:
        calls = {"ours": calls["ours"]}
        row.notes.append("without peers: with them the process ended")
    calls, notes = runnable(calls)
    if os.environ.get("VARFAST_BENCH_COMPILE_ONLY") == "1":  # for the compilers' caches: nothing is timed
        return
    ceilings = ceilings or record.ceilings
    timed = time_interleaved(calls, budget_s=0.4 if CUDA else 0.2)
    ours = timed.pop("ours")
    row.ms, row.spread, row.samples = ours.ms, ours.spread, ours.samples
    row.peers_ms = {name: peer.ms for name, peer in timed.items()}
    row.ratios = {name: round(peer.ms / ours.ms, 3) for name, peer in timed.items()}
    row.notes += notes
    row.share = floor_ms(row, ceilings) / row.ms
    record.add(row)
    print(row.line(), flush=True)
    benchmark.extra_info |= {"peers_ms": row.peers_ms, "share": round(row.share, 3)}

    def once() -> None:
        calls["ours"]()
        synchronize()

    if row.ms > 1000:  # pytest-benchmark's own five rounds would take minutes
        benchmark.pedantic(once if not CUDA else lambda: None, rounds=1, iterations=1)
    else:
        benchmark(once)


def floor_ms(row: Row, ceilings: Ceilings) -> float:
    return max(row.flop / ceilings.flop_per_s, row.io_bytes / ceilings.byte_per_s) * 1e3
