"""Write a grid of samples from any checkpoint.

    python -m varfast.sample checkpoint=runs/digits out=digits.png
    python -m varfast.sample checkpoint=hf://FoundationVision/var/var_d16.pth \
        vqvae=hf://FoundationVision/var/vae_ch160v4096z32.pth 'labels=[golden retriever,980]' cfg=4 top_k=900 top_p=0.95
    python -m varfast.sample checkpoint=runs/janus 'prompts=[a red cube, two dogs]' cfg=5
    python -m varfast.sample checkpoint=runs/janus prompts=prompts.txt
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a typo are answered before the imports below, which take 6 s
    from varfast.command import run_command

    run_command("sample")

from pathlib import Path

import torch

from varfast.data.labels import caption, label_names, label_numbers
from varfast.evaluation.config import SampleConfig
from varfast.evaluation.subjects import asked_of, check_kind
from varfast.policies.checks import check_finite
from varfast.policies.device import pick_device
from varfast.policies.protocol import Policy
from varfast.policies.text import reads_texts
from varfast.progress import Progress
from varfast.randomness import Key
from varfast.runs.load import load_policy
from varfast.runs.pictures import image_grid, prompt_title, save_picture, with_domain
from varfast.settings.loading import parse_arguments
from varfast.settings.section import MANY, check_divides
from varfast.types import InputError, Prompts, Sampling
from varfast.weights.saved import is_run

_ROWS = 8


def main(arguments: list[str]) -> int:
    """python -m varfast.sample checkpoint=... [key=value ...]"""
    config = parse_arguments(arguments, SampleConfig)
    out = Path(config.out).expanduser()
    if out.is_dir():
        raise InputError(f"out={config.out} is a folder; want the name of a picture in it, as {config.out}/samples.png")
    if is_run(config.checkpoint):
        for key in ("vqvae", "family"):
            if key in config.model_fields_set:
                raise InputError(
                    f"{key}={getattr(config, key)}: {config.checkpoint} is a run folder, which says it; leave it out"
                )
    policy = load_policy(
        config.checkpoint,
        config.vqvae,
        pick_device(config.device),
        config.dtype,
        family=config.family,
        argument="checkpoint",
    )
    check_kind(config, policy)
    of_texts = reads_texts(policy)
    rows, titles, left_out = _prompts(config, policy) if of_texts else _labels(config, policy)
    columns = config.samples_per_prompt if of_texts else config.samples_per_label
    labels_B = torch.tensor(rows).repeat_interleave(columns)
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
    save_picture(out, image_grid(torch.cat(parts), columns, titles))
    kind = ("prompt" if of_texts else "label") + "s" * (len(rows) > 1)
    print(f"{out}: {len(rows)} {kind} x {columns} samples, seed {config.seed}{left_out}")
    return 0


def _labels(config: SampleConfig, policy: Policy) -> tuple[list[int], list[str], str]:
    """Labels, titles of their rows, and a note on those that are not shown."""
    names = label_names(config.checkpoint, policy.num_classes)
    if config.labels is not None:
        labels = label_numbers("labels", config.labels, policy.num_classes, names)
        return labels, [caption(label, names) for label in labels], ""
    labels, num = list(range(min(_ROWS, policy.num_classes))), policy.num_classes
    note = ""
    if len(labels) < num:
        others = f"{len(labels)} to {num - 1}" if num > len(labels) + 1 else f"{len(labels)}"
        note = f"\nlabels 0 to {len(labels) - 1} are shown; for {others}: labels=[{len(labels)}, ...]"
    return labels, [caption(label, names) for label in labels], note


def _prompts(config: SampleConfig, policy: Policy) -> tuple[list[int], list[str], str]:
    """The same of prompts, of which the policy makes its table."""
    found = asked_of(config, MANY)
    shown = found if config.prompts is not None else found[:_ROWS]
    policy.set_prompts([prompt.text for prompt in shown])
    note = ""
    if len(shown) < len(found):
        note = f"\nthe first {len(shown)} of {len(found)} prompts are shown; others: prompts=[...], a .txt or a .jsonl"
    return list(range(len(shown))), [prompt_title(with_domain(prompt.text, prompt.domain)) for prompt in shown], note
