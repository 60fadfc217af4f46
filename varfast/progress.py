"""How far a command has come: a bar on a terminal, elsewhere lines of text that `tee`, `nohup` and Slurm can keep.

A bar redraws its line with carriage returns, which in a file becomes one line of 90 kB. So where standard output or
standard error is not a terminal, lines are printed instead, each flushed at once:

    grpo: step 10 of 60, reward=0.412 kl=0.003, 1532 ms a step, 1 min 17 s left

TQDM_DISABLE=1 turns off both, as it does for every bar of tqdm.
"""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

# If steps are slow, a line is printed after so many seconds, whatever the number of the step.
_LONGEST_SILENCE_S = 30.0


class Progress:
    """Progress over `total` steps. A context manager.

    Args:
        name: at the beginning of the bar and of every line.
        total, done: steps in all, and steps done already.
        unit: what a step is called.
        every: steps between lines where there is no terminal. The first and the last step always get a line, and so
            does a step that ends 30 s after the last line.
        quiet: show nothing, for all processes but the first.
    """

    def __init__(
        self, name: str, total: int, done: int = 0, unit: str = "step", every: int = 10, quiet: bool = False
    ) -> None:
        self._name, self._total, self._done, self._unit, self._every = name, total, done, unit, every
        quiet = quiet or os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
        on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        if on_terminal and not quiet:
            self._bar = tqdm(total=total, initial=done, desc=name, unit=unit, dynamic_ncols=True)
        self._prints = not on_terminal and not quiet
        self._first = True
        self._line_s, self._line_done = time.monotonic(), done

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def update(self, note: str = "", total: int | None = None) -> None:
        """One more step is done; `note` says what it measured, as "reward=0.412".

        total: of steps, where that is known better than before.
        """
        self._done += 1
        self._total = total or self._total
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
        elif self._prints:
            now_s = time.monotonic()
            due = self._done % self._every == 0 or now_s - self._line_s >= _LONGEST_SILENCE_S
            if self._first or due or self._done == self._total:
                self._print(note, now_s)
            self._first = False

    def say(self, text: str) -> None:
        """Print a line; on a terminal above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the bar as it is, and go to the next line."""
        if self._bar is not None:
            self._bar.close()

    def _print(self, note: str, now_s: float) -> None:
        """Print a line. Its pace is that since the last line, because the first step of a run is slow: it compiles."""
        step_s = (now_s - self._line_s) / (self._done - self._line_done)
        self._line_s, self._line_done = now_s, self._done
        left = duration(step_s * (self._total - self._done))
        of_step = f"{note}, " if note else ""
        print(
            f"{self._name}: {self._unit} {self._done} of {self._total}, {of_step}{step_s * 1e3:.4g} ms a {self._unit}, "
            f"{left} left",
            flush=True,
        )


def duration(seconds: float) -> str:
    """Two units at most: "3 h 20 min", "1 min 17 s", "4 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
