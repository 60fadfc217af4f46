import json
from pathlib import Path

import numpy as np
import pytest
import torch

from varfast import InputError, Policy
from varfast.data.prompts import Prompt, PromptSet, drawn
from varfast.randomness import EVAL_STEP
from varfast.rewards import WeightedSum
from varfast.runs.before_after import FILE, BeforeAfter, means, table
from varfast.runs.pictures import shown_prompts
from varfast.train import train
from varfast.types import Rollout


def content(config):
    return json.loads((Path(config.run.dir) / FILE).read_text())


def summary(config):
    whole = json.loads((Path(config.run.dir) / "summary.json").read_text())
    return {when: whole[when] for when in ("before", "after")}


def test_the_summary_is_the_mean_of_the_images_that_are_kept(make_config, capsys):
    config = make_config(update__lr=1e-2)
    train(config)
    kept = content(config)
    assert kept["labels"] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert kept["step"] == 3
    for when in ("before", "after"):
        assert {name: np.mean(values) for name, values in kept[when].items()} == summary(config)[when]
        assert all(len(values) == 10 for values in kept[when].values())
    assert kept["before"] != kept["after"]
    assert "difference [95 % interval]" in capsys.readouterr().out


@pytest.mark.parametrize("other", [{"eval__samples_per_label": 3}, {"eval__max_labels": 2}])
def test_before_is_measured_again_where_the_table_is_of_other_samples(make_config, tmp_path, capsys, other):
    """What a run that goes on with another setting says of its base is what a whole run with it says."""
    config = make_config(run__steps=2, update__lr=1e-2)
    train(config)
    capsys.readouterr()
    train(make_config(run__steps=4, update__lr=1e-2, **other))
    ((key, value),) = other.items()
    assert (
        f"{key.rpartition('__')[2]}: {'2' if 'samples' in key else '1000'} there, {value} here"
        in capsys.readouterr().out
    )
    whole = make_config(run__steps=4, update__lr=1e-2, run__dir=str(tmp_path / "whole"), **other)
    train(whole)
    assert content(config) == content(whole)
    assert summary(config) == summary(whole)


@pytest.mark.parametrize("of_before", [False, True], ids=["kept", "of a version that kept no rewards"])
def test_before_is_measured_again_where_the_rewards_may_have_changed(make_config, of_before):
    """The base's reward in the table is by the rewards of now: brightness was measured alone, now it is doubled."""
    config = make_config(run__steps=1)
    train(config)
    once, path = content(config), Path(config.run.dir) / FILE
    assert set(once["settings"]["reward"]) == {"luma"}
    if of_before:
        del once["settings"]["reward"]
        path.write_text(json.dumps(once))
        train(config)  # the same rewards: nothing is measured
        assert content(config) == once
    doubled = {"luma": {"type": "brightness", "mode": "raw", "weight": 2.0}}
    train(make_config(run__steps=2, reward=doubled, run__allow_change=["reward"]))
    np.testing.assert_allclose(content(config)["before"]["reward"], 2 * np.array(once["before"]["reward"]), rtol=1e-6)


def test_labels_that_are_held_out_have_rows_of_their_own(make_config):
    config = make_config(run__steps=1, rollout__labels=[1, 3], eval__held_out_labels=2, update__lr=1e-2, eval__every=1)
    train(config)
    kept = content(config)
    others = kept["labels"][4:]
    assert kept["labels"][:4] == [1, 1, 3, 3]
    assert len(others) == 4
    assert set(others) < {0, 2, 4}
    assert [len(kept["after"][name]) for name in ("reward", "reward (held out)")] == [4, 4]
    last = json.loads((Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/held_out/reward"] == np.mean(kept["after"]["reward (held out)"])


def test_labels_cannot_be_held_out_where_all_are_trained_on(make_config):
    with pytest.raises(InputError, match="the run draws from all 5 labels"):
        train(make_config(eval__held_out_labels=2))


def test_before_is_measured_once_where_nothing_changed(make_config, monkeypatch):
    sampled = []

    def count(self, prompts, how, key, *arguments, sample=Policy.sample_images, **keywords):
        sampled.append(key.step)
        return sample(self, prompts, how, key, *arguments, **keywords)

    monkeypatch.setattr(Policy, "sample_images", count)
    train(make_config(run__steps=2))
    before_and_after = sampled.count(EVAL_STEP)
    assert before_and_after > 0
    sampled.clear()
    train(make_config(run__steps=3))
    assert 2 * sampled.count(EVAL_STEP) == before_and_after
    sampled.clear()
    train(make_config(run__steps=3))  # a finished run: its table is there
    assert sampled == []


@pytest.mark.parametrize("damage", ["", "[1]", "\ufeff{}", '{"settings": {}}', "[" * 100_000, None, "values", "nan"])
def test_a_damaged_file_is_measured_again(make_config, tmp_path, damage):
    config = make_config(run__steps=1)
    train(config)
    whole, path = content(config), Path(config.run.dir) / FILE
    if damage is None:
        path.unlink()
    elif damage == "values":
        path.write_text(json.dumps(whole | {"before": {"reward": [1.0]}}))
    elif damage == "nan":
        path.write_text(json.dumps(whole | {"before": {"reward": [float("nan")] * 10}}))
    else:
        path.write_text(damage)
    train(make_config(run__steps=2))
    assert content(config)["before"] == whole["before"]


def test_no_samples_no_table(make_config, capsys):
    config = make_config(eval__samples_per_label=0)
    train(config)
    assert summary(config) == {"before": {}, "after": {}}
    assert not (Path(config.run.dir) / FILE).exists()
    assert "before " not in capsys.readouterr().out


def test_table_lines_up():
    values = {
        "before": {"reward": np.array([0.0, 0.2]), "accuracy": np.array([0.0, 0.0])},
        "after": {"reward": np.array([1.0, 1.2]), "accuracy": np.array([1.0, 1.0])},
    }
    assert table(values).splitlines() == [
        "            before     after  difference [95 % interval]",
        "reward       0.100     1.100      +1.000 [+1.000, +1.000]",
        "accuracy     0.000     1.000      +1.000 [-0.349, +1.000]",
    ]
    assert means(values["after"]) == {"reward": 1.1, "accuracy": 1.0}


def kl_of(config):
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["kl"] for line in map(json.loads, lines) if "kl" in line}


def test_kl_that_nothing_measures_is_absent(make_config, capsys):
    config = make_config(grpo__kl_beta=0.0)
    train(config)
    assert kl_of(config) == {}
    assert "grpo.kl_every" in capsys.readouterr().out


def test_kl_measured_without_a_kl_term_is_that_of_the_policy_and_changes_nothing(make_config, tmp_path):
    """Against the KL that the loss's own path gives: an infinitesimal weight, one optimizer step a rollout."""
    settings = {"run__steps": 5, "update__lr": 1e-2, "update__minibatch": 8, "grpo__kl_beta": 0.0}
    plain = make_config(**settings)
    train(plain)
    measured = make_config(**settings, grpo__kl_every=2, run__dir=str(tmp_path / "measured"))
    train(measured)
    found = kl_of(measured)
    assert list(found) == [2, 4, 5]
    states = [torch.load(Path(c.run.dir) / "var.pth", weights_only=True) for c in (plain, measured)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    weighted = make_config(**settings | {"grpo__kl_beta": 1e-12}, run__dir=str(tmp_path / "weighted"))
    train(weighted)
    of_loss = kl_of(weighted)
    assert found[4] > 1e-4
    for step, kl in found.items():
        assert kl == pytest.approx(of_loss[step], rel=1e-3, abs=1e-7)


def test_an_adapter_measures_its_kl_by_itself(make_config):
    pytest.importorskip("peft")
    config = make_config(grpo__kl_beta=0.0, policy__lora={"rank": 2}, update__lr=1e-2)
    assert config.measure_kl_every == 10
    train(config)
    assert list(kl_of(config)) == [3]
    assert kl_of(config)[3] > 0


def test_kl_every_may_change_when_a_run_goes_on(make_config):
    train(make_config(grpo__kl_beta=0.0, run__steps=2))
    config = make_config(grpo__kl_beta=0.0, run__steps=4, grpo__kl_every=2, update__lr=1e-4)
    train(config)
    assert list(kl_of(config)) == [4]


class Painter:
    """A policy of texts, whose images are as light as their prompt is long, and lighter by `light`."""

    def __init__(self, prompts, light):
        self.texts, self.light, self.sampled = prompts.texts, light, []

    def sample_images(self, prompts, how, key):
        self.sampled += [(int(row), key.first_sample + i) for i, row in enumerate(prompts.ids_B)]
        zeros = torch.zeros(len(prompts), 4)
        rollout = Rollout(prompts, prompts.ids_B.unsqueeze(1), zeros, zeros, how.temperature, True)
        grey = [len(self.texts[int(row)]) / 100 + self.light for row in prompts.ids_B]
        return rollout, torch.tensor(grey).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


def table_of_prompts(make_config, tmp_path, prompts, **settings):
    config = make_config(**{"eval__samples_per_label": 2, "eval__max_labels": 3} | settings)
    return BeforeAfter(tmp_path, config, prompts.ids("train"), prompts), config


def test_prompts_of_each_domain_are_measured_under_names_of_their_own(make_config, tmp_path):
    domains = ["train"] * 5 + ["held_out"] * 4 + ["out_of_domain"]
    prompts = PromptSet(tuple(Prompt("x" * (i + 1), domain=domain) for i, domain in enumerate(domains)))
    found, config = table_of_prompts(make_config, tmp_path, prompts)
    reward = WeightedSum(config.reward, prompts=prompts)
    before = found.before(Painter(prompts, 0.0), reward, micro_batch=4)
    policy = Painter(prompts, 0.5)
    after = found.after(policy, reward, 1, None)
    chosen = {domain: drawn(prompts.ids(domain), 3, config.run.seed) for domain in prompts.domains}
    assert [len(ids) for ids in chosen.values()] == [3, 3, 1]
    assert policy.sampled == [(row, n) for n, row in enumerate(r for ids in chosen.values() for r in ids for _ in "ab")]
    for domain, end in (("train", ""), ("held_out", " (held out)"), ("out_of_domain", " (out of domain)")):
        want = np.repeat([(row + 1) / 100 for row in chosen[domain]], 2)
        np.testing.assert_allclose(before[f"reward{end}"], want, atol=1e-4)
        np.testing.assert_allclose(after[f"reward/luma{end}"], want + 0.5, atol=1e-4)
        assert len(after[f"entropy{end}"]) == len(want)
    lines = table(found.values).splitlines()
    assert [line.split("  ")[0] for line in lines[1:7:3]] == ["reward", "reward (held out)"]
    # What a run that goes on finds: the same values, or none if other prompts would be chosen.
    assert json.loads((tmp_path / FILE).read_text())["labels"] == [row for row, _ in policy.sampled]
    again = table_of_prompts(make_config, tmp_path, prompts)[0].values
    assert again.keys() == found.values.keys()
    assert all((again[when][name] == values).all() for when in again for name, values in found.values[when].items())
    assert table_of_prompts(make_config, tmp_path, prompts, eval__max_labels=2)[0].values == {}


def test_a_classifier_of_labels_is_refused_of_a_run_on_prompts(make_config, tmp_path):
    with pytest.raises(InputError, match="eval.classifier=digits tells labels apart, and the run is on prompts"):
        table_of_prompts(make_config, tmp_path, PromptSet.of(["a"]), eval__classifier="digits")


def test_shown_prompts_are_of_all_domains_and_say_so():
    domains = ["train"] * 20 + ["held_out"] * 9 + ["out_of_domain"]
    prompts = PromptSet(tuple(Prompt(f"p{i}", domain=domain) for i, domain in enumerate(domains)))
    rows, titles = shown_prompts(prompts, 8, 0)
    assert [domains[row] for row in rows] == ["train"] * 5 + ["held_out"] * 2 + ["out_of_domain"]
    assert titles[:5] == [f"p{row}" for row in rows[:5]]
    assert titles[5:] == [f"(held out) p{row}" for row in rows[5:7]] + ["(out of domain) p29"]
    assert shown_prompts(prompts, 8, 0) == (rows, titles) != shown_prompts(prompts, 8, 1)
    for few in (1, 2):
        assert [domains[row] for row in shown_prompts(prompts, few, 0)[0]] == ["train", "held_out"][:few]
