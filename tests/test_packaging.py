"""The wheel and the sdist carry everything."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_wheel_and_sdist_carry_everything(tmp_path):
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    for command in ("sdist", "bdist_wheel"):
        subprocess.run([sys.executable, "setup.py", "-q", command, "-d", str(tmp_path)], cwd=source, check=True,
                       capture_output=True)  # fmt: skip
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        in_wheel = set(wheel.namelist())
    modules = [n for n in tracked if n.endswith(".py") and n.startswith("varfast/")]
    modules += [f"varfast/{n}" for n in tracked if n.endswith(".py") and n.startswith("kernels/")]
    assert len(modules) > 20
    assert set(modules) | {"varfast/py.typed", "varfast/data/imagenet.txt"} <= in_wheel
    if shutil.which("c++") or shutil.which("g++"):
        assert "varfast/kernels/_C.so" in in_wheel
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        in_sdist = {name.partition("/")[2] for name in sdist.getnames()}
    hidden = {n for n in tracked if n.startswith(".")}
    assert set(tracked) - hidden <= in_sdist
