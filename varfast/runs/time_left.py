"""How long a run still takes: its steps at their recent pace, and what happens between them."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_WINDOW = 20  # steps whose median is the pace


class TimeLeft:
    """Learns how long steps and other work take, and adds up what is left of them."""

    def __init__(self) -> None:
        self._steps_s: deque[float] = deque(maxlen=_WINDOW)
        self._first = True
        self._aside_s: dict[str, float] = {}

    def step(self, seconds: float) -> None:
        """A step took so long. The first one, which compiles, counts only until there is another."""
        if self._first and self._steps_s:
            self._steps_s.clear()
            self._first = False
        self._steps_s.append(seconds)

    @contextmanager
    def aside(self, kind: str) -> Iterator[None]:
        """Around work that is done beside some of the steps: the last of a kind tells how long the next takes."""
        begin_s = time.perf_counter()
        yield
        self._aside_s[kind] = time.perf_counter() - begin_s

    @property
    def step_s(self) -> float:
        """Seconds of a step; 0 before the first one."""
        return statistics.median(self._steps_s) if self._steps_s else 0.0

    def seconds(self, steps: int, aside: Mapping[str, int]) -> float:
        """Until so many steps and so many of each kind of other work are done. What was not done yet takes no time."""
        return self.step_s * steps + sum(self._aside_s.get(kind, 0.0) * count for kind, count in aside.items())


def multiples_left(done: int, total: int, every: int) -> int:
    """Of the steps done + 1 to total, how many are multiples of `every`, or the last one."""
    whole = total // every - done // every
    return whole + (total > done and total % every > 0)
