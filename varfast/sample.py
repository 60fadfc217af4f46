"""Write a grid of samples from any checkpoint.

    python -m varfast.sample checkpoint=runs/digits out=digits.png
    python -m varfast.sample checkpoint=hf://FoundationVision/var/var_d16.pth \
        vqvae=hf://FoundationVision/var/vae_ch160v4096z32.pth 'labels=[golden retriever,980]' cfg=4 top_k=900 top_p=0.95
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a typo are answered before the imports below, which take 6 s
    from varfast.command import run_command

    run_command("sample")

from pathlib import Path

import torch

from varfast.data.labels import caption, label_names, label_numbers
from varfast.evaluation.config import SampleConfig
from varfast.policies.checks import check_finite
from varfast.policies.device import pick_device
from varfast.progress import Progress
from varfast.randomness import Key
from varfast.runs.load import load_policy
from varfast.runs.pictures import PICTURE_FORMATS, image_grid, save_picture
from varfast.settings.loading import parse_arguments
from varfast.settings.section import check_divides
from varfast.types import InputError, Prompts, Sampling

_ROWS = 8


def main(arguments: list[str]) -> int:
    """python -m varfast.sample checkpoint=... [key=value ...]"""
    config = parse_arguments(arguments, SampleConfig)
    out = Path(config.out).expanduser()
    if out.is_dir() or config.out.endswith("/") or out.suffix.lower() not in PICTURE_FORMATS:
        raise InputError(
            f"out={config.out}: want the name of a picture, as samples.png; known: {', '.join(PICTURE_FORMATS)}"
        )
    policy = load_policy(
        config.checkpoint,
        config.vqvae,
        pick_device(config.device),
        config.dtype,
        family=config.family,
        argument="checkpoint",
    )
    names = label_names(config.checkpoint, policy.num_classes)
    labels = list(range(min(_ROWS, policy.num_classes)))
    if config.labels is not None:
        labels = label_numbers("labels", config.labels, policy.num_classes, names)
    labels_B = torch.tensor(labels).repeat_interleave(config.samples_per_label)
    check_divides("micro_batch", config.micro_batch, len(labels_B))
    size = config.micro_batch or len(labels_B)
    how = Sampling(config.temperature, config.cfg, config.top_k, config.top_p)
    parts = []
    with Progress("sample", len(labels_B) // size, unit="batch") as progress:
        for first in range(0, len(labels_B), size):
            prompts = Prompts(labels_B[first : first + size])
            rollout, images = policy.sample_images(prompts, how, Key(config.seed, first_sample=first))
            check_finite(rollout, images)
            parts.append(images)
            progress.update()
    titles = [caption(label, names) for label in labels]
    save_picture(out, image_grid(torch.cat(parts), config.samples_per_label, titles))
    print(f"{out}: {len(labels)} labels x {config.samples_per_label} samples")
    if config.labels is None and len(labels) < policy.num_classes:
        left_out = (
            f"{len(labels)} to {policy.num_classes - 1}" if policy.num_classes > len(labels) + 1 else f"{len(labels)}"
        )
        print(f"labels 0 to {len(labels) - 1} are shown; for {left_out}: labels=[{len(labels)}, ...]")
    return 0
