import contextlib
import errno
import fcntl
import json
import math
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from varfast import InputError
from varfast.runs import lock
from varfast.runs.lock import LOCK_NAME, FolderLock, locked

ADVICE = "take another folder"


def held(folder, **settings):
    return locked(folder, f"folder {folder}", ADVICE, **({"wait_s": 0.0} | settings))


@pytest.fixture
def forked():
    """Run a function in a forked process, in no time: an import of torch takes seconds. Its process number."""
    children = []

    def run(body):
        child = os.fork()
        if child == 0:
            try:
                body()
            finally:
                os._exit(0)
        children.append(child)
        return child

    yield run
    for child in children:
        end(child)


def end(child, number=signal.SIGKILL):
    """Send a signal to a child, and wait until it has ended."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, number)
        os.waitpid(child, 0)


@pytest.fixture
def other(tmp_path, forked):
    """Start a process that holds the lock on tmp_path; its number. `within`: what it does with the lock in hand."""

    def start(within=lambda held: None):
        read, write = os.pipe()

        def hold():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with held(tmp_path) as ours:
                within(ours)
                os.write(write, b".")
                time.sleep(60)

        child = forked(hold)
        os.close(write)
        assert os.read(read, 1) == b"."
        os.close(read)
        return child

    return start


def note(folder, **changes):
    """Change what the lock file says, as if another machine or container had written it."""
    path = folder / LOCK_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def no_flock(monkeypatch):
    """A file system without flock, in this process."""

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in (("_SIGN_OF_LIFE_S", 0.1), ("_SILENCE_S", 0.6), ("_SETTLE_S", 0.2), ("_POLL_S", 0.02)):
        monkeypatch.setattr(lock, name, seconds)


def test_the_refused_one_hears_who_holds_it(tmp_path, other):
    pid = other()
    wanted = (
        rf"folder .* is in use by pid {pid} on host {re.escape(socket.gethostname())} since 20\d\d-\d\d-\d\d \d\d:\d\d:"
        rf"\d\d; wait until .* or take another folder. .* delete .*/{LOCK_NAME}$"
    )
    with pytest.raises(InputError, match=wanted), held(tmp_path):
        pass


def test_two_in_one_process_are_kept_apart_too(tmp_path):
    with held(tmp_path), pytest.raises(InputError, match=f"in use by pid {os.getpid()}"), held(tmp_path):
        pass


def test_it_is_free_again_however_the_holder_ends(tmp_path, other):
    with held(tmp_path):
        assert (tmp_path / LOCK_NAME).exists()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), held(tmp_path):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        end(other(), number)
        with held(tmp_path):  # what a killed holder wrote is of no weight
            assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_forked_children_do_not_keep_it(tmp_path, other):
    """A DataLoader's worker, or a pool in a reward, may outlive a process that is killed."""

    def fork(ours):
        if os.fork() == 0:
            ours.release()  # as the end of a `with` does there
            time.sleep(5)
            os._exit(0)

    holder = other(fork)
    time.sleep(0.2)
    with pytest.raises(InputError, match=f"pid {holder} "), held(tmp_path):
        pass
    end(holder)
    with held(tmp_path):
        pass


def test_one_that_waits_gets_it_and_says_for_whom(tmp_path, other):
    holder, said = other(), []

    def say(text):
        said.append(text)
        end(holder)

    with held(tmp_path, wait_s=60.0, say=say):
        pass
    assert re.fullmatch(rf"waiting: folder .* is in use by pid {holder} on host .*", said[0])
    assert len(said) == 1


def test_many_that_start_at_once_come_one_after_the_other(tmp_path, forked, monkeypatch):
    """The file is removed by each: none may lock one that is not there any more."""
    inside = tmp_path / "inside"

    def take_turns(number):
        for _ in range(100):
            with held(tmp_path, wait_s=math.inf, say=lambda text: None):
                inside.touch(exist_ok=False)
                inside.unlink()
        (tmp_path / f"done_{number}").touch()

    monkeypatch.setattr(lock, "_POLL_S", 0.0005)
    for child in [forked(lambda number=number: take_turns(number)) for number in range(4)]:
        os.waitpid(child, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"done_{number}" for number in range(4)]


def test_without_flock_a_process_of_this_machine_is_looked_up(tmp_path, other, no_flock, quick):
    holder = other()
    with pytest.raises(InputError, match=f"pid {holder} "), held(tmp_path):
        pass
    note(tmp_path, started="1")  # its number belongs to another process by now
    with held(tmp_path):
        pass
    end(holder)
    end(other())  # dead, and its note is there
    with held(tmp_path):
        note(tmp_path, token="of another")
    assert (tmp_path / LOCK_NAME).exists()  # another's, which took it over


@pytest.mark.parametrize("flock", [True, False])
def test_a_holder_elsewhere_is_watched_for_signs_of_life(tmp_path, quick, request, flock):
    """NFS with locks of one machine alone, or none; as two hosts see it."""
    if not flock:
        request.getfixturevalue("no_flock")
    said = []
    holder = FolderLock(tmp_path, "folder", ADVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *args: None)
        patch.setattr(lock, "_this_process", lambda: here_of("elsewhere"))
        holder.take()
    with pytest.raises(InputError, match="in use by pid 1 on host elsewhere"), held(tmp_path, say=said.append):
        pass
    assert re.fullmatch(
        "folder .* was last in use by pid 1 on host elsewhere.*; watching 1 s for a sign of life", said[0]
    )
    holder.check()
    holder._released.set()  # it falls silent, as one that is suspended
    time.sleep(0.3)
    with held(tmp_path, say=said.append) as ours:
        holder._released.clear()  # and wakes up
        holder._live(holder._mine)
        ours.check()
        with pytest.raises(InputError, match=f"was taken over by pid {os.getpid()} .* this one ends"):
            holder.check()


def here_of(host):
    return lock.Holder(host, 1, "2026-01-01 00:00:00", "other-kernel", "pid:[1]", "5", "t")


def test_two_that_start_at_once_without_flock_are_kept_apart(tmp_path, no_flock, quick):
    """Both find nothing and write: the one whose note stays has it."""
    late = here_of("elsewhere")
    ours = FolderLock(tmp_path, "folder", ADVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock.time, "sleep", lambda seconds: note(tmp_path, **vars(late)))
        with pytest.raises(InputError, match="in use by pid 1 on host elsewhere"):
            ours.take(wait_s=0.0)


def test_a_machine_that_was_started_again_holds_nothing(tmp_path):
    with held(tmp_path):
        left = json.loads((tmp_path / LOCK_NAME).read_text())
    (tmp_path / LOCK_NAME).write_text(json.dumps(left | {"boot": "an earlier one"}))
    with held(tmp_path, say=pytest.fail):
        pass


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[" * 100_000, b'{"pid": "7"}', b"null", b'{"pid": ' + b"9" * 5000]
)
def test_a_lock_file_of_garbage_is_taken_over(tmp_path, content):
    (tmp_path / LOCK_NAME).write_bytes(content)
    with held(tmp_path):
        pass


def test_a_crafted_note_prints_nothing_that_a_terminal_obeys(tmp_path):
    with held(tmp_path):
        note(tmp_path, host="\x1b]0;title\x07")
        with pytest.raises(InputError, match="in use by another process; "), held(tmp_path):
            pass


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_something_else_in_the_files_place_is_refused(tmp_path, make):
    make(tmp_path / LOCK_NAME)
    with pytest.raises(InputError, match=f"{LOCK_NAME} is not a file that varfast wrote; delete it"), held(tmp_path):
        pass


def test_a_full_disk_costs_the_note_alone(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with held(tmp_path), pytest.raises(InputError, match="in use by another process"), held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="folder .* cannot be used: File exists; take"), held(tmp_path / "file"):
        pass
