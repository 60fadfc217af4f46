"""Write the model of a run in the format of the public checkpoints, with a model card beside it.

python -m varfast.export checkpoint=runs/x out=model.safetensors
python -m varfast.export checkpoint=runs/x out=model.pth dtype=bfloat16
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a typo are answered before the imports below, which take 6 s
    from varfast.command import run_command

    run_command("export")

import errno
import json
import os
import re
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from varfast.config import Config
from varfast.data.labels import imagenet, read_labels
from varfast.files import read_json, read_leaves, read_text, save_tensors, save_text, write_atomically
from varfast.policies.config import LoRAConfig
from varfast.policies.families import family_of, whole_state
from varfast.policies.text import TOKENIZER_FILE
from varfast.printable import printable
from varfast.runs.config import ExportConfig
from varfast.runs.environment import environment
from varfast.runs.folder import RunFolder
from varfast.runs.load import delivered_state, frozen_part
from varfast.settings.loading import parse_arguments
from varfast.settings.reading import dump_yaml
from varfast.types import InputError
from varfast.weights.shards import index_of, split_state, stored_bytes
from varfast.weights.state import State


def export(config: ExportConfig) -> Path:
    """Write config.out and the model card. Returns the card's path.

    Raises: InputError if the folder holds no run or no checkpoint, or a file is in the way and overwrite is not set.
    """
    folder, out = RunFolder(config.checkpoint), Path(config.out).expanduser()
    run = folder.load_config()
    card, frozen = out.with_suffix(".md"), frozen_file(out, run)
    beside = out.with_name(TOKENIZER_FILE) if run.policy.conditioned_on == "text" else None
    in_the_way = [path for path in (out, frozen, card, beside, index_of(out)) if path is not None and path.exists()]
    if in_the_way and not config.overwrite:
        raise InputError(f"{in_the_way[0]} exists; choose another out, or overwrite=true")
    if config.shard_gb is not None and (out.suffix != ".safetensors" or not run.policy.as_transformers):
        raise InputError(
            f"shard_gb={config.shard_gb:g} writes several .safetensors files and their index, for a family that reads "
            f"those, as janus; here out={config.out} and policy.family={run.policy.family}: use shard_gb=null"
        )
    state, step = delivered_state(folder, getattr(torch, config.dtype))
    if run.policy.as_transformers:
        _save_parts(whole_state(run.policy, state, _frozen_state(folder, run)), out, config.shard_gb)
    else:
        _save(state, out)
    if frozen is not None:
        _save(_frozen_state(folder, run), frozen)
    if beside is not None and (tokenizer := folder.path / TOKENIZER_FILE).exists():
        save_text(beside, read_text(tokenizer))
    save_text(card, model_card(out.name, config.dtype, folder, run, step))
    return card


def _frozen_state(folder: RunFolder, run: Config) -> State:
    part = run.policy.parts[1]
    content = frozen_part(folder, part)
    if isinstance(content, Path):
        return family_of(run.policy).load_part(part, str(content), run.policy).state_dict()
    return content


def frozen_file(out: Path, config: Config) -> Path | None:
    """Where the VQ-VAE is written; None if the config takes it from the hub, where everybody can fetch it, or if one
    file has the whole model.
    """
    if config.policy.as_transformers:
        return None
    address, part = config.policy.frozen_checkpoint, config.policy.parts[1]
    return None if address is not None and address.startswith("hf://") else out.with_suffix(f".{part}{out.suffix}")


def _save_parts(state: State, out: Path, shard_gb: float | None) -> None:
    """One file, or several of at most `shard_gb` and their index, under the names that transformers gives them."""
    parts = split_state(state, shard_gb)
    if len(parts) == 1:
        _save(state, out)
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"{out.stem}-{number:05d}-of-{len(parts):05d}{out.suffix}"
        _save({tensor: state[tensor] for tensor in part}, out.with_name(name))
        weight_map |= dict.fromkeys(part, name)
    total = {"total_size": sum(tensor.nbytes for tensor in state.values())}
    save_text(index_of(out), json.dumps({"metadata": total, "weight_map": weight_map}, indent=2) + "\n")


def _save(state: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        write_atomically(path, lambda file: _save_safetensors(state, file))
    else:
        save_tensors(path, state)


def _save_safetensors(state: dict[str, Tensor], file: IO[bytes]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        # By file name, since safetensors.torch.save would hold the whole file in memory.
        save_file(state, file.name, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # the text of an error from Rust
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else printable(error)) from error


def model_card(name: str, dtype: str, folder: RunFolder, config: Config, step: int | None) -> str:
    """Markdown: base model, reward, settings, evaluation, how to load it. step: steps done; None if all."""
    sampling, summary = config.rollout, read_leaves(folder.path / "summary.json")
    last = summary.get("step")
    done = step if step is not None else last if isinstance(last, int) else config.run.steps
    frozen = _frozen(name, config)
    kind, sizes, with_public_code = family_of(config.policy).model_card(config.policy, name, frozen)
    decay = config.update.ema_decay
    here = environment()
    rows = {
        "sizes": sizes,
        "base model": _base(config),
        **({} if config.policy.as_transformers else {"VQ-VAE, not in this file": frozen}),
        **({"trained": _adapter(config.policy.lora)} if config.policy.lora else {}),
        "steps": f"{_steps(done, config.run.steps)}{_ended(summary, done)}, {sampling.images} images each "
        f"({sampling.labels_per_step} labels x {sampling.group_size} samples)",
        f"{config.loss.summary[0]}, learning rate": f"{config.loss.summary[1]}, {config.update.lr}",
        "temperature of the samples": f"{sampling.temperature}, "
        f"{f'guidance {sampling.cfg:g} as a part of the policy' if sampling.cfg else 'no guidance'} and no filters",
        "numbers in the file": dtype if decay is None else f"{dtype}, averaged over optimizer steps, decay {decay}",
        "written by": f"varfast {here['varfast']}, commit {here['commit'] or 'unknown'}",
    }
    reward = dump_yaml(config.model_dump(mode="json", exclude_none=True)["reward"])
    settings = read_text(folder.config)
    card = "\n\n".join(
        [
            f"# {Path(name).stem}",
            f"{kind}, fine-tuned with {config.loss.name.upper()}.",
            _markdown_table(["", ""], [[key, value] for key, value in rows.items()]),
            f"## Reward\n\n```yaml\n{reward}```",
            f"## Evaluation\n\n{_evaluation(folder, summary, done >= config.run.steps or last == done)}",
            f"## Load it\n\nWith varfast:\n\n```python\n{_with_varfast(name, config)}\n```",
            with_public_code,
            *_labels(folder, config.policy.num_classes),
            "## Licence\n\nTo be stated by whoever publishes this model. The terms of the base model, of the VQ-VAE "
            "and of models used as a reward may bind it.",
            f"## All settings\n\n```yaml\n{settings}```\n",
        ]
    )
    return _without_home(card)


def _without_home(text: str) -> str:
    """The text with ~ in place of home folders, whose names say who made the model."""
    return re.sub(rf"({re.escape(os.path.expanduser('~'))}|/home/[^/\s]+|/Users/[^/\s]+)(?=/|\s|$)", "~", text)


def _steps(done: int, wanted: int) -> str:
    return f"{done} of {wanted}" if done <= wanted else f"{done}, more than the {wanted} that run.steps says now"


def _base(config: Config) -> str:
    if config.policy.checkpoint == "pretrain":
        return f"pre-trained on {config.pretrain.dataset} by varfast"
    return "random weights" if config.policy.checkpoint == "random" else config.policy.checkpoint


def _adapter(lora: LoRAConfig) -> str:
    return f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}; merged into the weights"


def _frozen(name: str, config: Config) -> str:
    beside = frozen_file(Path(name), config)
    return config.policy.frozen_checkpoint or "" if beside is None else beside.name


def _ended(summary: dict[str, Any], done: int) -> str:
    """By which budget, if one has ended the run at that step."""
    by = str(summary.get("ended_by", ""))
    return f", ended by {printable(by)}" if by.startswith("run.budget") and summary.get("step") == done else ""


def _evaluation(folder: RunFolder, summary: dict[str, Any], complete: bool) -> str:
    parts = []
    names = dict.fromkeys(key.partition(".")[2] for key in summary if key.startswith(("before.", "after.")))
    if complete and names:
        rows = [[name, *(summary.get(f"{when}.{name}") for when in ("before", "after"))] for name in names]
        parts.append("Fresh samples, the same labels and random numbers before and after:")
        parts.append(_markdown_table(["", "before", "after"], rows))
    measured = folder.path / "evaluation" / "evaluation.json"
    if os.path.lexists(measured):
        parts.append(_measured(measured))
    return "\n\n".join(parts) or "None: the run was not complete, or had no evaluation."


def _measured(path: Path) -> str:
    """The table of an evaluation.json; if that is damaged, a note, since the weights can be exported all the same."""
    try:
        rows = read_json(path)["rows"]
        sides = [side for side in ("reference", "checkpoint", "difference") if any(row[side] for row in rows)]
        cells = [
            [f"{row['name']}, {row['labels']}", *((row[side] or {}).get("value") for side in sides)] for row in rows
        ]
    except (InputError, KeyError, TypeError, AttributeError) as error:
        return f"`evaluation/{path.name}` is left out, as it is damaged: {printable(error)}"
    return "By `varfast.evaluate`, with the labels it is of:\n\n" + _markdown_table(["", *sides], cells)


def _labels(folder: RunFolder, num_classes: int) -> list[str]:
    """A section about the labels: of the folder that the base was pre-trained on, or of ImageNet."""
    found = read_labels(folder.path)
    if found:
        rows = [[row.label, row.folder, row.name if row.name != row.folder else None, row.images] for row in found]
        return ["## Labels\n\n" + _markdown_table(["label", "folder", "name", "images"], rows)]
    names = list(imagenet().values())
    if folder.load_config().policy.checkpoint not in ("random", "pretrain") and num_classes == len(names):
        order = f"in the order of their WordNet ids, 0 {names[0]} to {num_classes - 1} {names[-1]}"
        return [f"## Labels\n\nTaken for the {num_classes} classes of ImageNet (ILSVRC 2012), {order}."]
    return []


def _markdown_table(head: list[str], rows: list[list[Any]]) -> str:
    def line(cells: list[Any]) -> str:
        texts = [f"{c:.4g}" if isinstance(c, float) else "" if c is None else str(c)[:200] for c in cells]
        return "| " + " | ".join(" ".join(text.replace("|", "\\|").split()) for text in texts) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def _with_varfast(name: str, config: Config) -> str:
    family = "" if config.policy.family == "var" else f", family={config.policy.family!r}"
    frozen = "" if config.policy.as_transformers else f", vqvae={_frozen(name, config)!r}"
    prompts = [0, 1] if config.policy.conditioned_on == "labels" else ["a red cat"]
    return (
        "import varfast\n\n"
        f"policy = varfast.load_policy(var={name!r}{frozen}{family})\n"
        f"rollout = policy.sample({prompts!r}, temperature=1.0, seed=0)\n"
        "images = policy.decode(rollout.tokens_BL)"
    )


def main(arguments: list[str]) -> int:
    """python -m varfast.export checkpoint=... out=... [key=value ...]"""
    config = parse_arguments(arguments, ExportConfig)
    card = export(config)
    out = Path(config.out).expanduser()
    size = stored_bytes(out if out.exists() else index_of(out))
    print(f"{config.out}: {size / 1e6:.1f} MB, {config.dtype}. Model card: {card}")
    return 0
