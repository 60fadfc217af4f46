import errno
import os
import resource
import threading

import pytest
import torch

from varfast import InputError
from varfast.files import (
    WriteError,
    leaves,
    move_folder,
    parse_json,
    read_bytes,
    read_json,
    read_leaves,
    remove_leftovers,
    remove_tree,
    save_tensors,
    save_text,
    sync_folder,
    write_atomically,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_of_one_file_do_not_share_a_temporary_one(tmp_path):
    """With one name for both, the file of the second one's open was published half written."""
    path, half, published = tmp_path / "x", threading.Event(), threading.Event()

    def slow(file):
        file.write(b"half of one")
        file.flush()
        half.set()
        assert published.wait(30)
        file.write(b", and the rest")

    thread = threading.Thread(target=write_atomically, args=(path, slow))
    thread.start()
    assert half.wait(30)
    write_atomically(path, lambda file: file.write(b"other"))
    assert path.read_bytes() == b"other"
    published.set()
    thread.join()
    assert path.read_bytes() == b"half of one, and the rest"
    assert names(tmp_path) == ["x"]


def failing(number, of=lambda path: True):
    """A call of os that fails for some paths or descriptors."""

    def fail(path, *args, **kwargs):
        if not of(path):
            return original(path, *args, **kwargs)
        raise OSError(number, os.strerror(number))

    original = os.fsync
    return fail


def is_folder(descriptor):
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF, errno.EPERM, errno.ENOSYS])
def test_a_folder_whose_fsync_is_refused_is_passed_over(tmp_path, monkeypatch, number):
    """CIFS, vboxsf, FUSE: the file is written, and its folder's entry is as safe as it gets there."""
    monkeypatch.setattr(os, "fsync", failing(number, is_folder))
    save_text(tmp_path / "x", "text")
    assert (tmp_path / "x").read_text() == "text"


def test_a_folder_whose_fsync_finds_a_fault_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EIO, is_folder))
    with pytest.raises(WriteError, match="Input/output error. The disk reports a fault"):  # not: the earlier is whole
        save_text(tmp_path / "x", "text")
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)


@pytest.mark.parametrize(
    ("number", "wanted"),
    [
        (errno.ENOSPC, "No space left on device; the earlier one is whole. Free space there"),
        (errno.EDQUOT, "Disk quota exceeded; the earlier one is whole. Free space there .your quota"),
        (errno.EFBIG, "File too large; .* .ulimit -f"),
        (errno.EIO, "Input/output error; .* dmesg"),
        (errno.EROFS, "Read-only file system; .* Mend its rights"),
        (errno.EXDEV, "Invalid cross-device link; .*. Choose another folder"),
        (errno.EMFILE, "Too many open files; .* .ulimit -n"),
        (errno.ESTALE, "Stale file handle; .*. Choose another folder"),
    ],
)
def test_what_to_do_about_a_failed_write_depends_on_what_failed(tmp_path, monkeypatch, number, wanted):
    save_text(tmp_path / "x", "whole")
    monkeypatch.setattr(os, "replace", failing(number))
    with pytest.raises(WriteError, match=wanted) as caught:
        save_text(tmp_path / "x", "other")
    assert ("Free space" in str(caught.value)) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert (tmp_path / "x").read_text() == "whole"
    assert names(tmp_path) == ["x"]


def test_a_disk_that_fails_while_torch_writes_is_named(tmp_path):
    """torch turns the failed write of its file into a RuntimeError without a reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(WriteError, match="cannot write .*x.pth: File too large. The limit is on"):
            save_tensors(tmp_path / "x.pth", {"w": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def test_an_error_of_whoever_writes_is_passed_on(tmp_path):
    def write(file):
        raise RuntimeError("a fault of its own")

    with pytest.raises(RuntimeError, match="a fault of its own"):
        write_atomically(tmp_path / "x", write)
    assert names(tmp_path) == []


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/full", path)])
def test_a_device_or_folder_is_not_replaced(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(WriteError, match="it is a folder or a device, not a file"):
        save_text(tmp_path / "x", "text")
    assert not os.path.isfile(tmp_path / "x")


def test_the_longest_name_can_be_written(tmp_path):
    for name in ("n" * 255, "ä" * 127):
        save_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    save_text(tmp_path / "x", "a\ud800b")
    assert (tmp_path / "x").read_text() == "a\\ud800b"


def test_a_folder_that_cannot_be_renamed_is_moved_file_by_file(tmp_path, monkeypatch):
    """EXDEV, as overlays say for folders; killed at any file, no half folder has its seal."""
    for moment in range(9):
        start, end = tmp_path / f"{moment}.part", tmp_path / str(moment)
        start.mkdir()
        for name in ("a", "m", "seal", "z"):
            (start / name).write_text(name)
        done = [0]

        def rename(path, to, moment=moment, done=done):
            if os.path.isdir(path):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            if done[0] == moment:
                raise KeyboardInterrupt
            done[0] += 1
            os.replace(path, to)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", rename)
            try:
                move_folder(start, end, ("m", "seal"))
            except KeyboardInterrupt:
                assert "seal" not in names(end)
            else:
                break
    assert moment == 4
    assert names(end) == ["a", "m", "seal", "z"]
    assert not start.exists()


def test_of_a_link_the_link_is_removed(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x").touch()
    for name, target in (("link", tmp_path / "theirs"), ("dangling", tmp_path / "none"), ("loop", tmp_path / "loop")):
        (tmp_path / name).symlink_to(target)
        remove_tree(tmp_path / name)
    remove_tree(tmp_path / "not there")
    assert names(tmp_path) == ["theirs"]
    assert names(tmp_path / "theirs") == ["x"]


def test_leftovers_of_killed_writers_are_removed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: os._exit(0))
        child = os.fork()
        if child == 0:
            save_text(tmp_path / "x.yaml", "text")
    os.waitpid(child, 0)
    assert len(names(tmp_path)) == 1
    (tmp_path / "notes.txt").touch()
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "not there")
    assert names(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe", "is damaged: byte 0 is not of a text in UTF-8"),
        (b"{", "is damaged: it is not JSON as varfast writes it .Expecting"),
        (b"[" * 100_000, "is damaged: it is not JSON"),
        (b"[" * 200 + b"]" * 200, "is damaged: .*nested more than 100 deep"),
        (b'{"a": "\\ud800"}', "is damaged: .*surrogates not allowed"),
        (b'{"\\udfff": 1}', "is damaged: .*surrogates not allowed"),
        (None, "cannot be read: No such file"),
        (os.mkfifo, "cannot be read: it is no regular file"),
        (os.mkdir, "cannot be read: it is no regular file"),
        (lambda path: os.symlink("/dev/zero", path), "cannot be read: it is no regular file"),
        (lambda path: os.symlink(path, path), "cannot be read: Too many levels of symbolic links"),
        (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 10**12), "has more than 67108864 bytes"),
    ],
)
def test_a_small_file_that_is_not_what_was_written_is_named(tmp_path, content, reason):
    path = tmp_path / "x.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        content(path)
    with pytest.raises(InputError, match=f"x.json.* {reason}"):
        read_json(path)
    assert read_leaves(path) == {}


def test_numbers_of_any_length_are_of_use_as_floats():
    assert parse_json(b'{"a": ' + b"9" * 400 + b"}")["a"] == float("inf")
    assert parse_json(b"[1, -2, 1e400]") == [1, -2, float("inf")]
    assert isinstance(parse_json("9007199254740993"), int)


def test_leaves_end_on_whatever_yaml_can_build():
    laughs = {"end": 1}
    for _ in range(40):
        laughs = {"a": laughs, "b": laughs}
    assert len(leaves(laughs)) < 100_000
    loop: dict = {"lr": 0.5}
    loop["again"] = loop
    assert leaves(loop)["lr"] == 0.5
    assert leaves({"update": {"lr": 1, "betas": [1, 2]}, "x": {}}) == {"update.lr": 1, "update.betas": [1, 2]}


def test_read_bytes_waits_for_nothing(tmp_path):
    for path in ("/dev/zero", "/dev/tty", "/dev/ptmx"):
        with pytest.raises(OSError):  # noqa: PT011 - of several kinds
            read_bytes(tmp_path / path)
