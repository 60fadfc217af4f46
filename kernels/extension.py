"""The extension: csrc/, built by `pip install -e .` into _C.so beside this file (setup.py)."""

from __future__ import annotations

from pathlib import Path

import torch

HOW = "`pip install -v -e .` builds it and says what was missing"


def _load() -> str | None:
    """Load the extension; why there is none, or None where there is one."""
    library = Path(__file__).with_name("_C.so")
    if not library.exists():
        return f"the extension is not built; {HOW}"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # of a build with CUDA under a torch without, say
        return f"the extension cannot be loaded: {error}; {HOW}"
    return None


NO_EXTENSION = _load()


def why_no_op(op: str) -> str | None:
    """Why there is no torch.ops.varfast.<op>, or None where there is one."""
    if NO_EXTENSION is None and not hasattr(torch.ops.varfast, op):
        return f"the extension was built before it had {op}; {HOW}"
    return NO_EXTENSION


def cannot_run_cpp(device: torch.device, op: str) -> str | None:
    """Why the extension's CPU kernel of an op cannot run on a device, or None where it can."""
    return why_no_op(op) or (None if device.type == "cpu" else "it runs on the CPU")
