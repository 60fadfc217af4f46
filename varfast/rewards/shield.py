"""Restores the settings of the process that a user's reward changes, since it runs in the trainer's process.

A reward is code of the person who trains, and trusted (docs/security.md). This protects from accidents, such as a
module that switches gradients off when it is imported, not from an attack.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from varfast.printable import printable

# The signals that end a run after a checkpoint. Not SIGALRM: who set an alarm still needs its handler when it rings.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# How torchrun tells a process its rank. Other variables stay as the reward set them, as libraries read them late.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _set_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


# How each setting is read and written. The order counts: precision of products first in full, then its parts.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _set_device),
    *(
        (
            partial(torch.is_autocast_enabled, kind),
            partial(torch.set_autocast_enabled, kind),
        )
        for kind in ("cpu", "cuda")
    ),
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda both: torch.use_deterministic_algorithms(both[0], warn_only=both[1]),
    ),
    (
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda both: torch.autograd.set_detect_anomaly(*both),
    ),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    _attribute(torch.backends.cuda.matmul, "allow_tf32"),
    _attribute(torch.backends.cudnn, "allow_tf32"),
    _attribute(torch.backends.cudnn, "benchmark"),
    _attribute(torch.backends.cudnn, "deterministic"),
    _attribute(torch.backends.cudnn, "enabled"),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (np.geterr, lambda before: np.seterr(**before)),
    (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    _attribute(sys, "stdout"),
    _attribute(sys, "stderr"),
    (
        lambda: {name: os.environ.get(name) for name in _LAUNCHER},
        lambda before: _set_variables(before),
    ),
)


# Modules and classes whose functions a reward may have replaced; the trainer would then call the replacement.
_LIBRARY: tuple[Any, ...] = (torch, torch.nn.functional, torch.autograd, torch.Tensor, torch.nn.Module)


def _set_variables(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _read(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:  # torch, of a precision that was set by its old names and its new ones
        return None


@contextmanager
def shielded(name: str, device: torch.device, key: Sequence[int]) -> Iterator[None]:
    """Run the body without gradients and with its own random numbers; then restore what it changed of the process.

    That is: grad mode, inference mode, autocast, default dtype and device, precision and determinism of PyTorch, its
    threads, NumPy's error state, random generators of Python, NumPy and PyTorch, the GPU and its stream, handlers of
    the signals that end a run, filters that turn warnings into errors, standard output, the working directory, and
    torchrun's variables. Functions of PyTorch that it replaced are restored, with a warning. A process that the body
    forked ends here instead of going on as a second trainer.

    Args:
        name: of the reward, for messages.
        device: of the images; the generator of this GPU is the body's too.
        key: the random generators begin as a function of these numbers, each in [0, 2^64).
    """
    process, folder = os.getpid(), _folder()
    before = [_read(read) for read, _ in _SETTINGS]
    handlers = _handlers()
    filters = list(warnings.filters)
    library = [dict(vars(owner)) for owner in _LIBRARY]
    with _own_random_numbers(device, key), _own_gpu(device), torch.inference_mode(False):
        try:
            with torch.no_grad():
                yield
        finally:
            if os.getpid() != process:
                text = f"reward {printable(name)}: a process that it forked came back from it, and ends here\n"
                os.write(2, text.encode("utf-8", "replace"))
                os._exit(1)
            for (read, write), value in zip(_SETTINGS, before, strict=True):
                if value is not None and _read(read) != value:
                    write(value)
            replaced = _names_put_back(library)  # after the default dtype, which PyTorch binds a name to itself
            _put_back(handlers)
            if list(warnings.filters) != filters:  # others that a library sets for itself may stay
                kept = [f for f in warnings.filters if f in filters or f[0] != "error"]
                warnings.filters[:] = kept  # type: ignore[index]
            if folder is not None and _folder() != folder:
                os.chdir(folder)
        # inference_mode(False) puts grad mode back to what it was when it began.
    if replaced:
        text = f"reward {printable(name)} replaced {', '.join(replaced[:4])} for the whole process; this was put back"
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def _names_put_back(library: list[dict[str, Any]]) -> list[str]:
    """Restore names that were bound to something else; returns them."""
    replaced = []
    for owner, before in zip(_LIBRARY, library, strict=True):
        now = vars(owner)
        for name, value in before.items():
            if now.get(name, _read) is not value and not name.startswith("_"):
                setattr(owner, name, value)
                replaced.append(f"{owner.__name__}.{name}")
    return replaced


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # somebody deleted it
        return None


def _handlers() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in _SIGNALS}


def _put_back(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        now = signal.getsignal(number)
        # A trainer that has received its first signal meanwhile has gone back to Python's own handlers itself.
        if now is not handler and handler is not None and now not in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, handler)


@contextmanager
def _own_random_numbers(device: torch.device, key: Sequence[int]) -> Iterator[None]:
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = random.getstate(), np.random.get_state(), [generator.get_state() for generator in generators]
    seed = int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]) >> 1
    random.seed(seed)
    np.random.seed(seed % 2**32)
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for generator, state in zip(generators, states[2], strict=True):
            generator.set_state(state)


@contextmanager
def _own_gpu(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    current, stream = torch.cuda.current_device(), torch.cuda.current_stream()
    try:
        yield
    finally:
        torch.cuda.set_device(current)
        torch.cuda.set_stream(stream)
