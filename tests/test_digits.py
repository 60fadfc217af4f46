"""The README's promise: the embedded default, from nothing to a policy that earns its reward. Takes two minutes."""

import json
from pathlib import Path

import pytest

from varfast.config import load_config
from varfast.train import train

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"


@pytest.mark.slow
def test_digits_become_bright_and_stay_digits(tmp_path):
    config = load_config(CONFIG, [f"run.dir={tmp_path}/run", f"pretrain.cache_dir={tmp_path}/cache", "run.device=cpu"])
    assert train(config) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert before["reward/bright"] < 0.3
    assert after["reward/bright"] > 0.9
    assert before["accuracy"] >= 0.9
    assert after["accuracy"] >= 0.85
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["ratio_gap_max"] for line in lines) < 1e-4
