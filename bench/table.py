"""Write the README's kernel table from the newest GPU record.

python bench/table.py            # rewrite README.md
python bench/table.py --check    # exit 1 if it is not what the record says
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- kernels: python bench/table.py -->", "<!-- end of kernels -->"
# What the table shows of each op: implementation, and one row of the record.
OPS = (
    ("sample_tokens", "Triton", "forward"),
    ("selective_log_softmax", "Triton", "forward"),
    ("selective_log_softmax", "Triton", "backward"),
    ("block_causal_attention", "Triton", "forward"),
    ("block_causal_attention", "Triton", "backward"),
    ("cached_attention", "Triton", "forward"),
    ("gated_residual_norm", "Triton", "forward"),
    ("gated_residual_norm", "Triton", "backward"),
    ("group_norm_silu", "Triton", "forward"),
    ("grpo_token_loss", "C++/CUDA", "both"),
)


def newest_gpu_record() -> dict[str, object] | None:
    """The newest record of a GPU in bench/records, or None."""
    for path in sorted((ROOT / "bench" / "records").glob("*.json"), reverse=True):
        record: dict[str, object] = json.loads(path.read_text())
        if record["environment"]["gpus"]:  # type: ignore[index]
            return record | {"path": path.name}
    return None


def table() -> str:
    """The table, a row an op and direction; "not measured" where there is no GPU record."""
    record = newest_gpu_record()
    lines = ["| op | kernel | shape | time | against | share of the ceiling |", "| --- | --- | --- | --- | --- | --- |"]
    for op, kernel, direction in OPS:
        name = f"`{op}`" + ("" if direction == "both" else f" {direction}")
        rows = [r for r in record["rows"] if (r["op"], r["direction"]) == (op, direction)] if record else []  # type: ignore[attr-defined]
        if not rows:
            lines.append(f"| {name} | {kernel} | | not measured | not measured | not measured |")
        for row in rows:
            ratios = ", ".join(f"{ms / row['ms']:.2f}x {peer}" for peer, ms in row["peers_ms"].items())
            lines.append(f"| {name} | {kernel} | {row['shape']} | {row['ms']:.4f} ms | {ratios} | {row['share']:.0%} |")
    if record:
        gpu, commit = record["environment"]["gpus"][0], record["environment"]["commit"]  # type: ignore[index]
        lines += [
            "",
            f"Measured on one {gpu} at commit {commit}: bench/records/{record['path']}, by `{record['command']}`.",
        ]
    else:
        lines += ["", "No GPU has run these kernels so far: no record in bench/records."]
    return "\n".join(lines)


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"README.md has no {BEGIN} ... {END}")
    wanted = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if "--check" in sys.argv:
        return int(text != wanted)
    readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
