"""How far a command has come: a bar on a terminal, elsewhere lines of text that `tee`, `nohup` and Slurm can keep.

A bar redraws its line with carriage returns, which in a file becomes one line of 90 kB. So where standard output or
standard error is not a terminal, lines are printed instead, each flushed at once; in a notebook too, whose output is no
terminal:

    grpo: step 10 of 60, reward 0.412 (+0.274) kl 0.003 no signal 12/32, 1.53 s a step, 1 min 17 s left (14:32)

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
# {bar} takes what the text leaves of the terminal's width; of a text that is too long the end is cut off.
_BAR = "{desc} {n_fmt}/{total_fmt}{postfix} |{bar}|"


class Progress:
    """Progress over `total` steps. A context manager.

    Args:
        name: at the beginning of the bar and of every line.
        total, done: steps in all, and steps done already.
        unit: what a step is called.
        every: steps between lines where there is no terminal. The first and the last step always get a line, and so
            does a step that ends 30 s after the last line.
        quiet: show nothing, for all processes but the first.
        patient: of work within a step of another Progress: only lines, each after 30 s without one.
    """

    def __init__(
        self,
        name: str,
        total: int,
        done: int = 0,
        unit: str = "step",
        every: int = 10,
        quiet: bool = False,
        patient: bool = False,
    ) -> None:
        self._name, self._total, self._done, self._unit, self._every = name, total, done, unit, every
        quiet = quiet or os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
        on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        if on_terminal and not quiet and not patient:
            self._bar = tqdm(total=total, initial=done, desc=name, dynamic_ncols=True, bar_format=_BAR)
        self._prints = not quiet and (patient or not on_terminal)
        self._first, self._patient = not patient, patient
        self._line_s, self._line_done = time.monotonic(), done

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def update(
        self,
        note: str = "",
        total: int | None = None,
        step_s: float | None = None,
        left_s: float | None = None,
    ) -> None:
        """One more step is done; `note` says what it measured, as "reward 0.412".

        Args:
            total: of steps, where that is known better than before.
            step_s, left_s: seconds of a step and until the end, where the caller knows them better than from the time
                between two calls.
        """
        self._done += 1
        self._total = total or self._total
        now_s = time.monotonic()
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.set_postfix_str(self._text(note, step_s, left_s, now_s), refresh=False)
            self._bar.update()
        elif self._prints:
            late = now_s - self._line_s >= _LONGEST_SILENCE_S
            due = self._done % self._every == 0 or self._done == self._total
            if self._first or late or (due and not self._patient):
                text = self._text(note, step_s, left_s, now_s)
                tqdm.write(f"{self._name}: {self._unit} {self._done} of {self._total}, {text}", file=sys.stdout)
                sys.stdout.flush()
                self._line_s, self._line_done = now_s, self._done
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

    def _text(self, note: str, step_s: float | None, left_s: float | None, now_s: float) -> str:
        """What follows the number of the step. Unless the caller knows better, its pace is that since the last line,
        because the first step is slow: it compiles. A bar, which has no lines, takes the pace since its second step.
        """
        if step_s is None:
            step_s = (now_s - self._line_s) / (self._done - self._line_done)
            if self._bar is not None and self._first:
                self._line_s, self._line_done, self._first = now_s, self._done, False
        left_s = step_s * (self._total - self._done) if left_s is None else left_s
        ends = f" ({clock(left_s)})" if left_s >= _LONGEST_SILENCE_S else ""
        left, each = f"{duration(left_s)} left{ends}", f"{pace(step_s)} a {self._unit}"
        parts = [note, each, left] if self._bar is None else [left, note, each]
        return ", ".join(part for part in parts if part)


def pace(seconds: float) -> str:
    """Three digits: "1.53 s", "153 ms"."""
    return f"{seconds:.3g} s" if seconds >= 1.0 else f"{seconds * 1e3:.3g} ms"


def clock(seconds: float) -> str:
    """What the clock shows in so many seconds: "14:32"; if that is not today, "Fri 14:32"."""
    then, now = time.localtime(time.time() + seconds), time.localtime()
    return time.strftime("%H:%M" if then[:3] == now[:3] else "%a %H:%M", then)


def duration(seconds: float) -> str:
    """Two units at most: "3 h 20 min", "1 min 17 s", "4 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
