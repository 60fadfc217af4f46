"""Which implementation of an op runs, and why. The one place where `impl=` is read."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varfast.kernels._triton import NO_TRITON


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        name: its value of impl=.
        run: computes the op from its arguments (without impl), which the op has checked.
        cannot: returns why it cannot run on a device, or None if it can.
        auto_on: device types on which impl="auto" may pick it; empty for implementations that exist for comparison.
        refuses: for arguments that it does not support (float64, say), returns what it supports instead; else None.
    """

    name: str
    run: Callable[..., Any]
    cannot: Callable[[torch.device], str | None] = lambda device: None
    auto_on: tuple[str, ...] = ("cuda", "cpu")
    refuses: Callable[..., str | None] = lambda *arguments: None


@dataclass(frozen=True)
class Choice:
    """The implementation that impl="auto" picks for an op on a device."""

    op: str
    impl: str
    why: str
    available: tuple[str, ...]


# The implementations of every op, the fastest first and "reference" last.
OPS: dict[str, tuple[Implementation, ...]] = {}
_CONFIGURED: dict[str, str] = {}


def implementations(op: str, *fastest_first: Implementation) -> None:
    """Declare the implementations of an op. Called once, in the op's own file; "reference" must be the last."""
    assert op not in OPS, op
    assert fastest_first[-1].name == "reference", op
    OPS[op] = fastest_first


def configure(impls: Mapping[str, str], device: torch.device | None = None) -> None:
    """Set which implementation impl="auto" picks, by op. Ops that are not named go back to their default.

    Raises: ValueError for an op or an implementation that does not exist, or that cannot run on `device`.
    """
    for op, impl in impls.items():
        check_implementation(op, impl)
        if device is not None and impl != "auto":
            select(op, impl, device)
    _CONFIGURED.clear()
    _CONFIGURED.update({op: impl for op, impl in impls.items() if impl != "auto"})


def check_implementation(op: str, impl: str) -> None:
    """Raises: ValueError for an op that does not exist, or an `impl` that is neither "auto" nor one of its own."""
    if op not in OPS:
        raise ValueError(f"there is no op {op}; there are {', '.join(OPS)}")
    if impl != "auto":
        _named(op, impl)


def choose(op: str, device: torch.device) -> Choice:
    """The implementation that impl="auto" picks on this device."""
    reasons = {i.name: i.cannot(device) for i in OPS[op]}
    available = tuple(name for name, reason in reasons.items() if reason is None)
    if op in _CONFIGURED:
        return Choice(op, _CONFIGURED[op], "asked for in the config", available)
    picked = next(i for i in OPS[op] if device.type in i.auto_on and reasons[i.name] is None)
    faster = [i for i in OPS[op][: OPS[op].index(picked)] if i.auto_on]
    why = "; ".join(f"{i.name}: {reasons[i.name] or 'not picked on this device'}" for i in faster)
    return Choice(op, picked.name, why or "the fastest that runs here", available)


def select(op: str, impl: str, device: torch.device) -> Callable[..., Any]:
    """The function that runs for `impl` on tensors of a device.

    Raises: ValueError if `impl` is neither "auto" nor an implementation of this op, or cannot run on this device.
    """
    return _runnable(op, impl, device).run


def run(op: str, impl: str, *arguments: Any) -> Any:
    """Compute an op on the device of its first argument, a tensor.

    If the implementation that impl="auto" picked refuses these arguments, the next one runs, with a warning once.
    Raises: ValueError as select, and if an implementation chosen by `impl` or in the config refuses the arguments.
    """
    device = arguments[0].device
    chosen = _runnable(op, impl, device)
    refusal = chosen.refuses(*arguments)
    if refusal is None:
        return chosen.run(*arguments)
    if impl != "auto" or op in _CONFIGURED:
        raise ValueError(f"impl={chosen.name!r} of {op} takes {refusal}; use impl='reference'")
    slower = OPS[op][OPS[op].index(chosen) + 1 :]
    able = (
        i for i in slower if device.type in i.auto_on and i.cannot(device) is None and i.refuses(*arguments) is None
    )
    instead = next(able)
    say_once(f"{op}: impl={chosen.name!r} takes {refusal}; {instead.name!r} runs instead")
    return instead.run(*arguments)


@functools.cache
def say_once(message: str) -> None:
    """Warn, but only at the first call with this message."""
    warnings.warn(message, stacklevel=4)


def _runnable(op: str, impl: str, device: torch.device) -> Implementation:
    name = choose(op, device).impl if impl == "auto" else impl
    implementation = _named(op, name)
    reason = implementation.cannot(device)
    if reason is not None:
        raise ValueError(f"impl={name!r} of {op} cannot run on {device}: {reason}")
    return implementation


def choices(device: torch.device) -> list[Choice]:
    """What impl="auto" picks for every op; shown by `python -m varfast.env`."""
    return [choose(op, device) for op in OPS]


def _named(op: str, impl: str) -> Implementation:
    for implementation in OPS[op]:
        if implementation.name == impl:
            return implementation
    names = ", ".join(i.name for i in OPS[op])
    raise ValueError(f"impl={impl!r}: {op} has {names}; use one of these, or 'auto'")


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_recording = False


@contextmanager
def launches_recorded() -> Iterator[None]:
    """Within the context, impl="triton" accepts CPU tensors. kernels/aot.py intercepts the launches; nothing runs."""
    global _recording
    _recording = True
    try:
        yield
    finally:
        _recording = False


FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that the Triton kernels support


def refused_dtype(x: Tensor) -> str | None:
    """The dtypes that Triton kernels support, for the error message, if this tensor has another one; else None."""
    return None if x.dtype in FLOATS else f"float32, bfloat16 or float16, got {x.dtype}"


def cannot_run_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, or None. They run on CUDA devices, and with TRITON_INTERPRET=1 also on
    the CPU, slowly, to test their logic."""
    if NO_TRITON is not None:
        return NO_TRITON
    if device.type == "cuda" or INTERPRETED or _recording:
        return None
    return "Triton needs a CUDA device"
