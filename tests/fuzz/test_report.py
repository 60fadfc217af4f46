"""Hundreds of damaged and crafted run folders through `python -m varfast.report`, in this process.

Each case damages one to four files of a good folder, chosen by its seed. The command must show the folder, or refuse it
in one message; no other exception, no case of more than 10 s, and no markup that came from a file.
"""

import copy
import io
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from html.parser import HTMLParser

import pytest
import yaml
from PIL import Image

from varfast import InputError
from varfast.config import parse_config
from varfast.report import main

CASES = 300
BUDGET_S = 25.0
HANG_S = 10
EVIL = "<img src=x onerror=alert(1)>\"'&amp;</script><script>alert(2)</script>"


NASTY = [None, True, -1, 0, 10**400, -(10**400), 1e308, -1e308, 5e-324, float("nan"), float("inf"), "", EVIL, "\ud800",
         "x\x00\x1b[2Jy", [], {}, [[[[]]]], "x" * 100_000, [0] * 10_000, {"a": {"b": {}}}, {EVIL: EVIL}, [None], 2**63,
         "2001-13-45", 1e-320]  # fmt: skip


def laughs(first, nine):
    """A dozen lines that describe 9^11 values."""
    levels = (f"a{i}: &a{i} {nine.replace('%', f'*a{i - 1}')}" for i in range(1, 12))
    return "\n".join([f"a0: &a0 {first}", *levels])


YAML = [
    "a: &a [*a]",
    "a: &a {b: *a}",
    "x: 2001-13-45",
    laughs("{x: 1}", "{k0: %, k1: %, k2: %, k3: %, k4: %, k5: %, k6: %, k7: %, k8: %}"),
    laughs("[1]", "[%, %, %, %, %, %, %, %, %]"),
    "[" * 50_000,
    "{a: " * 5_000,
    "- " * 5_000,
    "!!python/object/apply:os.system [touch /tmp/varfast-fuzz]",
    "!!bool x: 1",
    "? [a, b]\n: 1",
    "? {a: b}\n: 1",
    "\t",
    "a: b\na: c",
    "%YAML 9.9\n---\na: 1",
    "a: 1\n---\nb: 2",
    "*unknown",
    "<<: {a: 1}",
    "run: {steps: 1e999, dtype: [1]}\nrollout: {labels_per_step: nan}\ngrpo: {kl_beta: .nan}",
    f"run: {{steps: {'9' * 5000}}}",
    "just text",
    "\ufeffa: 1",
]  # fmt: skip


def png(width, height, kind="PNG", **settings):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, kind, **settings)
    return file.getvalue()


HUGE_PNG = png(9000, 9000, compress_level=9)  # 81 million pixels in 240 kB


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A run folder in which every file that the report reads is there."""
    folder = tmp_path_factory.mktemp("good") / "run"
    sections = {
        "run": {"dir": "r", "steps": 60},
        "policy": {"preset": "d16", "checkpoint": "random"},
        "reward": {"b": {"type": "brightness"}},
    }
    for name in ("grids", "samples", "evaluation"):
        (folder / name).mkdir(parents=True)
    config = parse_config(sections).model_dump(mode="json", exclude_none=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    names = ("reward_mean", "reward/b", "kl", "entropy", "clip_fraction", "ratio_gap_max", "rollout_ms", "grad_norm")
    rows = [{"step": step, **dict.fromkeys(names, step / 60)} for step in range(1, 61)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = {"reward": [0.0, 1.0, 1.0], "accuracy": [1.0, 1.0, 0.0]}
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75}
    row = {"name": "score/b", "labels": "all", "reference": estimate, "checkpoint": estimate, "difference": estimate}
    sample = {"label": 1, "reward": 1.0, "rewards": {"b": 1.0}}
    files = {
        "summary.json": {when: {"reward": 0.5, "accuracy": 0.7} for when in ("before", "after")} | {"step": 59},
        "before_after.json": {"settings": {}, "labels": [0, 1, 2], "step": 60, "before": numbers, "after": numbers},
        "environment.json": {"torch": "2", "gpus": ["a", "b"], "allocator": {"x": 1}},
        "ended.json": {"step": 60, "why": EVIL, "diverged": True},
        "labels.json": {"labels": [{"label": 1, "folder": "n01", "name": "cat", "images": 3}]},
        "samples/step_000060.json": {"best": [sample] * 2, "worst": [sample] * 2, "ties": {"best": 9}, "images": 16},
        "evaluation/evaluation.json": {
            "images": 4, "labels": 2, "intervals": "95 %", "rows": [row, row],
            "pictures": {"columns": [{"of": "reference", "sample": 0}], "rows": [0, 1]},
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    for name in ("grids/step_000000", "grids/step_000060", "samples/step_000060", "evaluation/pictures"):
        (folder / f"{name}.png").write_bytes(png(100, 100))
    return folder


class Markup(HTMLParser):
    """Refuses a page with an element, attribute or address that is not the report's own."""

    def __init__(self, source):
        super().__init__()
        self.scripts = 0
        self.feed(source)
        self.close()
        assert self.scripts == 2

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        for name, value in attributes:
            assert not name.startswith("on"), (tag, attributes)
            assert name not in ("src", "href") or value.startswith("data:"), (tag, attributes)


# ---------------------------------------------------------------------------------------------------------------------
# Damages: each takes the random numbers and a file, and says nothing


def places(node, place=()):
    """Of all values of nested JSON, how to get there."""
    yield place
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield from places(child, (*place, key))


def mutated(rng, content):
    """JSON with a value replaced, a key renamed or removed."""
    content = copy.deepcopy(content)
    found = [place for place in places(content) if place]
    if not found:
        return rng.choice(NASTY)
    *parents, last = rng.choice(found)
    node = content
    for key in parents:
        node = node[key]
    if isinstance(node, dict) and rng.random() < 0.3:
        value = node.pop(last)
        if rng.random() < 0.6:
            node[rng.choice(["\ud800", EVIL, "", "x" * 5000, "step"])] = value
    elif isinstance(node, dict | list):
        node[last] = rng.choice(NASTY)
    return content


def parsed(content):
    try:
        return json.loads(content)
    except (ValueError, RecursionError):  # damaged already
        return None


def damage_json(rng, path):
    content = parsed(path.read_bytes()) if path.suffix == ".json" else None
    if content is None:
        return damage_bytes(rng, path)
    content = mutated(rng, content)
    for _ in range(rng.choice([0, 0, 3])):
        content = mutated(rng, content)
    path.write_text(json.dumps(content))


def damage_metrics(rng, path):
    path = path.parents[0 if path.parent.name == "run" else 1] / "metrics.jsonl"
    if not path.is_file():
        return
    rows = [row for line in path.read_bytes().splitlines() if isinstance(row := parsed(line), dict)]
    kind = rng.randrange(6) if rows else 0
    if kind == 0:
        rows = [mutated(rng, row) if rng.random() < 0.3 else row for row in rows]
    elif kind == 1:
        value, name = rng.choice(NASTY), rng.choice(list(rows[0]))
        rows = [row | {name: value} for row in rows]
    elif kind == 2:
        rows = [row | {"kl": rng.choice([1e308, -1e308])} for row in rows * 5]
    elif kind == 3:
        rows = [row | {f"{EVIL}{i}_ms": 1.0 for i in range(400)} for row in rows]
    elif kind == 4:
        rows = [row | {"step": rng.choice([0, 1, 10**12, -5, "1", True, 10**30, 2.0])} for row in rows]
    else:
        rows = [row | {"reward_mean": rng.choice([1e300, -1e300, 5e-324, 0.0])} for row in rows]
    lines = [json.dumps(row) for row in rows]
    if rng.random() < 0.3:
        lines += rng.choice(
            [["[" * 100_000], ["9" * 5000], ["{" * 50], ["x" * 3_000_000], [f'{{"step": {"9" * 4000}}}']]
        )
    path.write_text("\n".join(lines))


def damage_config(rng, path):
    path = path.parents[0 if path.parent.name == "run" else 1] / "config.yaml"
    if path.is_file():
        path.write_text(rng.choice(YAML))


def damage_bytes(rng, path):
    if not path.is_file() or path.is_symlink():
        return
    content = bytearray(path.read_bytes())
    kind = rng.randrange(6) if content else 2
    if kind == 0:
        content = content[: rng.randrange(len(content) + 1)]
    elif kind == 1:
        for _ in range(rng.choice([1, 4, 100])):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == 2:
        content = bytearray(rng.randbytes(rng.choice([0, 1, 1000])))
    elif kind == 3:
        content = bytearray(content.decode("utf-8", "replace").encode("utf-16"))
    elif kind == 4:
        content = bytearray(
            rng.choice([b"[" * 200_000, b'{"a":' * 100_000, b"null", b"[]", b"{}", b"1e999", b'"\\ud800"'])
        )
    else:
        content = content + content
    path.write_bytes(bytes(content))


def damage_picture(rng, path):
    folder = path.parents[0 if path.parent.name == "run" else 1]
    path = rng.choice([p for p in folder.glob("*/*.png") if p.is_file()] or [path])
    if path.suffix == ".png":
        made = rng.choice(
            [
                HUGE_PNG,
                png(1, 1),
                png(3, 100_000),
                png(50, 50, "GIF"),
                png(50, 50, "JPEG"),
                png(9, 9, "EPS"),
                png(50, 50, "TIFF"),
                b"",
            ]
        )
        path.write_bytes(made)


def damage_kind(rng, path):
    """Something else than a file in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    kind = rng.randrange(8)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind < 7:
        path.symlink_to(["/dev/zero", "/dev/urandom", path.name, "nothing", "/etc/passwd"][kind - 2])


def damage_folder(rng, path):
    """More files, of names that a run does not make."""
    folder = path.parents[0 if path.parent.name == "run" else 1]
    for name in ("grids", "samples"):
        if (folder / name).is_dir():
            for stem in (
                "step_" + "9" * 200,
                "step_-1",
                "step_\u0663",
                "step_",
                os.fsdecode(b"step_\xff"),
                "step_000061",
            ):
                (folder / name / f"{stem}.png").write_bytes(png(10, 10))
                (folder / name / f"{stem}.json").write_text("{}")


DAMAGES = [
    damage_json,
    damage_json,
    damage_metrics,
    damage_config,
    damage_bytes,
    damage_picture,
    damage_kind,
    damage_folder,
]


@pytest.fixture
def no_hang():
    def ring(*_):
        raise TimeoutError(f"a case took more than {HANG_S} s")

    before = signal.signal(signal.SIGALRM, ring)
    yield signal.alarm
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_damaged_run_folders_are_shown_or_refused(good, tmp_path, capsys, no_hang):
    counts, begin_s, slowest = Counter(), time.monotonic(), (0.0, 0)
    for seed in range(CASES):
        if time.monotonic() - begin_s > BUDGET_S:
            break
        rng, folder = random.Random(seed), tmp_path / str(seed) / "run"
        shutil.copytree(good, folder)
        for _ in range(rng.randint(1, 4)):
            path = rng.choice([p for p in sorted(folder.rglob("*")) if not p.is_dir()] or [folder / "x"])
            damage = rng.choice(DAMAGES)
            if path.is_file() and not path.is_symlink():
                damage(rng, path)
            counts[damage.__name__] += 1
        case_s = time.monotonic()
        no_hang(HANG_S)
        try:
            assert main([str(folder), f"out={folder.parent / 'out.html'}"]) == 0
            Markup((folder.parent / "out.html").read_text(encoding="utf-8"))
            counts["shown"] += 1
        except InputError:
            counts["refused"] += 1
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        no_hang(0)
        said = capsys.readouterr().err
        counts["with something left out"] += "left out" in said
        assert "Traceback" not in said
        slowest = max(slowest, (time.monotonic() - case_s, seed))
        shutil.rmtree(folder.parent)
    done = counts["shown"] + counts["refused"]
    with capsys.disabled():
        print(f"\n{done} damaged run folders, 0 tracebacks, 0 hangs: {dict(counts)}")
        print(f"the slowest took {slowest[0]:.1f} s (seed {slowest[1]})")
    assert counts["shown"] > 0.9 * done
    assert counts["with something left out"] > 0.4 * done
