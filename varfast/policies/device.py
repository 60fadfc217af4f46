"""The device that a model is put on."""

from __future__ import annotations

import torch

from varfast.perf.cpu import keep_freed_memory
from varfast.types import InputError


def pick_device(name: str) -> torch.device:
    """The device that a config names (run.device, or device of a command).

    From then on float32 convolutions on a GPU are exact, and on a CPU freed memory is kept.

    Raises: InputError for a GPU that is not there.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"device={name}: this machine has {torch.cuda.device_count()} GPUs; use cpu or auto")
        # cuDNN's default rounds to 10 bits (TF32), at some batch sizes and not at others: the transformer's input would
        # differ between rollout and update. So would upsampling, which is a product; there exact is the default.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    elif device.type == "cpu":
        keep_freed_memory()
    return device


def existing_device(device: torch.device | str) -> torch.device:
    """The device that a caller of the Python API names.

    Raises: InputError for a name that is no device, and for a GPU that is not there.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device={device!r}: want cpu, cuda or cuda:1") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device={found}: this machine has {torch.cuda.device_count()} GPUs; use cpu")
    return found
