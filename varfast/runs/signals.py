"""Signals that ask a run to end: Ctrl-C, and what a scheduler or a terminal that closes sends.

SIGINT, SIGTERM, SIGHUP and SIGUSR1 (Slurm's --signal=USR1@120) have the same effect: the run finishes the current step,
saves, and exits with 128 + the signal's number. Outside of steps there is nothing to save, and they end the process at
once, as Ctrl-C does.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# One Ctrl-C arrives twice: the terminal sends SIGINT to torchrun and to its processes, and torchrun forwards it.
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
    """The signals of STOPPING while `listen` handles them.

    Attributes:
        received: the first signal that arrived within steps.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._in_steps = False
        self._received_s = 0.0
        self._pid = os.getpid()
        # Asked now, because isatty is False for a terminal that has hung up.
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    @contextmanager
    def in_steps(self) -> Iterator[None]:
        """In the body a signal only sets `received`, which the body looks at. A second Ctrl-C stops at once."""
        self._in_steps = True
        try:
            yield
        finally:
            self._in_steps = False

    def _handle(self, number: int, frame: object) -> None:
        name = signal.Signals(number)
        if os.getpid() != self._pid:  # a forked process, of a reward or a DataLoader: the default effect
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
            if os.environ.get("RANK", "0") != "0":  # all processes get it, and the first one says so
                return
            # os.write, since the signal may have interrupted a print; and a closed pipe must not prevent the save.
            with suppress(OSError):
                os.write(2, b"\nstopping after this step; Ctrl-C stops at once (back to the last checkpoint)\n")
        elif name == signal.SIGINT and time.monotonic() - self._received_s > _ONE_REQUEST_S:
            raise Stopped(name)

    def _leave_terminal(self) -> None:
        """Redirect output to /dev/null: every write to a terminal that hung up fails, those of progress bars too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


@contextmanager
def listen() -> Iterator[StopSignals]:
    """Handle the signals of STOPPING in the body: they raise Stopped, except within `in_steps`.

    A SIGHUP or SIGUSR1 that was ignored (nohup ignores SIGHUP) stays ignored. Only the main thread can handle signals;
    in another thread they keep their effect.
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
