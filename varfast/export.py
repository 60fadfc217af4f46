"""Write the model of a run in the format of the public checkpoints, with a model card beside it.

python -m varfast.export checkpoint=runs/x out=model.safetensors
python -m varfast.export checkpoint=runs/x out=model.pth dtype=bfloat16
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from torch import Tensor

from varfast.checkpoint import RunFolder, read_leaves, save_tensors, save_text, write_atomically
from varfast.command import run_command
from varfast.config import Config, ExportConfig, LoRAConfig, VARConfig, VQVAEConfig, parse_arguments
from varfast.labels import imagenet, read_labels
from varfast.log import environment
from varfast.models import VAR
from varfast.models.lora import merged_state, without_lora
from varfast.models.weights import load_var
from varfast.policy import pick_device
from varfast.train import load_run
from varfast.types import InputError


def public_state(folder: RunFolder, sizes: VARConfig, dtype: torch.dtype) -> tuple[dict[str, Tensor], int | None]:
    """Names, shapes and order of the public checkpoints, buffers included; what is no integer in `dtype`.

    Returns: what the run delivers as of the last checkpoint (with update.ema_decay, the average), or var.pth where that
        alone is left, and the steps that made it (None for var.pth).
    Raises: InputError if the folder holds no weights, or others than its config says.
    """
    step, config = None, folder.load_config()
    if folder.weights.exists() and not folder.checkpoints.exists():
        found: dict[str, Tensor] = load_var(str(folder.weights), sizes).state_dict()
    elif config.policy.lora:
        # Random weights are those of the device that they were drawn on.
        device = pick_device(config.run.device if config.policy.checkpoint == "random" else "cpu")
        var, step = load_run(folder, device, "float32").var, folder.newest().step
        found = merged_state(var, without_lora(var).state_dict())
    else:
        checkpoint, var = folder.newest(), VAR(sizes)
        checkpoint.load_result(var)
        found, step = var.state_dict(), checkpoint.step
    with torch.device("meta"):
        wanted = VAR(sizes).state_dict()
    return {n: found[n].to(dtype if t.is_floating_point() else t.dtype).contiguous() for n, t in wanted.items()}, step


def export(config: ExportConfig) -> Path:
    """Write config.out and the model card; the card's path.

    Raises: InputError if the folder holds no run or no checkpoint, or a file is in the way and overwrite is not set.
    """
    folder, out = RunFolder(config.checkpoint), Path(config.out).expanduser()
    run = folder.load_config()
    card = out.with_suffix(".md")
    in_the_way = [path for path in (out, card) if path.exists()]
    if in_the_way and not config.overwrite:
        raise InputError(f"{in_the_way[0]} exists; choose another out, or overwrite=true")
    state, step = public_state(folder, run.policy.sizes, getattr(torch, config.dtype))
    if out.suffix == ".safetensors":
        write_atomically(out, lambda file: _save_safetensors(state, file))
    else:
        save_tensors(out, state)
    save_text(card, model_card(out.name, config.dtype, folder, run, step))
    return card


def _save_safetensors(state: dict[str, Tensor], file: IO[bytes]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        # By name: safetensors.torch.save would hold the file in memory once more.
        save_file(state, file.name, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(None, str(error)) from error


def model_card(name: str, dtype: str, folder: RunFolder, config: Config, step: int | None) -> str:
    """Markdown: base model, reward, settings, evaluation, how to load it. `step`: steps done; None: all."""
    sizes, sampling, done = config.policy.sizes, config.rollout, config.run.steps if step is None else step
    decay = config.update.ema_decay
    here = environment()
    rows = {
        "sizes": f"{config.policy.preset or f'depth {sizes.depth}'}, images of {config.policy.vqvae.image_size} x "
        f"{config.policy.vqvae.image_size} pixels, {sizes.num_classes} labels",
        "base model": _base(config),
        "VQ-VAE, not in this file": _vqvae(folder, config),
        **({"trained": _adapter(config.policy.lora)} if config.policy.lora else {}),
        "steps": f"{done} of {config.run.steps}, {sampling.images} images each ({sampling.labels_per_step} labels x "
        f"{sampling.group_size} samples)",
        "KL weight, clip, learning rate": f"{config.grpo.kl_beta}, {config.grpo.clip_eps}, {config.update.lr}",
        "temperature of the samples": f"{sampling.temperature}, no guidance and no filters",
        "numbers in the file": dtype if decay is None else f"{dtype}, averaged over optimizer steps, decay {decay}",
        "written by": f"varfast {here['varfast']}, commit {here['commit'] or 'unknown'}",
    }
    reward = yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)["reward"], sort_keys=False)
    settings = folder.config.read_text(encoding="utf-8")
    return "\n\n".join(
        [
            f"# {Path(name).stem}",
            "A VAR transformer, fine-tuned with GRPO.",
            _table(["", ""], [[key, value] for key, value in rows.items()]),
            f"## Reward\n\n```yaml\n{reward}```",
            f"## Evaluation\n\n{_evaluation(folder, done == config.run.steps)}",
            f"## Load it\n\nWith varfast:\n\n```python\n{_with_varfast(name, folder, config)}\n```",
            _with_public_code(name, _vqvae(folder, config), sizes, config.policy.vqvae),
            *_labels(folder, sizes.num_classes),
            "## Licence\n\nTo be stated by whoever publishes this model. The terms of the base model, of the VQ-VAE "
            "and of models used as a reward may bind it.",
            f"## All settings\n\n```yaml\n{settings}```\n",
        ]
    )


def _base(config: Config) -> str:
    if config.policy.checkpoint == "pretrain":
        return f"pre-trained on {config.pretrain.dataset} by varfast"
    return "random weights" if config.policy.checkpoint == "random" else config.policy.checkpoint


def _adapter(lora: LoRAConfig) -> str:
    return f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}; merged into the weights"


def _vqvae(folder: RunFolder, config: Config) -> str:
    base = folder.load_base()
    return config.policy.vqvae_checkpoint or (base[1] if base is not None else "random weights")


def _evaluation(folder: RunFolder, complete: bool) -> str:
    summary = read_leaves(folder.path / "summary.json") if complete else {}
    parts = []
    if summary:
        names = dict.fromkeys(key.partition(".")[2] for key in summary)
        rows = [[name, *(summary.get(f"{when}.{name}") for when in ("before", "after"))] for name in names]
        parts.append("Fresh samples, the same labels and random numbers before and after:")
        parts.append(_table(["", "before", "after"], rows))
    measured = folder.path / "evaluation" / "evaluation.json"
    if measured.exists():
        rows = json.loads(measured.read_text(encoding="utf-8"))["rows"]
        sides = [side for side in ("reference", "checkpoint", "difference") if any(row[side] for row in rows)]
        cells = [
            [f"{row['name']}, {row['labels']}", *((row[side] or {}).get("value") for side in sides)] for row in rows
        ]
        parts.append("By `varfast.evaluate`, with the labels it is of:")
        parts.append(_table(["", *sides], cells))
    return "\n\n".join(parts) or "None: the run was not complete, or had no evaluation."


def _labels(folder: RunFolder, num_classes: int) -> list[str]:
    """What the labels are: of a base that was pre-trained on a folder, or of ImageNet."""
    found = read_labels(folder.path)
    if found:
        rows = [[row.label, row.folder, row.name if row.name != row.folder else None, row.images] for row in found]
        return ["## Labels\n\n" + _table(["label", "folder", "name", "images"], rows)]
    names = list(imagenet().values())
    if folder.load_config().policy.checkpoint not in ("random", "pretrain") and num_classes == len(names):
        order = f"in the order of their WordNet ids, 0 {names[0]} to {num_classes - 1} {names[-1]}"
        return [f"## Labels\n\nTaken for the {num_classes} classes of ImageNet (ILSVRC 2012), {order}."]
    return []


def _table(head: list[str], rows: list[list[Any]]) -> str:
    def line(cells: list[Any]) -> str:
        texts = [f"{c:.4g}" if isinstance(c, float) else "" if c is None else str(c) for c in cells]
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def _with_varfast(name: str, folder: RunFolder, config: Config) -> str:
    return (
        "import varfast\n\n"
        f"policy = varfast.load_policy(var={name!r}, vqvae={_vqvae(folder, config)!r})\n"
        "rollout = policy.sample([0, 1], temperature=1.0, seed=0)\n"
        "images = policy.decode(rollout.tokens_BL)"
    )


def _with_public_code(name: str, vqvae_file: str, var: VARConfig, vqvae: VQVAEConfig) -> str:
    # What build_vae_var fixes.
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
    load = f"safetensors.torch.load_file({name!r})" if safe else f"torch.load({name!r}, map_location='cpu')"
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
vae.load_state_dict(torch.load({Path(vqvae_file).name!r}, map_location="cpu"))
var.load_state_dict({load})
```"""


def main(arguments: list[str]) -> int:
    """python -m varfast.export checkpoint=... out=... [key=value ...]"""
    config = parse_arguments(arguments, ExportConfig)
    card = export(config)
    size = Path(config.out).expanduser().stat().st_size
    print(f"{config.out}: {size / 1e6:.1f} MB, {config.dtype}. Model card: {card}")
    return 0


if __name__ == "__main__":
    run_command(main)
