"""What is wrong with an address that should name a run folder or weights, in words."""

from __future__ import annotations

import re
from pathlib import Path

from varfast.printable import printable
from varfast.settings.paths import expanded
from varfast.settings.schema import listed

_OF_WEIGHTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".json")
_WANTED = "want a run folder, or a transformer's weights"
_SHOWN_RUNS = 5


def fault(address: str) -> str | None:
    """Why an address can be neither a run folder nor weights; None if it may be weights. Looks at this disk alone."""
    if address.startswith("hf://"):
        parts = address.removeprefix("hf://").strip("/").split("/")
        return None if len(parts) > 1 and all(parts) else f"is no address; {_WANTED}, as hf://owner/repo/file"
    if re.match(r"\w+://", address):
        return None
    path = expanded(address)
    if not path.exists():
        return f"does not exist; {_WANTED}"
    if path.is_dir():
        runs = runs_in(path)
        return "is no run folder" + (f"; it holds the runs {listed(runs, 'and')}" if runs else "")
    folder = path.parent
    if (folder / "config.yaml").is_file() and path.suffix in (".pth", ".yaml", ".json", ".jsonl"):
        return f"is a file of a run; did you mean {folder}?"
    if path.suffix.lower() not in _OF_WEIGHTS:
        return f"is no file of weights ({listed(_OF_WEIGHTS[:-1])}); {_WANTED}"
    return None


def runs_in(folder: Path) -> list[str]:
    """The first run folders of a folder, by path."""
    try:
        found = sorted(path.parent for path in folder.glob("*/config.yaml"))
    except OSError:
        return []
    return [printable(str(path), 100) for path in found[:_SHOWN_RUNS]]
