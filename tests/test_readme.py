"""What the README shows is what the repository says."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_kernel_table_is_made_from_the_newest_record():
    assert subprocess.run([sys.executable, "bench/table.py", "--check"], cwd=ROOT, check=False).returncode == 0


def test_files_and_links_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for config in re.findall(r"configs/\w+\.yaml", README):
        assert (ROOT / config).exists(), config


def test_settings_of_the_paper_are_the_defaults():
    from varfast.config import GRPOConfig, RolloutConfig, UpdateConfig

    sections = {"rollout": RolloutConfig(), "update": UpdateConfig(), "grpo": GRPOConfig()}
    shown = re.findall(r"`(rollout|update|grpo)\.(\w+)` \| ([\d.e-]+) \|", README)
    assert len(shown) == 7
    for section, key, value in shown:
        assert float(value) == getattr(sections[section], key)


def test_small_cards_are_what_roofline_predicts():
    from varfast.config import load_config
    from varfast.roofline import DEVICES, memory, planned, speed_of_light_s, stage_counts

    table = README.split("<!-- small cards:")[1].split("<!-- end")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "`" in line][1:]
    assert len(rows) >= 8
    for config, device, settings, *shown in rows:
        overrides = ["run.dtype=bfloat16", *re.findall(r"`(\S+)`", settings)]  # what auto means on a GPU
        ceilings = DEVICES[device.strip("`")].ceilings("bfloat16")
        plan = planned(load_config(ROOT / config.strip("`"), overrides), ceilings.memory_bytes)
        held, update = memory(plan), plan.update
        step_s = sum(speed_of_light_s(count, ceilings) for count in stage_counts(plan).values())
        sizes = (held.states, held.moments, held.rollout, held.update, held.peak, ceilings.memory_bytes)
        predicted = [f"{size / 2**30:.1f}" for size in sizes]
        predicted += [f"{plan.rollout.micro_batch}, {update.micro_batch}, {update.checkpointing}"]
        predicted += [f"{step_s:.1f}" if held.fits(ceilings.memory_bytes) else "does not fit"]
        assert shown == predicted, " | ".join([config, device, settings, *predicted])
