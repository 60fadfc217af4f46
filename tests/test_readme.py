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
