import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import varfast.env
import varfast.export
import varfast.sample
from varfast import InputError, kernels, load_policy
from varfast.config import load_config
from varfast.data.labels import Label, labels_json
from varfast.distributed import ALONE
from varfast.learner import Learner
from varfast.perf.allocator import expand_segments
from varfast.perf.profile import memory_metrics, without_noise
from varfast.perf.work import Work
from varfast.policies.var.build import cost_of
from varfast.runs.base import Base
from varfast.runs.checkpoint import Checkpoints
from varfast.runs.environment import environment
from varfast.runs.folder import RunFolder
from varfast.runs.load import load_run, random_policy
from varfast.runs.manifest import dump_config
from varfast.runs.setup import fitting_plan
from varfast.train import main, train

STAGES = ("rollout", "decode", "reward", "reference", "update", "optimizer")
TIMES = (
    "step_s",
    "images_per_s",
    "mfu",
    "spent_hours",
    *(f"{stage}_{what}" for stage in STAGES for what in ("ms", "share")),
)


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def metrics(folder):
    """Without times, and without drift/..., of steps that have a grid: there is one wherever a run ends."""
    return [{k: v for k, v in line.items() if k not in TIMES and not k.startswith("drift/")} for line in lines(folder)]


def weights(folder):
    return torch.load(Path(folder) / "var.pth", weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_train_writes_a_whole_run_folder(make_config, capsys):
    config = make_config(log__tensorboard=True)
    assert train(config) == 0
    folder = Path(config.run.dir)
    names = {p.name for p in folder.iterdir()}
    assert names >= {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "var.pth", "summary.json"}
    assert {p.name for p in (folder / "grids").iterdir()} == {"step_000000.png", "step_000003.png"}
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0].keys() >= {"reward_mean", "reward_std", "reward/luma", "advantage_mean", "advantage_std", "kl",
                               "clip_fraction", "entropy", "ratio_gap_mean", "ratio_gap_max", "grad_norm",
                               "groups_without_signal", "learning_rate", "loss"}  # fmt: skip
    assert all(line["ratio_gap_max"] < 1e-4 for line in lines)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"].keys() == summary["after"].keys() == {"reward", "reward/luma", "entropy"}
    out = capsys.readouterr().out
    assert "before     after" in out
    assert out.endswith(
        f"run complete: 3 steps. Weights {folder / 'var.pth'}, curves and grids in {folder}\n"
        f"next: python -m varfast.report {folder}\n"
        f"      python -m varfast.sample {folder}\n"
        f"      python -m varfast.export {folder} out=model.safetensors\n"
    )


def test_deterministic_runs_agree_in_every_bit_whatever_memory_is_free(make_config, tmp_path, monkeypatch):
    def trained(name, free_bytes, wanted):
        monkeypatch.setattr("varfast.runs.setup.available_bytes", lambda device: free_bytes)
        config = make_config(run__dir=str(tmp_path / name), run__deterministic=wanted)
        assert train(config) == 0
        return config.run.dir

    first, second = trained("little", 0, True), trained("much", 2**40, True)
    assert metrics(first) == metrics(second)
    assert equal(weights(first), weights(second))
    little, much = trained("free_little", 0, False), trained("free_much", 2**40, False)
    assert not equal(weights(little), weights(much))  # other micro-batches: sums of another order
    torch.use_deterministic_algorithms(True)  # as the user may, which fills empty memory with NaN
    try:
        assert equal(weights(trained("filled", 2**40, False)), weights(much))
    finally:
        torch.use_deterministic_algorithms(False)


def test_train_twice_gives_the_same_numbers(make_config, tmp_path):
    first, second = make_config(), make_config(run__dir=str(tmp_path / "second"))
    train(first)
    train(second)
    assert metrics(first.run.dir) == metrics(second.run.dir)
    assert equal(weights(first.run.dir), weights(second.run.dir))


def test_resumed_run_equals_the_uninterrupted_one(make_config, tmp_path):
    whole = make_config(run__steps=5)
    train(whole)
    parts = {"run__dir": str(tmp_path / "parts")}
    train(make_config(run__steps=2, **parts))
    train(make_config(run__steps=5, **parts))
    assert metrics(whole.run.dir) == metrics(parts["run__dir"])
    assert equal(weights(whole.run.dir), weights(parts["run__dir"]))
    before = [json.loads((Path(d) / "summary.json").read_text())["before"] for d in (whole.run.dir, parts["run__dir"])]
    assert before[0] == before[1]


def held(folder):
    """All tensors of the newest checkpoint, by name."""
    files = sorted(RunFolder(folder).newest().path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_resume_keeps_average_and_reference_bit_for_bit(make_config, tmp_path):
    """Stopped after 3 steps, between the refreshed references of steps 2 and 4; the policy of step 2 is gone then."""
    both = {"update__ema_decay": 0.9, "grpo__reference_every": 2, "update__lr": 1e-3}
    whole, parts = {"run__dir": str(tmp_path / "whole"), **both}, {"run__dir": str(tmp_path / "parts"), **both}
    train(make_config(run__steps=5, **whole))
    train(make_config(run__steps=3, **parts))
    train(make_config(run__steps=5, **parts))
    a, b = (metrics(folder["run__dir"]) for folder in (whole, parts))
    assert a == b
    assert [line["reference_step"] for line in a] == [0, 0, 2, 2, 4]
    a, b = (held(folder["run__dir"]) for folder in (whole, parts))
    assert equal(a, b)
    names = [name for name, _ in random_policy(make_config(**whole), torch.device("cpu")).var.named_parameters()]
    for kind in ("ema", "reference"):
        assert {n for n in a if n.startswith(f"{kind}.")} == {f"{kind}.{n}" for n in names}
    assert equal(weights(whole["run__dir"]), weights(parts["run__dir"]))


def test_a_run_with_an_average_delivers_it_and_goes_on_with_its_own_weights(make_config, tmp_path):
    config = make_config(update__ema_decay=0.9, update__lr=1e-2)
    train(config)
    plain = make_config(run__dir=str(tmp_path / "plain"), update__lr=1e-2)
    train(plain)
    assert metrics(config.run.dir) == metrics(plain.run.dir)  # the average touches nothing that is trained or sampled
    saved, delivered = held(config.run.dir), weights(config.run.dir)
    averaged = {n.removeprefix("ema."): t for n, t in saved.items() if n.startswith("ema.")}
    assert averaged
    for name, average in averaged.items():
        assert torch.equal(delivered[name], average)
        assert torch.equal(saved[f"model.{name}"], weights(plain.run.dir)[name])
    assert not torch.equal(delivered["head.weight"], saved["model.head.weight"])
    loaded = load_run(RunFolder(config.run.dir), torch.device("cpu"), "float32").var.state_dict()
    assert equal(loaded, delivered)
    varfast.export.main([f"checkpoint={config.run.dir}", f"out={tmp_path / 'model.pth'}"])
    assert equal(torch.load(tmp_path / "model.pth", weights_only=True), delivered)
    assert "averaged over optimizer steps, decay 0.9" in (tmp_path / "model.md").read_text()
    after = [json.loads((Path(c.run.dir) / "summary.json").read_text())["after"] for c in (config, plain)]
    assert after[0] != after[1]
    assert not any(n.startswith(("ema.", "reference.")) for n in held(plain.run.dir))


@pytest.mark.parametrize(("every", "references"), [(1, [0, 1, 2, 3, 4]), (2, [0, 0, 2, 2, 4])])
def test_reported_kl_is_to_the_policy_of_the_last_refresh(make_config, monkeypatch, every, references):
    """One optimizer step a rollout: the KL of a step is between two sets of weights; in float64, written out."""
    policies, rollouts = [], []

    def record(self, scored, step, *rest, step_of=Learner.step):
        policies.append(copy.deepcopy(self.state.policy.trainable).double())
        policies[-1].compute_dtype = torch.float64
        rollouts.append(scored.rollout)
        return step_of(self, scored, step, *rest)

    monkeypatch.setattr(Learner, "step", record)
    config = make_config(run__steps=5, update__minibatch=8, update__lr=1e-2, grpo__reference_every=every)
    train(config)
    vqvae = random_policy(config, torch.device("cpu")).vqvae

    @torch.no_grad()
    def logp(model, rollout):
        logits = model(rollout.labels_B, vqvae.var_input(rollout.tokens_BL).double())
        return (logits / 0.7).log_softmax(-1).gather(-1, rollout.tokens_BL[..., None])[..., 0]

    for step, line in enumerate(metrics(config.run.dir)):
        assert line["reference_step"] == references[step]
        q = logp(policies[references[step]], rollouts[step]) - logp(policies[step], rollouts[step])
        expected = float((q.exp() - q - 1).mean())
        assert (expected == 0.0) == (references[step] == step)
        assert expected == 0.0 or expected > 1e-5
        assert line["kl"] == pytest.approx(expected, rel=1e-3, abs=1e-11)


def test_kl_is_to_the_average_of_the_policies_of_before(make_config, monkeypatch):
    """grpo.reference_ema: the average after each step, and the KL to it in the next, in float64 written out."""
    policies, rollouts = [], []

    def record(self, scored, step, *rest, step_of=Learner.step):
        policies.append(copy.deepcopy(self.state.policy.trainable).double())
        policies[-1].compute_dtype = torch.float64
        rollouts.append(scored.rollout)
        return step_of(self, scored, step, *rest)

    monkeypatch.setattr(Learner, "step", record)
    config = make_config(run__steps=4, update__minibatch=8, update__lr=1e-2, grpo__reference_ema=0.75)
    train(config)
    vqvae = random_policy(config, torch.device("cpu")).vqvae

    @torch.no_grad()
    def logp(model, rollout):
        logits = model(rollout.labels_B, vqvae.var_input(rollout.tokens_BL).double())
        return (logits / 0.7).log_softmax(-1).gather(-1, rollout.tokens_BL[..., None])[..., 0]

    average = copy.deepcopy(policies[0])
    for step, line in enumerate(metrics(config.run.dir)):
        for own, new in zip(average.parameters(), policies[step].parameters(), strict=True):
            own.data.lerp_(new.data, 0.25)  # the policy after the step before; at first it is itself
        q = logp(average, rollouts[step]) - logp(policies[step], rollouts[step])
        assert line["kl"] == pytest.approx(float((q.exp() - q - 1).mean()), rel=1e-3, abs=1e-11)
        assert (line["kl"] > 1e-6) == (step > 0)
        assert "reference_step" not in line


def test_a_run_with_all_settings_of_the_loss_goes_on_bit_for_bit(make_config, tmp_path):
    grpo = {"reference_ema": 0.9, "ratio": "sequence", "kl_gradient": "unbiased", "scale_alpha": 0.7,
            "normalise_std": False, "entropy": {"target": 0.5}}  # fmt: skip
    whole, parts = ({"run__dir": str(tmp_path / name), "grpo": grpo, "update__lr": 1e-3} for name in ("whole", "parts"))
    train(make_config(run__steps=5, **whole))
    train(make_config(run__steps=3, **parts))
    assert {n.partition(".")[0] for n in held(parts["run__dir"])} == {"model", "optimizer", "reference_ema"}
    train(make_config(run__steps=5, **parts))
    a, b = (metrics(folder["run__dir"]) for folder in (whole, parts))
    # In runs of 3 and 5 steps the schedule of the entropy's weight, a share of run.steps, is 1 in each.
    assert {"entropy_coef", "entropy_norm"} <= a[0].keys()
    assert a == b
    assert equal(held(whole["run__dir"]), held(parts["run__dir"]))


def test_a_rollout_left_out_does_not_put_the_reference_off(make_config, failing_reward):
    """The reward of the third step is NaN: the fourth call, after the evaluation of the base and two steps."""
    config = make_config(run__steps=4, reward=failing_reward, grpo__reference_every=2, eval__samples_per_label=1,
                         update__minibatch=8)  # fmt: skip
    train(config)
    steps = metrics(config.run.dir)
    assert [line["skipped_rollouts"] for line in steps] == [0, 0, 1, 0]
    assert [line.get("reference_step") for line in steps] == [0, 0, None, 2]
    assert steps[1]["kl"] > 1e-6
    assert steps[3]["kl"] == pytest.approx(0.0, abs=1e-11)


@pytest.fixture
def lora_config(make_config, make_models, tmp_path):
    """A run that trains an adapter on a base from files; the base as a state_dict."""
    var, vqvae = make_models(patch_nums=(1, 2), vocab_size=16, code_width=4)
    torch.save(var.state_dict(), tmp_path / "base.pth")
    torch.save(vqvae.state_dict(), tmp_path / "vqvae.pth")

    def make(**overrides):
        paths = {"checkpoint": str(tmp_path / "base.pth"), "vqvae_checkpoint": str(tmp_path / "vqvae.pth")}
        lora = {"policy__lora": {"rank": 3, "alpha": 6.0, "targets": ["mat_qkv", "fc2", "ada_lin"]}}
        return make_config(**{f"policy__{k}": v for k, v in paths.items()}, **(lora | {"update__lr": 1e-2} | overrides))

    return make, var.state_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_an_adapter(lora_config, tmp_path, dtype):
    """Stopped and resumed as without a stop; small checkpoints; var.pth merged; the adapter as peft reads it."""
    make, base = lora_config
    whole, parts = make(run__steps=4, run__dtype=dtype), {"run__dir": str(tmp_path / "parts"), "run__dtype": dtype}
    train(whole)
    train(make(run__steps=2, **parts))
    train(make(run__steps=4, **parts))
    folder = Path(whole.run.dir)
    assert metrics(folder) == metrics(parts["run__dir"])
    assert equal(weights(folder), weights(parts["run__dir"]))
    assert metrics(folder)[-1]["kl"] > 1e-3
    assert all(line["ratio_gap_max"] < (1e-4 if dtype == "float32" else 0.1) for line in metrics(folder))

    saved = load_file(next((folder / "checkpoints" / "step_000004").glob("*.safetensors")))
    assert {n.partition(".lora_")[1] for n in saved if n.startswith("optimizer.")} == {".lora_"}
    buffers = {"model.lvl_1L", "model.attn_bias_for_masking", "model.blocks.0.attn.zero_k_bias"}
    assert {n for n in saved if n.startswith("model.") and ".lora_" not in n} == buffers

    adapter, merged = load_file(folder / "adapter" / "adapter_model.safetensors"), weights(folder)
    assert list(merged) == list(base)
    for name, tensor in base.items():
        up, down = (adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{k}.weight") for k in "BA")
        assert torch.equal(merged[name], tensor if up is None else tensor + 2.0 * (up @ down)), name
    assert len(adapter) == 6

    run = load_run(RunFolder(folder), torch.device("cpu"), "float32")
    by_peft = load_policy(*(str(tmp_path / name) for name in ("base.pth", "vqvae.pth")))
    unmoved = by_peft.token_logp([0, 1, 2], torch.arange(15).view(3, 5)).detach()
    peft.PeftModel.from_pretrained(by_peft.var, str(folder / "adapter"))
    public = load_policy(str(folder / "var.pth"), str(tmp_path / "vqvae.pth"))
    logp = [p.token_logp([0, 1, 2], torch.arange(15).view(3, 5)).detach() for p in (run, by_peft, public)]
    assert float((logp[0] - unmoved).abs().max()) > 0.05
    torch.testing.assert_close(logp[1], logp[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(logp[2], logp[0], rtol=0, atol=2e-5)

    assert varfast.export.main([f"checkpoint={folder}", f"out={tmp_path / 'out.pth'}"]) == 0
    assert equal(torch.load(tmp_path / "out.pth", weights_only=True), merged)
    assert "rank 3" in (tmp_path / "out.md").read_text()
    assert varfast.sample.main([f"checkpoint={folder}", f"out={tmp_path / 'grid.png'}", "device=cpu"]) == 0
    with pytest.raises(InputError, match=r"policy.lora.rank: 3 there, 4 here"):
        train(make(run__steps=4, run__dtype=dtype, policy__lora__rank=4))
    with pytest.raises(InputError, match=r"policy.lora.rank: 3 there, None here"):
        train(make(run__steps=4, run__dtype=dtype, policy__lora=None))


def test_an_adapter_is_averaged_and_then_merged(lora_config):
    """In 8 bits, and stopped in between."""
    make, base = lora_config
    settings = {"update__ema_decay": 0.5, "update__optimizer": "adamw8bit"}
    train(make(run__steps=2, **settings))
    config = make(run__steps=4, **settings)
    train(config)
    saved, merged = held(config.run.dir), weights(config.run.dir)
    averages = {name.removeprefix("ema."): tensor for name, tensor in saved.items() if name.startswith("ema.")}
    assert len(averages) == 6
    for name, tensor in base.items():
        of_one = [averages.get(f"{name.removesuffix('.weight')}.lora_{k}.default.weight") for k in "BA"]
        assert torch.equal(merged[name], tensor if of_one[0] is None else tensor + 2.0 * (of_one[0] @ of_one[1])), name
    assert not any(torch.equal(tensor, saved[f"model.{name}"]) for name, tensor in averages.items())
    run = load_run(RunFolder(config.run.dir), torch.device("cpu"), "float32").var
    assert all(torch.equal(parameter, averages[name]) for name, parameter in run.named_parameters() if name in averages)


def test_an_adapter_without_peft_is_refused_before_anything_is_made(lora_config, monkeypatch):
    config = lora_config[0]()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"policy.lora: the package peft cannot be imported"):
        train(config)
    assert not Path(config.run.dir).exists()


def test_a_run_killed_between_checkpoints_does_the_lost_steps_again(make_config, tmp_path, monkeypatch):
    whole = make_config(run__steps=5)
    train(whole)
    killed = make_config(run__steps=5, run__dir=str(tmp_path / "killed"))
    saves = []

    def save_once(self, step, *state, save=Checkpoints.save):
        if saves:
            raise KeyboardInterrupt
        saves.append(step)
        save(self, step, *state)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_once)
        with pytest.raises(KeyboardInterrupt):
            train(killed)  # after step 4; the checkpoint holds step 2
    assert saves == [2]
    assert len(metrics(killed.run.dir)) == 4
    train(killed)
    assert metrics(whole.run.dir) == metrics(killed.run.dir)
    assert equal(weights(whole.run.dir), weights(killed.run.dir))


TRITON_OPS = [
    "sample_tokens",
    "selective_log_softmax",
    "split_heads",
    "split_heads_to_cache",
    "block_causal_attention",
    "cached_attention",
    "layer_norm_modulate",
    "gated_residual",
    "gated_residual_norm",
    "adamw_step",
]


@pytest.fixture
def restore_kernels():
    yield
    kernels.configure({})


def test_the_kernels_give_the_same_run_as_the_reference(make_config, tmp_path, restore_kernels):
    """Interpreted on the CPU, compiled on a GPU: the same tokens and rewards, and weights within rounding."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = {}
    for name, impl in (("plain", "reference"), ("fast", "triton")):
        ops = dict.fromkeys(TRITON_OPS, impl) | {"grpo_token_loss": "reference" if name == "plain" else "auto"}
        runs[name] = make_config(run__dir=str(tmp_path / name), run__steps=2, run__device=device, kernels=ops)
        train(runs[name])
    plain, fast = (metrics(config.run.dir) for config in runs.values())
    for a, b in zip(plain, fast, strict=True):
        assert a["reward_mean"] == pytest.approx(b["reward_mean"], abs=1e-6)
        assert a["kl"] == pytest.approx(b["kl"], abs=1e-6)
        assert b["ratio_gap_max"] < 1e-4
    plain, fast = (weights(config.run.dir) for config in runs.values())
    apart = torch.cat([(plain[n] - fast[n]).flatten() for n in plain if n != "attn_bias_for_masking"]).abs()
    # Adam's step has the size of lr even where a gradient is all rounding: 4 steps of 1e-4, either way.
    assert float(apart.max()) < 1e-3
    assert float(apart.mean()) < 1e-6


def test_an_implementation_that_cannot_run_is_refused(make_config, restore_kernels):
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="kernels: impl='cuda' of grpo_token_loss cannot run on cpu"):
            train(make_config(kernels={"grpo_token_loss": "cuda"}))


def test_brightness_rises(make_config):
    config = make_config(run__steps=25, rollout__labels_per_step=4, rollout__group_size=16, update__minibatch=8,
                         update__lr=2e-3, grpo__kl_beta=0.0)  # fmt: skip
    train(config)
    rewards = [line["reward_mean"] for line in metrics(config.run.dir)]
    spread = metrics(config.run.dir)[0]["reward_std"]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.5 * spread


def test_groups_without_signal_are_counted(make_config):
    config = make_config(reward={"never": {"type": "brightness", "mode": "bright", "threshold": 2.0}}, run__steps=1)
    train(config)
    (line,) = metrics(config.run.dir)
    assert line["groups_without_signal"] == 2
    assert line["advantage_std"] == 0.0
    assert line["reward_mean"] == 0.0


def test_combine_is_how_rewards_become_advantages(make_config, tmp_path, monkeypatch):
    # Added, the two are 0 for every image; normalised first, what is left is 3 - 1.5 times one of them.
    (tmp_path / "opposite.py").write_text(
        "from varfast.rewards.brightness import brightness\n"
        "def reward(images, labels): return -2 * brightness(images)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards = {"luma": {"type": "brightness", "mode": "raw", "weight": 3.0},
               "opposite": {"type": "function", "function": "opposite:reward", "weight": 1.5}}  # fmt: skip
    lines = {}
    for combine in ("sum_then_normalise", "normalise_then_sum"):
        train(make_config(run__dir=str(tmp_path / combine), run__steps=1, reward=rewards, grpo__combine=combine))
        (lines[combine],) = metrics(tmp_path / combine)
    assert lines["sum_then_normalise"]["advantage_std"] == 0.0
    assert lines["sum_then_normalise"]["groups_without_signal"] == 2
    assert lines["normalise_then_sum"]["advantage_std"] == pytest.approx(1.5, rel=1e-3)
    assert lines["normalise_then_sum"]["groups_without_signal"] == 0
    sys.modules.pop("opposite")


@pytest.fixture
def failing_reward(tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text(
        "import torch\ncalls = [0]\nbroken = True\n"
        "def reward(images, labels):\n"
        "    calls[0] += 1\n"
        "    bad = broken and calls[0] == 4\n"
        "    return images.mean(dim=(1, 2, 3)) * (float('nan') if bad else 1)\n"
        "def crash(images, labels):\n"
        "    raise KeyError('what I look for')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield {"mine": {"type": "function", "function": "failing:reward"}}
    sys.modules.pop("failing", None)


def test_a_reward_that_returns_nan_loses_nothing(make_config, failing_reward, tmp_path):
    import failing

    one_batch = {"eval__samples_per_label": 1}  # an evaluation asks the reward once
    one_batch["run__max_bad_rollouts"] = 1

    failing.broken = False
    whole = make_config(
        run__steps=4, reward=failing_reward, run__dir=str(tmp_path / "whole"), log__checkpoint_every=99, **one_batch
    )
    train(whole)
    failing.calls[0], failing.broken = 0, True
    config = make_config(run__steps=4, reward=failing_reward, log__checkpoint_every=99, **one_batch)
    with pytest.raises(InputError, match="reward mine returned nan") as caught:
        train(config)  # the evaluation before, two steps, and the third fails
    assert "holds step 2; the same command goes on" in caught.value.__notes__[0]
    failing.broken = False
    assert train(config) == 0
    assert metrics(config.run.dir) == metrics(whole.run.dir)
    assert equal(weights(config.run.dir), weights(whole.run.dir))


def test_a_reward_that_raises_keeps_its_own_error(make_config, failing_reward):
    reward = {"mine": {"type": "function", "function": "failing:crash"}}
    with pytest.raises(KeyError, match="what I look for"):
        train(make_config(reward=reward, eval__samples_per_label=0))


def test_a_finished_run_says_so_and_changes_nothing(make_config, capsys):
    config = make_config()
    train(config)
    before = weights(config.run.dir)
    assert train(config) == 0
    said = capsys.readouterr().out
    assert f"{config.run.dir} holds all of run.steps=3: no step is left to do" in said
    assert "before     after" in said
    assert "run complete: 3 steps" in said
    assert equal(before, weights(config.run.dir))
    train(make_config(run__steps=2))
    said = capsys.readouterr().out
    assert f"{config.run.dir} holds step 3, more than run.steps=2: no step is left to do" in said
    assert "run complete: 3 steps" in said
    assert equal(before, weights(config.run.dir))


def test_a_run_that_has_no_checkpoint_starts_afresh_from_what_the_config_says(make_config, make_models, tmp_path):
    sizes = {"patch_nums": (1, 2), "vocab_size": 16, "code_width": 4}
    vqvae = make_models(**sizes)[1].state_dict()
    torch.save(vqvae, tmp_path / "vqvae.pth")
    for name, shift in (("a", 0.0), ("b", 1.0)):
        var = {n: t + shift if n == "head.bias" else t for n, t in make_models(**sizes)[0].state_dict().items()}
        torch.save(var, tmp_path / f"{name}.pth")

    def config(name):
        return make_config(
            policy__checkpoint=f"{tmp_path}/{name}.pth", policy__vqvae_checkpoint=f"{tmp_path}/vqvae.pth"
        )

    train(config("a"))
    shutil.rmtree(RunFolder(config("a").run.dir).checkpoints)
    with pytest.raises(InputError, match="holds no checkpoint yet"):
        varfast.sample.main([f"checkpoint={config('a').run.dir}"])
    train(config("b"))
    assert Base(RunFolder(config("b").run.dir)).find("var").samefile(tmp_path / "b.pth")


def test_missing_checkpoint_is_named(make_config, tmp_path):
    config = make_config(policy__checkpoint=str(tmp_path / "no.pth"), policy__vqvae_checkpoint="x.pth")
    with pytest.raises(InputError, match=r"no.pth does not exist"):
        train(config)


def test_train_from_checkpoints_and_with_other_sizes(make_config, make_models, tmp_path):
    sizes = {"patch_nums": (1, 2), "vocab_size": 16, "code_width": 4}
    var, vqvae = make_models(**sizes)
    torch.save(var.state_dict(), tmp_path / "var.pth")
    torch.save(vqvae.state_dict(), tmp_path / "vqvae.pth")
    paths = {"policy__checkpoint": str(tmp_path / "var.pth"), "policy__vqvae_checkpoint": str(tmp_path / "vqvae.pth")}
    config = make_config(**paths)
    assert train(config) == 0
    assert list(weights(config.run.dir)) == list(var.state_dict())
    deeper = {"policy__var": {"depth": 2, "num_classes": 5, **sizes}, "run__dir": str(tmp_path / "deeper")}
    with pytest.raises(InputError, match="does not fit the configured VAR; it fits policy.var with depth=1"):
        train(make_config(**paths, **deeper))


def test_sample_says_what_it_leaves_out_and_writes_what_the_suffix_says(make_models, tmp_path, capsys):
    var, vqvae = make_models(num_classes=10)
    torch.save(var.state_dict(), tmp_path / "var.pth")
    torch.save(vqvae.state_dict(), tmp_path / "vqvae.pth")
    names = [Label(label, f"class {label}", f"class {label}", 1) for label in range(10)]
    (tmp_path / "labels.json").write_text(labels_json(names))
    given = [f"checkpoint={tmp_path}/var.pth", f"vqvae={tmp_path}/vqvae.pth", "samples_per_label=1", "device=cpu"]
    assert varfast.sample.main([*given, f"out={tmp_path}/x.jpg"]) == 0
    assert "labels 0 to 7 are shown; for 8 to 9: labels=[8, ...]" in capsys.readouterr().out
    assert (tmp_path / "x.jpg").read_bytes().startswith(b"\xff\xd8")
    assert varfast.sample.main([*given, f"out={tmp_path}/y.png", "labels=[class 9, 3]"]) == 0
    assert "are shown" not in capsys.readouterr().out
    (tmp_path / "folder.png").mkdir()
    ends = "want a name that ends with .png, .jpg"
    refused = dict.fromkeys((f"{tmp_path}/", f"{tmp_path}/new/", f"{tmp_path}/x", f"{tmp_path}/x.bmp"), ends)
    for out, said in (refused | {f"{tmp_path}/folder.png": "want the name of a picture"}).items():
        with pytest.raises(InputError, match=said):
            varfast.sample.main([*given, f"out={out}"])


def test_sample_from_a_run_and_from_weights(make_config, make_models, tmp_path, capsys):
    from PIL import Image

    config = make_config()
    train(config)
    out = tmp_path / "grid.png"
    arguments = [f"out={out}", "labels=[0, 4]", "samples_per_label=3", "cfg=1.5", "top_k=5", "device=cpu"]
    assert varfast.sample.main([f"checkpoint={config.run.dir}", *arguments]) == 0
    width, height = Image.open(out).size
    assert height == 2 * 52 - 4
    assert 0 < width - (3 * 52 - 4) < 40  # a title beside each row
    assert "2 labels x 3 samples" in capsys.readouterr().out
    var, vqvae = make_models()
    torch.save(var.state_dict(), tmp_path / "var.pth")
    torch.save(vqvae.state_dict(), tmp_path / "vqvae.pth")
    weights_of = [f"checkpoint={tmp_path}/var.pth", f"vqvae={tmp_path}/vqvae.pth"]
    first = varfast.sample.main([*weights_of, *arguments]), out.read_bytes()
    assert (varfast.sample.main([*weights_of, *arguments]), out.read_bytes()) == first
    with pytest.raises(InputError, match=r"so vqvae=... is needed"):
        varfast.sample.main(weights_of[:1])
    with pytest.raises(InputError, match="labels holds 7; the model has labels 0..4"):
        varfast.sample.main([*weights_of, "labels=[7]", f"out={out}"])


def test_env_names_every_op_and_why(capsys):
    assert varfast.env.main([]) == 0
    out = capsys.readouterr().out
    for text in ("torch", "flash_attn", "apex", *TRITON_OPS, "grpo_token_loss"):
        assert text in out
    if not torch.cuda.is_available():
        assert re.search(r"sample_tokens +reference +triton: \w", out)


def test_commands_end_with_code_2_and_no_traceback_for_bad_input(tmp_path):
    for module, argument in (("train", "nowhere.yaml"), ("pretrain", "nowhere.yaml"), ("sample", "checkpoint=nowhere")):
        done = subprocess.run([sys.executable, "-m", f"varfast.{module}", argument], capture_output=True, text=True,
                              cwd=tmp_path, check=False)  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr


def test_train_logs_time_and_share_of_the_limit_of_every_stage(make_config):
    config = make_config()
    train(config)
    for line in lines(config.run.dir):
        in_stages = [line[f"{stage}_ms"] for stage in STAGES]
        assert all(ms > 0 for ms in in_stages)
        assert sum(in_stages) < 1e3 * line["step_s"]
        assert all(0 < line[f"{stage}_share"] < 1 for stage in STAGES if stage != "reward")
        assert 0 < line["mfu"] < 1
        assert line["images_per_s"] == pytest.approx(8 / line["step_s"])


def test_profile_writes_a_trace_with_the_stages_and_the_memory_of_one_step(make_config, tmp_path, capfd):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(make_config(run__steps=4)))
    assert main([str(path), "--profile"]) == 0
    folder = tmp_path / "run" / "profile"
    trace = json.loads((folder / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    for stage in STAGES:
        assert stage in names
    assert names.count("reward") == 1  # one step, of four
    assert "aten::" in (folder / "memory.txt").read_text()
    assert not {"USDT", "gpuGetDeviceCount"} & set(capfd.readouterr().err.replace(":", " ").split())


@pytest.mark.parametrize("on_gpu", [False, True])
def test_only_what_kineto_says_in_every_profile_is_dropped(capfd, on_gpu):
    no_device = b"ERROR:2026-11-27 20:05:47 9244:9244 DeviceProperties.cpp:56] gpuGetDeviceCount failed with code 35\n"
    with without_noise(on_gpu):
        os.write(2, b"mine\nUSDT:2026-11-27 20:05:47 9244:9244 x.cpp:39] profiler_start\n" + no_device)
        os.write(2, b"ERROR:2026-11-27 20:05:47 CuptiActivityApi.cpp:9] no permission\nhalf a line")
    os.write(2, b"\nafter")
    error = no_device.decode() if on_gpu else ""
    assert capfd.readouterr().err == (
        f"mine\n{error}ERROR:2026-11-27 20:05:47 CuptiActivityApi.cpp:9] no permission\nhalf a line\nafter"
    )


def test_sweep_runs_every_choice_in_a_folder_of_its_own(make_config, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(make_config(run__steps=1, eval__samples_per_label=0)))
    assert main([str(path), "--sweep", "grpo.kl_beta=0,0.1", "--sweep", "update.lr=1e-3,1e-4", "run.seed=3"]) == 0
    found = {}
    for folder in sorted((tmp_path / "run").iterdir()):
        config = RunFolder(str(folder)).load_config()
        assert config.run.seed == 3
        found[folder.name] = (config.grpo.kl_beta, config.update.lr)
        assert len(lines(folder)) == 1
    assert found == {
        f"grpo.kl_beta={b},update.lr={r}": (float(b), float(r)) for b in ("0", "0.1") for r in ("1e-3", "1e-4")
    }
    assert f"python -m varfast.report {tmp_path}/run/*" in capsys.readouterr().out


@pytest.mark.parametrize("sweep", [[], ["grpo.kl_beta"], ["grpo.kl_beta=0,,1"]])
def test_sweep_without_values_is_refused(sweep):
    with pytest.raises(InputError, match="--sweep wants key=value,value"):
        main(["configs/digits.yaml", "--sweep", *sweep])


def test_sweep_reads_every_config_before_the_first_runs(make_config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(make_config()))
    with pytest.raises(InputError, match=r"grpo\.kl_beta: got -1"):
        main([str(path), "--sweep", "grpo.kl_beta=0.1,-1"])
    assert not (tmp_path / "run").exists()


def test_adamw8bit_goes_on_bit_for_bit(make_config, tmp_path):
    """Half-way through the moments are read back from a checkpoint, 8 bits, float32, absmax and step."""
    settings = {"update__optimizer": "adamw8bit", "update__lr": 1e-3, "update__weight_decay": 0.1}
    train(make_config(**settings, run__steps=5, run__dir=str(tmp_path / "whole")))
    for steps in (2, 5):
        train(make_config(**settings, run__steps=steps, run__dir=str(tmp_path / "parts")))
    ends = [RunFolder(tmp_path / name).newest() for name in ("whole", "parts")]
    states = []
    for end in ends:
        states.append({n: t for f in sorted(end.path.glob("*.safetensors")) for n, t in load_file(f).items()})
    assert any(t.dtype == torch.uint8 and t.any() for t in states[0].values())
    assert equal(*states)


def test_segments_grow_unless_the_user_has_set_the_allocator(monkeypatch):
    variables = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    for theirs in (None, *variables):
        with monkeypatch.context() as patch:
            for name in variables:
                patch.setenv(name, "x")  # so that what is set below is undone
                patch.delenv(name)
            if theirs:
                patch.setenv(theirs, "max_split_size_mb:128")
            expand_segments()
            found = {name: os.environ[name] for name in variables if name in os.environ}
            assert found == (
                {theirs: "max_split_size_mb:128"} if theirs else {variables[0]: "expandable_segments:True"}
            )
            assert environment()["allocator"] == found


def test_memory_metrics_are_of_a_gpu_alone():
    assert memory_metrics(torch.device("cpu")) == {}


@pytest.mark.parametrize(
    ("asked", "free_bytes", "device", "captured"),
    [
        ("null", 79 * 2**30, "cuda", True),
        ("null", 79 * 2**30, "cpu", False),
        ("null", 16 * 2**30, "cuda", False),  # d30 does not fit in any way: nothing more is held
        ("false", 79 * 2**30, "cuda", False),
        ("true", 79 * 2**30, "cuda", True),
    ],
)
def test_update_is_captured_on_one_gpu_where_memory_allows(monkeypatch, asked, free_bytes, device, captured):
    monkeypatch.setattr("varfast.runs.setup.available_bytes", lambda device: free_bytes)
    monkeypatch.setattr("varfast.perf.out_of_memory.whole_bytes", lambda device: 80 * 2**30)
    root = Path(__file__).parent.parent
    config = load_config(root / "configs" / "d30.yaml", ["run.dtype=bfloat16", f"update.cuda_graph={asked}"])
    work = Work.whole(config, cost_of(config.policy, "bfloat16"))
    assert fitting_plan(work, torch.device(device), ALONE).update.cuda_graph is captured


def test_a_run_goes_on_with_what_it_may_change(make_config, capsys):
    config = make_config(run__steps=2, eval__samples_per_label=0)
    train(config)
    begun = (config.run.dir, metrics(config.run.dir))
    other = {"run__dir": begun[0], "run__steps": 4, "eval__samples_per_label": 0, "update__lr": 5e-4}
    with pytest.raises(InputError, match=r"update.lr: 0.0001 there, 0.0005 here(.|\n)*run.allow_change"):
        train(make_config(**other))
    with pytest.raises(InputError, match=r"update.lr: 0.0001 there"):
        train(make_config(**other, run__allow_change=["update.minibatch"]))
    assert train(make_config(**other, run__allow_change=["update.lr"])) == 0
    said = capsys.readouterr().out
    assert "from step 2 on, as run.allow_change says:\n  update.lr: 0.0001 there, 0.0005 here" in said
    lines = metrics(config.run.dir)
    assert lines[:2] == begun[1]
    assert [line["learning_rate"] for line in lines] == [1e-4, 1e-4, 5e-4, 5e-4]
    assert train(make_config(**other)) == 0  # the folder's config is the one of now


@pytest.mark.parametrize(
    "key", ["policy.preset", "update", "update.optimizer", "grpo.reference_every", "run.seed", "lr"]
)
def test_what_a_checkpoint_depends_on_may_not_change(make_config, key):
    with pytest.raises(InputError, match=r"run.allow_change.*want keys such as update.lr"):
        make_config(run__allow_change=[key])
