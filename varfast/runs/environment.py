"""Versions and hardware, for the run folder and for `python -m varfast.env`."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from varfast.perf.allocator import ALLOCATOR_VARIABLES


def environment() -> dict[str, Any]:
    """What numbers may depend on beside the config; values are JSON's."""
    from varfast import __version__

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "varfast": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": gpus,
        "allocator": {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ},
    }


def _commit() -> str | None:
    """Commit of the git checkout that holds this code, with a + if files were changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
