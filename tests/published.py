"""What the public code of the next-token families computes, with weights that are a function of their names.

tests/data/golden/README.md says what the arrays are.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from .conftest import STRUCTURE, golden_tensors

GOLDEN = Path(__file__).parent / "data" / "golden"


def golden(family: str, tag: str = "tiny4") -> SimpleNamespace:
    """The arrays of a file as tensors by name, and `meta`."""
    with np.load(GOLDEN / family / f"{tag}.npz") as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "meta"}
        return SimpleNamespace(meta=json.loads(str(arrays["meta"])), **tensors)


def checkpoint(family: str, prefix: str, tag: str = "tiny4") -> dict[str, torch.Tensor]:
    """The state_dict of a tiny public model under its public names, without buffers that hold structure."""
    shapes = json.loads((GOLDEN / family / f"{tag}_names.json").read_text())[prefix]
    state = {name: torch.zeros(shape) for name, shape in shapes.items() if not name.endswith(STRUCTURE)}
    golden_tensors(state, prefix)
    return state


def published(family: str) -> dict[str, dict]:
    """Sizes, names and shapes of the public checkpoints."""
    return json.loads((GOLDEN / family / "published_names.json").read_text())
