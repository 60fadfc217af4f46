"""The documentation's site: it builds, its links lead somewhere, and what its pages show as code works."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shlex
import subprocess
import sys
import tomllib
import types
from html.parser import HTMLParser
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml

import varfast
from varfast import kernels
from varfast.command import COMMANDS
from varfast.config import Config, parse_config
from varfast.evaluation.config import EvaluateConfig, SampleConfig
from varfast.rewards import WeightedSum
from varfast.settings import schema
from varfast.settings.aliases import ALIASES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
needs_mkdocs = pytest.mark.skipif(
    not (find_spec("mkdocs") and find_spec("material") and find_spec("mkdocstrings_handlers")),
    reason="the site is built by mkdocs-material and mkdocstrings: pip install 'varfast[docs]'",
)


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text()) if name == language]


def all_blocks(language: str):
    return [
        pytest.param(page, body, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, body in enumerate(blocks(page, language), start=1)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The site


class Page(HTMLParser):
    """Anchors, links and what is fetched, of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {value for key in ("id", "name") if (value := given.get(key))}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and "stylesheet" in (given.get("rel") or ""):
            self.fetched.append(given["href"])
        elif given.get("src"):
            self.fetched.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}


@needs_mkdocs
def test_links_of_the_built_site_lead_somewhere_and_nothing_is_fetched_from_elsewhere(site):
    pages = {
        name: Page(path.read_text()) for name, path in site.items() if name.endswith(".html") and name != "404.html"
    }
    assert {"index.html", "tutorial.html", "config.html", "api/kernels.html", "guide/coming_from.html"} <= pages.keys()
    for name, page in pages.items():
        for link in [*page.links, *page.fetched]:
            parts = urlsplit(link)
            if parts.scheme:
                assert link in page.links or parts.scheme == "data", f"{name} fetches {link}"
                continue
            path = (Path("/") / name).parent.joinpath(unquote(parts.path)) if parts.path else Path("/") / name
            target = path.resolve().relative_to("/").as_posix()
            assert target in site, f"{name} links to {link}"
            if parts.fragment and target in pages and parts.fragment not in ("", "__toc"):
                assert unquote(parts.fragment) in pages[target].ids, f"{name} links to {link}"


@needs_mkdocs
def test_the_reference_has_all_that_is_public(site):
    reference = set.union(*(Page(path.read_text()).ids for name, path in site.items() if name.startswith("api/")))
    elsewhere = {
        "varfast.Policy": "varfast.policies.var.policy.VARPolicy",
        "varfast.train": "varfast.from_python.train",
    }
    public = [f"varfast.kernels.{name}" for name in kernels.__all__]
    public += [f"varfast.{name}" for name in varfast.__all__ if not name.startswith("__")]
    assert [name for name in public if elsewhere.get(name, name) not in reference] == []


@needs_mkdocs
def test_includes_show_what_they_point_to(site):
    assert "handwritten digits" in site["index.html"].read_text()  # a section of the README
    assert "MFU" in site["index.html"].read_text()  # between two comments of it
    family = site["guide/add_a_family.html"].read_text()
    assert "ToyPolicy" in family  # a class of a test
    assert 'title="include"' not in "".join(path.read_text() for name, path in site.items() if name.endswith(".html"))


def site_module(name):
    spec = spec_from_file_location(f"docs_site_{name}", DOCS / "site" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_mkdocs
def test_an_include_of_something_that_is_not_there_is_an_error():
    from mkdocs.exceptions import PluginError

    expand = site_module("hooks").expand
    for target, message in (
        ("../README.md#no-such", "no such heading"),
        ("../no.md", "no such file"),
        ("site/hooks.py#no_such", "no such function"),
    ):
        with pytest.raises(PluginError, match=message):
            expand(f'[x]({target} "include")', DOCS / "index.md")
    code = '```text\n[x](../no.md "include")\n```'
    assert expand(code, DOCS / "index.md") == code
    assert expand('[a](b.md "include") and more', DOCS / "index.md") == '[a](b.md "include") and more'
    text = expand('[x](../README.md#look-at-a-run "include")', DOCS / "index.md")
    assert "guide/numbers.md" in text
    assert "## Sample, measure" not in text


@needs_mkdocs
def test_docstrings_with_sections_of_one_line_are_read_whole():
    text = "What.\n\nArgs:\n    a, b: two\nReturns: one\n    and more.\nRaises: ValueError\n\nAs in::\n\n    code"
    assert site_module("docstrings").as_markdown(text) == (
        "What.\n\nArgs:\n    a, b: two\n\n**Returns:** one and more.\n\n**Raises:** ValueError\n\nAs in:\n\n    code"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What pages show


@pytest.mark.parametrize(("page", "body"), all_blocks("python"))
def test_python_parses(page, body):
    ast.parse(body)


def with_defaults(body: str) -> dict:
    """A config of what a page shows of one: some sections, or some components of the reward."""
    shown = yaml.safe_load(body)
    if all(isinstance(value, dict) and "type" in value for value in shown.values()):
        shown = {"reward": shown}
    return {
        "run": {"dir": "r", "steps": 3},
        "policy": {"preset": "d16", "checkpoint": "random"},
        "reward": {"bright": {"type": "brightness"}},
        **shown,
    }


@pytest.mark.parametrize(("page", "body"), all_blocks("yaml"))
def test_configs_are_valid(page, body):
    parse_config(with_defaults(body))


def commands(body: str):
    """What a shell's lines call of varfast: name of the command and its arguments."""
    body = re.sub(r"\$(\(\(.*?\)\)|\w+)", "8", body.replace("\\\n", " "))  # what a shell puts in
    for line in body.splitlines():
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            if word.startswith("varfast.") and words[place - 1] == "-m":
                yield word.removeprefix("varfast."), words[place + 1 :]
            elif word.endswith("varfast") and place + 1 < len(words) and words[place - 1] != "-m":
                yield words[place + 1], [*itertools.takewhile(lambda word: word != ">", words[place + 2 :])]


@pytest.mark.parametrize(("page", "body"), all_blocks("bash"))
def test_commands_are_accepted(page, body, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for shown in blocks(page, "yaml"):
        if name := re.match(r"# (\w+\.yaml)\n", shown):
            (tmp_path / name[1]).write_text(shown)
    for command, arguments in commands(body):
        COMMANDS[command].read(arguments)


def test_commands_finds_them():
    assert list(commands("torchrun -n 8 -m varfast.train a.yaml \\\n  x.y=1 # why\n.venv/bin/varfast env")) == [
        ("train", ["a.yaml", "x.y=1"]),
        ("env", []),
    ]


def test_recipes_of_the_cookbook_score_images(tmp_path, monkeypatch, forget_modules):
    page = DOCS / "guide" / "reward_cookbook.md"
    functions = [body for body in blocks(page, "python") if body.startswith("# my_rewards.py")]
    (tmp_path / "my_rewards.py").write_text("\n\n".join(functions))
    monkeypatch.chdir(tmp_path)
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    run = set()
    for body in blocks(page, "yaml"):
        config = parse_config(with_defaults(body))
        if all(reward.type == "function" for reward in config.reward.values()):
            rewards = WeightedSum(config.reward, num_classes=1000, names=[f"class {n}" for n in range(1000)])
            found = rewards(images, torch.tensor([0, 0, 0, 1, 1, 1]), step=0)
            assert found.total_B.shape == (6,)
            assert len(set(found.total_B.tolist())) > 1
            run |= {reward.function.partition(":")[2] for reward in config.reward.values()}
    defined = {node.name for body in functions for node in ast.parse(body).body if hasattr(node, "name")}
    assert run == defined
    (last,) = (body for body in blocks(page, "python") if "WeightedSum" in body)
    namespace = {}
    exec(compile(last, str(page), "exec"), namespace)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(with_defaults("bright: {type: brightness, mode: raw}")))
    total_B, components = namespace["scores"]("c.yaml", images)
    assert torch.equal(total_B, components["bright"])


def of_page(page, name):
    """The names that the Python block of a page defines in which `name` is defined."""
    (body,) = (body for body in blocks(page, "python") if f"def {name}(" in body)
    namespace = {}
    exec(compile(body, str(page), "exec"), namespace)
    return namespace[name]


def test_loops_of_your_own_run(make_policy, make_config, capsys):
    page = DOCS / "guide" / "python.md"

    def red(images, labels):
        return images[:, 0].mean(dim=(1, 2))

    def redness(policy):
        rollout = policy.sample([0, 1, 2, 3] * 16, seed=99)
        return red(policy.decode(rollout.tokens_BL), None).mean()

    policy = make_policy()
    before = redness(policy)
    of_page(page, "reinforce")(policy, red, steps=2)
    assert redness(policy) != before
    config = make_config(
        reward={"red": {"type": "function", "function": red}}, rollout={"labels_per_step": 4, "group_size": 8},
        update={"minibatch": 16, "lr": 1e-3},
    )  # fmt: skip
    policy = make_policy()
    of_page(page, "grpo")(policy, config, steps=8)
    assert redness(policy) > before
    assert len(capsys.readouterr().out.splitlines()) == 8


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def rows(page: Path):
    """Section and cells of a page's tables, without their heads."""
    section = ""
    lines = page.read_text().splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        section = line.removeprefix("## ") if line.startswith("## ") else section
        if line.startswith("|") and not re.match(r"\| -", line) and before.startswith("|"):
            yield section, [cell.strip() for cell in line.strip("|").split("|")]


def test_names_of_other_packages_lead_to_keys_that_exist():
    schemas = {"TRL": [Config], "diffusers": [SampleConfig, EvaluateConfig], "flow_grpo": [Config]}
    seen = []
    for section, (theirs, ours, remark) in rows(DOCS / "guide" / "coming_from.md"):
        models = schemas[re.split(r"\W", section)[0]]
        name = theirs.strip("`").split(".")[-1]
        seen.append(name)
        if not ours:
            assert remark, name
            continue
        key = ours.strip("`")
        assert all(schema.exists(model, key) for model in models), key
        if theirs == "`sample.train_batch_size`":  # without its section it is the one of the update
            continue
        # Who writes their name into a config is told the same key; `reward.NAME.weight` is told as reward.
        told = [meaning for meaning, _ in ALIASES.get(name, ())] + [name]
        assert key in told or key.split(".")[-1] in told or key.split(".")[0] in told, f"{theirs} is told {told}"
        for value in re.findall(r"`(\w+)`", remark):
            found = [value_of for model in models for value_of in at(model, key)]
            assert any(value in schema.choices(one) for one in found), f"{key} takes no {value}"
    assert {"learning_rate", "beta", "num_generations", "guidance_scale", "num_image_per_prompt"} <= set(seen)


def at(model, key):
    found = [schema.Value(model)]
    for part in key.split("."):
        found = [value for each in found for value in each.below(part)]
    return [member for value in found for member in value.members()]


def test_extras_are_those_of_the_package():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    shown = [name for _, (names, *_) in rows(DOCS / "guide" / "install.md") for name in re.findall(r"`(\w+)`", names)]
    assert sorted(shown) == sorted(declared)


def literals(folder: Path) -> list[str]:
    """Texts of the source, each with NUL where a value is put in."""
    found = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_quoted_errors_stand_in_the_source():
    source = literals(ROOT / "varfast")
    quoted = [line for page in PAGES for body in blocks(page, "error") for line in body.splitlines()]
    assert len(quoted) > 20
    for line in quoted:
        for part in line.split("…"):
            assert not re.search(r"\w", part) or any(part.strip() in text for text in source), line


# ---------------------------------------------------------------------------------------------------------------------
# The tutorial


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path, digits_cache, monkeypatch):
    """Its cells, one after another, as a notebook runs them; with 2 of its steps, and the digits that other tests
    pre-trained."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    config = yaml.safe_load((ROOT / "configs" / "digits.yaml").read_text())
    config["run"]["device"], config["pretrain"]["cache_dir"] = "cpu", str(digits_cache)
    (tmp_path / "configs" / "digits.yaml").write_text(yaml.safe_dump(config))
    notebook = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    cells = json.loads((DOCS / "tutorial.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum("STEPS = 20" in source for source in code) == 1
    for source in code:
        exec(compile(source.replace("STEPS = 20", "STEPS = 2"), "tutorial.ipynb", "exec"), vars(notebook))
    assert notebook.images.shape == (8, 3, 8, 8)
    assert (notebook.logp_BL - notebook.rollout.logp_BL).abs().max() < 1e-4
    assert (tmp_path / "runs" / "tutorial" / "report.html").is_file()
    assert torch.equal(notebook.again.tokens_BL, notebook.rollout.tokens_BL)  # of the exported files
