"""The rooms import downwards: from kernels at the ground to the commands at the top."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up. Rooms of one layer may import each other, as long as no module imports itself by a detour. Of a
# dotted name and its room the longer one counts: the sections of the config, and what every part measures itself with,
# stand below `config`, which joins the sections, though the rest of their room stands above it.
LAYERS = [
    {"kernels"},
    {"printable", "types", "files", "weights", "randomness", "distributed", "progress", "settings", "tables"},
    {"cards", "policies", "models", "data", "features", "rewards", "losses", "advantages", "optim", "runs.config"}
    | {"pretraining.config", "perf.allocator", "perf.cpu", "perf.graphs", "perf.stages", "perf.cost"},
    {"config"},
    {"perf", "learner", "state", "runs", "pretraining", "evaluation", "report.config", "command"},
    {"pretrain", "train", "sample", "evaluate", "statistics", "export", "report", "env", "roofline", "completion"}
    | {"from_python"},
]
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}


def room(name: str) -> str:
    """Of "runs.log": runs, as LAYERS has no longer name of it."""
    parts = name.split(".")
    longer = [".".join(parts[:count]) for count in range(len(parts), 1, -1)]
    return next((name for name in longer if name in LAYER), parts[0])


def name_of(path: Path) -> str:
    """Of varfast/runs/log.py: runs.log; of kernels/linear.py: kernels.linear."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "kernels" else parts[1:])


def imported_names(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top, _, inner = name.partition(".")
            if top == "varfast" and inner and not inner.startswith("__"):
                yield inner


# These two stand above all rooms.
TOP = ("varfast/__init__.py", "varfast/__main__.py")
SOURCES = [
    p for p in [*ROOT.glob("varfast/**/*.py"), *ROOT.glob("kernels/*.py")] if str(p.relative_to(ROOT)) not in TOP
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path):
    own = room(name_of(path))
    assert own in LAYER, f"{own} is a new room: give it its place in LAYERS"
    for other in map(room, imported_names(path)):
        assert other in LAYER, f"{path} imports {other}"
        assert LAYER[other] <= LAYER[own], f"{path} imports {other}, which stands above {own}"
        if own == "kernels":
            assert other == "kernels"


def imported_modules(path: Path) -> set[str]:
    """Those of varfast that the body of a module imports, but for what only a type checker reads."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else str(node.module) for name in names}
    return {name for name in found if name in MODULES}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("varfast", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


def test_no_module_imports_itself_by_a_detour():
    graph = {name: imported_modules(path) - {name} for name, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


HEAVY = {"torch", "numpy", "PIL", "triton", "torchvision", "open_clip", "sklearn", "safetensors"}


def imported_packages(path: Path) -> set[str]:
    """The packages that the body of a module imports."""
    body = ast.parse(path.read_text()).body
    names = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in body if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_what_reads_a_command_line_imports_no_heavy_package():
    """PyTorch takes seconds: a typo is answered before it is imported. This names the module that imports it."""
    seen, left = set(), {"varfast.command"}
    while left:
        name = left.pop()
        seen.add(name)
        assert imported_packages(MODULES[name]) & HEAVY == set(), name
        packages = {".".join(name.split(".")[:count]) for count in range(2, name.count(".") + 1)}
        left |= (imported_modules(MODULES[name]) | packages & MODULES.keys()) - seen
    assert {"varfast.config", "varfast.rewards.classifier", "varfast.losses"} <= seen
