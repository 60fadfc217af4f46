"""DPO in the trainer: loss and gradient against the formula in float64, runs, rounds, saved pairs."""

import copy
import json
import math
import re
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from varfast import Policy
from varfast.learner import Learner
from varfast.losses.config import DPOConfig
from varfast.losses.dpo import DPO
from varfast.optim.config import UpdateConfig
from varfast.perf.memory import UpdatePlan
from varfast.rewards import BrightnessReward, WeightedSum
from varfast.runs.folder import RunFolder
from varfast.state import State
from varfast.train import train
from varfast.types import InputError, NotFiniteReward, Rewards

from ..conftest import tiny_models
from ..runs import assert_same_run, metrics, weights

G = 3
LARGER = {"depth": 1, "patch_nums": [1, 2, 3], "vocab_size": 16, "code_width": 4, "num_classes": 5}
QUICK = {"eval__samples_per_label": 0}
SIZES = {"patch_nums": (1, 2), "vocab_size": 16, "code_width": 4}  # of make_config's models


def learner_of(policy, reference=None, dpo=None, **update):
    """DPO in a learner of plain SGD-like steps: one minibatch of all pairs, so that its gradient can be read."""
    settings, update = DPOConfig(**(dpo or {})), UpdateConfig(**({"minibatch": 8, "grad_clip": 1e30} | update))
    rewards = WeightedSum({"luma": BrightnessReward(type="brightness")})
    state = State(policy, reference or policy.frozen_copy(), rewards, update, settings)
    plan = UpdatePlan(update.micro_batch or update.minibatch, "none", False)
    return Learner(state, DPO(settings), update, plan, 10, 0)


def scored(policy, prompts=4, seed=0):
    """A rollout of G images for each of the labels 0, 1, ..., and rewards."""
    rollout = policy.sample([label for label in range(prompts) for _ in range(G)], 0.9, seed=seed)
    total_B = torch.randn(prompts * G, generator=torch.Generator().manual_seed(seed))
    return rollout, Rewards(total_B, {"luma": total_B})


def moved(policy, size=0.05):
    """The policy, its weights changed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.trainable.parameters():
            weight += size * torch.randn(weight.shape, generator=generator)
    policy.weights_changed()
    return policy


def trl_sigmoid(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing):
    """The loss of TRL's DPOTrainer (loss_type="sigmoid", label_smoothing), written out in float64."""
    logits = (chosen - rejected) - (ref_chosen - ref_rejected)
    return -(
        torch.nn.functional.logsigmoid(beta * logits) * (1 - smoothing)
        + torch.nn.functional.logsigmoid(-beta * logits) * smoothing
    )


@pytest.mark.parametrize("dpo", [{}, {"beta": 0.7, "label_smoothing": 0.2}])
@pytest.mark.parametrize("micro_batch", [8, 2])
def test_loss_and_gradient_of_the_learner_are_those_of_the_formula_in_float64(make_models, dpo, micro_batch):
    policy = Policy(*make_models())
    reference = policy.frozen_copy()
    rollout, rewards = scored(policy)
    moved(policy)
    learner = learner_of(policy, reference, dpo, micro_batch=micro_batch, lr=1e-30)
    batch = learner.loss.batch(rollout, rewards, learner.state.rewards, G)
    found = learner.step(batch, 0)
    gradient = {n: p.grad.clone() for n, p in policy.trainable.named_parameters() if p.grad is not None}

    # The same models in float64, teacher-forced, and pairs by hand.
    exact, base = (Policy(*make_models()) for _ in range(2))
    moved(exact)
    for each in (exact, base):
        each.trainable.double()
        each.trainable.compute_dtype = torch.float64
    table = rewards.total_B.view(-1, G)
    best = table.argmax(1) + G * torch.arange(len(table))
    worst = table.argmin(1) + G * torch.arange(len(table))

    def logp(model, rows):
        return model.teacher_forced(replace(rollout, teacher_input=None).rows(rows)).logp_BL.double().sum(1)

    settings = DPOConfig(**dpo)
    with torch.no_grad():
        refs = logp(base, best), logp(base, worst)
    loss = trl_sigmoid(logp(exact, best), logp(exact, worst), *refs, settings.beta, settings.label_smoothing).mean()
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    of_float64 = {n: p.grad for n, p in exact.trainable.named_parameters() if p.grad is not None}
    ours = torch.cat([gradient[n].double().flatten() for n in of_float64])
    theirs = torch.cat([g.flatten() for g in of_float64.values()])
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_the_loss_is_ln_2_exactly_while_policy_and_reference_are_the_same(make_policy):
    policy = make_policy()
    learner = learner_of(policy, lr=1e-30)
    rollout, rewards = scored(policy)
    found = learner.step(learner.loss.batch(rollout, rewards, learner.state.rewards, G), 0)
    assert found["loss"] == float(torch.tensor(math.log(2.0)))
    assert found["implicit_margin"] == 0.0
    assert found["pair_accuracy"] == 0.0
    assert found["ratio_gap_max"] < 1e-5
    assert found["grad_norm"] > 0.0


def test_pairs_that_are_left_out_do_not_count(make_policy):
    """The loss of two prompts of which one has equal rewards is that of the other one alone."""
    policy = make_policy()
    reference = policy.frozen_copy()
    rollout, rewards = scored(policy, prompts=2)
    total_B = rewards.total_B.clone()
    total_B[G:] = 0.5
    moved(policy)
    found = []
    for rows in (2, 1):
        learner = learner_of(policy, reference, minibatch=2 * rows, lr=1e-30)
        batch = learner.loss.batch(rollout.rows(slice(0, rows * G)), Rewards(total_B[: rows * G], {}), None, G)
        assert len(batch) == 2 * rows
        assert int(batch.numbers["pairs"]) == 1
        found.append(learner.step(batch, 0))
    for name in ("loss", "grad_norm", "implicit_margin", "logp_chosen"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-6), name


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def run_of(make_config, make_models, tmp_path):
    """Train a run of a few steps in a folder of its own, of a model that an adapter can change too; keyword
    section__key sets a value.
    """

    def run(name, steps=4, **more):
        settings = {"dpo": {}, "rollout__labels_per_step": 4, "update__minibatch": 4, "update__lr": 1e-3} | more
        policy = Policy(*make_models(**SIZES))
        assert train(make_config(run__dir=str(tmp_path / name), run__steps=steps, **settings), policy=policy) == 0
        return tmp_path / name

    return run


def test_a_run_learns_from_pairs_and_says_so(run_of, monkeypatch, capsys):
    monkeypatch.delenv("TQDM_DISABLE")
    folder = run_of("run", dpo={"kl_every": 2})
    said = capsys.readouterr().out
    assert re.search(r"^dpo: step 4 of 4, reward 0\.\d+ .*margin -?\d\.\d+ pair accuracy \d\.\d+ ", said, re.MULTILINE)
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert type(line["pairs"]) is int
        assert 1 <= line["pairs"] <= 4
        assert line["reward_margin"] == pytest.approx(line["reward_chosen"] - line["reward_rejected"])
        assert line["reward_margin"] > 0
        assert line["ratio_gap_max"] < 1e-5
        assert ("kl" in line) == (line["step"] % 2 == 0)
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-2)  # two optimizer steps
    settings = (folder / "config.yaml").read_text()
    assert "\ndpo:\n" in settings
    assert "grpo:\n" not in settings


def test_saved_pairs_are_learned_from_and_a_run_on_them_goes_on(run_of):
    made = run_of("made", dpo={"save_pairs": True}, **QUICK)
    lines = [json.loads(line) for file in sorted((made / "pairs").glob("*.jsonl")) for line in file.open()]
    assert len(lines) == sum(line["pairs"] for line in metrics(made))
    assert all(row["reward"][0] > row["reward"][1] for row in lines)
    assert sum(row["reward"][0] for row in lines) == pytest.approx(
        sum(line["reward_chosen"] * line["pairs"] for line in metrics(made)), rel=1e-5
    )
    settings = {"dpo": {"pairs": str(made)}, "rollout__labels_per_step": 6, "update__minibatch": 4, **QUICK}
    whole = run_of("whole", 6, **settings)
    assert [line["pairs"] for line in metrics(whole)] == [6] * 6
    assert all("reward_mean" not in line and "ratio_gap_max" not in line for line in metrics(whole))
    run_of("parts", 3, **settings)
    assert_same_run(whole, run_of("parts", 6, **settings))


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["weights", "adapter"])
def test_rounds_sample_from_a_reference_that_stays_within_a_round(run_of, make_models, monkeypatch, lora):
    """dpo.samples=reference with reference_every=2: what is sampled, and what the update compares with, is the policy
    of steps 0, 0, 2, 2, 4; a run that is stopped within a round goes on bit for bit.
    """
    policies, rollouts = [], []

    def record(self, batch, step, total_steps=None, step_of=Learner.step):
        policies.append(copy.deepcopy(self.state.policy.trainable.state_dict()))
        rollouts.append(batch.rollout)
        found = step_of(self, batch, step, total_steps)
        # By teacher forcing, the reference has the log-probabilities that the samples were drawn with.
        with torch.no_grad():
            again = self.state.reference.teacher_forced(batch.rollout).logp_BL
        assert float((again - batch.rollout.logp_BL).abs().max()) < 1e-5
        return found

    monkeypatch.setattr(Learner, "step", record)
    dpo = {"samples": "reference", "reference_every": 2}
    settings = {"dpo": dpo, "policy__lora": lora, "eval__samples_per_label": 0}
    settings |= {"update__lr": 1e-2, "update__minibatch": 8}
    whole = run_of("whole", 5, **settings)
    lines = metrics(whole)
    assert [line["reference_step"] for line in lines] == [0, 0, 2, 2, 4]
    assert all(line["ratio_gap_max"] < 1e-5 and "kl" not in line for line in lines)
    # At the start of a round the policy is the reference, until the one optimizer step of the rollout.
    assert [line["implicit_margin"] == 0.0 for line in lines] == [True, False, True, False, True]
    made = Policy(*make_models(**SIZES))
    if lora:
        made.add_lora(RunFolder(whole).load_config().policy.lora, 0)
    for step, of in ((1, 0), (3, 2)):
        made.trainable.load_state_dict(policies[of])
        made.weights_changed()
        with torch.no_grad():
            of_round = made.teacher_forced(rollouts[step]).logp_BL
        assert float((of_round - rollouts[step].logp_BL).abs().max()) < 1e-5
        made.trainable.load_state_dict(policies[step])
        made.weights_changed()
        with torch.no_grad():
            of_now = made.teacher_forced(rollouts[step]).logp_BL
        assert float((of_now - rollouts[step].logp_BL).abs().max()) > 1e-3
    run_of("parts", 3, **settings)
    assert_same_run(whole, run_of("parts", 5, **settings))


def test_a_killed_run_goes_on_bit_for_bit_and_so_do_its_pairs(run_of, monkeypatch):
    """It dies in the fourth step, after the checkpoint of the second; without rounding, it then does the same."""
    settings = {"dpo": {"save_pairs": True, "pairs_per_prompt": 2}, "update__minibatch": 8, **QUICK}
    whole = run_of("whole", 5, **settings)
    with monkeypatch.context() as patch:

        def dying(self, batch, step, total_steps=None, step_of=Learner.step):
            if step == 3:
                raise RuntimeError("killed")
            return step_of(self, batch, step, total_steps)

        patch.setattr(Learner, "step", dying)
        with pytest.raises(RuntimeError, match="killed"):
            run_of("killed", 5, **settings)
    killed = run_of("killed", 5, **settings)
    assert_same_run(whole, killed)
    names = sorted(path.name for path in (whole / "pairs").iterdir())
    assert names == sorted(path.name for path in (killed / "pairs").iterdir())
    assert len(names) == 1 + 2 * 5
    for name in names:
        assert (whole / "pairs" / name).read_bytes() == (killed / "pairs" / name).read_bytes()


def test_saved_pairs_hold_the_images_that_the_rewards_chose(run_of, monkeypatch):
    rollouts = []

    def record(self, rollout, rewards, reward, group_size, batch=DPO.batch):
        rollouts.append((rollout, rewards))
        return batch(self, rollout, rewards, reward, group_size)

    monkeypatch.setattr(DPO, "batch", record)
    folder = run_of("made", 1, dpo={"save_pairs": True}, **QUICK)
    ((rollout, rewards),) = rollouts
    table = rewards.total_B.view(4, 4)
    tokens = safetensors.torch.load_file(folder / "pairs" / "step_000001.safetensors")["tokens"]
    rows = [json.loads(line) for line in (folder / "pairs" / "step_000001.jsonl").open()]
    for prompt, (row, pair) in enumerate(zip(rows, tokens, strict=True)):
        both = 4 * prompt + torch.stack([table[prompt].argmax(), table[prompt].argmin()])
        assert torch.equal(pair.long(), rollout.tokens_BL[both])
        assert row["label"] == int(rollout.labels_B[4 * prompt])
        assert row["prompt"] == str(row["label"])
        assert row["reward"] == row["rewards"]["luma"] == rewards.total_B[both].tolist()


def test_no_pair_and_no_number_leave_the_policy_as_it_is(run_of, monkeypatch):
    """Equal rewards: a step without pairs. NaN: the rollout is left out, and the round begins in the next step."""
    equal = run_of("equal", 2, reward={"luma": {"type": "brightness", "mode": "bright", "threshold": 1.0}}, **QUICK)
    for line in metrics(equal):
        assert (line["pairs"], line["loss"], line["groups_without_signal"]) == (0, 0.0, 4)
        assert "reward_margin" not in line
        assert "pair_accuracy" not in line
    base = Policy(*tiny_models(**SIZES)).trainable.state_dict()
    assert all(torch.equal(tensor, base[name]) for name, tensor in weights(equal).items())

    steps = iter(range(10))

    def score(self, measured, of=WeightedSum.score):
        if next(steps) == 1:
            raise NotFiniteReward("NaN")
        return of(self, measured)

    monkeypatch.setattr(WeightedSum, "score", score)
    lines = metrics(run_of("nan", 4, dpo={"samples": "reference", "reference_every": 1}, **QUICK))
    assert [line["skipped_rollouts"] for line in lines] == [0, 1, 0, 0]
    assert [line.get("reference_step") for line in lines] == [0, None, 2, 3]
    assert all(line.get("ratio_gap_max", 0.0) < 1e-5 for line in lines)


def test_a_guided_policy_learns_from_pairs_of_the_guided_distribution(run_of):
    for line in metrics(run_of("guided", 2, rollout__cfg=1.5, dpo={"kl_every": 1}, update__minibatch=8, **QUICK)):
        assert line["ratio_gap_max"] < 1e-5
    assert line["kl"] > 0


def test_a_set_of_other_tokens_or_of_another_time_is_refused(run_of, make_config):
    made = run_of("made", 2, dpo={"save_pairs": True}, **QUICK)
    learn = {"dpo": {"pairs": str(made / "pairs")}, **QUICK}
    run_of("learned", 2, **learn)
    with pytest.raises(
        InputError, match=r"dpo.pairs=.*: there is no .*/learned/pairs/set.json; want the folder of a r"
    ):
        run_of("other", 2, dpo={"pairs": str(made.parent / "learned")}, **QUICK)
    with pytest.raises(InputError, match=r"of another kind of tokens \(shape \[5\]\) than this policy .*shape \[14\]"):
        train(make_config(run__dir=str(made.parent / "larger"), policy__var=LARGER, **learn))
    (made / "pairs" / "step_000002.safetensors").unlink()
    with pytest.raises(InputError, match="has changed since this run began: 4 pairs now, and not those that"):
        run_of("learned", 3, **learn)
    file = made / "pairs" / "step_000001.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match="step_000001.safetensors cannot be read"):
        run_of("damaged", 2, **learn)
