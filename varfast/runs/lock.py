"""A lock that admits one process at a time to a folder: of a run, or of a base model that is being pre-trained.

The lock is a file, lock.json, that names its holder. Other processes are kept out by the operating system's lock on
that file (flock), which ends with the process, so a process killed at any moment leaves nothing to clean up.

Some network file systems refuse flock (Lustre without its mount option, FUSE) or apply it within one machine only (NFS
with local_lock or nolock, BeeGFS by default, sshfs). There the file's content decides. A holder on this machine is
looked up by process number and start time. A holder on another machine updates the file's time every 10 s as a sign of
life; if there is none for 35 s, the lock is taken over. A holder that was suspended for so long, and lost its lock that
way, finds out from `check`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from varfast.types import InputError

LOCK_NAME = "lock.json"
_SIGN_OF_LIFE_S = 10.0
# Three signs of life, and 5 s for a slow server.
_SILENCE_S = 35.0
# Without flock two processes can start at the same time: each writes the file and waits so long; the last writer wins.
_SETTLE_S = 1.0
_POLL_S = 0.1
# What flock raises where the file system has no locks, so that the content of the file decides.
_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)
# The content is written in place in one piece of this size, so that a reader never sees half of it.
_NOTE_BYTES = 1024


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: the content of lock.json.

    Attributes:
        host: name of the machine.
        pid: number of the process.
        since: when it took the lock, local time.
        boot: identity of the running kernel; "" where /proc does not tell.
        namespace: the process namespace that `pid` belongs to; each container has its own.
        started: when the process started, in ticks of that kernel.
        token: unique to this lock.
    """

    host: str
    pid: int
    since: str
    boot: str
    namespace: str
    started: str
    token: str

    def __str__(self) -> str:
        return f"pid {self.pid} on host {self.host} since {self.since}"


class FolderLock:
    """The lock on a folder.

    Args:
        folder: is created by `take`.
        name: of the folder in messages, such as "run.dir=runs/x".
        advice: what a user who is refused can do instead of waiting.
    """

    def __init__(self, folder: Path, name: str, advice: str) -> None:
        self.path = folder / LOCK_NAME
        self._name, self._advice = name, advice
        self._descriptor: int | None = None
        self._mine: Holder | None = None
        self._taken_by: Holder | None = None
        self._released = threading.Event()

    def take(self, wait_s: float = 2.0, say: Callable[[str], object] = print) -> None:
        """Hold the lock from now on.

        Args:
            wait_s: how long to wait for another holder. The default, 2 s, lets a killed process end, which takes a
                moment if it has much memory to give back.
            say: called once with a line that names the holder, if the wait can take longer than 10 s.
        Raises: InputError that names the holder, or says why the lock file cannot be created.
        """
        assert self._descriptor is None
        deadline_s, said = time.monotonic() + wait_s, False
        while (holder := self._try(say)) is not None:
            if time.monotonic() >= deadline_s:
                raise InputError(self._refusal(holder))
            if not said and wait_s > 10.0:
                say(f"waiting: {self._name} is in use by {holder}")
                said = True
            time.sleep(_POLL_S)

    def release(self) -> None:
        """Give the lock up, if it is held."""
        if self._descriptor is None or self._mine is None or self._mine.pid != os.getpid():
            return  # a forked process that ends with an exception gets here too
        self._released.set()
        # Remove the file before unlocking it: whoever has it open notices, once it has the lock, that the file is gone.
        if self._is_at_path(self._descriptor) and self._at_path() in (self._mine, None):
            self.path.unlink(missing_ok=True)
        _close(self._descriptor)
        self._descriptor = self._mine = None

    def check(self) -> None:
        """Raises: InputError if another process has taken the lock over and now writes into the folder."""
        if self._taken_by is not None:
            raise InputError(
                f"{self._name} was taken over by {self._taken_by}, as this process gave no sign of life for "
                f"{_SILENCE_S:.0f} s; this one ends, the other goes on from the last checkpoint"
            )

    def _refusal(self, holder: Holder | str) -> str:
        return (
            f"{self._name} is in use by {holder}; wait until that process has ended, or {self._advice}. If there is "
            f"no such process any more, delete {self.path}"
        )

    def _try(self, say: Callable[[str], object]) -> Holder | str | None:
        """Try to take the lock once. Returns its holder, as far as it is known; None if the lock is now ours."""
        descriptor = self._opened()
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                return _read(descriptor) or "another process"
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise self._unusable(error) from error
                locked = False
            if not self._is_at_path(descriptor):
                return "another process, which has just ended"  # its holder removed the file; the next try creates one
            left = _read(descriptor)
            if left is not None and not self._is_gone(left, locked, say):
                return left
            mine = _this_process()
            self._write(descriptor, mine, locked)
            if not locked or (left is not None and left.boot != mine.boot):
                time.sleep(_SETTLE_S)
                if (found := self._at_path()) != mine:
                    return found or "another process, which has just ended"
            self._descriptor, self._mine = descriptor, mine
        finally:
            if self._descriptor is None:
                os.close(descriptor)
        _HELD.add(descriptor)
        threading.Thread(target=self._live, args=(mine,), name="lock", daemon=True).start()
        return None

    def _opened(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise self._unusable(error) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InputError(f"{self.path} is not a file that varfast wrote; delete it")
        return descriptor

    def _unusable(self, error: OSError) -> InputError:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            return InputError(f"{self.path} is not a file that varfast wrote; delete it")
        return InputError(f"{self._name} cannot be used: {error.strerror}; {self._advice}")

    def _is_gone(self, holder: Holder, locked: bool, say: Callable[[str], object]) -> bool:
        """Whether the process that the file names has certainly ended."""
        here = _this_process()
        if holder.boot == here.boot != "":
            if locked:
                return True  # one kernel applies flock across all of its containers
            if holder.namespace == here.namespace:
                return _started(holder.pid) != holder.started
        elif holder.host == here.host and (locked or here.boot):
            return True  # the machine has been restarted since
        say(f"{self._name} was last in use by {holder}; watching {_SILENCE_S:.0f} s for a sign of life")
        first, deadline_s = self._sign(), time.monotonic() + _SILENCE_S
        while time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
            if self._sign() != first:
                return False
        return True

    def _write(self, descriptor: int, mine: Holder, locked: bool) -> None:
        note = json.dumps(asdict(mine)).encode().ljust(_NOTE_BYTES - 1) + b"\n"
        try:
            os.pwrite(descriptor, note, 0)
            os.fsync(descriptor)
        except OSError as error:
            if not locked:  # with flock the lock holds without its content: others are told "another process"
                raise self._unusable(error) from error

    def _live(self, mine: Holder) -> None:
        """Give a sign of life every 10 s until the lock is released; stop if another process has taken it over."""
        while not self._released.wait(_SIGN_OF_LIFE_S):
            try:
                found = self._at_path()
                if found is not None and found != mine:
                    self._taken_by = found
                    return
                os.utime(self.path, follow_symlinks=False)
            except OSError:  # released just now, or the disk is not reachable; then others see no sign of life
                continue

    def _at_path(self) -> Holder | None:
        # Opened again each time: on open, a network file system asks the server instead of its cache.
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            return _read(descriptor)
        finally:
            os.close(descriptor)

    def _sign(self) -> tuple[int, Holder | None]:
        try:
            return self.path.stat().st_mtime_ns, self._at_path()
        except OSError:
            return 0, None

    def _is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.lstat())
        except OSError:
            return False


@contextmanager
def locked(
    folder: Path, name: str, advice: str, wait_s: float = 2.0, say: Callable[[str], object] = print
) -> Iterator[FolderLock]:
    """Hold the lock on a folder in the body.

    Args:
        folder: is created.
        name, advice: for messages: "NAME is in use by pid 7 on host a since ...; wait ..., or ADVICE".
        wait_s: how long to wait for another holder; math.inf is allowed.
        say: told who is waited for.
    Raises: InputError if another process has it for longer, or no lock file can be made.
    """
    lock = FolderLock(folder, name, advice)
    lock.take(wait_s, say)
    try:
        yield lock
    finally:
        lock.release()


def _this_process() -> Holder:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = namespace = ""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    pid = os.getpid()
    return Holder(socket.gethostname(), pid, since, boot, namespace, _started(pid), uuid.uuid4().hex)


def _started(pid: int) -> str:
    """When a process started; "" if there is none with this number, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


def _read(descriptor: int) -> Holder | None:
    """The holder that a lock file names; None if it names none yet, or is damaged."""
    try:
        content = json.loads(os.pread(descriptor, _NOTE_BYTES, 0))
    except (OSError, ValueError, RecursionError):
        return None
    names = Holder.__dataclass_fields__
    if not isinstance(content, dict) or content.keys() != names.keys() or not isinstance(content["pid"], int):
        return None
    if not all(isinstance(content[name], str) for name in names if name != "pid"):
        return None
    # This text will be printed, so it must not hold control characters, nor be long.
    if not all(str(value).isprintable() and len(str(value)) <= 100 for value in content.values()):
        return None
    return Holder(**content)


# A forked process (of a DataLoader, of a reward) inherits the lock's descriptor, and would hold the lock on after this
# process is killed. So it closes its copy, which does not release the lock.
_HELD: set[int] = set()


def _close(descriptor: int) -> None:
    _HELD.discard(descriptor)
    os.close(descriptor)


def _forget() -> None:
    for descriptor in list(_HELD):
        _close(descriptor)


os.register_at_fork(after_in_child=_forget)
