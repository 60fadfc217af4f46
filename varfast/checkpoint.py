"""Atomic save and load."""
from __future__ import annotations
import os
from pathlib import Path
from typing import Any
import torch
def write_atomically(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, str(path)+".tmp"); os.replace(str(path)+".tmp", path)
