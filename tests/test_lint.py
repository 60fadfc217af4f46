"""Style and types. mypy sees the package as an install lays it out: kernels/ inside varfast/."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path = ROOT) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [("check", "."), ("format", "--check", ".")], ids=["check", "format"])
def test_ruff(command):
    run("ruff", *command)


def test_mypy_strict(tmp_path):
    package = tmp_path / "varfast"
    package.mkdir()
    for source in (ROOT / "varfast").iterdir():
        (package / source.name).symlink_to(source)
    (package / "kernels").symlink_to(ROOT / "kernels")
    config, cache = ROOT / "pyproject.toml", ROOT / ".mypy_cache"
    run("mypy", "--config-file", str(config), "--cache-dir", str(cache), cwd=tmp_path)
