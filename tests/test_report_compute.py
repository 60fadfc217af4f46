"""The page over compute: axes, several runs side by side, pairs, prompts, evaluations of prompts."""

import json
import re
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from varfast.report import charts as report_charts
from varfast.report import main
from varfast.report.axes import number, positions
from varfast.report.layout import page
from varfast.report.run import read_run
from varfast.report.verdicts import verdict
from varfast.runs.log import RunLog
from varfast.runs.pictures import save_picture
from varfast.train import train
from varfast.types import Rewards

from .test_report import Page, acted_on, assert_self_contained, before_after, browse, make_run, needs_browser  # noqa: F401

EVIL = '<img src=x onerror="document.title=1">'


def spent(step, flop, **values):
    """A line of metrics.jsonl of a run whose steps cost `flop` each."""
    of_run = {"spent_images": 8 * step, "spent_flop": flop * step, "spent_hours": 0.5 * step}
    return {"step": step, "reward_mean": 0.1 * step, **of_run, **values}


def pages(folders, over="auto"):
    return Page(page([read_run(folder, folder.name) for folder in folders], over))


@pytest.fixture
def two(make_run):  # noqa: F811
    """A run of 4 cheap steps and one of 2 dear ones, both of 8e15 FLOP."""
    values = {"reward": [0.0, 0.5], "accuracy": [1.0, 0.0]}, {"reward": [0.5, 1.0], "accuracy": [1.0, 1.0]}
    summary = {"before": {}, "after": {}, "ended_by": "run.budget_flop=8e15"}
    cheap = make_run(
        "cheap", [spent(step, 2e15) for step in range(1, 5)], summary=summary | {"step": 4},
        before_after=before_after(*values, step=4),
    )  # fmt: skip
    dear = make_run("dear", [spent(step, 4e15) for step in (1, 2)], before_after=before_after(*values, step=2))
    return cheap, dear


def line_of(parsed, chart, name):
    """(x, y) of the points of a curve as it is drawn, and None if it is hidden."""
    number_of = next(i for i, line in enumerate(parsed.numbers[chart]["curves"]) if line["name"] == name)
    paths = [a for a in parsed.all("path") if a["class"].startswith("line") and "data-curve" in a]
    before = sum(len(numbers["curves"]) for numbers in parsed.numbers[:chart])
    path = paths[before + number_of]
    return None if not path["d"] else re.findall(r"([\d.]+),([\d.]+)", path["d"])


def charts_by_title(parsed_text):
    return re.findall(r"<figcaption><b>(.*?)</b>", parsed_text)


def test_several_runs_stand_on_one_axis_of_flop(two):
    source = page([read_run(folder, folder.name) for folder in two])
    parsed = Page(source)
    assert_self_contained(parsed)
    chart = charts_by_title(source).index("reward_mean")
    assert parsed.numbers[chart]["x"] == [2e15, 8e15]
    assert [line["spent"]["flop"] for line in parsed.numbers[chart]["curves"]] == [
        [2e15, 4e15, 6e15, 8e15],
        [4e15, 8e15],
    ]
    assert [x for x, _ in line_of(parsed, chart, "cheap")] == ["0.0", "333.3", "666.7", "1000.0"]
    assert [x for x, _ in line_of(parsed, chart, "dear")] == ["333.3", "1000.0"]
    plot = source[source.index("reward_mean over FLOP") :]
    assert re.findall(r'<span class="x" style="left:([\d.]+)%">(\w+)</span>', plot[: plot.index("</figure>")]) == [
        ("0.0", "2e15"), ("33.3", "4e15"), ("66.7", "6e15"), ("100.0", "8e15"),
    ]  # fmt: skip
    assert "reward_mean over FLOP; cheap: 0.1 to 0.4; dear: 0.1 to 0.2" in source
    shown = next(a for a in parsed.all("input", name="over") if "checked" in a)
    assert shown["value"] == "flop"
    assert [a["value"] for a in parsed.all("input", name="over")] == ["step", "images", "flop", "hours"]


@pytest.mark.parametrize(("over", "ends"), [("step", [1, 4]), ("images", [8, 32]), ("hours", [0.5, 2.0])])
def test_another_axis_can_be_asked_for(two, over, ends, tmp_path):
    assert main([*map(str, two), f"over={over}", f"out={tmp_path / 'r.html'}"]) == 0
    source = (tmp_path / "r.html").read_text()
    assert Page(source).numbers[charts_by_title(source).index("reward_mean")]["x"] == ends


def test_one_run_is_drawn_over_steps_and_says_what_it_spent(two):
    parsed = pages(two[:1])
    assert parsed.numbers[0]["x"] == [1, 4]
    assert "Spent: 32 images, 8e15 FLOP, 2 h 0 min of steps. Ended by run.budget_flop=8e15." in parsed.text
    assert "ended by run.budget_flop=8e15, after 4 steps" in parsed.text


def test_a_run_that_does_not_count_is_drawn_over_steps_alone(make_run, two):  # noqa: F811
    old = make_run("old", [{"step": step, "reward_mean": 0.5, "loss": 1.0} for step in (1, 2, 3)])
    source = page([read_run(folder, folder.name) for folder in (old, *two)])
    parsed, titles = Page(source), charts_by_title(source)
    assert parsed.numbers[titles.index("reward_mean")]["x"] == [1, 4]  # not all of them count
    parsed = pages([old, *two], "flop")
    assert line_of(parsed, titles.index("reward_mean"), "old") is None
    assert line_of(parsed, titles.index("reward_mean"), "cheap") is not None
    # A chart of which no curve has the axis stays over steps.
    assert parsed.numbers[titles.index("loss")]["x"] == [1, 3]
    assert parsed.all("input", name="over")
    assert not pages([old]).all("input", name="over")


def test_steps_of_an_earlier_version_are_taken_to_have_cost_the_same(make_run):  # noqa: F811
    rows = [{"step": 1, "reward_mean": 0.1}, {"step": 2, "reward_mean": 0.2}, spent(3, 2e15), spent(5, 2e15)]
    run = read_run(make_run(rows=rows), "x")
    assert positions(run, [1, 2, 3, 4, 5])["flop"] == [2e15, 4e15, 6e15, 8e15, 1e16]
    falling = read_run(make_run("y", [spent(1, 3.0), spent(2, 1.0)]), "y")
    assert "flop" not in positions(falling, [1, 2])  # edited: no axis goes back


def test_a_table_says_what_each_run_reached_and_spent(two):
    text = pages(two).text
    table = text[: text.index("In numbers")]
    assert "verdictreward, before → afteraccuracy, before → afterstepsimagesFLOPtimeended by" in table
    assert re.search(r"cheap[^→]*0.25 → 0.7550.0 % → 100.0 %4328e152 h 0 minrun.budget_flop=8e15", table)
    assert re.search(r"dear[^→]*0.25 → 0.7550.0 % → 100.0 %2168e151 h 0 min", table)
    assert "Of 2 runs" not in text  # not all of them are complete


def test_fresh_samples_are_drawn_from_the_base_to_the_end(two):
    source = page([read_run(folder, folder.name) for folder in two])
    parsed, titles = Page(source), charts_by_title(source)
    assert titles[:2] == ["reward of samples", "accuracy of samples"]
    assert [line["points"] for line in parsed.numbers[1]["curves"]] == [
        [[0, 0.5], [4, 1.0]],
        [[0, 0.5], [2, 1.0]],
    ]
    assert [line["spent"]["flop"] for line in parsed.numbers[1]["curves"]] == [[0.0, 8e15], [0.0, 8e15]]


@pytest.mark.parametrize(("value", "wanted"), [(2e15, "2e15"), (5e8, "5e8"), (250.0, "250"), (0.02, "0.02"), (0, "0")])
def test_numbers_of_an_axis_are_short(value, wanted):
    assert number(value) == wanted


REDRAW = """
const drawn = () => [...document.querySelectorAll(".plot")].map(plot => ({
  paths: [...plot.querySelectorAll("path")].map(path => path.getAttribute("d")),
  labels: [...plot.querySelectorAll(".x, .y, .axis")].map(label => label.textContent),
  note: plot.closest("figure").querySelector(".cut").textContent,
}));
const found = {};
for (const [name, selector, change] of [
  ["over", "[name=over][value=hours]", input => { input.checked = true; }],
  ["scale", "[name=scale][value=log]", input => { input.checked = true; }],
  ["smoothing", "[name=smoothing]", input => { input.value = 0.9; }],
]) {
  const input = document.querySelector(selector);
  change(input);
  input.dispatchEvent(new Event("input", {bubbles: true}));
  found[name] = drawn();
}
document.body.dataset.seen = JSON.stringify(found);
"""


def drawn(source):
    """Of each chart: places in its paths, and labels, as REDRAW notes them."""
    found = []
    for plot in re.findall(r'<div class="plot".*?</figure>', source, re.DOTALL):
        labels = re.findall(r'<span class="(?:x|y|axis)"[^>]*>([^<]*)</span>', plot)
        found.append((re.findall(r'<path class="(?:rule|band|raw|line)[^>]* d="([^"]*)"', plot), sorted(labels)))
    return found


def assert_drawn_alike(ours, theirs):
    assert len(ours) == len(theirs)
    for ours_of, (paths, labels) in zip(ours, theirs, strict=True):
        assert sorted(ours_of["labels"]) == labels
        # A plot's legend has paths too, outside of it.
        for a, b in zip(ours_of["paths"], paths, strict=False):
            numbers = [[float(x) for x in re.findall(r"-?[\d.]+", d)] for d in (a, b)]
            assert numbers[0] == pytest.approx(numbers[1], abs=0.4, rel=1e-3)


@needs_browser
def test_the_script_draws_as_the_page_does(make_run, tmp_path, monkeypatch):  # noqa: F811
    """Over another axis, then on logarithmic scales, then smoothed more: against pages that are drawn so by Python."""
    noise = np.random.RandomState(0).uniform(0.5, 1.0, (700, 3))
    rows = [
        spent(n, 2e15, loss=float(a), kl=float(b * n), entropy=0.0, rollout_ms=9e4 if n == 1 else float(c))
        for n, (a, b, c) in enumerate(noise, 1)
    ]
    folders = [make_run("long", rows), make_run("short", [spent(n, 4e15, loss=0.7, kl=2.0) for n in (1, 2)])]
    runs = [read_run(folder, folder.name) for folder in folders]
    found = json.loads(browse(acted_on(page(runs), REDRAW), tmp_path, 1300).all("body")[0]["data-seen"])
    assert_drawn_alike(found["over"], drawn(page(runs, "hours")))
    assert any(chart["note"] == "Cut off at the top; the highest is 90000." for chart in found["over"])
    monkeypatch.setattr(
        report_charts, "_LOG_SCALE", list(dict.fromkeys(m for run in runs for m in run.metrics.columns))
    )
    assert_drawn_alike(found["scale"], drawn(page(runs, "hours")))
    monkeypatch.setattr(report_charts, "smoothed", partial(report_charts.smoothed, weight=0.9))
    assert_drawn_alike(found["smoothing"], drawn(page(runs, "hours")))


def test_the_script_is_a_script(two, tmp_path):
    """Where there is no browser, node at least reads it."""
    (tmp_path / "script.js").write_text(pages(two).scripts[1])
    try:
        done = subprocess.run(["node", "--check", str(tmp_path / "script.js")], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no node here")
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


def dpo_run(make_run, name="x", steps=30, accuracy=0.7, chosen=0.01, rejected=-0.2):  # noqa: F811
    pairs = {"pair_accuracy": accuracy, "implicit_margin": chosen - rejected, "implicit_chosen": chosen}
    pairs |= {"implicit_rejected": rejected, "reward_chosen": 0.9, "reward_rejected": 0.1, "reward_margin": 0.8}
    pairs |= {"pairs": 4, "logp_chosen": -9.0, "logp_rejected": -10.0, "kl": 0.01}
    rows = [spent(step, 1e9, **pairs) for step in range(1, steps + 1)]
    return make_run(name, rows, "dpo: {beta: 0.1}\nrollout: {labels_per_step: 4}\n")


def test_pairs_have_charts_of_their_own(make_run):  # noqa: F811
    folder = dpo_run(make_run)
    source = page([read_run(folder, "x")])
    section = source[source.index("<h3>Pairs</h3>") : source.index("<summary>Other metrics</summary>")]
    titles = charts_by_title(section)
    assert titles == [
        "pair_accuracy", "implicit_margin", "reward_margin", "pairs",
        "implicit rewards of pairs", "rewards of pairs", "log-probabilities of pairs",
    ]  # fmt: skip
    assert re.findall(r"</svg>((?:implicit|reward|logp)_\w+)</li>", section) == [
        "implicit_chosen", "implicit_rejected", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected",
    ]  # fmt: skip
    other = dpo_run(make_run, "y")
    several = charts_by_title(page([read_run(folder, "x"), read_run(other, "y")]))
    assert {"implicit_chosen", "implicit_rejected", "reward_chosen", "logp_rejected"} <= set(several)


@pytest.mark.parametrize(
    ("metric", "values", "level"),
    [
        ("pair_accuracy", {"accuracy": 0.55}, "healthy"),
        ("pair_accuracy", {"accuracy": 0.549}, "look"),
        ("pair_accuracy", {"accuracy": 0.499}, "broken"),
        ("pair_accuracy", {"accuracy": 0.7, "steps": 5}, None),
        ("implicit_chosen", {"chosen": 0.1, "rejected": -0.2}, "healthy"),
        ("implicit_chosen", {"chosen": -0.1, "rejected": -0.4}, "look"),
        ("implicit_chosen", {"chosen": -1.0, "rejected": -1.2}, "broken"),
        ("implicit_chosen", {"chosen": -1.0, "rejected": -0.5}, None),
    ],
)
def test_verdicts_of_pairs(make_run, metric, values, level):  # noqa: F811
    assert verdict(read_run(dpo_run(make_run, **values), "x"), metric).level == level


def test_what_is_said_of_dpo_is_of_dpo(make_run):  # noqa: F811
    text = pages([dpo_run(make_run)]).text
    assert "clip_fraction" not in text
    assert "kl_beta" not in text
    assert "still growing steeply: raise dpo.beta" in text


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and their evaluations


def prompts_of(folder, *texts):
    rows = [{"prompt": text, "tag": "colour", "domain": "train", "extra": [1]} for text in texts]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_prompts_stand_under_the_grids_and_beside_the_samples(make_run):  # noqa: F811
    folder = make_run()
    prompts_of(folder, "a red cube", f"two dogs {EVIL}")
    rewards = Rewards(torch.arange(2.0), {"luma": torch.arange(2.0)})
    rows = ["a red cube", f"two dogs {EVIL}"]
    with RunLog(folder, 3, 3, tensorboard=False) as log:
        for step in (0, 3):
            log.grid(step, torch.zeros(4, 3, 8, 8), 2, ["a red", "two"], rows)
        log.samples(3, torch.zeros(2, 3, 8, 8), torch.arange(2), rewards)
    parsed = pages([folder])
    assert_self_contained(parsed)
    assert parsed.all("ol", **{"aria-label": "prompts of the rows, from the top"})
    assert f"a red cubetwo dogs {EVIL}" in parsed.text
    assert "A row a prompt" in parsed.text
    alts = [a["alt"] for a in parsed.all("img")]
    assert f"best 1: “two dogs {EVIL}”, reward 1" in alts
    assert "worst 1: “a red cube”, reward 0" in alts
    assert "label" not in "".join(alts)


def test_damaged_prompts_are_left_out(make_run):  # noqa: F811
    folder = make_run()
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    assert "prompts.jsonl: prompt: Input should be a valid string" in pages([folder]).text
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n{"pro')
    assert "prompts.jsonl: line 2 is not valid JSON" in pages([folder]).text
    (folder / "grid_rows.json").write_text("{}")
    assert "grid_rows.json: it holds no list" in pages([folder]).text


def test_a_run_keeps_what_its_rows_show(make_config):
    config = make_config(eval__samples_per_label=0, run__steps=1)
    train(config)
    assert json.loads((Path(config.run.dir) / "grid_rows.json").read_text()) == ["0", "1"]
    assert "rows, from the top" not in page([read_run(Path(config.run.dir), "x")])  # labels are in the picture


def evaluated(folder, after):
    estimate = {"value": after, "low": after - 0.1, "high": after + 0.1}
    row = {"name": "score/clip", "reference": {"value": 0.5}, "checkpoint": estimate, "difference": {"value": 0.1}}
    groups = ("all", "train", "held_out", "out_of_domain", "tag:counting", f"tag:{EVIL}")
    content = {"images": 40, "labels": 10, "prompts": 10, "intervals": "95 %", "pictures": None}
    content["rows"] = [row | {"labels": group} for group in groups]
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(content))


def test_an_evaluation_of_prompts_has_domains_and_tags(two):
    for folder, after in zip(two, (0.6, 0.7), strict=True):
        evaluated(folder, after)
    source = page([read_run(folder, folder.name) for folder in two])
    parsed = Page(source)
    assert_self_contained(parsed)
    text = parsed.text[parsed.text.index("Side by side") :]
    for group in ("trained on", "held out", "out of domain", "counting", EVIL):
        assert re.search(re.escape(f"score/clip, {group}") + r"0.6 \[0.5, 0.7\]0.7 \[0.6, 0.8\]", text), group
    assert "By tag" in text
    assert "40 images a model, of 10 prompts" in text
    # Over compute, by domain.
    titles = charts_by_title(source)
    assert {"score/clip", "score/clip, held out", "score/clip, out of domain"} <= set(titles)
    out = parsed.numbers[titles.index("score/clip, out of domain")]["curves"]
    assert [[point[1] for point in line["points"]] for line in out] == [[0.5, 0.6], [0.5, 0.7]]


def test_a_grid_is_told_to_be_of_labels_where_there_are_no_prompts(make_run):  # noqa: F811
    folder = make_run()
    for step in (0, 3):
        save_picture(folder / "grids" / f"step_{step:06d}.png", np.zeros((8, 8, 3), np.uint8))
    assert "A row a label" in pages([folder]).text
