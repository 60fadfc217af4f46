"""Numbers of what pictures look like, against ones that are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from varfast.report.charts import charts
from varfast.report.run import read_run
from varfast.runs.appearance import appearance
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
