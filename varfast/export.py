"""Write the model of a run in the format of the public checkpoints, with a model card beside it.

python -m varfast.export checkpoint=runs/x out=model.safetensors
python -m varfast.export checkpoint=runs/x out=model.pth dtype=bfloat16
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a typo are answered before the imports below, which take 6 s
    from varfast.command import run_command

    run_command("export")

import errno
import os
import re
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from varfast.config import Config
from varfast.data.labels import imagenet, read_labels
from varfast.files import read_json, read_leaves, read_text, save_tensors, save_text, write_atomically
from varfast.policies.var.build import load_part
from varfast.policies.var.config import LoRAConfig, VARConfig, VQVAEConfig
from varfast.printable import printable
from varfast.runs.config import ExportConfig
from varfast.runs.environment import environment
from varfast.runs.folder import RunFolder
from varfast.runs.load import delivered_state, frozen_part
from varfast.settings.loading import parse_arguments
from varfast.settings.reading import dump_yaml
from varfast.types import InputError


def export(config: ExportConfig) -> Path:
    """Write config.out and the model card. Returns the card's path.

    Raises: InputError if the folder holds no run or no checkpoint, or a file is in the way and overwrite is not set.
    """
    folder, out = RunFolder(config.checkpoint), Path(config.out).expanduser()
    run = folder.load_config()
    card, vqvae = out.with_suffix(".md"), vqvae_file(out, run)
    in_the_way = [path for path in (out, vqvae, card) if path is not None and path.exists()]
    if in_the_way and not config.overwrite:
        raise InputError(f"{in_the_way[0]} exists; choose another out, or overwrite=true")
    state, step = delivered_state(folder, getattr(torch, config.dtype))
    _save(state, out)
    if vqvae is not None:
        content = frozen_part(folder, "vqvae")
        if isinstance(content, Path):
            content = load_part("vqvae", str(content), run.policy).state_dict()
        _save(content, vqvae)
    save_text(card, model_card(out.name, config.dtype, folder, run, step))
    return card


def vqvae_file(out: Path, config: Config) -> Path | None:
    """Where the VQ-VAE is written; None if the config takes it from the hub, where everybody can fetch it."""
    address = config.policy.vqvae_checkpoint
    return None if address is not None and address.startswith("hf://") else out.with_suffix(f".vqvae{out.suffix}")


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
    sizes, sampling, done = config.policy.sizes, config.rollout, config.run.steps if step is None else step
    decay = config.update.ema_decay
    here = environment()
    rows = {
        "sizes": f"{config.policy.preset or f'depth {sizes.depth}'}, images of {config.policy.vqvae.image_size} x "
        f"{config.policy.vqvae.image_size} pixels, {sizes.num_classes} labels",
        "base model": _base(config),
        "VQ-VAE, not in this file": _vqvae(name, config),
        **({"trained": _adapter(config.policy.lora)} if config.policy.lora else {}),
        "steps": f"{_steps(done, config.run.steps)}, {sampling.images} images each "
        f"({sampling.labels_per_step} labels x {sampling.group_size} samples)",
        "KL weight, clip, learning rate": f"{config.grpo.kl_beta}, {config.grpo.clip_eps}, {config.update.lr}",
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
            "A VAR transformer, fine-tuned with GRPO.",
            _markdown_table(["", ""], [[key, value] for key, value in rows.items()]),
            f"## Reward\n\n```yaml\n{reward}```",
            f"## Evaluation\n\n{_evaluation(folder, done >= config.run.steps)}",
            f"## Load it\n\nWith varfast:\n\n```python\n{_with_varfast(name, config)}\n```",
            _with_public_code(name, _vqvae(name, config), sizes, config.policy.vqvae),
            *_labels(folder, sizes.num_classes),
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


def _vqvae(name: str, config: Config) -> str:
    beside = vqvae_file(Path(name), config)
    return config.policy.vqvae_checkpoint or "" if beside is None else beside.name


def _evaluation(folder: RunFolder, complete: bool) -> str:
    summary = read_leaves(folder.path / "summary.json") if complete else {}
    parts = []
    if summary:
        names = dict.fromkeys(key.partition(".")[2] for key in summary)
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
    return (
        "import varfast\n\n"
        f"policy = varfast.load_policy(var={name!r}, vqvae={_vqvae(name, config)!r})\n"
        "rollout = policy.sample([0, 1], temperature=1.0, seed=0)\n"
        "images = policy.decode(rollout.tokens_BL)"
    )


def _with_public_code(name: str, vqvae_name: str, var: VARConfig, vqvae: VQVAEConfig) -> str:
    # The sizes that build_vae_var of the public code fixes.
    public = VQVAEConfig()
    fixed = {key: getattr(public, key) for key in ("channel_multipliers", "num_res_blocks", "phi_ratio")}
    if any(getattr(vqvae, key) != value for key, value in fixed.items()) or (var.mlp_ratio, var.norm_eps) != (
        4.0,
        1e-6,
    ):
        return (
            "The public code (github.com/FoundationVision/VAR) reads the weights, which have its names and shapes, but "
            "its `build_vae_var` makes no model of these sizes: the VQ-VAE's levels and blocks, or the transformer's "
            "mlp_ratio and norm_eps, are others than there."
        )
    safe = name.endswith(".safetensors")

    def load(file: str) -> str:
        if file.endswith(".safetensors"):
            return f"safetensors.torch.load_file({file!r})"
        return f"torch.load({file!r}, map_location='cpu')"

    imports = "import safetensors.torch\nimport torch" if safe else "import torch"
    return f"""With the public code, in a checkout of github.com/FoundationVision/VAR:

```python
{imports}
from models import build_vae_var

vae, var = build_vae_var(
    device="cuda", patch_nums={var.patch_nums}, V={var.vocab_size}, Cvae={var.code_width}, ch={vqvae.base_channels},
    share_quant_resi={vqvae.num_phi}, num_classes={var.num_classes}, depth={var.depth}, shared_aln={var.shared_adaln},
    attn_l2_norm={var.qk_l2_norm},
)
vae.load_state_dict({load(Path(vqvae_name).name)})
var.load_state_dict({load(name)})
```"""


def main(arguments: list[str]) -> int:
    """python -m varfast.export checkpoint=... out=... [key=value ...]"""
    config = parse_arguments(arguments, ExportConfig)
    card = export(config)
    size = Path(config.out).expanduser().stat().st_size
    print(f"{config.out}: {size / 1e6:.1f} MB, {config.dtype}. Model card: {card}")
    return 0
