import base64
import hashlib
import html
import io
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import varfast.evaluate
import varfast.evaluation.metrics
from varfast import InputError
from varfast.report import main
from varfast.report.charts import charts, curve, smoothed, ticks
from varfast.report.elements import brief, masked
from varfast.report.layout import page
from varfast.report.reading import parse_metrics
from varfast.report.run import read_run
from varfast.runs.log import RunLog
from varfast.runs.pictures import save_picture
from varfast.train import train
from varfast.types import Rewards

VOID = {"meta", "link", "img", "br", "input"}
EVIL = '<img src=x onerror="document.title=1">&amp;'


class Page(HTMLParser):
    """Elements with their attributes, and the text outside of scripts and styles. Refuses what does not balance."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.spans, self.scripts, self.styles = [], [], []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):  # SVG's
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        if inside in ("script", "style"):
            (self.scripts if inside == "script" else self.styles).append(data)
        else:
            self.text += data
            if inside == "span":
                self.spans.append((self.elements[-1][1], data))

    def all(self, tag, **attributes):
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]

    @property
    def numbers(self):
        """Of the charts, in the order of the page."""
        return json.loads(self.scripts[0])["charts"]


def assert_self_contained(parsed):
    for _, attributes in parsed.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                assert value.startswith(("data:", "#"))
    styles = "".join(parsed.styles + [a["style"] for _, a in parsed.elements if "style" in a])
    assert "url(" not in styles
    assert "@import" not in styles
    assert len(parsed.scripts) == 2


def metrics(step, **values):
    return {"step": step, "reward_mean": 0.1 * step, "kl": 0.01 * step, "rollout_ms": 5.0, **values}


@pytest.fixture
def make_run(tmp_path):
    """A run folder written by hand."""

    def make(name="x", rows=None, config="run: {steps: 3}\n", **files):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(config)
        rows = [metrics(step) for step in (1, 2, 3)] if rows is None else rows
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for file, content in files.items():
            (folder / f"{file}.json").write_text(json.dumps(content))
        return folder

    return make


def report(*folders):
    return Page(page([read_run(folder, folder.name) for folder in folders]))


def test_report_of_a_real_run(make_config, tmp_path, capsys):
    config = make_config(log__grid_every=2)
    train(config)
    out = tmp_path / "deep" / "report.html"
    assert main([config.run.dir, f"out={out}"]) == 0
    assert f"{out}: 1 run" in capsys.readouterr().out
    parsed = Page(out.read_text())
    assert_self_contained(parsed)
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    logged = {name for line in lines for name in json.loads(line)}  # some are measured with the grids alone
    titles = re.findall(r"<figcaption><b>(.*?)</b>", out.read_text())
    stages = {name for name in logged if name.endswith(("_ms", "_share"))}
    assert set(titles) == set(logged) - {"step", "reward/luma"} - stages | {"stages, *_ms", "stages, *_share"}
    assert {line["name"] for chart in parsed.numbers for line in chart["curves"]} == stages | {"run"}
    assert [a["data-step"] for a in parsed.all("img") if "data-step" in a] == ["0", "2", "3"]
    assert len([a for a in parsed.all("img") if re.match(r"(best|worst) \d: label \d, reward 0", a["alt"])]) == 16
    assert all(len(a["alt"]) > 15 for a in parsed.all("img"))
    assert "Left out" not in parsed.text
    for shown in ("kl_beta: 0.2", "before", "after", "torch", "reward (luma)", "10 fresh images", "3 of 3 steps"):
        assert shown in parsed.text


def test_report_draws_the_numbers_where_they_are(make_run):
    rows = [metrics(step, reward_mean=value) for step, value in ((1, 2.0), (2, 4.0), (5, 3.0))]
    parsed = report(make_run(rows=rows))
    how = {"log": False, "zero": False, "cut": False}
    assert parsed.numbers[0] == {
        "x": [1, 5], "curves": [{"name": "x", "points": [[1, 2.0], [2, 4.0], [5, 3.0]]}], "how": how
    }  # fmt: skip
    line = next(a["d"] for a in parsed.all("path") if a["class"].startswith("line"))
    points = [tuple(map(float, pair.split(","))) for pair in line.removeprefix("M").split()]
    assert [x for x, _ in points] == [0.0, 250.0, 1000.0]
    (_, low), (_, high), (_, middle) = points
    assert 0 < high < middle < low < 1000
    assert middle == pytest.approx((low + high) / 2, abs=0.1)
    # The label "3" stands where the curve is 3.
    place = next(a["style"] for a, label in parsed.spans if label == "3")
    assert float(re.search(r"top:([\d.]+)%", place)[1]) == pytest.approx(middle / 10, abs=0.1)


def test_several_runs_share_charts_and_show_what_differs(make_run):
    first = make_run("a", config="run: {dir: r/a, steps: 3}\nupdate: {lr: 0.1, minibatch: 4}\n", environment={"t": 1})
    rows = [metrics(1), metrics(2, extra=1.0)]
    second = make_run("b", rows, "run: {dir: r/b, steps: 9}\nupdate: {lr: 0.2, minibatch: 4}\n", environment={"t": 2})
    parsed = report(first, second)
    assert [line["name"] for line in parsed.numbers[0]["curves"]] == ["a", "b"]
    table = parsed.text[parsed.text.index("Settings") : parsed.text.index("config.yaml, resolved")]
    assert "update.lr0.10.2" in table
    assert "run.steps39" in table
    assert "minibatch" not in table
    assert "run.dir" not in table
    # A run keeps its colour where the other one has no curve.
    only_b = charts([read_run(first, "a"), read_run(second, "b")])["Other metrics"][0]
    assert [(line.name, line.style) for line in only_b.curves] == [("b", 1)]


def test_html_in_names_and_values_is_text(make_run):
    rows = [metrics(1, **{f"reward/{EVIL}": 1.0, f"</script>{EVIL}_ms": 2.0})]
    config = json.dumps({"run": {"steps": 1}, "reward": {EVIL: {"type": EVIL}}})  # JSON is YAML
    folder = make_run(EVIL, rows, config, environment={EVIL: EVIL}, summary={"before": {EVIL: EVIL}})
    other = make_run("b", config=config.replace("type", "kind"))
    noted = {"label": EVIL, "reward": 1.0, "rewards": {EVIL: 1.0, "b": 2.0}}
    save_picture(folder / "samples" / "step_000001.png", np.zeros((20, 8, 3), np.uint8))
    (folder / "samples" / "step_000001.json").write_text(json.dumps({"best": [noted], "worst": [noted]}))
    for folders in ([folder], [folder, other]):
        parsed = report(*folders)
        assert_self_contained(parsed)
        assert all(a["src"].startswith("data:image/") for a in parsed.all("img"))
        assert parsed.text.count(EVIL) > 10
    names = [line["name"] for chart in report(folder).numbers for line in chart["curves"]]
    assert f"</script>{EVIL}_ms" in names


def test_the_policy_lets_only_this_script_run(make_run):
    parsed = report(make_run())
    allowed = parsed.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    digest = base64.b64encode(hashlib.sha256(parsed.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in allowed
    assert allowed.startswith("default-src 'none'; img-src data:;")


def test_a_run_killed_while_it_wrote_is_shown(make_run):
    folder = make_run()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    parsed = report(folder)
    assert parsed.numbers[0]["x"] == [1, 3]
    assert "x: 1 lines of metrics.jsonl, cut off or damaged" in parsed.text
    assert "No sample grids" in parsed.text
    assert "Fresh samples are compared when a run is complete." in parsed.text


def test_values_that_are_not_finite_are_left_out(make_run):
    parsed = report(make_run(rows=[metrics(1), metrics(2, kl=math.nan), metrics(3, kl=math.inf), metrics(4)]))
    assert "NaN" not in parsed.scripts[0]
    kl = next(chart for chart in parsed.numbers if chart["curves"][0]["points"][-1][1] == 0.04)
    assert [point[0] for point in kl["curves"][0]["points"]] == [1, 4]
    assert "x: 2 values of kl that are no finite number" in parsed.text


def test_a_run_without_a_step_is_shown(make_run):
    assert "No step is complete yet" in report(make_run(rows=[])).text


def test_what_is_no_run_folder_is_refused(tmp_path, make_run):
    folder = make_run()
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"x is no run folder, or its run has not begun: it holds none of config.yaml"):
        read_run(folder, "x")
    (folder / "config.yaml").write_text("a: [1")
    with pytest.raises(InputError, match=r"x holds nothing to show: config.yaml: not valid YAML"):
        read_run(folder, "x")
    with pytest.raises(InputError, match="nowhere is no run folder: it does not exist"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="runs is missing; want a list, each a path"):
        main(["out=x.html"])
    with pytest.raises(InputError, match="there is no user 'nobody-of-this-name'"):
        main(["~nobody-of-this-name/x"])


def test_of_several_folders_those_without_a_run_are_named_and_left_out(tmp_path, make_run, capsys):
    (tmp_path / "notes.txt").write_text("no run")
    assert main([str(make_run()), str(tmp_path / "notes.txt"), f"out={tmp_path / 'r.html'}"]) == 0
    shown = capsys.readouterr()
    assert "1 run," in shown.out
    assert shown.err == f"left out: {tmp_path / 'notes.txt'} is no run folder: a file\n"


def test_config_that_is_no_yaml_is_left_out_and_the_rest_shown(make_run, tmp_path, capsys):
    assert main([str(make_run(config="a: [1")), f"out={tmp_path / 'r.html'}"]) == 0
    assert "x: left out: config.yaml: not valid YAML" in capsys.readouterr().err
    parsed = Page((tmp_path / "r.html").read_text())
    assert "config.yaml: not valid YAML" in parsed.text
    assert parsed.numbers[0]["x"] == [1, 3]


def test_folders_of_one_name_are_told_apart(make_run, tmp_path):
    make_run("a")
    (tmp_path / "deep").mkdir()
    shutil.copytree(tmp_path / "a", tmp_path / "deep" / "a")
    main([str(tmp_path / "a"), str(tmp_path / "deep" / "a"), f"out={tmp_path / 'r.html'}"])
    assert [line["name"] for line in Page((tmp_path / "r.html").read_text()).numbers[0]["curves"]] == [
        str(tmp_path / "a"),
        str(tmp_path / "deep" / "a"),
    ]


def test_curve_keeps_short_runs_as_they_are():
    assert curve("x", 0, [1, 3], [5.0, 4.0]).points == [(1, 5.0, 5.0, 5.0), (3, 4.0, 4.0, 4.0)]


def test_smoothed_is_an_average_by_weights_that_fall_with_age():
    values = np.random.RandomState(0).standard_normal(50) + 10.0
    for at, found in enumerate(smoothed(values.tolist(), 0.9)):
        assert found == pytest.approx(np.average(values[: at + 1], weights=0.9 ** np.arange(at, -1, -1)))
    assert smoothed([1.0, 5.0] * 10, 0.9) == [1.0, 5.0] * 10  # few values are left as they are


def test_curve_of_a_long_run_has_300_means_and_keeps_the_extremes():
    steps = list(range(1, 6001))
    values = np.random.RandomState(0).standard_normal(6000)
    values[1234] = 50.0
    found = curve("x", 0, steps, values.tolist()).points
    assert len(found) == 300
    for (step, value, low, high), part in zip(found, values.reshape(300, 20), strict=True):
        assert value == pytest.approx(part.mean())
        assert (low, high) == (part.min(), part.max())
        assert values[step - 1] in part
    assert max(point[3] for point in found) == 50.0


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.137, 0.9), (-3e-7, 2e-6), (1, 40000), (99.9, 100.1), (5, 5)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high) for t in found)
    apart = {float(f"{b - a:.6g}") for a, b in pairwise(found)}
    assert len(apart) <= 1
    assert all(f"{d:e}"[0] in "125" for d in apart)


def test_a_first_step_that_compiles_does_not_flatten_the_rest(make_run):
    rows = [
        metrics(step, rollout_ms=9000.0 if step == 1 else 10.0, kl=9.0 if step == 1 else 1e-3) for step in range(1, 13)
    ]
    parsed = report(make_run(rows=rows))
    assert parsed.text.count("Cut off at the top; the highest is 9000.") == 1
    lines = [a["d"] for a in parsed.all("path") if a["class"].startswith("line") and "," in a["d"]]
    heights = [[float(pair.split(",")[1]) for pair in line.removeprefix("M").split()] for line in lines]
    kl, rollout_ms = heights[1], heights[2]
    assert rollout_ms[0] < 0  # above the top
    assert 300 < rollout_ms[1] < 400  # 10 of 15
    assert kl[0] > 0


def test_log_scale_has_powers_of_ten(make_run):
    rows = [metrics(1, ratio_gap_max=2e-6), metrics(2, ratio_gap_max=0.0), metrics(3, ratio_gap_max=3e-3)]
    text = report(make_run(rows=rows)).text
    for label in ("1e-6", "1e-5", "1e-4", "1e-3", "1e-2"):
        assert label in text


def picture(uri):
    kind, _, content = uri.partition(";base64,")
    return kind, np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_best_and_worst_samples_are_shown_with_their_rewards(make_run, tmp_path):
    folder = make_run()
    images = torch.linspace(0, 1, 20).view(20, 1, 1, 1).expand(20, 3, 8, 8)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    scores_B = torch.arange(20.0)[order]
    rewards = Rewards(10 * scores_B, {"luma": scores_B, "other": -scores_B})
    with RunLog(folder, 3, 3, tensorboard=False) as log:
        log.samples(3, images[order], torch.arange(20)[order], rewards)
    parsed = report(folder)
    shown = [picture(a["src"]) for a in parsed.all("img")]
    wanted = [round(255 * i / 19) for i in [*range(19, 11, -1), *range(8)]]
    assert [kind for kind, _ in shown] == ["data:image/png"] * 16
    assert all(
        pixels.shape == (48, 48, 3) and (pixels == grey).all() for (_, pixels), grey in zip(shown, wanted, strict=True)
    )
    assert "have the" not in parsed.text  # no ties
    assert re.findall(r"label (\d+)(\d{3})luma", parsed.text)[:2] == [("19", "190"), ("18", "180")]
    assert re.findall(r"luma (-?\d+?)other", parsed.text)[-1] == "7"


def test_half_of_a_pair_falls_back_to_the_earlier_samples(make_run):
    folder = make_run()
    rewards = Rewards(torch.arange(4.0), {"luma": torch.arange(4.0)})
    with RunLog(folder, 3, 3, tensorboard=False) as log:
        for step in (1, 2):
            log.samples(step, torch.zeros(4, 3, 8, 8), torch.arange(4), rewards)
    (folder / "samples" / "step_000002.png").unlink()
    assert "x, step 1" in report(folder).text


def test_grids_of_a_long_run_are_few_and_small(make_run):
    folder = make_run()
    noise = np.random.RandomState(0).randint(0, 256, (300, 1300, 3)).astype(np.uint8)
    for step in range(0, 100):
        save_picture(folder / "grids" / f"step_{step:06d}.png", noise if step == 99 else noise[:8, :8])
    (folder / "grids" / "step_000000.png").write_bytes(b"no picture")
    grids = [a for a in report(folder).all("img") if "data-step" in a]
    steps = [int(a["data-step"]) for a in grids]
    assert len(steps) == 23  # of 24 the first cannot be read
    assert steps[-1] == 99
    kind, pixels = picture(grids[-1]["src"])
    assert kind == "data:image/jpeg"
    assert pixels.shape == (236, 1024, 3)
    assert picture(grids[0]["src"])[0] == "data:image/png"


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome here to open the page in")
ACT = """
const set = (selector, change) => {
  const input = document.querySelector(selector);
  change(input);
  input.dispatchEvent(new Event("input", {bubbles: true}));
};
const figures = [...document.querySelectorAll(".plot")];
const texts = figures.slice(0, 2).map((plot, i) => {
  const box = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + [0.57, 0.19][i] * box.width}));
  return plot.querySelector("output").innerText;
});
const after = document.querySelector(".after");
set(".pair input", slider => { slider.value = 0; });
const seen = [after.src === document.querySelector(".pair img").src, document.querySelector("span.step").textContent];
const lines = () => [...figures[1].querySelectorAll(".line")].map(path => path.getAttribute("d") !== "");
const labels = () => [...figures[1].querySelectorAll(".y")].map(label => label.textContent);
const switched = [lines()];
set("[name=run]", box => { box.checked = false; });
switched.push(lines(), labels());
set("[name=run]", box => { box.checked = true; });
figures[1].closest("figure").querySelectorAll(".legend button")[1].click();
switched.push(lines(), labels());
set("[name=scale][value=log]", box => { box.checked = true; });
switched.push(labels());
document.body.dataset.seen = JSON.stringify([texts, seen, switched]);
"""


def browse(source, folder, width):
    """The page after its scripts have run, without an error on the console."""
    (folder / "page.html").write_text(source)
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
         f"--user-data-dir={folder / 'profile'}", f"--window-size={width},2000", "--enable-logging=stderr",
         "--v=0", "--dump-dom", (folder / "page.html").as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    return Page(done.stdout)


def acted_on(source, script):
    """A page that runs another script after its own."""
    return re.sub(r"'sha256-[^']*'", "'unsafe-inline'", source).replace("</body>", f"<script>{script}</script></body>")


@pytest.fixture
def two_pages(make_run):
    """The report of two runs, one of which has grids and a long name of a platform."""
    rows = [metrics(step, kl=1e-6 * step) for step in range(1, 12)]
    folder = make_run(rows=rows, environment={"platform": "x" * 200})
    for step in (0, 10, 11):
        save_picture(folder / "grids" / f"step_{step:06d}.png", np.full((1040, 1040, 3), step, np.uint8))
    return page([read_run(folder, "x"), read_run(make_run("y"), "y")])


@needs_browser
def test_page_in_a_browser(two_pages, tmp_path):
    """No error on the console, values under the pointer, the slider turns, lines and scales are switched."""
    browse(two_pages, tmp_path, 1300)
    texts, seen, switched = json.loads(browse(acted_on(two_pages, ACT), tmp_path, 1300).all("body")[0]["data-seen"])
    assert texts == ["step 7\nx: 0.7", "step 3\nx: 3e-6\ny: 0.03"]
    assert seen == [True, "0"]
    both, without_x, of_y, without_y, of_x, powers = switched
    assert both == [True, True]
    assert (without_x, without_y) == ([False, True], [True, False])
    assert of_y == ["0", "0.01", "0.02", "0.03"]  # the axis follows the lines that are left
    assert of_x == ["0", "5e-6", "1e-5"]
    assert powers == ["1e-6", "1e-5", "1e-4"]


@needs_browser
def test_nothing_is_wider_than_a_phone(two_pages, tmp_path):
    """In a frame, since windows of some browsers cannot be made so narrow."""
    frame = f'<iframe style="width:400px;height:900px;border:0" srcdoc="{html.escape(two_pages)}"></iframe>'
    measure = """
      addEventListener("load", () => {
        const page = document.querySelector("iframe").contentDocument.documentElement;
        document.body.dataset.seen = JSON.stringify([page.clientWidth, page.scrollWidth]);
      });"""
    source = f"<!DOCTYPE html><html><head></head><body>{frame}<script>{measure}</script></body></html>"
    assert json.loads(browse(source, tmp_path, 1300).all("body")[0]["data-seen"]) == [400, 400]


def test_what_is_wide_scrolls_in_a_box_of_its_own(two_pages):
    """Without a browser: tables and texts are in boxes that scroll, and no cell of a grid keeps it wide."""
    parsed = Page(two_pages)
    rules = "".join(parsed.styles)
    assert ".wide{overflow-x:auto}" in rules
    assert re.search(r"pre\{overflow:auto", rules)
    assert two_pages.count("<table>") == two_pages.count('<div class="wide"><table>')
    widths = re.findall(r"minmax\((?!min\(100%|0,)[^)]*\)", rules)
    assert widths == ["minmax(clamp(72px,8vw,128px)"]  # of the best and worst samples
    assert re.search(r"\.pair img,\.grids img,\.measured img\{[^}]*max-width:100%", rules)


def test_page_shows_what_evaluate_measured(make_config, tmp_path):
    config = make_config(log__tensorboard=False)
    train(config)
    folder = Path(config.run.dir)
    arguments = [f"checkpoint={folder}", "samples_per_label=4", "cfg=0", "top_k=0", "top_p=0", "device=cpu"]
    assert varfast.evaluate.main(arguments) == 0
    measured = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    shown = page([read_run(folder, "run")])
    assert "varfast.evaluate" in shown
    row = measured["rows"][0]
    for side in ("reference", "checkpoint", "difference"):
        value, low, high = (f"{row[side][n]:{'+' * (side == 'difference')}.4g}" for n in ("value", "low", "high"))
        assert f"{value} [{low}, {high}]" in shown
    assert re.search(r'<figure class="measured"><img src="data:image/png;base64,[^"]+" alt="A row a label', shown)
    assert "from the left: reference, then checkpoint, the same seeds" in shown
    fid = {"name": "fid", "labels": "all", "reference": None, "checkpoint": {"value": 3.5}, "difference": None}
    measured["rows"] = [fid | {"features": f, "cfg": cfg} for f in ("inception", "dino") for cfg in (0.0, 1.5)]
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(measured))
    several = page([read_run(folder, "run")])
    for name in ("inception", "dino"):
        assert f"fid, {name} features, cfg 0<" in several
        assert f"fid, {name} features, cfg 1.5<" in several
    assert "images a model and guidance" in several
    (folder / "evaluation" / "evaluation.json").write_text('{"rows": [{"name": "<b>x</b>"}]}')
    broken = page([read_run(folder, "run")])
    assert "evaluation/evaluation.json: images: Field required" in broken
    assert "varfast.evaluate" not in broken


# ---------------------------------------------------------------------------------------------------------------------
# What changed


def first_screen(parsed):
    return parsed.text[: parsed.text.index("In numbers")]


def before_after(before, after, step=3):
    return {"settings": {}, "labels": [], "step": step, "before": before, "after": after}


def test_the_headline_is_before_to_after_with_the_interval_of_the_pairs(make_run):
    values = {"reward": [0.0] * 30 + [1.0] * 10}, {"reward": [0.0] * 4 + [1.0] * 36}
    parsed = report(make_run(before_after=before_after(*values)))
    found = varfast.evaluation.metrics.difference_interval(*(np.array(v["reward"]) for v in values))
    assert "Earns the reward: 25.0 % → 90.0 %." in first_screen(parsed)
    assert "40 fresh images" in first_screen(parsed)
    interval = f"+0.65 [{found.low:+.4g}, {found.high:+.4g}]"
    assert f"healthyReward of fresh samples {interval}" in first_screen(parsed)
    assert f"reward0.250.9{interval}" in parsed.text


def test_means_alone_have_no_interval(make_run):
    parsed = report(make_run(summary={"before": {"reward": 0.25, "accuracy": 1.0}, "after": {"reward": 0.5}}))
    assert "Mean reward: 0.25 → 0.5." in first_screen(parsed)
    assert "no interval, since before_after.json does not hold" in parsed.text
    assert "reward0.250.5+0.25" in parsed.text
    assert "[" not in parsed.text[: parsed.text.index("Settings")]


@pytest.mark.parametrize(
    ("weights", "names"),
    [((1.0,), ["reward (a)"]), ((2.0,), ["reward", "reward/a"]), ((1.0, 1.0), ["reward", "reward/a", "reward/b"])],
)
def test_the_only_reward_is_not_shown_twice(make_run, weights, names):
    parts = {f"reward/{name}": [0.5, 0.25] for name, _ in zip("ab", weights, strict=False)}
    total = {"reward": [sum(w * v for w in weights) for v in (0.5, 0.25)]}
    rows = [metrics(1, reward_mean=0.5 * sum(weights), **dict.fromkeys(parts, 0.5))]
    folder = make_run(rows=rows, before_after=before_after(total | parts, total | parts))
    text = page([read_run(folder, "x")])
    top = text[: text.index("Numbers of the steps")]
    assert re.findall(r'<th scope="row">(reward.*?)</th>', top) == names
    titles = re.findall(r"<figcaption><b>(.*?)</b>", text)
    drawn = [f"reward/{name}" for name, _ in zip("ab", weights, strict=False)]
    assert [t for t in titles if t.startswith("reward/")] == ([] if weights == (1.0,) else drawn)


def test_more_steps_than_asked_for_are_said(make_run):
    values = {"reward": [0.5, 0.5]}
    rows = [metrics(step) for step in range(1, 9)]
    folder = make_run(rows=rows, config="run: {steps: 6}\n", before_after=before_after(values, values, step=6))
    shown = report(folder).text
    assert '8 steps are done; the config now asks for 6. "After" was sampled after step 6.' in shown


def test_grids_of_first_and_last_step_stand_side_by_side_before_all_else(make_run):
    folder = make_run()
    for step, grey in ((0, 10), (2, 20), (3, 30)):
        save_picture(folder / "grids" / f"step_{step:06d}.png", np.full((8, 8, 3), grey, np.uint8))
    (folder / "grid_rows.json").write_text('["0", "cat"]')
    text = page([read_run(folder, "x")])
    parsed = Page(text[: text.index("<main>")] + "</body></html>")
    shown = parsed.all("img")
    assert [picture(a["src"])[1][0, 0, 0] for a in shown] == [10, 30]
    assert [a["alt"] for a in shown] == [
        "samples before training, step 0; a row each of 0, cat",
        "samples of the policy in training, step 3; a row each of 0, cat",
    ]
    rest = Page("<html><body>" + text[text.index("<main>") :])
    assert [picture(a["src"])[1][0, 0, 0] for a in rest.all("img")] == [10, 20, 30]


def test_ties_are_spread_over_labels_and_said(make_run):
    """Rewards of 0 and 1: eight images of eight labels, not the first group's eight."""
    folder = make_run()
    labels_B = torch.arange(10).repeat_interleave(16)
    ones_B = (torch.arange(160) % 16 < 12).float()
    images = torch.zeros(160, 3, 8, 8)
    with RunLog(folder, 3, 5, tensorboard=False) as log:
        log.samples(3, images, labels_B, Rewards(ones_B, {"bright": ones_B}))
        noted = json.loads((folder / "samples" / "step_000003.json").read_text())
        for title, reward in (("best", 1.0), ("worst", 0.0)):
            assert {sample["reward"] for sample in noted[title]} == {reward}
            assert len({sample["label"] for sample in noted[title]}) == 8
        text = report(folder).text
        assert "120 of the step's 160 have the best reward; 8 of them are shown" in text
        assert "40 of the step's 160 have the worst reward" in text
        log.samples(4, images, labels_B, Rewards(torch.ones(160), {"bright": torch.ones(160)}))
    noted = json.loads((folder / "samples" / "step_000004.json").read_text())
    assert len({sample["label"] for sample in noted["best"] + noted["worst"]}) == 10
    assert "All samples shown have the reward 1: none is better than another." in report(folder).text


@pytest.mark.parametrize(
    "content", [[{"label": 3, "name": "cat", "images": 5}], {"labels": [{"label": 3, "folder": "cat"}]}]
)
def test_labels_are_called_by_name_where_the_folder_gives_names(make_run, content):
    folder = make_run(labels=content)
    rewards = Rewards(torch.arange(4.0), {"luma": torch.arange(4.0)})
    with RunLog(folder, 3, 3, tensorboard=False) as log:
        log.samples(3, torch.zeros(4, 3, 8, 8), torch.arange(4), rewards)
    parsed = report(folder)
    assert "label 3 cat3" in parsed.text
    assert parsed.all("img", alt="best 1: label 3 cat, reward 3")
    assert "label 22" in parsed.text


def test_prompts_are_shown_by_domain_and_text(make_run):
    """What a run on texts leaves: values by domain, prompts.jsonl, and an evaluation of prompts."""
    ends = {"": 4, " (held out)": 3, " (out of domain)": 1}
    values = [{f"{n}{end}": [x] * k for end, k in ends.items() for n in ("reward", "reward/luma")} for x in (0.25, 0.5)]
    folder = make_run(before_after=before_after(*values))
    prompts = [{"prompt": text, "tag": "", "domain": "train"} for text in ("a\u2028 red <b>", "two dogs")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in prompts))
    with RunLog(folder, 3, 3, tensorboard=False) as log:
        log.samples(
            3, torch.zeros(2, 3, 8, 8), torch.arange(2), Rewards(torch.arange(2.0), {"luma": torch.arange(2.0)})
        )
    number = {"value": 0.5, "low": 0.25, "high": 0.75}
    rows = [{"name": "geneval", "labels": group, "reference": None, "checkpoint": number, "difference": None}
            for group in ("all", "held_out", "tag:counting")]  # fmt: skip
    pictures = {"columns": [{"of": "checkpoint", "sample": 0}], "rows": [0], "titles": ["five oaks"]}
    measured = {"images": 8, "labels": 4, "prompts": 4, "intervals": "95 %", "rows": rows, "pictures": pictures}
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(measured))
    save_picture(folder / "evaluation" / "pictures.png", np.zeros((8, 8, 3), np.uint8))
    shown = page([read_run(folder, "x")])
    assert "Left out" not in shown
    top = re.findall(r'<th scope="row">(reward.*?)</th>', shown[: shown.index("Numbers of the steps")])
    assert top == [f"reward (luma){end}" for end in ends]
    parsed = Page(shown)
    assert "4 fresh images" in parsed.text
    assert "“two dogs”" in parsed.text
    assert "8 images a model, of 4 prompts." in parsed.text
    assert re.search("geneval, held out.*By tag.*geneval, counting", parsed.text, re.S)
    assert "A row a prompt (five oaks)" in parsed.text
    (folder / "prompts.jsonl").write_text("[\n")
    assert "prompts.jsonl: line 1 is not valid JSON" in report(folder).text


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and crafted files; tests/fuzz/test_report.py tries many more


def test_metrics_take_the_later_of_equal_steps():
    lines = [
        {"step": 2, "a": 1.0, "b": 5.0},
        {"step": 1, "a": 3.0},
        {"step": 2, "a": 2.0},
        {"step": True, "a": 9.0},
        [1],
        7,
    ]
    found = parse_metrics("\n".join(map(json.dumps, lines)).encode())
    assert found.columns == {"a": ([1, 2], [3.0, 2.0])}
    assert (found.last_step, found.left_out) == (2, ["3 lines of metrics.jsonl, cut off or damaged"])


def test_a_file_of_many_lines_is_read(make_run):
    folder = make_run()
    (folder / "metrics.jsonl").write_text("".join(f'{{"step":{i},"kl":0.5}}\n' for i in range(100_000)))
    chart = report(folder).numbers[0]
    assert chart["x"][0] < 1000
    assert chart["x"][1] > 99_000
    assert len(chart["curves"][0]["points"]) == 300


def test_special_files_and_links_out_of_the_folder_are_left_out(make_run, tmp_path):
    folder = make_run()
    (tmp_path / "secret.json").write_text('{"key": "secret"}')
    for name in ("environment.json", "summary.json", "labels.json", "before_after.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "environment.json").symlink_to(tmp_path / "secret.json")
    os.mkfifo(folder / "summary.json")
    (folder / "labels.json").symlink_to("labels.json")
    (folder / "before_after.json").symlink_to("/dev/zero")
    (folder / "grids").mkdir()
    (folder / "grids" / "step_000001.png").mkdir()
    (folder / "grids" / "step_000002.png").symlink_to(folder / "nothing.png")
    (folder / "evaluation").write_text("a file")
    text = report(folder).text
    assert "secret" not in text
    for note in (
        "environment.json: a link that leads out of the run folder",
        "summary.json: a FIFO",
        "labels.json: Too many levels of symbolic links",
        "before_after.json: a device",
        "grids/step_000001.png: a folder",
        "grids/step_000002.png: a link to nothing",
        "evaluation/evaluation.json: Not a directory",
    ):
        assert f"x: {note}" in text


def test_brief_looks_at_no_more_than_it_shows():
    level = "ha"
    for _ in range(40):
        level = [level] * 10  # 10^40 values
    assert len(brief(level)) < 400
    assert len(brief({"a": level})) < 400
    assert brief({"a": [1, 2.5, None], "b": "x"}) == "{a: [1, 2.5, None], b: x}"
    assert brief(10**5000) == "an integer of too many digits"
    loop = []
    loop.append(loop)
    assert brief(loop) == "[[[[[[...]]]]]]"


def test_printable_keeps_letters_and_drops_what_terminals_obey():
    assert masked("é\u3000\xa0日\n") == "é\u3000\xa0日\n"
    assert masked("\x1b[2J\ud800\x00\u202e") == "?[2J???"
