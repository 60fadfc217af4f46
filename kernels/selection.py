"""Which implementation of an op runs, and why. The one place where `impl=` is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Implementation = Callable[..., Any]
_OPS: dict[str, dict[str, Implementation]] = {}


@dataclass(frozen=True)
class Choice:
    """What impl="auto" means for an op on this machine."""

    op: str
    impl: str
    why: str
    available: tuple[str, ...]


def implementations(op: str, **by_name: Implementation) -> None:
    """Declare the implementations of an op, once, in the op's own file; `reference` is always among them."""
    assert "reference" in by_name, op
    assert op not in _OPS, op
    _OPS[op] = by_name


def choose(op: str) -> Choice:
    """The implementation that impl="auto" stands for."""
    return Choice(op, "reference", "plain PyTorch: the only implementation of this op so far", tuple(_OPS[op]))


def select(op: str, impl: str) -> Implementation:
    """The function that runs for `impl`.

    Raises: ValueError if `impl` is neither "auto" nor an implementation of this op.
    """
    by_name = _OPS[op]
    name = choose(op).impl if impl == "auto" else impl
    if name not in by_name:
        raise ValueError(f"impl={impl!r}: {op} has {', '.join(by_name)}; use one of these, or 'auto'")
    return by_name[name]


def choices() -> list[Choice]:
    """What impl="auto" means for every op, for `python -m varfast.env`."""
    return [choose(op) for op in _OPS]
