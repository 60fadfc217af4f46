"""What the README shows is what the repository says."""

import re
import subprocess
import sys
from inspect import isfunction
from pathlib import Path

import pytest

from varfast import kernels

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))  # those below are checked as pages of the site


def test_tables_are_made_from_the_newest_records():
    assert subprocess.run([sys.executable, "bench/table.py", "--check"], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_links_exist(page):
    text = page.read_text()
    for target, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
    for config in re.findall(r"configs/\w+\.yaml", text):
        assert (ROOT / config).exists(), config


def test_every_op_has_its_specification_and_its_tests_beside_it():
    rows = re.findall(
        r"^\| (`.*?`) \| .* \| \[\S+\]\((\S+)\) \| (.*) \|$", (ROOT / "kernels" / "README.md").read_text(), re.M
    )
    rows = [(re.findall(r"`(\w+)`", names), file, re.findall(r"\((\S+?)\)", tests)) for names, file, tests in rows]
    functions = [name for name in kernels.__all__ if isfunction(getattr(kernels, name))]
    others = {"check_implementation", "choices", "configure"}
    assert sorted(name for names, _, _ in rows for name in names) == sorted(set(functions) - others)
    for names, file, tests in rows:
        specified = (ROOT / "kernels" / file).read_text()
        tested = "".join((ROOT / "kernels" / test).read_text() for test in tests)
        for name in names:
            assert f"def {name}(" in specified
            assert name in tested


def test_settings_of_the_paper_are_the_defaults():
    from varfast.losses.config import GRPOConfig
    from varfast.optim.config import UpdateConfig
    from varfast.policies.config import RolloutConfig

    sections = {"rollout": RolloutConfig(), "update": UpdateConfig(), "grpo": GRPOConfig()}
    shown = re.findall(r"`(rollout|update|grpo)\.(\w+)` \| ([\d.e-]+) \|", README)
    assert len(shown) == 7
    for section, key, value in shown:
        assert float(value) == getattr(sections[section], key)


def test_small_cards_are_what_roofline_predicts():
    from varfast.config import load_config
    from varfast.perf.devices import DEVICES
    from varfast.perf.limits import speed_of_light_s, stage_counts
    from varfast.perf.memory import memory
    from varfast.perf.plan import plan_memory
    from varfast.perf.work import Work
    from varfast.policies.var.build import cost_of

    table = (ROOT / "docs" / "training.md").read_text().split("<!-- small cards:")[1].split("<!-- end")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "configs" in line]
    assert len(rows) >= 8
    for card, config, settings, *shown in rows:
        overrides = ["run.dtype=bfloat16", *re.findall(r"`(\S+)`", settings)]  # what auto means on a GPU
        gigabytes, device = re.fullmatch(r"(\d+) GB, `(\S+)`", card).groups()
        ceilings = DEVICES[device].ceilings("bfloat16")
        assert round(ceilings.memory_bytes / 1e9) == int(gigabytes)
        read = load_config(ROOT / config.strip("`"), overrides)
        work = Work.whole(read, cost_of(read.policy, "bfloat16"))
        plan = plan_memory(work, ceilings.memory_bytes)
        held, update = memory(work, plan), plan.update
        step_s = sum(speed_of_light_s(count, ceilings) for count in stage_counts(work, plan).values())
        predicted = [
            f"{held.states.total / 2**30:.1f}",
            f"{held.peak / 2**30:.1f} of {ceilings.memory_bytes / 2**30:.1f}",
            f"{plan.rollout.micro_batch}, {update.micro_batch}, {update.checkpointing}",
            f"{step_s:.1f}" if held.fits(ceilings.memory_bytes) else "does not fit",
        ]
        assert shown == predicted, " | ".join([card, config, settings, *predicted])
