"""Real processes, over gloo: what several of them compute is what one computes, up to the order of sums."""

import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import varfast.evaluate
from varfast import InputError
from varfast.config import load_config
from varfast.distributed import Launch, World, _shard, joined, launched, local_device
from varfast.perf.memory import RolloutPlan, held_states
from varfast.perf.plan import plan_memory
from varfast.perf.work import Work
from varfast.policies.var.build import cost_of
from varfast.runs.folder import RunFolder
from varfast.runs.manifest import dump_config
from varfast.train import train

from .runs import metrics

DIGITS = Path(__file__).parent.parent / "configs" / "digits.yaml"
# A process that trains every config of the file it is given, one after the other, each at a port of its own.
TRAIN_ALL = """
import json, os, sys
from varfast.config import parse_config
from varfast.train import train
for port, data in json.load(open(sys.argv[1])):
    os.environ["MASTER_PORT"] = str(port)
    assert train(parse_config(data)) == 0
"""


def processes(count, *command, **environment):
    """The command as so many processes that torchrun would start, without torchrun's own second of work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_all = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "OMP_NUM_THREADS": 1} | environment  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {k: str(v) for k, v in (of_all | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def ends(started, timeout_s=120):
    """Exit codes and output of processes; those that have not ended by then are killed."""
    deadline, outputs = time.monotonic() + timeout_s, []
    for process in started:
        try:
            outputs.append(process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends the processes that it started
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=40)
            process.kill()
            outputs.append("KILLED\n" + process.communicate()[0])
    return [process.returncode for process in started], outputs


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def weights(folder):
    (path,) = Path(folder).glob("*.pth")  # var.pth, for VAR
    state = torch.load(path, weights_only=True)
    return torch.cat([t.flatten() for name, t in state.items() if name != "attn_bias_for_masking"])


# Name -> settings beside those of make_config. Each is run by one process and by several.
CASES = {
    # 20 steps in which the brightness counts.
    "raw": {"run__steps": 20, "update__lr": 1e-3},
    # 6 images on 4 processes, in two epochs of one minibatch: shares of 2, 2, 1, 1 that differ between the epochs.
    "uneven": {"rollout__labels_per_step": 3, "rollout__group_size": 2, "update__minibatch": 6, "update__epochs": 2},
    # One image in eight or none at all has a gradient: most processes, and at times all, have nothing to add.
    "no_signal": {
        "grpo__kl_beta": 0.0, "update__minibatch": 2, "update__lr": 1e-3, "run__steps": 6,
        "reward": {"luma": {"type": "brightness", "mode": "bright", "threshold": 0.56}},
    },
    # Two passes for a gradient, the second without an image in process 1; blocks computed again in the backward pass;
    # projections shared by the blocks.
    "passes": {
        "rollout__labels_per_step": 3, "rollout__group_size": 2,
        "update__minibatch": 3, "update__micro_batch": 1, "update__checkpointing": "full",
        "policy__var": {"depth": 2, "patch_nums": [1, 2], "vocab_size": 16, "code_width": 4, "num_classes": 5,
                        "shared_adaln": True},
    },
    # The same in 16 bits, attention alone computed again.
    "bfloat16": {"run__dtype": "bfloat16", "update__checkpointing": "attention"},
    # Both halves of guidance, in shares of two minibatches.
    "guided": {"rollout__cfg": 1.5, "update__lr": 1e-3},
    # A next-token model.
    "llamagen": {
        "update__lr": 1e-3,
        "policy": {
            "family": "llamagen", "checkpoint": "random",
            "gpt": {"depth": 2, "width": 32, "num_heads": 2, "vocab_size": 16, "num_classes": 5, "side": 3},
            "vq": {"base_channels": 32, "channel_multipliers": [1], "num_res_blocks": 1},
        },
    },
    # A next-token model of texts of unequal length, and both halves of guidance.
    "janus": {
        "update__lr": 1e-3, "rollout__cfg": 3.0, "prompts": {"source": str(Path(__file__).parent / "data/prompts.txt")},
        "policy": {
            "family": "janus", "checkpoint": "random", "max_prompt_tokens": 40,
            "transformer": {"depth": 2, "width": 32, "num_heads": 2, "mlp_width": 64, "vocab_size": 16,
                            "text_vocab_size": 260, "code_width": 4, "side": 3},
            "vq": {"base_channels": 32, "channel_multipliers": [1], "num_res_blocks": 1},
        },
    },
    # Not one log-probability of the update differs from the rollout's.
    "strict": {"run__strict": True, "run__dtype": "bfloat16"},
    # var.pth is the average; the KL of the third step is to the policy after two.
    "average": {"update__ema_decay": 0.8, "update__lr": 1e-3, "grpo__reference_every": 2, "eval__every": 2},
    # All that moves a loss beside its defaults: numbers of the whole step, and an average as reference.
    "loss": {
        "grpo": {"ratio": "sequence", "kl_gradient": "unbiased", "reference_ema": 0.5, "normalise_std": False,
                 "scale_alpha": 0.7, "entropy": {"coef": 0.1, "target": 0.5, "clamp": [0.0, 1.0]}},
        "update__lr": 1e-3, "update__epochs": 2,
    },
    # Three pairs or fewer for two processes, of samples of a reference that moves.
    "dpo": {
        "dpo": {"samples": "reference", "reference_every": 2, "min_margin": 0.03}, "update__lr": 1e-3,
        "rollout__labels_per_step": 3, "update__minibatch": 6, "update__micro_batch": 2, "update__epochs": 2,
    },
    # Each image is scored among those of all processes, with moments that began with the base's.
    "loo_fid": {
        "policy__var": {"depth": 1, "patch_nums": [1, 8], "vocab_size": 16, "code_width": 4, "num_classes": 5},
        "reward": {name: {"type": "loo_fid", "features": "digits", "reference": "digits", "covariance": name,
                          "ema": 0.9, "begin_images": 101} for name in ("diagonal", "full")},
    },
    # Moments of 8 bits: the order of a sum tips one in 1e5 or so to the next of 256 steps.
    "adamw8bit": {"update__optimizer": "adamw8bit", "update__lr": 1e-3},
}  # fmt: skip


# An adapter beside frozen weights.
LORA = {"policy__lora": {"targets": ["mat_qkv", "proj", "fc1", "fc2", "ada_lin"]}, "update__lr": 1e-2}
CASES["adapter"] = CASES["passes"] | LORA
WAYS = {"adamw8bit": ["ddp"], "adapter": ["ddp"], "loo_fid": ["ddp"]}  # the others: ddp and fsdp


def ways(case):
    return WAYS.get(case, ["ddp", "fsdp"])


def run_all(make_config, folder, count, cases):
    """Train the cases in one process each, and in `count` processes in all their ways; the folder of each run."""
    configs = {}
    for name in cases:
        alone = make_config(**CASES[name], run__dir=str(folder / name))
        if not Path(alone.run.dir).exists():
            train(alone)
        for way in ways(name):
            configs[name, way] = make_config(
                **CASES[name], run__dir=str(folder / f"{name}.{way}.{count}"), run__parallel=way
            )
    train_on(count, configs.values(), folder)
    return configs


def train_on(count, configs, folder):
    """Train the configs, one after the other, in `count` processes."""
    work = [(port, json.loads(config.model_dump_json(exclude_none=True)))
            for port, config in zip(free_ports(len(configs)), configs, strict=True)]  # fmt: skip
    (folder / "work.json").write_text(json.dumps(work))
    codes, outputs = ends(processes(count, "-c", TRAIN_ALL, str(folder / "work.json")))
    assert codes == [0] * count, "\n".join(outputs)


def assert_equal_runs(alone, spread, lr):
    assert_equal_metrics(alone, spread)
    after = [json.loads((Path(d) / "summary.json").read_text())["after"] for d in (alone, spread)]
    assert after[1] == pytest.approx(after[0], rel=1e-3)
    assert_equal_weights(alone, spread, lr)


def assert_equal_metrics(alone, spread, steps=None):
    both = zip(metrics(alone), metrics(spread), strict=True)
    for one, several in itertools.islice(both, steps):
        assert one.keys() == several.keys()
        for name, value in one.items():
            assert several[name] == pytest.approx(value, rel=1e-3, abs=2e-5), (name, one["step"])


def assert_equal_weights(alone, spread, lr):
    apart = (weights(alone) - weights(spread)).abs()
    # Adam's step has the size of lr even where a gradient is all rounding.
    assert float(apart.max()) < lr
    assert float(apart.mean()) < 1e-3 * lr


def tokens_agree(alone, spread):
    """Steps before the first in which entropy or KL differ by more than rounding, which is below 1e-6 of them.

    One token of the last scale changes the KL alone, by 1e-4 of it.
    """
    pairs = zip(metrics(alone), metrics(spread), strict=True)
    agree = [all(math.isclose(a[k], b[k], rel_tol=1e-5, abs_tol=1e-9) for k in ("entropy", "kl")) for a, b in pairs]
    return (*agree, False).index(False)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """All cases, once, by one process and by two."""
    return {"folder": tmp_path_factory.mktemp("runs"), "done": None}


@pytest.mark.parametrize(("case", "way"), [(case, way) for case in CASES for way in ways(case)])
def test_two_processes_train_as_one(make_config, on_two, case, way):
    folder = on_two["folder"]
    if on_two["done"] is None:
        on_two["done"] = run_all(make_config, folder, 2, list(CASES))
    config = on_two["done"][case, way]
    lr = config.update.lr
    assert_equal_runs(folder / case, config.run.dir, lr * (10 if config.run.dtype == "bfloat16" else 1))
    if case == "strict":
        assert [step["ratio_gap_max"] for step in metrics(config.run.dir)] == [0.0] * config.run.steps


@pytest.mark.slow
def test_four_processes_train_as_one(make_config, tmp_path):
    configs = run_all(make_config, tmp_path, 4, ["uneven", "no_signal", "passes", "loo_fid"])
    for (case, _), config in configs.items():
        assert_equal_runs(tmp_path / case, config.run.dir, config.update.lr)


@pytest.mark.slow
def test_the_digits_run_is_the_same_on_one_two_and_four_processes(tmp_path, digits_cache):
    """20 steps, of 32 images to keep it short.

    Rounding stays at 1e-6 as long as the same tokens are drawn: they are discrete, and rounding may tip one of the
    19,200 that stands on an edge (seen once in 8 runs, in step 14). What follows is another run, so the curves are
    compared up to there, and the weights where none tipped.
    """
    settings = ["run.device=cpu", "run.dtype=float32", f"pretrain.cache_dir={digits_cache}", "run.steps=20",
                "rollout.labels_per_step=4", "rollout.group_size=8", "update.minibatch=16", "eval.samples_per_label=0",
                "log.tensorboard=false", "log.checkpoint_every=20", "log.grid_labels=1"]  # fmt: skip

    def config(*more):
        return load_config(DIGITS, [*settings, *more])

    train(config(f"run.dir={tmp_path}/alone"))
    rewards = [line["reward_mean"] for line in metrics(tmp_path / "alone")]
    assert max(rewards) > rewards[0] + 0.2
    for count in (2, 4):
        spread = [config(f"run.dir={tmp_path}/{way}.{count}", f"run.parallel={way}") for way in ("ddp", "fsdp")]
        train_on(count, spread, tmp_path)
        for each in spread:
            same = tokens_agree(tmp_path / "alone", each.run.dir)
            assert same >= 8
            assert_equal_metrics(tmp_path / "alone", each.run.dir, same)
            if same == 20:
                assert_equal_weights(tmp_path / "alone", each.run.dir, each.update.lr)


def test_processes_killed_in_the_middle_of_a_save_go_on_as_many_or_as_one(make_config, tmp_path):
    few = {"run__steps": 20, "log__checkpoint_every": 5, "eval__samples_per_label": 0, "run__parallel": "fsdp"}
    whole, killed, alone = (make_config(run__dir=str(tmp_path / name), **few) for name in ("whole", "killed", "alone"))
    train_on(2, [whole], tmp_path)
    reached = tmp_path / "reached"
    dying = f"""
import sys, time
from pathlib import Path
from varfast.runs import checkpoint
from varfast.train import main
sha256 = checkpoint._sha256
def slow(path):
    if path.parent.name == "step_000010.part":  # the tensors of both are written, the manifest is not
        Path({str(reached)!r}).touch()
        time.sleep(600)
    return sha256(path)
checkpoint._sha256 = slow
main(sys.argv[1:])
"""
    (tmp_path / "config.yaml").write_text(dump_config(killed))
    started = processes(2, "-c", dying, str(tmp_path / "config.yaml"))
    deadline = time.monotonic() + 120
    while not reached.exists() and time.monotonic() < deadline and all(p.poll() is None for p in started):
        time.sleep(0.02)
    for process in started:
        process.kill()
    codes, outputs = ends(started)
    assert reached.exists(), "\n".join(outputs)
    assert codes == [-signal.SIGKILL] * 2
    assert {f.name for f in (tmp_path / "killed" / "checkpoints").iterdir()} == {"step_000005", "step_000010.part"}
    shutil.copytree(killed.run.dir, alone.run.dir)
    train_on(2, [killed], tmp_path)
    assert metrics(killed.run.dir) == metrics(whole.run.dir)
    assert torch.equal(weights(killed.run.dir), weights(whole.run.dir))
    train(alone)
    assert metrics(alone.run.dir)[:5] == metrics(whole.run.dir)[:5]
    assert_equal_runs(whole.run.dir, alone.run.dir, whole.update.lr)


def torchrun(config, tmp_path, *options, count=2, start_new_session=False, **environment):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [*command, *options, "-m", "varfast.train", str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=start_new_session,
    )


def test_torchrun_goes_on_with_what_one_process_began_and_back(make_config, tmp_path):
    both = {"update__ema_decay": 0.8, "grpo__reference_every": 2}
    whole = make_config(run__dir=str(tmp_path / "whole"), run__steps=5, **both)
    train(whole)
    parts = {"run__dir": str(tmp_path / "parts"), **both}
    train(make_config(run__steps=1, **parts))
    (code,), (out,) = ends([torchrun(make_config(run__steps=3, run__parallel="fsdp", **parts), tmp_path)])
    assert code == 0, out
    assert out.count("run complete: 3 steps") == 1
    train(make_config(run__steps=5, **parts))
    assert_equal_runs(whole.run.dir, parts["run__dir"], whole.update.lr)


def test_an_error_in_one_process_ends_all_of_them_soon(make_config, tmp_path):
    (tmp_path / "failing.py").write_text(
        "import os, torch\ncalls = [0]\n"
        "def reward(images, labels):\n"
        "    calls[0] += 1\n"
        "    if os.environ['RANK'] == '1' and calls[0] == 3: raise KeyError('what I look for')\n"
        "    return images.mean(dim=(1, 2, 3))\n"
        "def crash(images, labels):\n"
        "    if os.environ['RANK'] == '1': os._exit(7)\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])

    def config(function):
        return make_config(run__dir=str(tmp_path / function), run__steps=9, eval__samples_per_label=0,
                           reward={"mine": {"type": "function", "function": f"failing:{function}"}})  # fmt: skip

    path = tmp_path / "reward.yaml"
    path.write_text(dump_config(config("reward")))
    codes, outputs = ends(processes(2, "-m", "varfast.train", str(path), PYTHONPATH=paths))
    assert codes == [2, 1]
    assert "what I look for" in outputs[1]
    assert "holds step 2; the same command goes on" in outputs[1]
    assert "error: the reward failed in another process, which says why\n  nothing is lost: " in outputs[0]
    assert metrics(tmp_path / "reward")[-1]["step"] == 2
    (code,), (out,) = ends([torchrun(config("crash"), tmp_path, PYTHONPATH=paths)], timeout_s=60)
    assert code == 1, out  # not killed here
    assert "exitcode  : 7" in out


# Errors in process 0 alone, and in both alike: what each process has, and which of them would print it.
FAIL_TOGETHER = """
import os, sys
import torch
from varfast.command import _tells
from varfast.distributed import alike, decided_by_first, joined
from varfast.types import InputError

def fail(text):
    raise InputError(text)

def leads():
    with world.leader_first():
        fail("in order")

def both():
    with alike():
        fail("alike")

with joined(torch.device("cpu"), 60.0) as world:
    for case in (lambda: decided_by_first(lambda: fail("decided")), leads, both, lambda: fail("own")):
        try:
            case()
        except InputError as error:
            print(error, _tells(error))
"""


def test_one_of_two_processes_says_what_is_wrong_in_both():
    codes, outputs = ends(processes(2, "-c", FAIL_TOGETHER))
    assert codes == [0, 0], outputs
    assert outputs[0].splitlines() == ["decided True", "in order True", "alike True", "own True"]
    assert outputs[1].splitlines() == ["decided False", "in order False", "alike False", "own True"]


def test_one_of_two_processes_says_what_is_wrong_with_a_config(make_config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(make_config()))
    codes, outputs = ends(processes(2, "-m", "varfast.train", str(path), "update.lrr=1"))
    assert codes == [2, 2], outputs
    assert "did you mean update.lr?" in outputs[0]
    assert outputs[1] == ""


def test_torchrun_restarts_a_job_whose_rank_was_killed_and_it_goes_on(make_config, tmp_path):
    (tmp_path / "mortal.py").write_text(
        "import os, signal\ncalls = [0]\n"
        "def reward(images, labels):\n"
        "    calls[0] += 1\n"
        "    first = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0'\n"
        "    if os.environ.get('MORTAL') and os.environ['RANK'] == '1' and first and calls[0] == 6:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    few = {"run__steps": 8, "eval__samples_per_label": 0,
           "reward": {"mine": {"type": "function", "function": "mortal:reward"}}}  # fmt: skip
    runs = {}
    for name, mortal in (("whole", ""), ("mortal", "1")):
        runs[name] = config = make_config(run__dir=str(tmp_path / name), **few)
        started = torchrun(config, tmp_path, "--max-restarts", "1", PYTHONPATH=paths, MORTAL=mortal)
        (code,), (out,) = ends([started], timeout_s=90)
        assert code == 0, out
        assert ("going on after step 4" in out) == bool(mortal)
    assert metrics(runs["mortal"].run.dir) == metrics(runs["whole"].run.dir)
    assert torch.equal(weights(runs["mortal"].run.dir), weights(runs["whole"].run.dir))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_processes_of_torchrun_saves(make_config, tmp_path, number):
    """As the terminal sends it, to torchrun too, which sends it on: each process gets it twice."""
    config = make_config(run__steps=100_000, log__checkpoint_every=100_000, eval__samples_per_label=0)
    started = torchrun(config, tmp_path, start_new_session=True)
    deadline = time.monotonic() + 90
    while not (Path(config.run.dir) / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(started.pid, number)
    _, (out,) = ends([started], timeout_s=60)
    step = metrics(config.run.dir)[-1]["step"]
    assert RunFolder(config.run.dir).newest().step == step >= 1, out
    assert f"holds step {step} of 100000. The same command goes on." in out


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 6, 8])
def test_shares_are_consecutive_whole_and_even(size, count):
    shares = [_shard(rank, size, count) for rank in range(size)]
    assert [i for s in shares for i in range(count)[s]] == list(range(count))
    sizes = [len(range(count)[s]) for s in shares]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == math.ceil(count / size)


def test_a_world_of_one_process_changes_nothing():
    world, x = World(), torch.arange(3.0)
    assert world.is_main
    assert world.gather(x, 3) is x
    assert torch.equal(world.sum(x.clone()), x)
    assert world.largest(-2.5) == -2.5
    assert world.any(True)
    assert not world.any(False)
    with world.leader_first():
        pass


def test_local_device_is_one_gpu_a_process(monkeypatch):
    assert local_device("cuda:1") == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="LOCAL_RANK is not set, .* start it with torchrun"):
        local_device("auto")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert local_device("auto") == local_device("cuda") == "cuda:2"
    assert local_device("cpu") == "cpu"
    with pytest.raises(InputError, match="names one GPU for all processes"):
        local_device("cuda:1")


NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS",
         "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Set these variables and none of the others that say how a process was started."""

    def set_to(**variables):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4, but RANK is not set.*torchrun --nproc-per-node 4"),
        ({"WORLD_SIZE": "4", "RANK": ""}, "WORLD_SIZE=4, but RANK is not set"),
        ({"RANK": "1"}, "RANK=1, but WORLD_SIZE is not set.*torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2, but WORLD_SIZE=2: want RANK < WORLD_SIZE"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE=two: want a number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK=-1: want a number"),
        ({"WORLD_SIZE": "²", "RANK": "0"}, "WORLD_SIZE=²: want a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: want the number of processes"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM_NTASKS=2: srun starts tasks.*torchrun"),
        ({"WORLD_SIZE": "1", "SLURM_NTASKS": "2"}, "SLURM_NTASKS=2: srun starts tasks"),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "OMPI_COMM_WORLD_SIZE=8: mpirun starts tasks.*torchrun"),
        ({"PMI_SIZE": "8"}, "PMI_SIZE=8: mpiexec starts tasks.*torchrun"),
    ],
)
def test_processes_that_nobody_brings_together_are_refused_in_one_line(environment, make_config, variables, message):
    environment(**variables)
    with pytest.raises(InputError, match=message) as caught:
        train(make_config())
    assert "\n" not in str(caught.value)
    assert not Path(make_config().run.dir).exists()
    with pytest.raises(InputError, match=message):
        varfast.evaluate.main(["checkpoint=nowhere", "vqvae=nowhere"])


@pytest.mark.parametrize(
    ("variables", "process"),
    [
        ({}, Launch()),
        ({"WORLD_SIZE": "", "RANK": " "}, Launch()),
        ({"WORLD_SIZE": "1"}, Launch()),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "SLURM_NTASKS": "2"}, Launch(0, 1, 0)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Launch(3, 4, 1, 2)),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, Launch()),  # srun --ntasks=1 within an allocation of 4
        ({"SLURM_NTASKS": "1"}, Launch()),
    ],
)
def test_launched_reads_what_torchrun_sets(environment, variables, process):
    environment(**variables)
    assert launched() == process


def test_processes_that_do_not_meet_say_where(environment, monkeypatch):
    environment(WORLD_SIZE="2", RANK="1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="MASTER_ADDR=.*Start them with torchrun"), joined(torch.device("cpu"), 1.0):
        pass
    (port,) = free_ports(1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(InputError, match=f"MASTER_PORT={port}"), joined(torch.device("cpu"), 1.0):
        pass
    environment(WORLD_SIZE="2", RANK="0")
    with (
        pytest.raises(InputError, match="1/2 clients joined. Start them with torchrun"),
        joined(torch.device("cpu"), 1.0),
    ):
        pass


@pytest.mark.parametrize("optimizer", ["apex", "adamw8bit"])
def test_sharded_weights_go_with_adamw_alone(make_config, optimizer):
    with pytest.raises(InputError, match=f"{optimizer} does not take sharded weights; use adamw"):
        make_config(run__parallel="fsdp", update__optimizer=optimizer)


def test_plan_of_a_share_fits_the_share(make_config):
    config = make_config(rollout__labels_per_step=6, rollout__micro_batch=8, update__minibatch=12,
                         update__micro_batch=6, run__parallel="fsdp")  # fmt: skip
    whole = Work.whole(config, cost_of(config.policy, "float32"))
    part = whole.share(6, 4)
    assert (part.images, part.minibatch, part.shards) == (6, 3, 4)
    plan = plan_memory(part, None)
    assert (plan.rollout, plan.update.micro_batch) == (RolloutPlan(6, True), 3)
    small = make_config()
    share = Work.whole(small, cost_of(small.policy, "float32")).share(4, 2)
    assert (share.minibatch, share.shards, plan_memory(share, None).update.micro_batch) == (2, 1, 2)
    alone, sharded = held_states(whole), held_states(part)
    for name in ("weights", "gradients", "moments"):
        assert getattr(sharded, name) == getattr(alone, name) // 4
    assert sharded.compute_copy == alone.weights  # float32: the whole of it
    assert sharded.reference == alone.reference
