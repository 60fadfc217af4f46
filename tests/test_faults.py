"""Each fault is injected for real: signals to a process, bytes flipped on the disk, a disk that is full, NaN."""

import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from varfast import InputError, Policy, kernels
from varfast.runs.checkpoint import Checkpoints, newest_checkpoint
from varfast.runs.folder import RunFolder
from varfast.runs.manifest import dump_config
from varfast.train import train

from .runs import assert_same_run, metrics, weights


def names(config):
    return sorted(p.name for p in (Path(config.run.dir) / "checkpoints").iterdir())


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture
def start(tmp_path):
    """Start `train` of a config in another process, after some lines of Python; wait for a file to appear."""
    processes = []

    def start(config, wait_for, before=""):
        path = tmp_path / "config.yaml"
        path.write_text(dump_config(config))
        script = (
            f"import sys, time\nfrom varfast.train import main\n{textwrap.dedent(before)}\nsys.exit(main(sys.argv[1:]))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        processes.append(process)
        deadline = time.monotonic() + 120
        while not wait_for.exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_sigkill_in_the_middle_of_a_save_loses_the_steps_since_the_last_one(make_config, tmp_path, start):
    few = {"run__steps": 20, "log__checkpoint_every": 5, "eval__samples_per_label": 1}
    whole = make_config(run__dir=str(tmp_path / "whole"), **few)
    train(whole)
    killed = make_config(run__dir=str(tmp_path / "killed"), **few)
    reached = tmp_path / "reached"
    slow = f"""
        from pathlib import Path
        from varfast.runs import checkpoint
        sha256 = checkpoint._sha256
        def slow(path):
            if path.parent.name == "step_000010.part":  # the tensors are written, the manifest is not
                Path({str(reached)!r}).touch()
                time.sleep(600)
            return sha256(path)
        checkpoint._sha256 = slow
        """
    process = start(killed, reached, slow)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert names(killed) == ["step_000005", "step_000010.part"]
    assert newest_checkpoint(Path(killed.run.dir) / "checkpoints").step == 5
    train(killed)
    assert names(killed) == ["step_000015", "step_000020"]
    assert_same_run(whole.run.dir, killed.run.dir)


class Killed(BaseException):
    """Stands for the moment of a SIGKILL, where a process for each would take too long."""


def test_a_save_killed_at_any_moment_leaves_a_whole_checkpoint(make_config, tmp_path, monkeypatch):
    """Every call that changes what is on the disk after the tensors, one after the other."""
    config = make_config(log__keep_last=1)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def save(path, step):
        with torch.no_grad():
            model.weight.fill_(step)
        with Checkpoints(path, config, {"varfast": "0"}, print) as checkpoints:
            checkpoints.save(step, model, optimizer, {})

    moments = 0
    for moment in range(100):
        path = tmp_path / str(moment) / "checkpoints"
        save(path, 1)
        calls = [0]

        def dying(call, calls=calls, moment=moment):
            def wrapped(*args, **kwargs):
                calls[0] += 1
                if calls[0] == moment + 1:
                    raise Killed
                return call(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            for module, name in ((os, "fsync"), (os, "rename"), (shutil, "rmtree")):
                patch.setattr(module, name, dying(getattr(module, name)))
            try:
                save(path, 2)
            except (Killed, CheckpointException):  # torch wraps what is raised while it writes
                moments += 1
            else:
                break
        found = newest_checkpoint(path)
        with torch.no_grad():
            model.weight.fill_(0)
        found.load(model, optimizer)
        assert torch.equal(model.weight, torch.full((2, 2), float(found.step)))
    assert found.step == 2
    assert moments > 6


TWO_AT_ONCE = """
import os, random, sys, time
import varfast.train as train
from varfast.command import run_command

draw_labels = train.draw_labels
def slowly(*args):  # else the first may be done before the second one starts
    time.sleep(0.15)
    return draw_labels(*args)
train.draw_labels = slowly

def start(folder, number, delay_s):
    child = os.fork()
    if child:
        return child
    output = os.open(f"{folder}_{number}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    time.sleep(delay_s)
    sys.argv = ["train", sys.argv[1], f"run.dir={folder}"]
    try:
        run_command("train")
    except SystemExit as end:
        os._exit(end.code)
    finally:
        os._exit(99)

for repeat in range(int(sys.argv[3])):
    folder = f"{sys.argv[2]}/{repeat}"
    random.seed(repeat)
    delay_s = random.choice([0.0, random.uniform(0, 0.1), random.uniform(0, 2.5)])
    pids = [start(folder, number, delay) for number, delay in enumerate((0.0, delay_s))]
    print(folder, *pids, *[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], flush=True)
"""


def two_at_once(config, tmp_path, repeats):
    (tmp_path / "config.yaml").write_text(dump_config(config))
    done = subprocess.run(
        [sys.executable, "-c", TWO_AT_ONCE, str(tmp_path / "config.yaml"), str(tmp_path), str(repeats)],
        capture_output=True,
        text=True,
        check=True,
        timeout=100 + 60 * repeats,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == repeats
    for line in lines:
        folder, *pids_and_codes = line.split()
        first, second, *codes = map(int, pids_and_codes)
        outputs = [Path(f"{folder}_{number}.txt").read_text() for number in (0, 1)]
        assert sorted(codes) == [0, 2], outputs
        winner, refused = (first, outputs[1]) if codes[0] == 0 else (second, outputs[0])
        wanted = f"error: run.dir={folder} is in use by pid {winner} on host {socket.gethostname()} since "
        assert refused.startswith(wanted), refused
        assert len(refused.splitlines()) == 1
        assert [line["step"] for line in metrics(folder)] == list(range(1, config.run.steps + 1))
        assert not (Path(folder) / "lock.json").exists()
    return lines


def test_of_two_processes_on_one_run_folder_one_runs_and_one_is_refused(make_config, tmp_path):
    two_at_once(make_config(run__steps=30, eval__samples_per_label=0, log__checkpoint_every=5), tmp_path, 2)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
    ids=["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"],
)
def test_a_signal_saves_and_ends_with_its_code(make_config, tmp_path, start, number, code):
    config = make_config(run__steps=100_000, log__checkpoint_every=100_000, eval__samples_per_label=0)
    process = start(config, Path(config.run.dir) / "metrics.jsonl")
    time.sleep(0.5)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    step = metrics(config.run.dir)[-1]["step"]
    assert RunFolder(config.run.dir).newest().step == step >= 1
    assert f"holds step {step} of 100000. The same command goes on." in out
    ended = json.loads((Path(config.run.dir) / "ended.json").read_text())
    assert ended == {"step": step, "why": signal.Signals(number).name, "diverged": False}


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(make_config, tmp_path, capsys, damage):
    whole = make_config(run__dir=str(tmp_path / "whole"), run__steps=4)
    train(whole)
    config = make_config(run__steps=4)
    shutil.copytree(whole.run.dir, config.run.dir)
    folder = Path(config.run.dir) / "checkpoints" / "step_000004"
    (tensors,) = folder.glob("*.safetensors")
    if damage == "flipped":
        flip(tensors)
        reason = f"{tensors.name} is damaged: its SHA-256 is another one"
    elif damage == "truncated":
        size = tensors.stat().st_size
        os.truncate(tensors, size // 2)
        reason = f"{tensors.name} has {size // 2} of {size} bytes"
    elif damage == "missing":
        tensors.unlink()
        reason = f"{tensors.name}: No such file or directory"
    else:
        flip(folder / "manifest.json", 30)
        reason = "manifest.json is damaged: its SHA-256 is another one"
    capsys.readouterr()
    train(config)
    assert f"step_000004: {reason}. Using step_000002, the one before" in capsys.readouterr().out
    assert names(config) == ["step_000002", "step_000004", "step_000004.damaged"]
    assert_same_run(whole.run.dir, config.run.dir)


def test_a_run_whose_checkpoints_are_all_damaged_says_what_to_do(make_config):
    config = make_config(run__steps=4)
    train(config)
    for folder in (Path(config.run.dir) / "checkpoints").iterdir():
        flip(next(folder.glob("*.safetensors")))
    wanted = (
        r"no checkpoint in .* is whole:\n  step_000004: .*\n  step_000002: .*\n  bring one back .* delete .*checkpoints"
    )
    with pytest.raises(InputError, match=wanted):
        train(config)
    assert names(config) == ["step_000002", "step_000004"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MiB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"this machine refuses to mount: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_costs_that_checkpoint_and_no_more(make_config, small_disk):
    config, model, said = make_config(), torch.nn.Linear(512, 512), []
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    path, filler = small_disk / "checkpoints", small_disk / "filler"
    with Checkpoints(path, config, {"varfast": "0"}, said.append) as checkpoints:
        checkpoints.save(1, model, optimizer, {})
        checkpoints.wait()
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 500_000))
        checkpoints.save(2, model, optimizer, {})
        with pytest.raises(InputError, match="step_000002 could not be written: No space left on device"):
            checkpoints.wait()
        assert f"MiB free on the disk at {small_disk}; step_000001 is whole. Free space there" in said[0]
        assert [p.name for p in path.iterdir()] == ["step_000001"]
        filler.unlink()
        checkpoints.save(3, model, optimizer, {})
    assert len(said) == 1
    assert newest_checkpoint(path).step == 3


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 64 KiB: a limit of the operating system that needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_that_cannot_save_goes_on_and_says_so_at_its_end(make_config, small_files, capsys):
    config = make_config(log__checkpoint_every=1)
    with pytest.raises(InputError, match="checkpoint step_000003 could not be written: File too large"):
        train(config)
    assert [line["step"] for line in metrics(config.run.dir)] == [1, 2, 3]
    out = capsys.readouterr().out
    assert out.count("no earlier one. The limit is on the size of a file (ulimit -f") == 3
    assert out.count("; the run goes on and tries again") == 3
    assert names(config) == []


@pytest.fixture
def moody_reward(tmp_path, monkeypatch):
    """Brightness; not finite on the calls that `bad` names, counted from 1."""
    (tmp_path / "moody.py").write_text(
        "calls, bad, value = [0], [], float('nan')\n"
        "def reward(images, labels):\n"
        "    calls[0] += 1\n"
        "    scores = images.mean(dim=(1, 2, 3))\n"
        "    if calls[0] in bad:\n"
        "        scores[1] = value\n"
        "    return scores\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import moody

    yield moody
    sys.modules.pop("moody")


MOODY = {
    "reward": {"mine": {"type": "function", "function": "moody:reward"}},
    "eval__samples_per_label": 0,  # an evaluation would ask the reward too
    "log__checkpoint_every": 1,
    "log__keep_last": 9,
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_rollout_whose_reward_is_not_finite_is_left_out(make_config, moody_reward, capsys, value):
    moody_reward.bad, moody_reward.value = [2], value
    config = make_config(run__steps=4, **MOODY)
    assert train(config) == 0
    lines = metrics(config.run.dir)
    assert [line["skipped_rollouts"] for line in lines] == [0, 1, 0, 0]
    assert lines[1].pop("spent_flop") > lines[0]["spent_flop"]  # it was sampled, and not learned from
    assert lines[1] == {"step": 2, "skipped_rollouts": 1, "spent_images": 2 * config.rollout.images}
    assert f"step 2 is left out: reward mine returned {value} for image 1" in capsys.readouterr().out
    # The second step changed nothing, so there is nothing to hold of it.
    assert names(config) == ["step_000001", "step_000003", "step_000004"]


def test_rewards_that_are_not_finite_in_a_row_stop_the_run_and_lose_nothing(make_config, moody_reward, tmp_path):
    whole = make_config(run__steps=6, run__dir=str(tmp_path / "whole"), **MOODY)
    train(whole)
    moody_reward.calls[0], moody_reward.bad = 0, [3, 4, 5]
    config = make_config(run__steps=6, **MOODY)
    with pytest.raises(InputError, match="reward mine returned nan") as caught:
        train(config)
    assert "holds step 2; the same command goes on" in caught.value.__notes__[0]
    assert [line["step"] for line in metrics(config.run.dir)] == [1, 2, 3, 4]
    moody_reward.bad = []
    train(config)
    assert_same_run(whole.run.dir, config.run.dir)


def test_bad_rollouts_with_good_ones_between_do_not_stop_the_run(make_config, moody_reward):
    moody_reward.bad = [1, 2, 4, 5]
    config = make_config(run__steps=5, **MOODY)
    assert train(config) == 0
    assert sum(line["skipped_rollouts"] for line in metrics(config.run.dir)) == 4
    assert train(config) == 0  # complete, though its last rollout was left out
    assert len(metrics(config.run.dir)) == 5


def test_a_sum_of_rewards_that_is_not_finite_is_left_out(make_config, moody_reward):
    """3e38 is a number of float32, twice as much is not."""
    moody_reward.bad, moody_reward.value = list(range(1, 9)), 3e38
    twice = {name: {"type": "function", "function": "moody:reward"} for name in ("a", "b")}
    with pytest.raises(InputError, match=r"reward \(their weighted sum\) returned inf"):
        train(make_config(reward=twice, run__max_bad_rollouts=1, eval__samples_per_label=0))


@pytest.fixture
def loss_that_fails(monkeypatch):
    """The GRPO loss, with NaN in place of the numbers on the calls that the list names, counted from 1."""
    bad, calls, loss_of = [], [0], kernels.grpo_token_loss

    def grpo_token_loss(*args, **settings):
        calls[0] += 1
        loss, stats = loss_of(*args, **settings)
        return (loss * math.nan, stats * math.nan) if calls[0] in bad else (loss, stats)

    monkeypatch.setattr(kernels, "grpo_token_loss", grpo_token_loss)
    return bad


def test_a_loss_that_is_not_finite_costs_its_optimizer_step(make_config, loss_that_fails):
    loss_that_fails += [3]  # two minibatches a step
    config = make_config()
    assert train(config) == 0
    lines = metrics(config.run.dir)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 0]
    assert lines[0].keys() == lines[1].keys()
    assert lines[1]["ratio_gap_max"] < 1e-4
    assert all(
        tensor.isfinite().all() for name, tensor in weights(config.run.dir).items() if "bias_for_mask" not in name
    )


def test_losses_that_are_not_finite_in_a_row_stop_the_run_with_a_diagnosis(make_config, loss_that_fails, tmp_path):
    few = {"run__steps": 5, "log__checkpoint_every": 1, "update__max_skipped_steps": 2}
    whole = make_config(run__dir=str(tmp_path / "whole"), **few)
    train(whole)
    loss_that_fails += range(10 + 3, 10 + 99)  # after 10 calls of the first run, from its second step on
    config = make_config(**few)
    with pytest.raises(InputError, match="2 gradients in a row were not finite.* goes on from the last checkpoint"):
        train(config)
    loss_that_fails.clear()
    train(config)
    assert_same_run(whole.run.dir, config.run.dir)


EAGER = {"rollout__cuda_graph": False}


@pytest.mark.parametrize(
    ("where", "settings", "advice"),
    [
        ("rollout", {"rollout__micro_batch": 4}, "use rollout.micro_batch=2, now 4"),
        ("rollout", {}, "use rollout.micro_batch=4, now 8"),
        ("rollout", {"rollout__micro_batch": 1}, "nothing smaller can be set there: try run.dtype=bfloat16"),
        ("update", {}, "use rollout.cuda_graph=false, now true (its graph holds"),
        ("update", EAGER | {"update__checkpointing": "none"}, "use update.checkpointing=attention, now none with"),
        ("update", EAGER | {"update__checkpointing": "full"}, "use update.micro_batch=2, now 4"),
        (
            "update",
            EAGER | {"update__checkpointing": "full", "update__micro_batch": 1},
            "nothing smaller can be set there: try run.dtype=bfloat16, update.optimizer=adamw8bit (moments of 0.00",
        ),
    ],
)
def test_memory_that_runs_out_names_the_setting_to_lower(make_config, monkeypatch, where, settings, advice):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    monkeypatch.setattr(Policy, "sample_images" if where == "rollout" else "teacher_forced", fail)
    with pytest.raises(InputError, match=f"out of memory in the {where}: CUDA out of memory. Tried to") as caught:
        train(make_config(eval__samples_per_label=0, **settings))
    assert f"\n  {advice}" in str(caught.value)
