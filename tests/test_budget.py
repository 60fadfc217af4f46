"""What a run has spent, counted by hand and by torch; budgets that end it, and runs that go on."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from varfast import InputError
from varfast.config import parse_config
from varfast.losses.config import GRPOConfig
from varfast.perf.limits import stage_counts
from varfast.perf.memory import MemoryPlan, RolloutPlan, UpdatePlan
from varfast.perf.spent import Budget, Spent, spent_before, step_flop, whole_step
from varfast.perf.tables import report
from varfast.policies.var.config import VARLoRAConfig
from varfast.progress import Progress
from varfast.randomness import Key
from varfast.state import State
from varfast.train import train
from varfast.types import Batch, Sampling

from .learners import make_learner
from .runs import assert_same_run
from .test_distributed import train_on

# What the configs of make_config cost a step: 8 images, of which the update and the reference read all.
IMAGES = 8


# Without the table of before and after.
BARE = {"eval__samples_per_label": 0, "log__grid_every": 100}


def lines(config):
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


def summary(config):
    return json.loads((Path(config.run.dir) / "summary.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Counts


def hand_count(rank=0):
    """FLOP of an image of tiny_models(depth=2): 14 tokens of 3 scales, 128 channels, 32 codes of width 8.

    Returns: products of a pass with those of an adapter of all of fc1; those of attention; the product that needs no
        gradient of its input; those of fc1's adapter.
    """
    L, C, depth = 14, 128, 2
    matrices = 2 * L * depth * (3 * C * C + C * C + 4 * C * C + 4 * C * C)
    modulation = 2 * depth * C * 6 * C + 2 * C * 2 * C
    embedded = 2 * (L - 1) * 8 * C
    adapter = 2 * L * depth * rank * (C + 4 * C)
    pairs = 1 * 1 + 4 * 5 + 9 * 14
    products = matrices + modulation + embedded + 2 * L * C * 32 + adapter
    return SimpleNamespace(products=products, attention=4 * depth * pairs * C, embedded=embedded, adapter=adapter)


@pytest.mark.parametrize("kl_beta", [0.2, 0.0], ids=["reference", "none"])
@pytest.mark.parametrize("cfg", [0.0, 1.5], ids=["plain", "guided"])
def test_flop_of_a_step_are_those_of_hand_and_of_torch(make_policy, on_meta, cfg, kl_beta):
    """Of 8 images 2 have an advantage: without a reference the others are not computed."""
    policy, rows = make_policy(depth=2), 2 if cfg else 1
    learner = make_learner(policy, kl_beta=kl_beta, minibatch=4, checkpointing="full" if cfg else "none")
    with FlopCounterMode(display=False) as sampled:
        rollout, _ = policy.sample_images([0] * 8, Sampling(0.7, cfg), Key(0, 0, 0), keep_input=True)
    with FlopCounterMode(display=False) as decoded:
        policy.decode(rollout.tokens_BL)
    advantages_B = torch.tensor([1.0, -1.0, 0, 0, 0, 0, 0, 0])
    with FlopCounterMode(display=False) as learned:
        found = learner.step(Batch.of(rollout, advantages_B), 0)
    updated, referenced = (8, 8) if kl_beta else (2, 0)
    assert (found["update_images"], found["reference_images"]) == (updated, referenced)

    hand, rollout_config = (
        hand_count(),
        SimpleNamespace(sampled_images=8, rollout=SimpleNamespace(rows=rows), loss=GRPOConfig()),
    )
    ours = step_flop(rollout_config, policy.cost("float32"), updated, referenced)
    passes = rows * (8 + 3 * updated + referenced)
    decode = ours - passes * (hand.products + hand.attention)
    assert decode == 8 * policy.cost("float32").decode.flop
    # Torch counts none of the reference implementation's attention. It counts what checkpointing computes again, and no
    # gradient of the first product's input.
    again = 2 * 14 * 2 * 12 * 128**2 + 2 * 2 * 128 * 6 * 128 if cfg else 0
    of_update = updated * (3 * hand.products - hand.embedded + again) + referenced * hand.products
    assert learned.get_total_flops() == pytest.approx(rows * of_update, rel=1e-9 if not cfg else 0.02)
    # Between scales the sampler resizes a map of the tokenizer, which counts as a part of decoding.
    assert sampled.get_total_flops() == pytest.approx(rows * 8 * hand.products + decode, rel=5e-3)
    assert decoded.get_total_flops() == pytest.approx(decode, rel=0.02)


def test_an_adapter_s_reference_is_the_model_without_it(make_policy):
    """Frozen products have one forward pass as their backward pass; the adapter's and attention's have two."""
    hand, cost = hand_count(rank=4), make_policy(depth=2).cost("float32", VARLoRAConfig(rank=4, targets=("fc1",)))
    config = SimpleNamespace(sampled_images=8, rollout=SimpleNamespace(rows=1), loss=GRPOConfig())
    base = hand.products - hand.adapter + hand.attention
    assert step_flop(config, cost, 0, 1) - step_flop(config, cost, 0, 0) == base
    # Embeddings and modulation, which have no adapter and read no activation, need no backward pass.
    modulation = 2 * 2 * 128 * 6 * 128 + 2 * 128 * 2 * 128
    backward = base - hand.attention - modulation - hand.embedded + 2 * (hand.adapter + hand.attention)
    forward = base + hand.adapter
    assert step_flop(config, cost, 1, 0) - step_flop(config, cost, 0, 0) == forward + backward


@pytest.mark.parametrize(
    "sections", [{}, {"grpo": {"kl_beta": 0.0}, "update": {"epochs": 2}}, {"rollout": {"cfg": 1.5}}]
)
def test_a_whole_step_is_what_the_plan_counts_without_rewards(make_work, sections):
    work = make_work(**sections)
    plan = MemoryPlan(RolloutPlan(512, False), UpdatePlan(32, "full", False))
    counts = stage_counts(work, plan, "none")
    wanted = sum(counts[stage].flop for stage in ("rollout", "decode", "reference", "update"))
    assert whole_step(work).flop == pytest.approx(wanted, rel=1e-12)
    assert whole_step(work).images == 512


def test_each_step_of_a_run_adds_what_it_computed(make_config):
    """Without a reference, groups without a signal are left out; every second step measures the KL beside the loss."""
    bright = {"luma": {"type": "brightness", "mode": "bright", "threshold": 0.56}}
    config = make_config(
        grpo__kl_beta=0.0, grpo__kl_every=2, reward=bright, run__steps=4, rollout__group_size=2, **BARE
    )
    cost = config_cost(config)
    assert train(config) == 0
    before = Spent()
    for line in lines(config):
        assert line["update_images"] == 4 - 2 * line["groups_without_signal"]
        assert line["reference_images"] == 0
        drift = 4 if line["step"] % 2 == 0 else 0
        flop = step_flop(config, cost, int(line["update_images"]), drift)
        now = before + Spent(4, flop, line["step_s"] / 3600)
        assert {k: v for k, v in line.items() if k.startswith("spent_")} == now.metrics
        before = now
    assert len({line["update_images"] for line in lines(config)}) > 1
    assert summary(config)["spent"] == {"images": 16, "flop": before.flop, "hours": before.hours}
    assert (summary(config)["step"], summary(config)["ended_by"]) == (4, "run.steps=4")


def test_of_pairs_both_images_are_counted_and_no_others(make_config):
    """Best and worst of 4 samples: 8 images are sampled, and 2 pairs of them go through reference and update."""
    config = make_config(dpo={}, run__steps=2, **BARE)
    assert train(config) == 0
    before = 0.0
    for line in lines(config):
        assert line["update_images"] == line["reference_images"] == 2 * line["pairs"] == 4
        flop = step_flop(config, config_cost(config), 4, 4 + (8 if "kl" in line else 0))
        assert line["spent_flop"] == before + flop
        before = line["spent_flop"]
    assert lines(config)[-1]["spent_images"] == 16


def config_cost(config):
    from varfast.policies.families import family_of

    return family_of(config.policy).cost_of(config.policy, config.run.dtype)


def test_a_skipped_rollout_is_spent_and_a_checkpoint_of_the_step_before_does_not_count_it(make_policy):
    state: State = make_learner(make_policy()).state
    state.end_step(True, Spent(8, 1.0, 0.5))
    state.end_step(False, Spent(8, 0.25, 0.125))
    assert (state.spent, state.learned_spent) == (Spent(16, 1.25, 0.625), Spent(8, 1.0, 0.5))
    state.end_step(True, Spent(8, 1.0, 0.5))
    assert state.spent == state.learned_spent == Spent(24, 2.25, 1.125)


# ---------------------------------------------------------------------------------------------------------------------
# Budgets


def budget(steps=100, step=Spent(8, 10.0), **most):  # noqa: B008
    return Budget(steps, most, step)


def test_a_budget_ends_a_run_after_the_step_that_reaches_it():
    assert budget(images=20).ended_by(2, Spent(16)) is None
    assert budget(images=24).ended_by(3, Spent(24)) == "run.budget_images=24"
    assert budget(flop=1e15).ended_by(1, Spent(8, 1e15)) == "run.budget_flop=1e15"
    assert budget(hours=0.5).ended_by(1, Spent(8, 1.0, 0.5)) == "run.budget_hours=0.5"
    assert budget(steps=3).ended_by(3, Spent()) == "run.steps=3"


@pytest.mark.parametrize(
    ("made", "step", "spent", "total"),
    [
        (budget(), 0, Spent(), 100),
        (budget(images=20), 0, Spent(), 3),
        (budget(images=20), 2, Spent(16), 3),
        (budget(images=24), 2, Spent(16), 3),
        (budget(flop=50.0), 0, Spent(), 5),
        (budget(flop=50.0), 2, Spent(16, 10.0), 10),  # steps cost less than expected
        (budget(hours=1.0), 0, Spent(), 100),  # nothing measured yet
        (budget(hours=1.0), 3, Spent(24, 30.0, 0.3), 10),
        (budget(hours=1.0, images=40), 3, Spent(24, 30.0, 0.3), 5),
        (budget(images=16), 5, Spent(40), 5),  # a smaller budget than is spent
    ],
)
def test_total_steps_are_what_a_budget_buys_at_the_cost_so_far(made, step, spent, total):
    assert made.total_steps(step, spent) == total


def test_steps_of_equal_cost_buy_the_same_number_after_each_of_them():
    """0.1 added n times is not n * 0.1."""
    spent = Spent()
    for step in range(50):
        assert budget(step=Spent(1, 0.1), flop=5.0).total_steps(step, spent) == 50
        spent += Spent(1, 0.1)


def test_a_run_of_a_budget_is_the_run_of_as_many_steps(make_config, tmp_path):
    """Learning rates, the measured KL of the last step, and all else."""
    shared = {"update__lr_schedule": "cosine", "update__warmup_steps": 2, "grpo__kl_beta": 0.0, "grpo__kl_every": 4}
    steps = make_config(**shared, run__dir=str(tmp_path / "steps"), run__steps=6)
    images = make_config(
        **shared, run__dir=str(tmp_path / "images"), run__steps=1000, run__budget_images=6 * IMAGES - 3
    )
    train(steps)
    train(images)
    assert_same_run(steps.run.dir, images.run.dir)
    assert "kl" in lines(images)[-1]
    assert summary(images)["ended_by"] == f"run.budget_images={6 * IMAGES - 3}"
    assert summary(images)["after"] == summary(steps)["after"]
    assert Path(images.run.dir, "checkpoints", "step_000006").is_dir()


def test_a_larger_budget_goes_on_with_the_same_numbers(make_config, tmp_path, capsys):
    whole = make_config(run__dir=str(tmp_path / "whole"), run__steps=5, log__grid_every=1)
    train(whole)
    each = lines(whole)[0]["spent_flop"]
    parts = {"run__dir": str(tmp_path / "parts"), "run__steps": 1000, "log__grid_every": 1}
    train(make_config(**parts, run__budget_flop=1.5 * each))
    capsys.readouterr()
    # Nothing is left to do: the weights and the table are there.
    train(make_config(**parts, run__budget_flop=2.0 * each))
    said = capsys.readouterr().out
    assert "is reached: no step is left to do" in said
    assert f"run complete: 2 steps, ended by run.budget_flop={2.0 * each:.15g}: 16 images," in said
    # Lines of steps after the checkpoint, of a run that was killed, are done again.
    first = lines(whole)[1]
    with Path(parts["run__dir"], "metrics.jsonl").open("a") as file:
        file.write(json.dumps(first | {"step": 3, "spent_flop": 1e30, "spent_images": 10**9}) + "\n")
    last = make_config(**parts, run__budget_flop=5.0 * each)
    train(last)
    said = capsys.readouterr().out
    assert f"run.budget_flop={5 * each:.15g} buys 5 steps of" in said
    assert "going on after step 2 of about 5" in said
    assert_same_run(whole.run.dir, last.run.dir)
    found = lines(last)
    for before, line in pairwise(found):
        assert line["spent_hours"] == before["spent_hours"] + line["step_s"] / 3600
    assert summary(last)["ended_by"] == f"run.budget_flop={5 * each:.15g}"
    # The model card knows that it is complete.
    from varfast.export import main as export

    assert export([f"checkpoint={last.run.dir}", f"out={tmp_path / 'x.safetensors'}"]) == 0
    card = (tmp_path / "x.md").read_text()
    assert f"5 of 1000, ended by run.budget_flop={5 * each:.15g}, 8 images each" in card
    assert "Fresh samples, the same labels" in card


def test_a_schedule_depends_on_its_budget(make_config):
    train(make_config(run__steps=9, run__budget_images=8, update__lr_schedule="linear", **BARE))
    with pytest.raises(InputError, match=r"run.budget_images: update.lr_schedule=linear depends on it"):
        train(make_config(run__steps=9, run__budget_images=16, update__lr_schedule="linear"))


def test_a_checkpoint_of_an_earlier_version_goes_on_from_an_estimate(make_config, capsys):
    config = make_config(run__steps=2, **BARE)
    train(config)
    path = Path(config.run.dir) / "checkpoints" / "step_000002"
    manifest = json.loads((path / "manifest.json").read_text())
    spent = manifest.pop("spent")
    assert spent == summary(config)["spent"]
    for name in ("budget_images", "budget_flop", "budget_hours"):
        manifest["config"]["run"].pop(name, None)
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "manifest.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")
    old = [{k: v for k, v in line.items() if not k.startswith("spent_")} for line in lines(config)]
    Path(config.run.dir, "metrics.jsonl").write_text(json.dumps(old[0]) + "\n")
    capsys.readouterr()
    train(make_config(run__steps=3, **BARE))
    assert "does not say what it has spent; taken for 16 images" in capsys.readouterr().out
    found = lines(config)
    assert "spent_images" not in found[0]
    assert (found[-1]["spent_images"], found[-1]["spent_flop"]) == (24, spent["flop"] * 1.5)
    assert found[-1]["spent_hours"] == pytest.approx((2 * old[0]["step_s"] + found[-1]["step_s"]) / 3600)


def test_spent_before_takes_steps_without_a_time_for_the_mean():
    assert spent_before(4, Spent(8, 10.0), [3600.0, 7200.0]) == Spent(32, 40.0, 6.0)
    assert spent_before(4, Spent(8, 10.0), []) == Spent(32, 40.0, 0.0)


def test_two_processes_end_at_the_same_step(make_config, tmp_path):
    """By FLOP at the step of one process. By hours, of which each process measures its own."""
    alone = make_config(run__dir=str(tmp_path / "alone"), run__steps=3, **BARE)
    train(alone)
    flop = lines(alone)[-1]["spent_flop"]
    by_flop = make_config(run__dir=str(tmp_path / "flop"), run__steps=50, run__budget_flop=flop, **BARE)
    by_hours = make_config(run__dir=str(tmp_path / "hours"), run__steps=500, run__budget_hours=1e-5, **BARE)
    train_on(2, [by_flop, by_hours], tmp_path)
    assert [line["spent_flop"] for line in lines(by_flop)] == [line["spent_flop"] for line in lines(alone)]
    assert summary(by_flop)["step"] == 3
    of_hours = lines(by_hours)
    assert of_hours[-1]["spent_hours"] >= 1e-5
    assert all(line["spent_hours"] < 1e-5 for line in of_hours[:-1])
    assert summary(by_hours)["ended_by"] == "run.budget_hours=1e-05"


def test_roofline_says_what_a_budget_buys(make_work):
    run = {"dir": "r", "steps": 1000, "budget_images": 5000, "budget_flop": 1e16, "budget_hours": 1.0}
    work = make_work(run=run)
    ceilings = SimpleNamespace(flop_per_s=1e15, byte_per_s=1e30, memory_bytes=None)
    text = report(work, ceilings, "x")
    flop = whole_step(work).flop
    assert "run.budget_images=5000 buys 10 steps of 512 images" in text
    assert f"run.budget_flop=1e16 buys {-(-1e16 // flop):.0f} steps of {flop:.4g} FLOP" in text
    assert f"run.budget_hours=1 buys at most {3600 * 1e15 // flop:.0f} steps" in text


def test_progress_takes_the_total_that_is_known_now(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    with Progress("grpo", 100, every=1) as progress:
        progress.update("", 10)
        progress.update("", 2)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in said] == ["grpo: step 1 of 10", "grpo: step 2 of 2"]
    assert said[1].endswith(" 0 s left")


@pytest.mark.parametrize(("key", "value"), [("budget_images", 0), ("budget_flop", 0.0), ("budget_hours", -1.0)])
def test_a_budget_that_buys_nothing_is_refused(key, value):
    data = {"policy": {"checkpoint": "random"}, "reward": {"b": {"type": "brightness"}}}
    with pytest.raises(InputError, match=f"run.{key}"):
        parse_config(data | {"run": {"dir": "r", "steps": 1, key: value}})
