"""The stages of a step, by name: shown by Nsight (NVTX, domain varfast) and torch.profiler, and timed.

with StageClock(device) as clock:
    with stage("rollout"):
        ...
clock.read()  # {"rollout": milliseconds}
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import nvtx
import torch

_clocks: list[StageClock] = []


@contextmanager
def span(name: str) -> Iterator[None]:
    """A range that profilers show."""
    with nvtx.annotate(name, domain="varfast"), torch.profiler.record_function(name):
        yield


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A span whose time is added to its name by the clock that is running, if one is."""
    with span(name):
        if not _clocks:
            yield
            return
        timer = Timer(_clocks[-1].device)
        yield
        _clocks[-1].add(name, timer)


class Timer:
    """Times what the current stream runs, or on a CPU the process, from its creation to `stop`. Waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._events = None
        if device.type == "cuda":
            self._events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._events[0].record()
        self._begin_s = time.perf_counter()

    def stop(self) -> None:
        if self._events is not None:
            self._events[1].record()
        self._end_s = time.perf_counter()

    def ms(self) -> float:
        """Milliseconds until `stop`; on a GPU, once the device has run all that was launched before it."""
        if self._events is not None:
            return self._events[0].elapsed_time(self._events[1])
        return (self._end_s - self._begin_s) * 1e3


class StageClock:
    """Adds up the time of each stage until it is read.

    On a GPU each stage is timed by events on its own stream, so nothing waits before `read`. Each of several stages
    that overlap counts in full.

    Args:
        device: where the stages run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._measured: list[tuple[str, Timer]] = []

    def __enter__(self) -> StageClock:
        _clocks.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _clocks.remove(self)

    def add(self, name: str, timer: Timer) -> None:
        """End a stage, whose timer was made when it began."""
        timer.stop()
        self._measured.append((name, timer))

    def read(self) -> dict[str, float]:
        """Milliseconds by stage since the last call; waits for the device, once."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        totals: dict[str, float] = {}
        for name, timer in self._measured:
            totals[name] = totals.get(name, 0.0) + timer.ms()
        self._measured.clear()
        return totals
