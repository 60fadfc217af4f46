"""The stages of a step, by name: seen in Nsight (NVTX, domain varfast) and in torch.profiler, and timed.

with StageClock(device) as clock:
    with stage("rollout"):
        ...
clock.read()  # {"rollout": milliseconds}
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
    """A span that the clock running, if any, adds to the time of its name."""
    with span(name):
        if not _clocks:
            yield
            return
        read = _clocks[-1].start()
        yield
        _clocks[-1].add(name, read)


class StageClock:
    """Adds up what each stage took, until it is read.

    On a GPU by events on the stage's own stream: nothing waits before `read`. Stages that overlap count in full each.

    Args:
        device: where the stages run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._measured: list[tuple[str, Callable[[], float]]] = []

    def __enter__(self) -> StageClock:
        _clocks.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _clocks.remove(self)

    def start(self) -> Callable[[], Callable[[], float]]:
        """A stage begins; call the result when it ends, and the result of that, once the device is done, for its ms."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()

            def stop_event() -> Callable[[], float]:
                end.record()
                return lambda: begin.elapsed_time(end)

            return stop_event
        begin_s = time.perf_counter()

        def stop() -> Callable[[], float]:
            ms = (time.perf_counter() - begin_s) * 1e3
            return lambda: ms

        return stop

    def add(self, name: str, stop: Callable[[], Callable[[], float]]) -> None:
        """End a stage that `start` began."""
        self._measured.append((name, stop()))

    def read(self) -> dict[str, float]:
        """Milliseconds by stage since the last reading; waits for the device, once."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        totals: dict[str, float] = {}
        for name, ms in self._measured:
            totals[name] = totals.get(name, 0.0) + ms()
        self._measured.clear()
        return totals
