"""Numbers of what pictures look like, against ones that are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from varfast.data.captions import DIGITS, SHAPES
from varfast.data.config import PromptsConfig
from varfast.data.datasets import digits
from varfast.data.prompts import Prompt, PromptSet
from varfast.data.scenes import draw_scene
from varfast.data.shapes import labelled_shapes
from varfast.report.charts import charts
from varfast.report.run import read_run
from varfast.rewards import WeightedSum
from varfast.runs.appearance import Looks, appearance
from varfast.train import train


def test_appearance_of_plain_pictures():
    white, black = torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    found = appearance(torch.cat([white, black]), 2)
    assert found["brightness"] == pytest.approx(0.5)
    assert (found["dark"], found["bright"]) == (0.5, 0.5)
    assert (found["colour"], found["edges"]) == (0.0, 0.0)
    assert found["colour_entropy"] == pytest.approx(1.0)
    assert found["diversity"] == pytest.approx(0.5)
    apart = appearance(torch.cat([white, black]), 1)
    assert apart["diversity"] == 0.0


def test_appearance_agrees_with_numpy():
    images = torch.rand(6, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    found, pixels = appearance(images, 3), images.double().numpy()
    luma = pixels[:, 0] * 0.299 + pixels[:, 1] * 0.587 + pixels[:, 2] * 0.114
    assert found["brightness"] == pytest.approx(luma.mean())
    assert found["dark"] == pytest.approx((luma < 0.05).mean())
    assert found["bright"] == pytest.approx((luma > 0.95).mean())
    assert found["colour"] == pytest.approx(np.ptp(pixels, axis=1).mean())
    steps = np.concatenate([np.abs(np.diff(luma, axis=axis)).ravel() for axis in (1, 2)])
    assert found["edges"] == pytest.approx(steps.mean())
    histogram, _ = np.histogramdd(pixels.transpose(0, 2, 3, 1).reshape(-1, 3), bins=4, range=[(0, 1)] * 3)
    share = histogram[histogram > 0] / histogram.sum()
    assert found["colour_entropy"] == pytest.approx(-sum(p * math.log2(p) for p in share))
    assert found["diversity"] == pytest.approx(np.sqrt(pixels.reshape(2, 3, -1).var(axis=1).mean()), rel=1e-5)


def test_a_run_has_the_appearance_of_its_grids_and_of_the_base(make_config):
    config = make_config(run__steps=4, log__grid_every=2, eval__samples_per_label=0, update__lr=0.05)
    train(config)
    lines = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    names = set(appearance(torch.rand(2, 3, 4, 4), 1))
    for line in lines:
        found = {name.removeprefix("drift/") for name in line if name.startswith("drift/")}
        assert found == (names if line["step"] in (2, 4) else set())
    base = json.loads((Path(config.run.dir) / "appearance.json").read_text())
    assert set(base) == names
    assert base["brightness"] != lines[-1]["drift/brightness"]


def test_the_report_draws_what_grids_look_like_from_the_base_on(tmp_path):
    rows = [{"step": step, "reward_mean": 0.1 * step, "drift/brightness": 0.5 + 0.1 * step} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "appearance.json").write_text(json.dumps({"brightness": 0.25, "dark": "none", "edges": 1.0}))
    run = read_run(tmp_path, "x")
    assert run.series("drift/brightness") == ([0, 1, 2], [0.25, 0.6, 0.7])
    assert run.series("drift/edges") == ([], [])
    (drawn,) = charts([run])["What pictures look like"]
    assert [point[:2] for point in drawn.curves[0].points] == [(0, 0.25), (1, 0.6), (2, 0.7)]
    (tmp_path / "appearance.json").write_text("[")
    assert any("appearance.json" in line for line in read_run(tmp_path, "x").left_out)


LEGIBLE = {"legible": {"type": "classifier", "model": "digits"}}


@pytest.mark.parametrize("given", [{"eval__classifier": "digits"}, {"reward": LEGIBLE}], ids=["eval", "reward"])
def test_labels_are_read_by_what_the_run_has_to_read_them(make_config, given):
    config = make_config(policy__var__num_classes=10, **given)
    images, labels = digits()
    looks = Looks(config, WeightedSum(config.reward, num_classes=10), None)
    of_digits = looks(images[:100], labels[:100], 10)
    assert of_digits["label_accuracy"] > 0.98  # what the classifier was fitted to
    assert of_digits == appearance(images[:100], 10) | {"label_accuracy": of_digits["label_accuracy"]}
    half = labels[:100].clone()
    half[:50] = (half[:50] + 1) % 10
    assert looks(images[:100], half, 10)["label_accuracy"] == of_digits["label_accuracy"] - 0.5


def test_labels_are_not_read_where_nothing_reads_them(make_config):
    config = make_config()
    assert set(Looks(config, WeightedSum(config.reward), None)(torch.rand(4, 3, 8, 8), torch.zeros(4), 2)) == set(
        appearance(torch.rand(4, 3, 8, 8), 2)
    )


def test_pictures_of_digits_are_read_as_their_prompts(make_config):
    config = make_config().model_copy(update={"prompts": PromptsConfig(source="digits")})
    captions, rng = DIGITS.captions[::40], np.random.RandomState(0)
    prompts = PromptSet(tuple(Prompt(caption.text, metadata=caption.asked) for caption in captions))
    scenes = torch.stack([draw_scene(DIGITS.scenes(caption)[0], 12, rng) for caption in captions])
    looks, rows = Looks(config, WeightedSum(config.reward), prompts), torch.arange(len(captions))
    assert looks(scenes, rows, 1)["label_accuracy"] > 0.9
    assert looks(torch.zeros_like(scenes), rows, 1)["label_accuracy"] == 0.0
    assert looks(scenes, rows.flip(0), 1)["label_accuracy"] < 0.3
    elsewhere = config.model_copy(update={"prompts": PromptsConfig(source="my_prompts.jsonl")})
    assert "label_accuracy" not in Looks(elsewhere, WeightedSum(config.reward), prompts)(scenes, rows, 1)


def test_pictures_of_shapes_are_read_as_their_labels(make_config):
    config, names = make_config(pretrain__dataset="shapes"), list(SHAPES.labels)
    images, labels = labelled_shapes(32, 0)
    chosen = torch.arange(0, len(images), len(images) // 40)
    looks = Looks(config, WeightedSum(config.reward), None, names)
    assert looks(images[chosen], labels[chosen], 1)["label_accuracy"] > 0.8
    assert looks(images[chosen], labels[chosen].flip(0), 1)["label_accuracy"] < 0.3
    others = Looks(config, WeightedSum(config.reward), None, [*names, "a cat"])
    assert "label_accuracy" not in others(images[chosen], labels[chosen], 1)
