"""Run everything that needs a GPU, in parts: each with a limit, a log and an exit code, none able to stop the others.

    python bench/gpu.py WHAT [out-dir] [--seconds S]     # names of WHAT and what they do: bench/gpu.sh

What is not timed (tests, sanitizers, compilers) runs side by side; what is timed runs alone. A benchmark that loses
the device or hangs costs itself alone: its process is started again and goes on with the next. Written as they come:
<out-dir>/<what>.log, <what>.json (a line a part) and the record, <date>_<gpu>_<what>.json.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
_DEVICE_LOST = 33  # as in bench/conftest.py
_RESTARTS = 5
_SHOWN_LINES = 40  # of the log of a part that was not ok


@dataclass(frozen=True)
class Part:
    """A command with a limit.

    Attributes:
        name: for log and summary.
        command: arguments, or None with `skip`.
        limit_s: seconds after which it is ended.
        environment: beside the driver's own.
        resumes: it may be started again after it lost the device, was killed or crashed: it knows what it has done.
        vital: without it the others are not worth running.
        skip: why it does not run here.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    environment: Mapping[str, str] = field(default_factory=dict)
    resumes: bool = False
    vital: bool = False
    skip: str = ""


@dataclass
class Result:
    """What became of a part: "ok", "failed", "skipped: ..." or "over its limit"; exit codes of its runs, seconds."""

    name: str
    state: str
    seconds: float = 0.0
    codes: list[int] = field(default_factory=list)


def run_parts(
    phases: list[list[Part]],
    out: Path,
    what: str,
    seconds: float,
    now: Callable[[], float] = time.monotonic,
) -> list[Result]:
    """Run the phases one after the other, the parts of each side by side, within `seconds` altogether."""
    out.mkdir(parents=True, exist_ok=True)
    begin, results = now(), []
    for phase in phases:
        running = []
        for part in phase:
            left = seconds - (now() - begin)
            if part.skip or left < 5:
                results.append(Result(part.name, f"skipped: {part.skip or 'no time is left'}"))
            else:
                running.append(_Running(part, out, min(part.limit_s, left), now))
        while running:
            for one in list(running):
                result = one.poll()
                if result is not None:
                    running.remove(one)
                    results.append(result)
                    print(f"{result.name}: {result.state}, {result.seconds:.0f} s", flush=True)
                    _append(out / f"{what}.log", result, one.log)
                    _write_summary(out / f"{what}.json", results, now() - begin)
            time.sleep(0.2)
        _write_summary(out / f"{what}.json", results, now() - begin)
        vital = {part.name for part in phase if part.vital}
        if any(r.name in vital and r.state != "ok" for r in results):
            print(f"stopped: nothing runs without {', '.join(sorted(vital))}; see {out / f'{what}.log'}")
            break
    return results


class _Running:
    """A part under way, perhaps for the second time."""

    def __init__(self, part: Part, out: Path, limit_s: float, now: Callable[[], float]) -> None:
        self.part, self.log, self._now = part, out / f"{part.name}.part.log", now
        self._begin, self._deadline = now(), now() + limit_s
        self._codes: list[int] = []
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(self.part.command)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                self.part.command,
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(self.part.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> Result | None:
        code = self._process.poll()
        if code is None and self._now() < self._deadline:
            return None
        if code is None:
            _end(self._process)
            return self._result("over its limit")
        self._codes.append(code)
        if code == 0:
            return self._result("ok")
        died = code < 0 or code == _DEVICE_LOST
        if self.part.resumes and died and len(self._codes) <= _RESTARTS:
            self._start()
            return None
        return self._result("failed")

    def _result(self, state: str) -> Result:
        return Result(self.part.name, state, round(self._now() - self._begin, 1), self._codes)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started: its session is its own. Interrupted, pytest still says what failed."""
    process.send_signal(signal.SIGINT)
    for how, seconds in ((signal.SIGTERM, 8), (signal.SIGKILL, 3)):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
    process.wait()


def _append(log: Path, result: Result, own: Path) -> None:
    """Put a part's log behind the others; show its end, if it was not ok."""
    with log.open("ab") as file:
        file.write(f"\n==== {result.name}: {result.state}, {result.seconds} s, exit {result.codes}\n".encode())
        written = own.read_bytes()[-2_000_000:]
        file.write(written)
    own.unlink()
    shown = _SHOWN_LINES if result.state != "ok" else 400 if result.name == "tables" else 0
    if shown:
        print(
            "\n".join(f"  | {line[:300]}" for line in written.decode(errors="replace").splitlines()[-shown:]),
            flush=True,
        )


def _write_summary(path: Path, results: list[Result], seconds: float) -> None:
    content = {"seconds": round(seconds, 1), "parts": [vars(result) for result in results]}
    path.write_text(json.dumps(content, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def build() -> Part:
    """As the README says, without a network."""
    command = (PYTHON, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index", "-e", ".")
    return Part("build", command, 150, {"TORCH_CUDA_ARCH_LIST": _architecture()}, vital=True)


def _architecture() -> str:
    """Of the GPU that is here, for one build instead of three; Hopper's where it cannot be asked."""
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, check=False
    ) if shutil.which("nvidia-smi") else None  # fmt: skip
    return asked.stdout.split()[0] if asked and asked.returncode == 0 and asked.stdout.split() else "9.0"


def pytest(*arguments: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def workers(count: int) -> tuple[str, ...]:
    return ("-n", str(count)) if has("xdist") else ()


# Benchmarks of the kernels, those of the shipped model first.
KERNELS = ("bench/bench_kernels.py", "bench/bench_nexttoken.py")
# The tests of `quick`, those that matter most first: whole policy, rollout, then the kernels' numbers.
QUICK_TESTS = (
    "tests/test_gpu.py", "tests/test_rollout.py", "tests/test_learner.py", "tests/kernels/test_conv.py",
    "tests/kernels/test_adamw.py", "tests/kernels/test_sampling.py", "tests/kernels/test_attention.py",
    "tests/kernels/test_adaln.py", "tests/kernels/test_qkv.py", "tests/kernels/test_logprob.py",
    "tests/kernels/test_grpo_loss.py", "tests/kernels/test_group_norm.py", "tests/kernels/test_decode_attention.py",
    "tests/kernels/test_rotary.py", "tests/kernels/test_rms_norm.py", "tests/kernels/test_swiglu.py",
    "tests/kernels/test_dpo_loss.py", "tests/kernels/test_unequal_prompts.py",
)  # fmt: skip


def quick(record: Path) -> list[list[Part]]:
    """What to see first on a rented GPU. The limits add up to more than its 290 s: what is late is cut, not waited for.

    Build 40 s; kernels without the peers that compile; d16 20 + 6 + 6 x 3.2 s, d30 20 + 15 + 6 x 12 s (measured on an
    H100 at commit 3c56215: import, first step, other steps).
    """
    timed = {"VARFAST_BENCH_RECORD": str(record), "VARFAST_BENCH_TEST_S": "20", "VARFAST_BENCH_QUICK": "1",
             "VARFAST_BENCH_PEER_S": "5"}  # fmt: skip
    return [
        [build()],
        [Part("tests", pytest("-m", "gpu", *QUICK_TESTS, "-rfE", "--continue-on-collection-errors", *workers(8)), 50)],
        [Part("kernels", pytest(*KERNELS, "--benchmark-only", "-s"), 45, timed, resumes=True)],
        [steps("d16", record, 60)],
        [steps("d30", record, 120)],
        [tables(record)],
        [Part("trace", (PYTHON, "bench/step_trace.py", str(record.parent)), 60)],
    ]


def steps(model: str, record: Path, limit_s: float, *more: str) -> Part:
    """The real trainer, until it has its steady steps."""
    return Part(f"{model} steps", (PYTHON, "bench/train_steps.py", model, "--record", str(record), *more), limit_s)


def memory(record: Path) -> list[list[Part]]:
    """20 steps of d30, after which its memory must not have grown: 22 x 12 s and the start."""
    return [[build()], [steps("d30", record, 400, "--steady", "20", "--flat")]]


def tests(record: Path) -> list[list[Part]]:
    """Every GPU test, beside a check of each kernel that is repeated."""
    timeout = ("--timeout=120",) if has("pytest_timeout") else ()
    every = pytest("-m", "gpu", "tests", "--continue-on-collection-errors", "-rfE", *workers(8), *timeout)
    checks = (PYTHON, "bench/each_kernel.py", "--fresh", "--repeat", "20", "--record", str(record))
    return [[build()], [Part("tests", every, 300), Part("checks", checks, 120)]]


def sanitizers(record: Path) -> list[list[Part]]:
    """Every kernel once under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    absent = "" if Path(tool).exists() else "compute-sanitizer is not installed"
    # Without torch's caching allocator an access beside a tensor is one beside an allocation.
    exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def check(name: str) -> Part:
        once = (tool, "--tool", name, "--error-exitcode", "9", PYTHON, "bench/each_kernel.py", "--once")
        return Part(name, once, 400, exact, skip=absent)

    return [[build()], [check("memcheck"), check("racecheck")]]


def peers(record: Path) -> list[list[Part]]:
    """Every kernel against all of its peers. A compiling pass first, so that timing finds all in the caches."""
    timed = {"VARFAST_BENCH_RECORD": str(record), "VARFAST_BENCH_TEST_S": "150"}
    compilers = pytest(*KERNELS, "--benchmark-disable", *workers(5))
    return [
        [build()],
        [Part("compilers", compilers, 180, {"VARFAST_BENCH_COMPILE_ONLY": "1"})],
        [Part("benchmarks", pytest(*KERNELS, "--benchmark-only", "-s"), 300, timed, resumes=True)],
        [tables(record)],
    ]


def bench(name: str, record: Path, chosen: str, limit_s: float, file: str = "bench/bench_step.py") -> Part:
    """Benchmarks that are chosen by name, timed alone."""
    timed = {"VARFAST_BENCH_RECORD": str(record), "VARFAST_BENCH_TEST_S": "200"}
    return Part(name, pytest(file, "--benchmark-only", "-s", "-k", chosen), limit_s, timed, resumes=True)


def decoder(record: Path) -> list[list[Part]]:
    chosen = "(test_decode and bfloat16 and not vq_ds8 and not vqgan) or upsample"
    return [[build()], [bench("decoder", record, chosen, 300, "bench/bench_decode.py")], [tables(record)]]


def tokens(record: Path) -> list[list[Part]]:
    chosen = "test_rollout"
    return [[build()], [bench("tokens", record, chosen, 430, "bench/bench_decode_loop.py")], [tables(record)]]


def agreement(record: Path) -> list[list[Part]]:
    """Rollout against update at full size, and whether the digits' reward rises."""
    checks = (PYTHON, "bench/full_size.py", "--record", str(record))
    return [
        [build()],
        [Part("d16", (*checks, "d16"), 150), Part("digits", (*checks, "run"), 150)],
        [Part("d30", (*checks, "d30"), 120)],
    ]


def stages_of(model: str) -> Callable[[Path], list[list[Part]]]:
    """Steps by the trainer; then the stages, each against its peers."""

    def phases(record: Path) -> list[list[Part]]:
        return [
            [build()],
            [steps(model, record, 180)],
            [bench("stages", record, f"{model} and not test_rollout", 200)],
            [bench("rollouts", record, f"test_rollout and {model}", 120)],
            [tables(record)],
        ]

    return phases


def tables(record: Path) -> Part:
    return Part("tables", (PYTHON, "bench/table.py", "--print", "--record", str(record)), 20)


def tune(record: Path) -> list[list[Part]]:
    table = str(record.parent / "tune.json")
    return [[build()], [Part("tune", (PYTHON, "bench/tune.py", "--seconds", "400", "--out", table), 450)]]


WHAT = {
    "quick": quick, "tests": tests, "sanitizers": sanitizers, "peers": peers, "d16": stages_of("d16"),
    "d30": stages_of("d30"), "memory": memory, "decoder": decoder, "tokens": tokens,
    "agreement": agreement, "tune": tune,
}  # fmt: skip
SECONDS = {"quick": 290.0}  # altogether; of the others 530


def gpu_name() -> str:
    asked = (
        shutil.which("nvidia-smi")
        and subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    return asked.splitlines()[0].replace(" ", "-") if asked else "no-gpu"


def main(arguments: list[str]) -> int:
    seconds = None
    if "--seconds" in arguments:
        at = arguments.index("--seconds")
        seconds = float(arguments[at + 1])
        del arguments[at : at + 2]
    if not arguments or arguments[0] not in WHAT or len(arguments) > 2:
        print(__doc__)
        return 2
    what, given = arguments[0], arguments[1:]
    out = Path(given[0]).resolve() if given else ROOT / "runs" / "gpu"
    records = out if given else ROOT / "bench" / "records"
    record = records / f"{datetime.now(UTC):%Y-%m-%d_%H%M}_{gpu_name()}_{what}.json"
    os.environ["VARFAST_BENCH_COMMAND"] = f"bench/gpu.sh {what}"
    results = run_parts(WHAT[what](record), out, what, seconds or SECONDS.get(what, 530.0))
    print(f"\n{'part':24} {'seconds':>8}  state")
    for result in results:
        print(f"{result.name:24} {result.seconds:8.0f}  {result.state}")
    print(f"log {out / f'{what}.log'}, record {record}")
    return 0 if all(r.state == "ok" or r.state.startswith("skipped: ") for r in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
