"""Signals for real, to this process and to forked ones. Whole runs that are stopped: tests/test_faults.py."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from varfast.runs.signals import STOPPING, Stopped, StopSignals, listen


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_noted_in_steps_and_ends_what_is_outside_of_them(number):
    before = [signal.getsignal(name) for name in STOPPING]
    with listen() as signals:
        with signals.in_steps():
            os.kill(os.getpid(), number)
            assert signals.received == number
            os.kill(os.getpid(), number)  # one request is sent more than once: by torchrun, by a terminal that closes
        with pytest.raises(Stopped, match=f"stopped by {number.name}") as caught:
            os.kill(os.getpid(), number)
        assert caught.value.code == 128 + number
    assert [signal.getsignal(name) for name in STOPPING] == before


def test_a_later_ctrl_c_acts_at_once_and_a_later_other_signal_does_not(monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    with listen() as signals, signals.in_steps():
        os.kill(os.getpid(), signal.SIGUSR1)
        now_s[0] += 120.0
        os.kill(os.getpid(), signal.SIGTERM)  # Slurm's, at the end of the time, with 30 s left
        assert signals.received == signal.SIGUSR1
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_hangup_that_nohup_ignores_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listen() as signals, signals.in_steps():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_another_thread_listens_to_nothing():
    found = []

    def run():
        with listen() as signals, signals.in_steps():
            found.append(signals.received)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_forked_process_ends_by_a_signal(number):
    """As those of a pool that a reward has started, which a pool ends by SIGTERM."""
    with listen() as signals, signals.in_steps():
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.write(writing, b"x")  # Python forgets what arrives before it has set up a forked process
            time.sleep(20)
            os._exit(0)
        os.read(reading, 1)
        os.kill(child, number)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == number
        assert signals.received is None


def test_what_is_printed_after_a_terminal_hung_up_fails_nothing(tmp_path):
    ready, done = tmp_path / "ready", tmp_path / "done"
    script = (
        "import time, pathlib, sys\nfrom varfast.runs.signals import listen\n"
        "with listen() as signals, signals.in_steps():\n"
        f"    pathlib.Path({str(ready)!r}).touch()\n"
        "    while signals.received is None: time.sleep(0.01)\n"
        "    print('x' * 100000, flush=True); print('y', file=sys.stderr, flush=True)\n"
        f"    pathlib.Path({str(done)!r}).touch()\n"
    )
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=end, stdout=end, stderr=end, start_new_session=True, close_fds=True
    )
    os.close(end)
    try:
        while not ready.exists():
            assert process.poll() is None
            time.sleep(0.02)
        os.close(terminal)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=30) == 0
        assert done.exists()
    finally:
        process.kill()


def test_received_is_empty_at_first():
    assert StopSignals().received is None


@pytest.mark.parametrize(("rank", "times"), [(None, 1), ("0", 1), ("1", 0)])
def test_of_many_processes_the_first_one_says_that_it_stops(rank, times, monkeypatch, capfd):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with listen() as signals, signals.in_steps():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
    assert capfd.readouterr().err.count("stopping after this step") == times
