"""Write the tables of the pages from the newest GPU records: kernels, whole steps, and the README's few lines of both.

python bench/table.py                      # rewrite README.md, kernels/README.md, docs/guide/speed.md
python bench/table.py --check              # exit 1 if one is not what the records say
python bench/table.py --print [--record PATH]   # print the tables, of one record
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "bench" / "records"
# What the kernel table shows of each op: implementation, and rows of the record.
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
    ("channel_moments", "Triton", "forward"),
    ("conv3x3", "cuDNN, Triton", "forward"),
    ("grpo_token_loss", "C++/CUDA", "both"),
    ("dpo_loss", "C++/CUDA", "both"),
)
STEP_ROWS = ("rollout", "decode", "reference", "forward and backward", "optimizer", "update", "step")
MODELS = ("d16", "d30")
TOKENS = "next-token rollout"  # of shape "L, 64 images of 256 tokens"
# arXiv:2505.23331: 40 000 optimizer steps on 8 GPUs, 32 images a GPU and step: 20 000 steps of 512 images here.
PAPER_STEPS, PAPER = 20_000, {"d16": "16 h on 8 H100", "d30": "40 h on 8 H100"}

Record = dict[str, Any]


def newest(wanted: Callable[[Record], bool], record: Path | None = None) -> Record | None:
    """The newest record of a GPU with a row that is wanted, or None; of `record` alone where it is given."""
    paths = sorted(RECORDS.glob("*.json"), reverse=True) if record is None else [record]
    for path in paths:
        found: Record = json.loads(path.read_text())
        if (found["environment"]["gpus"] or record) and any(wanted(row) for row in found["rows"]):
            return found | {"path": path.name}
    return None


def _source(record: Record | None, none: str, to_root: str) -> list[str]:
    if record is None:
        return ["", none]
    environment, best = record["environment"], record["ceilings"]
    device = environment["gpus"][0] if environment["gpus"] else "CPU"
    ceilings = f"{best['flop_per_s'] / 1e12:.0f} TFLOP/s, {best['byte_per_s'] / 1e12:.2f} TB/s" if best else "not noted"
    return [
        "",
        f"Measured on one {device} (product and copy: {ceilings}), {record['date'][:10]}, "
        f"torch {environment['torch']}, at commit {environment['commit']}: "
        f"[{record['path']}]({to_root}bench/records/{record['path']}), by `{record['command']}`. "
        "What was changed after that commit is not in these figures (CHANGELOG.md).",
    ]


def kernel_table(record: Path | None = None, to_root: str = "") -> list[str]:
    """A row an op, direction and shape; "not measured" where there is no GPU record."""
    ops = {op for op, _, _ in OPS}
    found = newest(lambda row: row["op"] in ops, record)
    lines = ["| op | kernel | shape | time | against | share of the ceiling |", "| --- | --- | --- | --- | --- | --- |"]
    for op, kernel, direction in OPS:
        name = f"`{op}`" + ("" if direction == "both" else f" {direction}")
        rows = [r for r in found["rows"] if (r["op"], r["direction"]) == (op, direction)] if found else []
        if not rows:
            lines.append(f"| {name} | {kernel} | | not measured | not measured | not measured |")
        for row in rows:
            lines.append(
                f"| {name} | {kernel} | {row['shape']} | {_time(row)} | {_against(row)} | {row['share']:.0%} |"
            )
    return lines + _source(found, "No GPU has run these kernels so far: no record in bench/records.", to_root)


def step_table(record: Path | None = None, to_root: str = "") -> list[str]:
    """d16 and d30 at full size, with random weights."""
    of = {model: newest(lambda row, model=model: row["model"] == model, record) for model in MODELS}
    of["decoder"] = newest(lambda row: _is_of(row, "decoder"), record)
    found = [(r, row) for model, r in of.items() if r for row in r["rows"] if _is_of(row, model)]
    lines = [
        "| what | model, images | time | images/s | MFU | against | share of the limit | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for what in STEP_ROWS:
        rows = [(r, row) for r, row in found if row["op"] == what]
        if not rows:
            lines.append(f"| {what} | | not measured | | | | | |")
        for source, row in rows:
            images = row["images"] or _images_of(row["shape"])
            per_s = f"{images / row['ms'] * 1e3:.0f}" if images else ""
            peak = f"{row['peak_bytes'] / 2**30:.0f} GiB" if row["peak_bytes"] else ""
            against, share = _against(row), f"{row['share']:.0%}"
            cells = (what, row["shape"], _time(row), per_s, _mfu(row, source), against, share, peak)
            lines.append(f"| {' | '.join(cells)} |")
    sources = {r["path"]: r for r in of.values() if r}
    for source in sources.values():
        lines += _source(source, "", to_root)
    return lines + (
        hours(of) if sources else _source(None, "No GPU has run a step so far: no record in bench/records.", to_root)
    )


# What the README shows: op, direction and shape of a row, and what it is.
HEADLINES = (
    ("step", "", "d16, 512 images", "GRPO step, VAR d16: 32 labels x 16 samples"),
    ("step", "", "d30, 512 images", "GRPO step, VAR d30: 32 labels x 16 samples"),
    ("sample_tokens", "forward", "131072 x 4096 fp32", "`sample_tokens`: softmax, draw, log-probability"),
    ("selective_log_softmax", "backward", "43520 x 4096 fp32", "`selective_log_softmax`, gradient"),
    ("block_causal_attention", "forward", "B64 H30 L680 D64", "`block_causal_attention`"),
    ("block_causal_attention", "backward", "B64 H30 L680 D64", "`block_causal_attention`, gradient"),
    ("gated_residual_norm", "forward", "43520 x 1920 bfloat16", "`gated_residual_norm`"),
)
SHOWN_PEERS = ("eager", "torch.compile", "flex", "sdpa")


def headline_table(record: Path | None = None, to_root: str = "") -> list[str]:
    """A few rows of the other two tables; one that no record has is left out."""
    lines = ["| on one GPU | size | time | | share of the limit |", "| --- | --- | --- | --- | --- |"]
    sources = {}
    for op, direction, shape, name in HEADLINES:
        key = (op, direction, shape)
        found = newest(lambda row, key=key: _is_headline(row, key), record)
        for row in found["rows"] if found else []:
            if _is_headline(row, key):
                cell = (
                    _against(row, SHOWN_PEERS)
                    or f"{row['images'] / row['ms'] * 1e3:.0f} images/s, MFU {_mfu(row, found)}"
                )
                chosen = re.findall(r"kernels\.\S+", found["command"])  # other kernels than the defaults
                called = f"{name}, with {' '.join(f'`{override}`' for override in chosen)}" if chosen else name
                lines.append(f"| {called} | {row['shape']} | {_time(row)} | {cell} | {row['share']:.0%} |")
                sources[found["path"]] = found
    if not sources:
        return [*lines, *_source(None, "No GPU has run any of it so far: no record in bench/records.", to_root)]
    devices = sorted({found["environment"]["gpus"][0] for found in sources.values()})
    dates = sorted({found["date"][:10] for found in sources.values()})
    at = sorted({found["environment"]["commit"] for found in sources.values()})
    records = ", ".join(f"[{number}]({to_root}bench/records/{path})" for number, path in enumerate(sources, 1))
    return [
        *lines,
        "",
        f"Measured on one {' and one '.join(devices)}, {' and '.join(dates)}, at the commits {', '.join(at)}; the "
        f"records, with the commands: {records}. What was changed after those commits is not in these figures.",
    ]


def _is_headline(row: Record, key: tuple[str, str, str]) -> bool:
    return (row["op"], row["direction"] if key[1] else "", row["shape"]) == key


def tokens_table(record: Path | None = None, to_root: str = "") -> list[str]:
    """Rollouts of LlamaGen, random weights, 256 px: for docs/measured.md. Empty where no record has them."""
    found = newest(lambda row: row["op"] == TOKENS, record)
    lines = [
        "| next-token rollout | time | tokens/s | TB/s | share of the limit | against |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"] if found else []:
        if row["op"] == TOKENS:
            tokens = row["images"] * int(row["shape"].split()[-2]) / row["ms"] * 1e3
            moved = f"{row['io_bytes'] / row['ms'] / 1e9:.2f}"
            cells = (row["shape"], _time(row), f"{tokens:.0f}", moved, f"{row['share']:.0%}", _against(row))
            lines.append(f"| {' | '.join(cells)} |")
    return lines + _source(found, "", to_root) if found else []


def _is_of(row: Record, model: str) -> bool:
    """The decoder's own benchmark belongs to no model; "decode" of a model is a stage of its step."""
    return row["op"] == "decode" and not row["model"] if model == "decoder" else row["model"] == model


def hours(of: dict[str, Record | None]) -> list[str]:
    """What the paper's runs would take on one device, at the time of a step and of its reward."""
    lines = []
    rows = [row for record in of.values() if record for row in record["rows"]]
    clip = next((r for r in rows if r["op"].startswith("reward: CLIP")), None)
    for model in MODELS:
        step = next((r for r in rows if (r["op"], r["model"], r["images"]) == ("step", model, 512)), None)
        if step is not None:
            ms = step["ms"] + (clip["ms"] * 512 / clip["images"] if clip else 0.0)
            reward = "CLIP ViT-L/14 counted in" if clip else "a reward without a network"
            lines.append(
                f"- The paper's {model} run, {PAPER_STEPS} steps of 512 images ({PAPER[model]} there), would take "
                f"{PAPER_STEPS * ms / 3.6e6:.1f} h on this one device ({reward})."
            )
    return ["", *lines] if lines else []


def _time(row: Record) -> str:
    ms, spread = row["ms"], row.get("spread", 0.0)
    return (f"{ms:.4f} ms" if ms < 10 else f"{ms:.1f} ms") + (
        f" ± {spread / 2:.0%}" if row.get("samples", 0) > 1 else ""
    )


def _against(row: Record, shown: tuple[str, ...] = ()) -> str:
    """shown: these peers alone."""
    peers = {peer: ms for peer, ms in row["peers_ms"].items() if not shown or peer in shown}
    return ", ".join(f"{ms / row['ms']:.2f}x {peer}" for peer, ms in peers.items())


def _mfu(row: Record, record: Record | None) -> str:
    if not row["flop"] or not record or not record["ceilings"]:
        return ""
    return f"{row['flop'] / (row['ms'] * 1e-3 * record['ceilings']['flop_per_s']):.0%}"


def _images_of(shape: str) -> int:
    """Of a shape such as B64 256px bfloat16."""
    first = shape.split()[0]
    return int(first[1:]) if first[:1] == "B" and first[1:].isdigit() else 0


# Page, its way to the root for links, and its tables between "<!-- name: python bench/table.py -->" and "<!-- end of
# name -->".
PAGES = {
    "README.md": ("", {"measured": headline_table}),
    "kernels/README.md": ("../", {"kernels": kernel_table}),
    "docs/guide/speed.md": ("../../", {"steps": step_table}),
}


def filled(text: str, page: str) -> str:
    """The text of a page with its tables made anew. Raises: SystemExit where the marks of a table are missing."""
    to_root, tables = PAGES[page]
    for name, table in tables.items():
        begin, end = f"<!-- {name}: python bench/table.py -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            sys.exit(f"{page} has no {begin} ... {end}")
        text = f"{before}{begin}\n{chr(10).join(table(None, to_root))}\n{end}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    if arguments.print:
        for table in (kernel_table, step_table, tokens_table):
            print("\n".join(table(arguments.record)) + "\n")
        return 0
    texts = {page: (ROOT / page).read_text() for page in PAGES}
    wanted = {page: filled(text, page) for page, text in texts.items()}
    if arguments.check:
        return int(texts != wanted)
    for page, text in wanted.items():
        (ROOT / page).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
