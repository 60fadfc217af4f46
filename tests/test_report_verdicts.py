"""Verdicts on a run: at their thresholds and on both sides of them, and how a run ended."""

import json
import re
from pathlib import Path

import pytest

from varfast.report.layout import page
from varfast.report.run import read_run
from varfast.report.verdicts import CHECKS, HEALTHY, LIMITS, verdict, verdicts, worst
from varfast.runs.alarm import CAUSES, WINDOW

from .test_report import Page, before_after, make_run  # noqa: F401

ROOT = Path(__file__).parent.parent
SIGNS = {"healthy": "✓ healthy", "look": "! look", "broken": "✗ broken", None: "no verdict"}


def run_of(make_run, metric, values, config="{}", **files):  # noqa: F811
    rows = [{"step": step, metric: value} for step, value in enumerate(values, start=1)]
    return read_run(make_run(rows=rows, config=config, **files), "x")


@pytest.mark.parametrize(
    ("metric", "values", "config", "level"),
    [
        ("clip_fraction", [0.5, 0.1], "{}", "healthy"),
        ("clip_fraction", [0.101], "{}", "look"),
        ("clip_fraction", [0.2], "{}", "look"),
        ("clip_fraction", [0.201], "{}", "broken"),
        ("groups_without_signal", [16.0], "rollout: {labels_per_step: 32}", "healthy"),
        ("groups_without_signal", [16.1], "rollout: {labels_per_step: 32}", "look"),
        ("groups_without_signal", [18.8], "rollout: {labels_per_step: 32}", "look"),
        ("groups_without_signal", [25.6], "rollout: {labels_per_step: 32}", "look"),
        ("groups_without_signal", [25.7], "rollout: {labels_per_step: 32}", "broken"),
        ("groups_without_signal", [30.0], "{}", None),
        ("ratio_gap_max", [1e-4, 1e-6], "run: {dtype: float32}", "healthy"),
        ("ratio_gap_max", [1.1e-4, 1e-6], "run: {dtype: float32}", "look"),
        ("ratio_gap_max", [1.1e-3, 1e-6], "run: {dtype: float32}", "broken"),
        ("ratio_gap_max", [0.1], "run: {dtype: bfloat16}", "healthy"),
        ("ratio_gap_max", [0.3], "run: {dtype: bfloat16}", "look"),
        ("ratio_gap_max", [0.31], "run: {dtype: bfloat16}", "broken"),
        ("ratio_gap_max", [0.5], "{}", None),
        ("kl", [0.1 * (1 - 0.9**step) for step in range(60)], "{}", "healthy"),
        ("kl", [0.01 * step for step in range(60)], "{}", "look"),
        ("kl", [0.001 * step**2 for step in range(60)], "{}", "broken"),
        ("kl", [0.01 * step for step in range(10)], "{}", None),
        ("kl", [0.0] * 30, "{}", "healthy"),
    ],
)
def test_verdicts_on_metrics(make_run, metric, values, config, level):  # noqa: F811
    run = run_of(make_run, metric, values, config)
    found = verdict(run, metric)
    assert found.level == level
    text = page([run])
    badge = f'<span class="badge {level or "none"}">{SIGNS[level]}</span>'
    assert f"<li>{badge}<div><b>{CHECKS[metric]}</b>" in text[: text.index("<main>")]
    assert f"<p>Healthy: {HEALTHY[metric][0]}" in text.replace("&lt;", "<")  # at the chart
    assert f"{badge} <small>" in text[text.index("<main>") :]
    assert verdict(run, "clip_fraction" if metric != "clip_fraction" else "kl") is None


def test_groups_without_signal_are_no_fault_where_the_reward_is_earned(make_run):  # noqa: F811
    def run(name, ends):
        means = [ends[0]] * 10 + [ends[1]] * 20
        rows = [
            {"step": i, "reward_mean": r, "reward_std": 0.3, "groups_without_signal": 4} for i, r in enumerate(means, 1)
        ]
        return read_run(make_run(name, rows, "rollout: {labels_per_step: 4}"), name)

    risen, level = run("a", (0.1, 0.99)), run("b", (0.1, 0.12))
    for check in ("groups_without_signal", "learning"):
        assert verdict(risen, check).level == "look"
        assert "nearly all samples earn the reward now" in verdict(risen, check).value
        assert verdict(level, check).level == "broken"


def test_kl_that_was_not_measured_is_said(make_run):  # noqa: F811
    run = run_of(make_run, "reward_mean", [0.5], "grpo: {kl_beta: 0.0}")
    assert verdict(run, "kl").value == "not measured"
    parsed = Page(page([run]))
    assert f"no verdict{CHECKS['kl']} not measuredgrpo.kl_beta=0 holds no base to compare with" in parsed.text
    assert verdict(run_of(lambda **k: make_run("y", **k), "reward_mean", [0.5]), "kl") is None


def test_a_kl_of_zero_that_an_earlier_version_wrote_without_measuring_it_is_not_shown(make_run):  # noqa: F811
    run = run_of(make_run, "kl", [0.0] * 30, "grpo: {kl_beta: 0.0}")
    assert verdict(run, "kl").value == "not measured"
    text = page([run])
    assert "<figcaption><b>kl</b>" not in text
    assert "0 → 0" not in text


@pytest.mark.parametrize(
    ("before", "after", "level"),
    [
        ([0.0] * 40, [1.0] * 40, "healthy"),
        ([0.0, 1.0] * 20, [1.0, 0.0] * 20, "look"),
        ([1.0] * 40, [0.0] * 40, "broken"),
    ],
)
def test_the_verdict_on_the_reward_is_by_the_interval_of_the_pairs(make_run, before, after, level):  # noqa: F811
    run = read_run(make_run(before_after=before_after({"reward": before}, {"reward": after})), "x")
    assert verdict(run, "reward").level == level


@pytest.mark.parametrize(
    ("after", "level"), [(0.95, "healthy"), (0.949, "look"), (0.8, "look"), (0.799, "broken"), (1.0, "healthy")]
)
def test_the_verdict_on_labels_is_by_the_fall_from_the_base(make_run, after, level):  # noqa: F811
    of_grids = run_of(make_run, "drift/label_accuracy", [after], appearance={"label_accuracy": 1.0})
    assert verdict(of_grids, "label_accuracy").level == level
    values = [1.0] * 1000, [1.0] * round(1000 * after) + [0.0] * round(1000 * (1 - after))
    folder = make_run("y", before_after=before_after(*({"reward": v, "accuracy": v} for v in values)))
    assert verdict(read_run(folder, "y"), "label_accuracy").level == level


@pytest.mark.parametrize(("end", "level"), [(0.1, "healthy"), (0.099, "look"), (0.05, "look"), (0.049, "broken")])
def test_the_verdict_on_diversity_is_by_the_share_of_the_base(make_run, end, level):  # noqa: F811
    run = run_of(make_run, "drift/diversity", [0.2, end], appearance={"diversity": 0.2})
    assert verdict(run, "diversity").level == level
    assert verdict(run_of(lambda **k: make_run("y", **k), "drift/diversity", [0.2, end]), "diversity") is None


# ---------------------------------------------------------------------------------------------------------------------
# How it ended, and whether it learned


@pytest.mark.parametrize(
    ("files", "level", "value"),
    [
        ({"summary": {"before": {}, "after": {}, "step": 3, "ended_by": "run.steps=3"}}, "healthy", "finished: 3 of 9"),
        (
            {"summary": {"before": {}, "after": {}, "step": 3, "ended_by": "run.budget_flop=1e9"}},
            "healthy",
            "ended by run.budget_flop=1e9, after 3 steps",
        ),
        (
            {"summary": {"before": {}, "after": {}, "step": 3, "ended_by": "run.stop_when_idle=true"}},
            "look",
            "stopped after 3 steps",
        ),
        ({}, "look", "not finished: 3 of 9 steps"),
        ({"summary": {"before": {}, "after": {}, "step": 2}}, "look", "not finished: 3 of 9 steps"),  # it went on
        ({"ended": {"step": 3, "why": "SIGTERM", "diverged": False}}, "look", "stopped by SIGTERM: 3 of 9 steps"),
        (
            {"ended": {"step": 4, "why": "it diverged: weights\n  more", "diverged": True}},
            "broken",
            "diverged after step 4",
        ),
        ({"ended": {"step": 3, "why": "no space", "diverged": False}}, "broken", "ended by an error after step 3"),
        ({"ended": {"step": 2, "why": "SIGTERM", "diverged": False}}, "look", "not finished: 3 of 9"),  # it went on
        ({"ended": {"step": "2"}}, "look", "not finished: 3 of 9"),
    ],
)
def test_how_a_run_ended(make_run, files, level, value):  # noqa: F811
    run = read_run(make_run(config="run: {steps: 9}", **files), "x")
    found = verdict(run, "end")
    assert found.level == level
    assert found.value.startswith(value)
    if "ended" in files and level == "broken":
        assert found.rule == files["ended"]["why"].split("\n")[0]


IDLE = {"reward_mean": 0.0, "reward_std": 0.0, "groups_without_signal": 4, "grad_norm": 0.0, "learning_rate": 1e-4}
LEARNS = {"reward_mean": 0.5, "reward_std": 0.3, "groups_without_signal": 1, "grad_norm": 0.4, "learning_rate": 1e-4}


@pytest.mark.parametrize(
    ("steps", "level", "value"),
    [
        ([LEARNS] * 30, "healthy", "rewards differ"),
        ([LEARNS] * (WINDOW - 1), None, ""),
        ([IDLE] * 30, "broken", "not since step 1"),
        ([LEARNS] * 5 + [IDLE] * WINDOW, "broken", "not since step 6"),
        ([LEARNS] * 5 + [IDLE] * 20 + [LEARNS] * 5, "look", "not in steps 6 to 25"),
        ([IDLE] * (WINDOW - 1) + [LEARNS] * 5, "healthy", "rewards differ"),
    ],
)
def test_the_alarm_of_training_is_in_the_page(make_run, steps, level, value):  # noqa: F811
    rows = [{"step": number, **step} for number, step in enumerate(steps, 1)]
    run = read_run(make_run(rows=rows, config="rollout: {labels_per_step: 4}"), "x")
    found = verdict(run, "learning")
    assert found.level == level
    assert found.value.startswith(value)
    if level in ("broken", "look"):
        assert CAUSES["reward"][1] in found.rule
        assert "every image earned the same reward" in Page(page([run])).text


def test_the_worst_verdict_stands_at_the_top(make_run):  # noqa: F811
    rows = [{"step": number, **IDLE, "clip_fraction": 0.15} for number in range(1, 20)]
    run = read_run(make_run(rows=rows, config="run: {steps: 19}\nrollout: {labels_per_step: 4}"), "x")
    assert worst(list(verdicts(run).values())) == "broken"
    assert "✗ broken Learning, groups without signal" in Page(page([run])).text
    rows = [{"step": number, **LEARNS} for number in range(1, 20)]
    complete = {"before": {}, "after": {}, "step": 19}
    good = read_run(make_run("y", rows, "rollout: {labels_per_step: 4}", summary=complete), "y")
    assert "✓ healthy in all 3 checks" in Page(page([good])).text


# ---------------------------------------------------------------------------------------------------------------------
# What the documents say


def test_healthy_values_are_those_of_the_documentation():
    table = (ROOT / "docs/guide/numbers.md").read_text().partition("## The verdicts of the report")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", table, re.MULTILINE)
    said = {name: tuple(text.replace("`", "") for text in texts) for name, *texts in rows}
    assert len(HEALTHY) == 6
    assert said == HEALTHY


def test_limits_are_those_of_the_documentation():
    rows = re.findall(
        r"^\| (.*?) \| .*? \| (.*?) \| (.*?) \|$", (ROOT / "docs/guide/numbers.md").read_text(), re.MULTILINE
    )
    said = {name.replace("`", ""): ends for name, *ends in rows if re.search(r"\d", ends[0])}
    wanted = {
        name: [f"from {-good:g}", f"from {-bad:g}"] if good < 0 else [f"up to {good:g}", f"up to {bad:g}"]
        for name, (good, bad) in LIMITS.items()
    }
    assert said == wanted
    assert json.dumps(wanted)
