"""varfast: reinforcement learning (GRPO, DPO) for visual autoregressive image models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from varfast.types import InputError, Rollout

if TYPE_CHECKING:
    from varfast.from_python import train
    from varfast.policies.var.policy import VARPolicy as Policy
    from varfast.runs.load import load_policy
    from varfast.runs.pictures import picture, to_pil

__version__ = "0.1.0"
__all__ = ["InputError", "Policy", "Rollout", "__version__", "load_policy", "picture", "to_pil", "train"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Where the names above are, beside those of this module.
_HOMES = {
    "Policy": ("varfast.policies.var.policy", "VARPolicy"),
    "load_policy": ("varfast.runs.load", "load_policy"),
    "picture": ("varfast.runs.pictures", "picture"),
    "to_pil": ("varfast.runs.pictures", "to_pil"),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and PyTorch with it, only then: `--help` and typos need neither."""
    if name == "train":  # the module, which can be called: the same, whether or not somebody has imported it before
        return importlib.import_module("varfast.train")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, own_name = _HOMES[name]
    return getattr(importlib.import_module(home), own_name)
