"""varfast: reinforcement learning (GRPO, DPO) for visual autoregressive image models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from varfast.types import InputError, Rollout

if TYPE_CHECKING:
    from varfast.from_python import train
    from varfast.policies.var.policy import VARPolicy as Policy
    from varfast.runs.load import load_policy

__version__ = "0.1.0"
__all__ = ["InputError", "Policy", "Rollout", "__version__", "load_policy", "train"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import the policy, and PyTorch with it, when it is first asked for: `--help` and typos need neither."""
    if name == "Policy":
        from varfast.policies.var.policy import VARPolicy

        return VARPolicy
    if name == "load_policy":
        from varfast.runs.load import load_policy

        return load_policy
    if name == "train":  # the module, which can be called: so it is the same whether or not it was imported before
        return importlib.import_module("varfast.train")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
