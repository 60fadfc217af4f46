"""A run on texts from its first step to its evaluation: a Janus of random weights, in a few seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from varfast.data.prompts import saved_prompts
from varfast.evaluate import main as evaluate_main
from varfast.evaluation.asked import read_asked
from varfast.rewards.brightness import brightness
from varfast.sample import main as sample_main
from varfast.train import train

JANUS = {
    "family": "janus",
    "checkpoint": "random",
    "max_prompt_tokens": 64,
    "transformer": {"depth": 1, "width": 32, "num_heads": 2, "mlp_width": 64, "side": 3, "vocab_size": 32,
                    "text_vocab_size": 259},
    "vq": {"code_width": 8, "latent_width": 32, "base_channels": 32, "channel_multipliers": [1, 2],
           "num_res_blocks": 1},
}  # fmt: skip


def luma(path):
    return float(brightness(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255.0))


def test_a_run_on_texts_is_trained_measured_and_sampled(make_config, tmp_path, capsys):
    config = make_config(
        policy=JANUS, prompts={"source": "digits", "held_out": 20}, run__steps=1, eval__max_labels=3, update__lr=0.05
    )
    train(config)
    folder, prompts = Path(config.run.dir), saved_prompts(Path(config.run.dir))
    kept = json.loads((folder / "before_after.json").read_text())
    domains = [prompts.prompts[row].domain for row in kept["labels"]]
    assert domains == ["train"] * 6 + ["held_out"] * 6 + ["out_of_domain"] * 6
    assert {name: len(values) for name, values in kept["after"].items() if "luma" in name} == {
        "reward/luma": 6, "reward/luma (held out)": 6, "reward/luma (out of domain)": 6
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "reward (held out)" in said
    assert (
        evaluate_main([f"{folder}", "samples_per_prompt=2", "max_prompts=3", "save=png", "device=cpu", "seed=5"]) == 0
    )
    out = folder / "evaluation"
    asked = read_asked(out)
    assert [p.domain for p in asked] == ["train"] * 3 + ["held_out"] * 3 + ["out_of_domain"] * 3
    assert {p.text for p in asked} <= set(prompts.texts)
    rows = {row["labels"]: row for row in json.loads((out / "evaluation.json").read_text())["rows"]}
    changed = []
    for group in ("train", "held_out", "out_of_domain"):
        ids = [p.id for p in asked if p.domain == group]
        for side, name in (("reference", "reference"), ("checkpoint", "checkpoint")):
            files = [out / "images" / name / f"{row:04d}_{sample:04d}.png" for row in ids for sample in range(2)]
            assert rows[group][side]["value"] == pytest.approx(
                np.mean([luma(file) for file in files]), abs=3e-3
            )  # truncated to 8 bits
        changed.append(rows[group]["difference"]["value"])
    assert any(changed)
    assert sample_main([f"{folder}", f"out={tmp_path}/s.png", "samples_per_prompt=2", "device=cpu"]) == 0
    assert "8 prompts x 2 samples" in capsys.readouterr().out
