"""Loads the compiled extension: _C.so beside this file, built from csrc/ by `pip install -e .` (setup.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HOW = "`pip install -v -e .` builds it and says what was missing"


def _load() -> str | None:
    """Load the extension. Returns None, or the reason why it cannot be loaded."""
    library = Path(__file__).with_name("_C.so")
    if not library.exists():
        return f"the extension is not built; {HOW}"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # for example, it was built with CUDA and this torch has none
        return f"the extension cannot be loaded: {error}; {HOW}"
    newest = (
        "grpo_token_loss",
        "dpo_loss",
        "group_norm_silu_cpu",
        "split_heads_cpp",
        "adaln_cpp",
        "gelu_cpp",
        "attention_cpp",
        "rotary_cpp",
    )
    missing = [op for op in newest if not hasattr(torch.ops.varfast, op)]
    return f"the extension was built before it had {', '.join(missing)}; {HOW}" if missing else None


def _why_no_cuda() -> str | None:
    if NO_EXTENSION is not None:
        return NO_EXTENSION
    built, runs = torch.ops.varfast.built_for_cuda() // 1000, (torch.version.cuda or "none").split(".")[0]
    if built == 0:
        return f"the extension is built without CUDA; {HOW}"
    if str(built) != runs:
        return f"the extension is built with CUDA {built}, torch with CUDA {runs}: install again with nvcc {runs}"
    return None


NO_EXTENSION = _load()
_NO_CUDA = _why_no_cuda()


def cannot_run_cpp(device: torch.device) -> str | None:
    """Why the extension's CPU kernels cannot run on a device, or None if they can."""
    return NO_EXTENSION or (None if device.type == "cpu" else "it runs on the CPU")


def cannot_run_cuda(device: torch.device) -> str | None:
    """Why the extension's CUDA kernels cannot run on a device, or None if they can."""
    return _NO_CUDA or (None if device.type == "cuda" else "it needs a CUDA device")


def refused_by_cpp(x: Tensor, *_: Any) -> str | None:
    """The dtypes that the extension's kernels support, for the error message, if x has another one; else None."""
    if x.dtype in (torch.float32, torch.float64, torch.bfloat16):
        return None
    return f"float32, float64 or bfloat16, got {x.dtype}"
