"""A disk that fails at each call, and small files of a run folder that anybody may have changed.

Run as a program, under LD_PRELOAD of faulty_disk.c, this file trains on such a disk; the tests start it once.
"""

import ctypes
import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from varfast import InputError
from varfast.config import parse_config
from varfast.export import main as export
from varfast.perf import limits
from varfast.perf.devices import Ceilings
from varfast.sample import main as sample
from varfast.train import train

HERE = Path(__file__).parent
TIMES = ("step_s", "images_per_s", "mfu", "spent_hours")
LONGEST_S = 60  # of one run, on a machine that others use too
STEPS = 4
everything = pytest.mark.skipif(
    not os.environ.get("VARFAST_FUZZ_ALL"), reason="takes up to an hour; set VARFAST_FUZZ_ALL=1"
)


def config(folder):
    return parse_config(
        {
            "run": {"dir": str(folder), "steps": STEPS, "device": "cpu"},
            "policy": {
                "checkpoint": "random",
                "var": {"depth": 1, "patch_nums": [1, 2], "vocab_size": 16, "code_width": 4, "num_classes": 5},
                "vqvae": {"base_channels": 32, "channel_multipliers": [1], "num_res_blocks": 1},
            },
            "rollout": {"labels_per_step": 2, "group_size": 2},
            "reward": {"luma": {"type": "brightness", "mode": "raw"}},
            "update": {"minibatch": 4},
            "log": {"grid_labels": 2, "grid_samples": 2, "grid_every": 2, "checkpoint_every": 1, "keep_last": 1},
            "eval": {"samples_per_label": 1, "max_labels": 2},
        }
    )


class TookTooLong(BaseException):
    pass


@contextmanager
def bounded():
    def end(number, frame):
        raise TookTooLong

    signal.signal(signal.SIGALRM, end)
    signal.alarm(LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)


def outcome(call):
    """ "done", "refused: ..." by a clear error, or what must not be: a traceback, or no end."""
    said, of_threads = io.StringIO(), []
    threading.excepthook = lambda failed: of_threads.append(f"a thread: {failed.exc_value!r}")
    try:
        with bounded(), redirect_stdout(said), redirect_stderr(said):
            code = call()
    except InputError as error:
        return f"refused: {error}"
    except TookTooLong:
        return "hung"
    except BaseException:  # noqa: BLE001 - whatever comes from the depths is what is looked for
        return traceback.format_exc()
    finally:
        threading.excepthook = threading.__excepthook__
    return of_threads[0] if of_threads else "done" if code == 0 else f"code {code}"


def content(folder):
    """What a run must reach with the same bits: metrics without times, and weights."""
    assert (folder / "metrics.jsonl").is_file()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = (*TIMES, *(n for line in lines for n in line if n.endswith(("_ms", "_share"))))
    metrics = [{name: value for name, value in line.items() if name not in timed} for line in lines]
    return metrics, torch.load(folder / "var.pth", weights_only=True)


def same(a, b):
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(a[1][n], b[1][n]) for n in a[1])


@contextmanager
def no_measurement():
    """The benchmark of the machine's ceilings at each start is no part of this."""
    kept, limits.measure_here = limits.measure_here, lambda *args: Ceilings(1e9, 1e9, 10**10)
    try:
        yield
    finally:
        limits.measure_here = kept


# ---------------------------------------------------------------------------------------------------------------------
# A disk that fails


def faulty_disk(library, folder, budget_s):
    """Fail at a call of a run, take the run up again, compare; for as many calls as the time allows. Counts as JSON."""
    disk = ctypes.CDLL(library)
    folder.mkdir()
    whole = folder / "whole"
    disk.disk_fails(str(whole).encode(), -1, 0, 0)
    assert outcome(lambda: train(config(whole))) == "done"
    calls, wanted = disk.disk_calls(), content(whole)
    kinds = [errno.ENOSPC, errno.ENOSPC, errno.EDQUOT, errno.EIO]
    draw = random.Random(0)
    cases = [
        (first, draw.choice([first, first + draw.randrange(40), 10**9]), draw.choice(kinds)) for first in range(calls)
    ]
    draw.shuffle(cases)
    end_s = time.monotonic() + budget_s
    counts = {"calls": calls, "tried": 0, "went on": 0, "ended by an error that names the disk": 0}
    failures = []
    for number, (first, last, kind) in enumerate(cases):
        if time.monotonic() > end_s and counts["tried"] >= 5:
            break
        run = folder / str(number)
        disk.disk_fails(str(run).encode(), first, last, kind)
        ended = outcome(lambda run=run: train(config(run)))
        disk.disk_fails(b"", -1, 0, 0)
        again = outcome(lambda run=run: train(config(run)))
        counts["tried"] += 1
        counts["went on"] += ended == "done"
        named = ended.startswith("refused") and os.strerror(kind) in ended
        counts["ended by an error that names the disk"] += named
        if not (ended == "done" or named) or again != "done" or not same(content(run), wanted):
            failures.append(f"calls {first} to {last}, {errno.errorcode[kind]}:\n{ended}\nthen:\n{again}")
        shutil.rmtree(run, ignore_errors=True)
    return counts, failures


def run_on_a_faulty_disk(tmp_path, budget_s):
    library = tmp_path / "faulty_disk.so"
    build = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "faulty_disk.c"), "-ldl"]
    subprocess.run(build, check=True)
    done = subprocess.run(
        [sys.executable, __file__, str(library), str(tmp_path / "disk"), str(budget_s)],
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * budget_s + 240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts, failures = json.loads(done.stdout.splitlines()[-1])
    print(f"\na disk that fails: {counts}, {len(failures)} failures")
    assert not failures, "\n\n".join(failures)
    return counts


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_a_run_on_a_disk_that_fails_goes_on_or_says_so_and_reaches_the_same_bits(tmp_path):
    counts = run_on_a_faulty_disk(tmp_path, 16.0)
    assert counts["tried"] >= 5
    assert counts["went on"] > 0


@everything
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_the_disk_fails_at_every_call(tmp_path):
    counts = run_on_a_faulty_disk(tmp_path, 3600.0)
    assert counts["tried"] == counts["calls"]


def test_a_limit_on_open_files_is_named_or_met(tmp_path):
    """None can be opened beside this process's, up to more than a run needs."""
    counts, failures = {"tried": 0, "went on": 0, "refused": 0}, []
    with no_measurement():
        assert outcome(lambda: train(config(tmp_path / "whole"))) == "done"  # what is loaded once is loaded
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for spare in range(1, 10):
            run = tmp_path / str(spare)
            free = os.open("/dev/null", os.O_RDONLY)  # the lowest number that is not in use
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, hard))
            ended = outcome(lambda run=run: train(config(run)))
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            named = ended.startswith("refused") and "Too many open files" in ended
            counts["tried"] += 1
            counts["went on"] += ended == "done"
            counts["refused"] += named
            if not (ended == "done" or named):
                failures.append(f"{spare} files can be opened:\n{ended}")
    print(f"\nlimits on open files: {counts}, {len(failures)} failures")
    assert not failures, "\n\n".join(failures)
    assert counts["went on"]


# ---------------------------------------------------------------------------------------------------------------------
# Small files that anybody may have changed


def garbage(draw, text):
    """Content that is not what was written: bytes, or what is made in the file's place."""
    some = draw.randrange(len(text) + 1)
    numbers = [b"-1", b"1e999", b"9" * 5000, b"true", b"null", b"[]", b'"x"', b'"\\ud800"', b"{}", b"NaN"]
    changed = bytearray(text or b"x")
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    value = draw.choice([at for at, c in enumerate(text) if c in b"0123456789"] or [0])
    return draw.choice(
        [
            bytes(changed),
            text[:some],
            text[some:],
            text + text,
            draw.randbytes(draw.randrange(200)),
            b"",
            b"[" * 100_000,
            b'{"a":' * 5_000,
            b"\xef\xbb\xbf" + text,
            text.replace(b"\n", b"\r\n"),
            text.decode().encode("utf-16"),
            text[:value] + draw.choice(numbers) + text[value + 1 :],
            b"a: &a [*a]\n",
            draw.choice(numbers),
            os.mkfifo,
            os.mkdir,
            lambda path: os.symlink("/dev/zero", path),
            lambda path: os.symlink("/dev/full", path),
            lambda path: os.symlink(path, path),
            lambda path: None,
        ]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of all its steps, and one of half of them, which was left there."""
    with no_measurement():
        whole = tmp_path_factory.mktemp("runs") / "whole"
        train(config(whole))
        half = whole.with_name("half")
        shorter = config(half)
        train(shorter.model_copy(update={"run": shorter.run.model_copy(update={"steps": STEPS // 2})}))
        (half / "var.pth").unlink()
    return whole, half


def small_files(folder):
    """Those that a run wrote, but for tensors, and for what TensorBoard wrote."""
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix not in (".pth", ".safetensors")]
    return [path.relative_to(folder) for path in found if "tensorboard" not in path.parts]


def of_a_resume(path):
    """Whether a run cannot go on without the file; what only curves, pictures and tables need never stops it."""
    return path.name in ("config.yaml", "base.json") or path.parts[0] in ("checkpoints", "base")


def test_changed_small_files_end_in_one_clear_error_or_change_nothing(finished, tmp_path):
    change_small_files(finished, tmp_path, 14.0)


@everything
def test_many_changed_small_files(finished, tmp_path):
    change_small_files(finished, tmp_path, 400.0, seed=1)


def change_small_files(finished, tmp_path, budget_s, seed=0):
    draw, half, wanted = random.Random(seed), finished[1], content(finished[0])
    counts = {"tried": 0, "went on": 0, "refused": 0}
    files, failures = small_files(half), []
    end_s = time.monotonic() + budget_s
    with no_measurement():
        while time.monotonic() < end_s or counts["tried"] < len(files):  # each once, however slow the machine is
            run, damaged = tmp_path / str(counts["tried"]), files[counts["tried"] % len(files)]
            shutil.copytree(half, run)
            text = (run / damaged).read_bytes()
            (run / damaged).unlink()
            change = garbage(draw, text if b"\0" not in text else b"")
            (run / damaged).write_bytes(change) if isinstance(change, bytes) else change(run / damaged)
            made = change[:60] if isinstance(change, bytes) else change
            readers = [(sample, [f"out={run}.png", "labels=[0]"]), (export, [f"out={run}.pth"])]
            main, arguments = readers[counts["tried"] // len(files) % 2]
            arguments = [f"checkpoint={run}", *arguments]
            ended = [
                outcome(lambda main=main, arguments=arguments: main(arguments)),
                outcome(lambda run=run: train(config(run))),
            ]
            counts["tried"] += 1
            counts["went on"] += ended[-1] == "done"
            counts["refused"] += ended[-1].startswith("refused")
            bad = [text for text in ended if text != "done" and not text.startswith("refused")]
            if ended[-1] == "done":
                metrics, weights = content(run)
                if not same((wanted[0], weights), wanted) or metrics != [m for m in wanted[0] if m in metrics]:
                    bad.append("other numbers")
            elif not of_a_resume(damaged):
                bad.append(f"stopped the run: {ended[-1]}")
            if bad:
                failures.append(f"{damaged}: {made!r}:\n" + "\n".join(bad))
            shutil.rmtree(run)
    print(f"\nsmall files changed: {counts}, {len(failures)} failures")
    assert not failures, "\n\n".join(failures)
    assert counts["tried"] >= len(files)


if __name__ == "__main__":
    with no_measurement():
        result = faulty_disk(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
    print(json.dumps(result))
