"""What the tests compare of two runs."""

import json
from pathlib import Path

import torch

TIMES = ("step_s", "eval_s", "images_per_s", "mfu", "spent_hours")


def metrics(folder):
    """Lines of metrics.jsonl without what a clock measured, and without drift/..., of steps that have a grid: there is
    one wherever a run ends.
    """
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not _varies(k)} for line in lines]


def _varies(name):
    return name in TIMES or name.endswith(("_ms", "_share")) or name.startswith("drift/")


def weights(folder):
    return torch.load(Path(folder) / "var.pth", weights_only=True)


def assert_same_run(a, b):
    """Equal metrics, and weights of equal bits."""
    assert metrics(a) == metrics(b)
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
