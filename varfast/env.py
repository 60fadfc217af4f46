"""Print versions, devices, and which implementation of each op runs here and why.

python -m varfast.env
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a typo are answered before the imports below, which take 6 s
    from varfast.command import run_command

    run_command("env")

import importlib.util
from importlib import metadata

from varfast import kernels
from varfast.command import read_nothing
from varfast.policies.device import pick_device
from varfast.runs.environment import environment

_PACKAGES = (
    "numpy",
    "pydantic",
    "safetensors",
    "huggingface_hub",
    "tensorboard",
    "scikit-learn",
    "torchvision",
    "open_clip_torch",
    "triton",
    "bitsandbytes",
    "wandb",
    "trackio",
    "mlflow",
    "swanlab",
    "peft",
)
# Used where they can be imported; the names on PyPI are a source build and another package.
_OPTIONAL_MODULES = ("flash_attn", "apex")


def main(arguments: list[str]) -> int:
    """python -m varfast.env"""
    read_nothing(arguments)
    for name, value in environment().items():
        print(f"{name:16} {value}")
    for package in _PACKAGES:
        try:
            print(f"{package:16} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package:16} not installed")
    for module in _OPTIONAL_MODULES:
        found = importlib.util.find_spec(module) is not None
        print(f"{module:16} {'can be imported (optional)' if found else 'not installed (optional)'}")
    print("\nop                       impl        why")
    for choice in kernels.choices(pick_device("auto")):
        print(f"{choice.op:24} {choice.impl:11} {choice.why}")
    return 0
