"""What the benchmarks' own logic does without a GPU: the driver's parts and limits, records, tables, tuning, traces."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import each_kernel
import from_metrics
import gpu
import harness
import pytest
import step_trace
import table
import torch
import train_steps
import tune

from varfast.config import load_config
from varfast.kernels import aot, settings

ROOT = Path(__file__).parent.parent


def part(name, code, limit_s=20.0, **more):
    return gpu.Part(name, (sys.executable, "-c", code), limit_s, **more)


def states(results):
    return {result.name: result.state for result in results}


# ---------------------------------------------------------------------------------------------------------------------
# The driver


def test_run_parts_keeps_every_result_whatever_one_part_does(tmp_path):
    phases = [
        [part("good", "print('it ran')"), part("bad", "print('why'); raise SystemExit(7)")],
        [part("slow", "import time; print('began', flush=True); time.sleep(60)", limit_s=1.0)],
        [part("absent", "", skip="no such tool"), part("last", "pass")],
    ]
    results = gpu.run_parts(phases, tmp_path, "what", 60)
    assert states(results) == {
        "good": "ok",
        "bad": "failed",
        "slow": "over its limit",
        "absent": "skipped: no such tool",
        "last": "ok",
    }
    log = (tmp_path / "what.log").read_text()
    assert "it ran" in log
    assert "why" in log
    assert "began" in log
    noted = {p["name"]: p for p in json.loads((tmp_path / "what.json").read_text())["parts"]}
    assert noted["bad"]["codes"] == [7]
    assert noted["slow"]["seconds"] < 20


def test_run_parts_has_no_time_left_for_the_last_and_stops_without_a_vital_one(tmp_path):
    clock = iter(range(0, 10_000, 4)).__next__  # 4 s at every look
    results = gpu.run_parts([[part("one", "pass")], [part("two", "pass")]], tmp_path, "a", 12, clock)
    assert states(results) == {"one": "ok", "two": "skipped: no time is left"}
    broken = [[part("build", "raise SystemExit(1)", vital=True)], [part("tests", "pass")]]
    assert states(gpu.run_parts(broken, tmp_path, "b", 60)) == {"build": "failed"}


@pytest.mark.parametrize("end", [f"sys.exit({gpu._DEVICE_LOST})", "os.kill(os.getpid(), 11)"])
def test_a_part_that_resumes_is_started_again_after_it_lost_the_device_or_crashed(tmp_path, end):
    seen = tmp_path / "seen"
    code = f"import os, pathlib, sys; p = pathlib.Path({str(seen)!r})\nif not p.exists(): p.touch(); {end}"
    (result,) = gpu.run_parts([[part("bench", code, resumes=True)]], tmp_path, "what", 30)
    assert result.state == "ok"
    assert len(result.codes) == 2
    seen.unlink()
    (result,) = gpu.run_parts([[part("bench", code)]], tmp_path, "what", 30)
    assert result.state == "failed"


@pytest.mark.parametrize("what", gpu.WHAT)
def test_the_files_that_gpu_sh_runs_exist_and_its_names_choose_benchmarks(what, tmp_path):
    phases = gpu.WHAT[what](tmp_path / "record.json")
    files = [a for phase in phases for p in phase for a in p.command if a.startswith(("bench/", "tests"))]
    assert files or what == "tune"
    assert all((ROOT / name).exists() for name in files)
    names = [p.name for phase in phases for p in phase]
    assert len(names) == len(set(names))


def test_quick_begins_with_the_build_and_measures_steps_before_what_may_be_cut(tmp_path):
    record = tmp_path / "record.json"
    names = [p.name for phase in gpu.quick(record) for p in phase]
    assert names == ["build", "tests", "kernels", "d16 steps", "d30 steps", "tables", "trace"]
    assert all(len(phase) == 1 for phase in gpu.quick(record))  # timed alone
    assert gpu.SECONDS["quick"] < 300
    (kernels,) = gpu.quick(record)[2]
    assert kernels.environment["VARFAST_BENCH_QUICK"] == "1"
    assert all((ROOT / name).exists() for name in gpu.QUICK_TESTS)


def test_gpu_main_gives_quick_its_own_time_unless_another_is_asked_for(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(gpu, "run_parts", lambda phases, out, what, seconds: given.append((what, seconds)) or [])
    for arguments in (["quick"], ["peers"], ["quick", "--seconds", "100"]):
        assert gpu.main([*arguments[:1], str(tmp_path), *arguments[1:]]) == 0
    assert given == [("quick", 290.0), ("peers", 530.0), ("quick", 100.0)]
    assert gpu.main(["nothing"]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Records


def test_two_records_of_one_file_add_up(tmp_path, monkeypatch):
    monkeypatch.setenv("VARFAST_COMMIT", "abc123")
    one, other = (harness.Record(tmp_path / "deeper" / "record.json") for _ in range(2))
    one.add(harness.Row("a", "s", "forward", 1.0))
    other.add(harness.Row("b", "s", "forward", 2.0))
    one.note("checks", "c", "ok")
    content = json.loads(one.path.read_text())
    assert [row["op"] for row in content["rows"]] == ["a", "b"]
    assert content["checks"] == {"c": "ok"}
    assert content["environment"]["commit"] == "abc123"


class Benchmark:
    def __init__(self):
        self.extra_info = {}

    def __call__(self, call):
        call()

    def pedantic(self, call, **_):
        call()


def test_measure_leaves_out_a_peer_that_does_not_run_and_says_why(tmp_path):
    def refuses():
        raise ValueError("no such backend\nat length")

    record = harness.Record(tmp_path / "record.json")
    record.content["ceilings"] = {"flop_per_s": 1e12, "byte_per_s": 1e9, "memory_bytes": None}
    row = harness.Row("op", "shape", "forward", 0.0, io_bytes=1e3)
    x = torch.ones(1000)
    calls = {"ours": lambda: x + 1, "eager": lambda: [x + 1 for _ in range(20)], "cudnn": refuses}
    harness.measure(Benchmark(), record, row, calls)
    (noted,) = json.loads(record.path.read_text())["rows"]
    assert noted["ratios"].keys() == noted["peers_ms"].keys() == {"eager"}
    assert noted["ratios"]["eager"] == pytest.approx(noted["peers_ms"]["eager"] / noted["ms"], abs=1e-3)
    assert noted["share"] == pytest.approx(1e-3 / noted["ms"])
    assert noted["samples"] >= 3
    assert noted["notes"] == ["cudnn did not run: ValueError: no such backend"]
    record.alone = True
    harness.measure(Benchmark(), record, harness.Row("op", "shape", "forward", 0.0), calls)
    alone = json.loads(record.path.read_text())["rows"][1]
    assert alone["ratios"] == {}
    assert alone["notes"] == ["without peers: with them the process ended"]
    with pytest.raises(ValueError, match="no such backend"):  # ours must run
        harness.measure(Benchmark(), record, row, {"ours": refuses})


def test_a_peer_over_its_limit_is_left_out_and_an_earlier_alarm_goes_on(monkeypatch):
    monkeypatch.setenv("VARFAST_BENCH_PEER_S", "0.2")
    handler = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 50.0)
    try:
        calls = {"ours": lambda: None, "slow": lambda: time.sleep(30), "eager": lambda: None}
        found, notes = harness.runnable(calls)
        left_s, _ = signal.getitimer(signal.ITIMER_REAL)
        assert signal.getsignal(signal.SIGALRM) == signal.SIG_IGN
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert found.keys() == {"ours", "eager"}
    assert notes == ["slow did not run: TimeoutError: over its limit of 0.2 s"]
    assert 20 < left_s < 50


def test_quick_leaves_out_peers_that_are_compiled(monkeypatch):
    monkeypatch.setenv("VARFAST_BENCH_QUICK", "1")
    calls = {name: lambda: None for name in ("ours", "eager", "torch.compile", "flex, tuned")}
    found, notes = harness.runnable(calls)
    assert found.keys() == {"ours", "eager"}
    assert notes == [f"{name} left out: it is compiled first" for name in ("torch.compile", "flex, tuned")]


def test_a_session_that_died_goes_on_with_the_next_benchmark(tmp_path):
    """The first ends its process twice, the second fails, the third passes."""
    (tmp_path / "conftest.py").write_text((ROOT / "bench" / "conftest.py").read_text())
    (tmp_path / "test_three.py").write_text(
        "import os\ndef test_a(record): os._exit(1)\ndef test_b(record): assert 0\ndef test_c(record): pass\n"
    )
    record = tmp_path / "record.json"
    environment = os.environ | {"VARFAST_BENCH_RECORD": str(record), "PYTHONPATH": str(ROOT / "bench")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    codes = [subprocess.run(command, env=environment, capture_output=True, check=False).returncode for _ in range(3)]
    assert codes == [1, 1, 1]
    tests = {name.split("::")[1]: state for name, state in json.loads(record.read_text())["tests"].items()}
    assert tests["test_a"] == "ended its process twice"
    assert tests["test_b"].startswith("failed: ")
    assert tests["test_c"] == "passed"


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def fake_record(path, rows, gpus=("Some GPU",)):
    content = {
        "date": "2026-01-05T10:00:00+00:00",
        "environment": {"gpus": list(gpus), "commit": "abc", "torch": "2.11.0"},
        "ceilings": {"flop_per_s": 800e12, "byte_per_s": 3e12, "memory_bytes": None},
        "command": "bench/gpu.sh",
        "rows": rows,
    }
    path.write_text(json.dumps(content))


def row(op, ms, model="", images=0, direction="forward", flop=0.0):
    found = harness.Row(op, f"{model}, {images} images", direction, ms, {"plain": 3 * ms}, flop=flop, share=0.5)
    found.model, found.images, found.spread, found.samples = model, images, 0.04, 9
    return harness.asdict(found) | {"peak_bytes": 2 * 2**30 if model else 0}


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RECORDS", tmp_path)
    return tmp_path


def test_tables_take_what_is_newest_of_a_gpu(records):
    fake_record(records / "2026-01-01_a.json", [row("sample_tokens", 0.5), row("step", 2000.0, "d16", 512, flop=8e14)])
    fake_record(records / "2026-01-02_b.json", [row("step", 9000.0, "d30", 512), row("decode", 51.0)])
    fake_record(records / "2026-01-03_cpu.json", [row("sample_tokens", 70.0)], gpus=())
    kernels = "\n".join(table.kernel_table())
    assert "| `sample_tokens` forward | Triton | , 0 images | 0.5000 ms ± 2% | 3.00x plain | 50% |" in kernels
    assert "| `grpo_token_loss` | C++/CUDA | | not measured" in kernels
    assert "one Some GPU" in kernels
    assert "2026-01-05, torch 2.11.0, at commit abc: [2026-01-01_a.json]" in kernels
    steps = "\n".join(table.step_table())
    # 8e14 FLOP in 2 s at 800 TFLOP/s are half of it.
    assert "| step | d16, 512 images | 2000.0 ms ± 2% | 256 | 50% | 3.00x plain | 50% | 2 GiB |" in steps
    assert "| step | d30, 512 images | 9000.0 ms ± 2% | 57 |" in steps
    assert steps.count("| decode |") == 1
    assert "| rollout | | not measured" in steps
    assert "d16 run, 20000 steps of 512 images (16 h on 8 H100 there), would take 11.1 h on this one device" in steps
    assert "would take 50.0 h" in steps
    assert "2026-01-02_b.json" in steps


def test_hours_count_the_reward_in(records):
    clip = row("reward: CLIP ViT-L/14", 200.0, images=512)
    fake_record(records / "2026-01-01_a.json", [row("step", 1600.0, "d16", 512), clip])
    assert "would take 10.0 h on this one device (CLIP ViT-L/14 counted in)" in "\n".join(table.step_table())


def test_rollouts_token_by_token_have_a_table_of_their_own(records):
    assert table.tokens_table() == []
    found = row("next-token rollout", 100.0, "llamagen-L", 64) | {"io_bytes": 2e11}
    found["shape"] = "L, 64 images of 256 tokens"
    fake_record(records / "2026-01-01_a.json", [found, row("step", 1.0, "d16", 512)])
    (line,) = [line for line in table.tokens_table() if "L, 64" in line]
    assert line == "| L, 64 images of 256 tokens | 100.0 ms ± 2% | 163840 | 2.00 | 50% | 3.00x plain |"


def test_without_a_record_nothing_is_measured(records):
    assert table.kernel_table()[-1].startswith("No GPU has run these kernels")
    assert table.step_table()[-1].startswith("No GPU has run a step")
    assert table.headline_table()[-1].startswith("No GPU has run any of it")
    page = "kernels/README.md"
    assert table.filled((ROOT / page).read_text(), page).count("not measured") > 30


def test_a_record_is_made_from_the_metrics_of_a_run(tmp_path, monkeypatch):
    stages = dict.fromkeys(("decode_ms", "reward_ms", "reference_ms", "update_ms", "optimizer_ms"), 50.0)
    lines = [{"rollout_ms": ms, "step_s": ms / 100, **stages} for ms in (900.0, 500.0, 100.0, 120.0, 110.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fake_record(tmp_path / "like.json", [])
    out = tmp_path / "made.json"
    overrides = ["policy.preset=d16", "policy.checkpoint=random", "policy.vqvae_checkpoint=null"]
    arguments = [str(tmp_path / "metrics.jsonl"), str(ROOT / "configs" / "d30.yaml"), *overrides]
    monkeypatch.setattr(
        sys, "argv", ["", *arguments, "--like", str(tmp_path / "like.json"), "--out", str(out), "--note", "before"]
    )
    assert from_metrics.main() == 0
    made = {row["op"]: row for row in json.loads(out.read_text())["rows"]}
    # The first two steps compile and capture; 512 images of 298.7 GFLOP at 800 TFLOP/s take 191 ms.
    assert made["rollout"]["ms"] == 110.0
    assert made["rollout"]["share"] == pytest.approx(191.2 / 110, rel=0.01)
    assert made["step"]["ms"] == 1100.0
    assert made["step"]["samples"] == 3
    assert made["forward and backward"]["notes"] == ["before"]
    assert "| step | d16, 512 images | 1100.0 ms ± 9% | 465 |" in "\n".join(table.step_table(out))


TRAINER = """
import json, pathlib, sys
folder, steps, code = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
folder.mkdir()
stages = dict.fromkeys(("rollout_ms", "decode_ms", "reward_ms", "reference_ms", "update_ms", "optimizer_ms"), 50.0)
with (folder / "metrics.jsonl").open("a") as file:
    for step in range(steps):
        memory = {"memory_allocated_bytes": 100, "memory_reserved_bytes": 200 + GROWTH * step}
        file.write(json.dumps({"step_s": 5.0 if step < 2 else 0.5, **stages, **memory}) + chr(10))
    file.write('{"step_s": 9')  # cut in the middle
sys.exit(code)
"""


@pytest.mark.parametrize(("code", "growth", "expected"), [(0, 0, 0), (0, 10, 1), (7, 0, 7)])
def test_steps_of_a_run_are_noted_whatever_becomes_of_it(tmp_path, monkeypatch, code, growth, expected):
    path = tmp_path / "record.json"
    fake_record(path, [row("step", 9.0, "d16", 512), row("other", 1.0)])
    content = json.loads(path.read_text()) | {"checks": {}, "tests": {}}
    path.write_text(json.dumps(content))
    program = TRAINER.replace("GROWTH", str(growth))
    monkeypatch.setattr(
        train_steps,
        "command_of",
        lambda model, folder, steps, overrides: [sys.executable, "-c", program, str(folder), str(steps), str(code)],
    )
    assert train_steps.main(["d16", "--record", str(path), "--steady", "6", "--flat"]) == expected
    noted = json.loads(path.read_text())
    found = {one["op"]: one for one in noted["rows"]}
    assert len(noted["rows"]) == len(found) == 8  # six stages, the step in place of the older one, and the other
    assert (found["step"]["ms"], found["step"]["samples"]) == (500.0, 6)
    assert len(noted["checks"]["d16 memory of each step"]) == 8


def test_growth_of_memory_needs_the_metrics_that_tell_it():
    with pytest.raises(ValueError, match="does not have memory_allocated_bytes"):
        train_steps.growth([{"step_s": 1.0}] * 20)
    with pytest.raises(ValueError, match="more than 3 are needed"):
        train_steps.growth([dict.fromkeys(train_steps.MEMORY, 1)] * 3)


def test_the_trainer_accepts_what_train_steps_asks_of_it(tmp_path):
    for model in ("d16", "d30"):
        command = train_steps.command_of(model, tmp_path, 7, [])
        config = load_config(ROOT / command[3], command[4:])
        assert (config.run.steps, config.rollout.images, config.policy.preset) == (7, 512, model)
        assert config.eval.samples_per_label == 0


# ---------------------------------------------------------------------------------------------------------------------
# Tuning


def test_check_passes_a_right_candidate_and_names_what_is_wrong_with_others():
    sizes = {"heads": 2}
    assert tune.check("adaln_backward", "gated_residual_norm", {"ROWS": 8, "num_warps": 2}, sizes, small=True) == ""
    wrong = tune.check("split_heads_forward", "split_heads", {"TOKENS": 12}, sizes, small=True)
    assert "must be a power of 2" in wrong
    assert settings._TRIED == {}


def test_compare_names_an_output_that_is_less_exact_than_twice_the_reference():
    def function(impl, x):
        return x.exp(), (x * (1.0 + 1e-4 * (impl == "triton")))

    case = each_kernel.Case("op", function, (torch.randn(100).requires_grad_(),))
    assert each_kernel.compare(case, "reference") == []
    wrong = each_kernel.compare(case, "triton")
    assert [line.split(":")[0] for line in wrong] == ["output 1", "gradient 0"]


def test_setting_prefers_what_is_tried_then_what_is_pinned_then_the_rule(monkeypatch):
    monkeypatch.setitem(settings.PINNED, (settings.HOPPER, "some_kernel", 64), {"num_warps": 8})
    rule = {"BLOCK": 16, "num_warps": 4}
    assert settings.setting("some_kernel", 64, None, **rule) == {"BLOCK": 16, "num_warps": 8}
    assert settings.setting("some_kernel", 65, torch.device("cpu"), **rule) == rule
    with settings.trying("some_kernel", num_warps=2):
        assert settings.setting("some_kernel", 64, None, **rule) == {"BLOCK": 16, "num_warps": 2}


def test_every_target_names_a_kernel_that_asks_for_its_setting(monkeypatch):
    asked = set()
    original = settings.setting
    names = {target.kernel for target in tune.targets()}
    for module in [m for name, m in sys.modules.items() if name.startswith("varfast.kernels.")]:
        if getattr(module, "setting", None) is original:
            monkeypatch.setattr(module, "setting", lambda k, *a, **b: asked.add(k) or original(k, *a, **b))

    # Interpreted kernels have no types; which settings are asked for is seen all the same.
    monkeypatch.setattr(aot, "_specialised", lambda *_: {"signature": {}, "constants": {}})
    aot.all_kernels()
    assert names == asked


def test_table_of_candidates_recommends_what_is_faster_than_noise():
    target = tune.Target("some_kernel", 16, "", [], lambda: lambda: None, {})
    pinned, fast, wrong = (
        tune.Found({}, True, "", 1.0, 0.02),
        tune.Found({"num_warps": 8}, False, "", 0.8, 0.02),
        tune.Found({"num_warps": 4}, False, "spills", 0.0, 0.0),
    )
    lines = tune.table(target, [fast, pinned, wrong]).splitlines()
    assert lines[-1] == '  -> 1.25x: (HOPPER, "some_kernel", 16): {"num_warps": 8},'
    assert lines[3].endswith("num_warps=4  spills")
    fast.ms = 0.99
    assert "->" not in tune.table(target, [fast, pinned])


# ---------------------------------------------------------------------------------------------------------------------
# Traces


def test_summary_of_a_trace_finds_busy_share_and_gaps():
    def event(start, duration, name, category="kernel"):
        return {"cat": category, "ts": start, "dur": duration, "name": name, "ph": "X"}

    events = [
        event(0, 100, "a"),
        event(50, 100, "b"),  # beside the first, on another stream
        event(200, 50, "a"),  # after 50 us of nothing
        event(0, 9999, "python", "cpu_op"),
    ]
    lines = step_trace.summary(events)
    assert lines[0] == "device: 0.2 ms from first to last, busy 80.0%, 3 pieces"
    assert lines[1].startswith("gaps of 20 us and more: 1, 0.1 ms together")
    assert any("60.0%      2  a" in line for line in lines)
    assert step_trace.summary([]) == ["no work of a device in this trace"]
