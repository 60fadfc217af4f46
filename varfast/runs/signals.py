"""Signals that ask a run to end: Ctrl-C, and what a scheduler or a terminal that closes sends.

SIGINT, SIGTERM, SIGHUP and SIGUSR1 (Slurm's --signal=USR1@120) mean the same: end the step at hand, save, exit with
128 + the signal's number. Outside of steps there is nothing to save, and they end the process as Ctrl-C does.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# The terminal sends SIGINT to torchrun and to its processes, and torchrun sends it on: one Ctrl-C, two signals.
_ONE_REQUEST_S = 1.0


class Stopped(KeyboardInterrupt):
    """Raised where a signal arrives outside of a step.

    Attributes:
        code: the exit code, 128 + the signal's number.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}; the same command goes on from what is saved")
        self.code = 128 + number


class StopSignals:
    """The signals of STOPPING, from `listen` on; see there."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._in_steps = False
        self._received_s = 0.0
        self._pid = os.getpid()
        # Now: of a terminal that has hung up, isatty says that it is none.
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    @contextmanager
    def in_steps(self) -> Iterator[None]:
        """In the body a signal is noted in `received`, for the body to look at. A later Ctrl-C acts at once."""
        self._in_steps = True
        try:
            yield
        finally:
            self._in_steps = False

    def _handle(self, number: int, frame: object) -> None:
        name = signal.Signals(number)
        if os.getpid() != self._pid:  # a forked process, of a reward or a DataLoader: as if nobody listened
            if name == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(name, signal.SIG_DFL)
            os.kill(os.getpid(), name)
        if name == signal.SIGHUP:
            self._leave_terminal()
        if not self._in_steps:
            raise Stopped(name)
        if self.received is None:
            self.received, self._received_s = name, time.monotonic()
            # Not by print: the signal may have interrupted one. Nor may a reader that is gone keep the state from
            # being saved.
            with suppress(OSError):
                os.write(2, b"\nstopping after this step; Ctrl-C stops at once (back to the last checkpoint)\n")
        elif name == signal.SIGINT and time.monotonic() - self._received_s > _ONE_REQUEST_S:
            raise Stopped(name)

    def _leave_terminal(self) -> None:
        """A terminal that hung up fails every further write, progress bars too: print to nowhere from now on."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


@contextmanager
def listen() -> Iterator[StopSignals]:
    """Handle the signals of STOPPING in the body: they raise Stopped, but in `in_steps`.

    SIGHUP that was ignored, by nohup, stays so. In another thread than the main one signals cannot be handled: there
    they do what they did.
    """
    signals, previous = StopSignals(), {}
    if threading.current_thread() is threading.main_thread():
        for name in STOPPING:
            if name in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(name) != signal.SIG_IGN:
                previous[name] = signal.signal(name, signals._handle)
    try:
        yield signals
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
