# ruff: noqa: E501
"""Chunks of an evaluation that somebody changed: each is read as it was, or refused in one line that names the file.

Counts are printed (pytest -s). A traceback, a hang, a table with other numbers, or code that ran are failures.
"""

import collections
import io
import json
import os
import pickle
import random
import shutil
import signal
import zipfile

import numpy as np
import pytest

from varfast import InputError
from varfast.evaluation.arguments import Task
from varfast.evaluation.config import EvaluateConfig
from varfast.evaluation.folder import EvaluationFolder
from varfast.evaluation.measure import finish
from varfast.evaluation.plan import Plan
from varfast.evaluation.sampling import Evaluation
from varfast.evaluation.subjects import Subjects
from varfast.types import Sampling

_LIMIT_S = 20
FLIPS = 300


class Ran:
    ran = False

    def __reduce__(self):
        return exec, ("import tests_that_a_pickle_ran",)


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """An out folder of two chunks with 20 images of 8 pixels, as evaluate writes it; and the call that ends one."""
    monkeypatch.setattr("varfast.evaluation.plan._CHUNK_IMAGES", 12)
    monkeypatch.setattr("varfast.evaluation.measure.environment", dict)  # it asks git
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    config = EvaluateConfig(
        checkpoint="x", scores={"luma": {"type": "brightness"}}, classifier="digits", features="digits", save="npz"
    )
    task = Task(config, tmp_path / "out", None, "var", None, config.scores, config.classifier)
    plan, rng = Plan(list(range(10)), 2, 10), np.random.RandomState(0)
    folder = EvaluationFolder(tmp_path / "out", ["score/luma", "top1", "top5", "features", "logits"], 8)
    (folder.path / "chunks").mkdir(parents=True)
    for number, chunk in enumerate(plan.chunks):
        n = len(chunk)
        arrays = {
            "score/luma": rng.rand(n).astype(np.float32), "top1": rng.rand(n) < 0.5, "top5": rng.rand(n) < 0.8,
            "features": rng.rand(n, 64), "logits": rng.rand(n, 10),
            "levels": rng.randint(0, 256, (n, 8, 8, 3)).astype(np.uint8), "weights": np.array("0123456789abcdef"),
        }  # fmt: skip
        np.savez(folder.chunk("checkpoint", number), **arrays)

    subjects = Subjects(list(range(10)), 10, 2, None, None, {})
    evaluation = Evaluation(config, subjects, plan, judge=None, folder=folder, process=None, export=None)

    def end():
        return finish(task, [Sampling()], evaluation, ["checkpoint"], {}), folder.weights("checkpoint", 0)

    def late(*_):
        raise AssertionError(f"no end within {_LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    yield folder, plan, end
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def arrays_of(path):
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def saved(path, arrays, save=np.savez):
    with path.open("wb") as file:
        save(file, **arrays)


def crafted(folder):
    """Functions of a chunk's path, by name."""

    def change(name, value, save=np.savez):
        def apply(path):
            arrays = arrays_of(path)
            if value is None:
                del arrays[name]
            else:
                arrays[name] = value(arrays[name]) if callable(value) else value
            saved(path, arrays, save)

        return apply

    def member(name, content, kind=zipfile.ZIP_STORED, double=False):
        def apply(path):
            with zipfile.ZipFile(path) as archive:
                members = {info.filename: archive.read(info) for info in archive.infolist()}
            whole = members[f"{name}.npy"]
            members[f"{name}.npy"] = content(whole)
            with zipfile.ZipFile(path, "w", kind) as archive:
                for filename, data in members.items():
                    archive.writestr(filename, data)
                if double:
                    archive.writestr(f"{name}.npy", whole)

        return apply

    def header(text):
        return lambda content: b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content[128:]

    def link(target):
        def apply(path):
            path.unlink()
            path.symlink_to(target)

        return apply

    def replace(content):
        return lambda path: path.write_bytes(content)

    def pipe(path):
        path.unlink()
        os.mkfifo(path)

    def directory(path):
        path.unlink()
        path.mkdir()

    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights.npy", bytes(2**28))
    return {
        **{f"{name} of another shape": change(name, lambda a: a[:-1] if a.ndim else a.reshape(1, 1))
           for name in ("score/luma", "top1", "features", "logits", "levels")},
        **{f"{name} is gone": change(name, None) for name in ("score/luma", "top5", "features", "levels", "weights")},
        **{f"{name} of objects": change(name, np.array([Ran()] * 12)) for name in ("score/luma", "levels", "weights")},
        **{f"{name} of text": change(name, np.array(["a"] * 12)) for name in ("score/luma", "top1", "levels")},
        **{f"{name} as complex": change(name, lambda a: a.astype(complex)) for name in ("score/luma", "features")},
        "NaN": change("score/luma", np.full(12, np.nan, np.float32)),
        "infinite": change("features", np.full((12, 64), np.inf)),
        "wider features": change("features", np.zeros((12, 63))),
        "wider levels": change("levels", np.zeros((12, 9, 9, 3), np.uint8)),
        "float levels": change("levels", np.zeros((12, 8, 8, 3))),
        "no levels": change("levels", np.zeros((0, 8, 8, 3), np.uint8)),
        "a column more": change("score/luma", np.zeros((12, 2), np.float32)),
        "top1 as numbers": change("top1", np.full(12, 7.0)),
        "compressed": change("top1", lambda a: a, np.savez_compressed),
        "fortran": change("features", lambda a: np.asfortranarray(a)),
        "big-endian": change("features", lambda a: a.astype(">f8")),
        "twice": member("top1", lambda c: c, double=True),
        "a terabyte": member("features", header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }\n")),
        "a negative side": member("features", header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (-12, 64), }\n")),
        "sides of 5000 digits": member("features", header(b"{'descr': '<f8', 'fortran_order': False, 'shape': (" + b"9" * 5000 + b",), }\n")),
        "code as header": member("features", header(b"__import__('os').system('touch PWNED')\n")),
        "a deep header": member("features", header(b"(" * 60000 + b"\n")),
        "an open header": member("features", header(b"{'descr': '''\n")),
        "no magic": member("features", lambda c: c[6:]),
        "an empty member": member("features", lambda c: b""),
        "version 9": member("features", lambda c: c[:6] + b"\x09\x09" + c[8:]),
        "zip bomb": replace(bomb.getvalue()),
        "pickle": replace(pickle.dumps(Ran())),
        "numpy's pickle": lambda path: np.save(path.open("wb"), np.array([Ran()], object), allow_pickle=True),
        "empty": replace(b""),
        "text": replace(b"version https://git-lfs.github.com/spec/v1\n"),
        "zeros": replace(bytes(10_000)),
        "zip of nothing": replace(b"PK\x05\x06" + bytes(18)),
        "a million entries": replace(b"PK\x05\x06" + bytes(4) + b"\xff" * 14),
        "pipe": pipe,
        "folder": directory,
        "link to zeros": link("/dev/zero"),
        "link to a terminal": link("/dev/tty"),
        "link to a file": link("/etc/passwd"),
        "link to itself": lambda path: link(path)(path),
        "link to the other chunk": link(folder.chunk("checkpoint", 1)),
        "the other chunk": lambda path: shutil.copy(folder.chunk("checkpoint", 1), path),
    }  # fmt: skip


def test_a_chunk_that_somebody_changed_is_read_as_it_was_or_named(evaluated, tmp_path, monkeypatch):
    folder, _, end = evaluated
    monkeypatch.chdir(tmp_path)
    path = folder.chunk("checkpoint", 0)
    whole, truth = path.read_bytes(), end()
    counts, failures = collections.Counter(), []

    def attempt(name, apply):
        apply(path)
        signal.setitimer(signal.ITIMER_REAL, _LIMIT_S)
        try:
            found = end()
        except InputError as error:
            text = str(error)
            good = str(path.parent) in text and "delete it and run the command again" in text and text.isprintable()
            answer = "named" if good and len(text) < 700 else text
        except Exception as error:  # noqa: BLE001 - counted
            answer = f"{type(error).__name__}: {error}"
        else:
            answer = "as it was" if found == truth else "other numbers"
        signal.setitimer(signal.ITIMER_REAL, 0)
        counts[answer if answer in ("named", "as it was") else "FAILED"] += 1
        failures.extend([] if answer in ("named", "as it was") else [f"{name}: {answer[:300]}"])
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.write_bytes(whole)

    for name, apply in crafted(folder).items():
        attempt(name, apply)
    rng = random.Random(0)
    for number in range(FLIPS):
        content = bytearray(whole)
        # Headers of members and the directory at the end are the smaller part of the file, and the more delicate one.
        at = rng.randrange(len(content)) if number % 2 else -1 - rng.randrange(900)
        content[at] ^= 1 << rng.randrange(8)
        attempt(f"bit at {at}", lambda path, content=bytes(content): path.write_bytes(content))
        cut = rng.randrange(len(whole))
        if number % 6 == 0:
            attempt(f"cut at {cut}", lambda path, cut=cut: path.write_bytes(whole[:cut]))
    print(f"\n{sum(counts.values())} chunks: {dict(counts)}")
    assert not failures, f"{len(failures)} failures:\n" + "\n".join(failures[:40])
    assert counts["named"] > 100
    assert not (tmp_path / "PWNED").exists()


def test_settings_that_somebody_changed_are_named(evaluated):
    folder, _, _ = evaluated
    path = folder.path / "settings_0.json"
    for content in (b"", b"[1]", b"{", b"\xff", b"[" * 10**6, b"null", b'{"seed": NaN', b"1" * 10**5):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"settings_0.json cannot be read \(.*\); delete it"):
            folder.prepare({"seed": 0}, 0)
    path.write_text(json.dumps({"seed": "\x1b[2J" * 10**5, "\x1b": [[[1]] * 999] * 99}))
    with pytest.raises(InputError, match="holds an evaluation with other settings") as caught:
        folder.prepare({"seed": 0}, 0)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 3000
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="no regular file|cannot be read"):
        folder.prepare({"seed": 0}, 0)
