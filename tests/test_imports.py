"""The rooms import in one direction: nothing imports to its right. The commands stand at the end."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    "kernels",
    "printable",
    "types",
    "lock",
    "signals",
    "files",
    "cpu",
    "stages",
    "graphs",
    "gradients",
    "distributed",
    "progress",
    "settings",
    "config",
    "command",
    "randomness",
    "roofline",
    "models",
    "rollout",
    "policy",
    "strict",
    "images",
    "data",
    "labels",
    "rewards",
    "metrics",
    "features",
    "grpo",
    "adamw8bit",
    "update",
    "checkpoint",
    "divergence",
    "base",
    "log",
    "before_after",
    "pretrain",
    "train",
    "sample",
    "evaluate",
    "export",
    "report",
    "env",
]


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] == "kernels" else Path(parts[1]).stem


def imported_rooms(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "varfast" and len(parts) > 1 and not parts[1].startswith("__"):
                yield parts[1]


# These two stand above all rooms.
TOP = ("varfast/__init__.py", "varfast/__main__.py")
SOURCES = [
    p for p in [*ROOT.glob("varfast/**/*.py"), *ROOT.glob("kernels/*.py")] if str(p.relative_to(ROOT)) not in TOP
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = room(path)
    assert own in ORDER, f"{own} is a new room: give it its place in ORDER"
    for other in imported_rooms(path):
        assert other in ORDER, f"{path} imports {other}"
        assert ORDER.index(other) <= ORDER.index(own), f"{own} imports {other}, which stands to its right"
        if own == "kernels":
            assert other == "kernels"
