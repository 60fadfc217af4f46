"""Sampling the images of an evaluation and measuring them, chunk by chunk.

Axes: B image of a chunk; H, W pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varfast.distributed import Launch
from varfast.evaluation.benchmarks import Export
from varfast.evaluation.config import EvaluateConfig
from varfast.evaluation.folder import EvaluationFolder
from varfast.evaluation.judge import Judge
from varfast.evaluation.pictures import save_pngs
from varfast.evaluation.plan import Images, Plan
from varfast.evaluation.subjects import Subjects
from varfast.features.networks import to_levels
from varfast.policies.checks import check_finite
from varfast.policies.protocol import Policy
from varfast.progress import Progress
from varfast.randomness import EVAL_STEP, Key
from varfast.types import InputError, Prompts, Sampling


@dataclass(frozen=True)
class Evaluation:
    """What the sets of images of an evaluation share.

    Attributes:
        config: the arguments.
        subjects: what they are to show.
        plan: which images are sampled.
        judge: measures them.
        folder: keeps them.
        process: this process among those that share the chunks.
        export: writes them for a benchmark's evaluator, where that was asked for.
    """

    config: EvaluateConfig
    subjects: Subjects
    plan: Plan
    judge: Judge
    folder: EvaluationFolder
    process: Launch
    export: Export | None = None

    def sample(self, images: Images, policy: Policy, weights: str) -> None:
        """Sample and measure this process's chunks of a set that are not there yet.

        Args:
            policy: of images.side.
            weights: hash of the policy's weights.
        Raises: InputError if chunks of other weights are there.
        """
        todo = self._missing(images, weights)
        with Progress(images.name, len(todo), unit="chunk", quiet=self.process.rank != 0) as progress:
            for number in todo:
                self._sample_chunk(images, number, policy, weights)
                progress.update()

    def _missing(self, images: Images, weights: str) -> list[int]:
        """Numbers of the chunks that this process has to sample."""
        missing = []
        for number in range(self.process.rank, len(self.plan.chunks), self.process.size):
            if not self.folder.chunk(images.name, number).exists():
                missing.append(number)
            elif self.folder.weights(images.name, number) != weights:
                raise InputError(
                    f"{self.folder.chunk(images.name, number)} holds images of other weights than {images.side} has "
                    "now; choose another out folder, or delete this one"
                )
        return missing

    def _sample_chunk(self, of: Images, number: int, policy: Policy, weights: str) -> None:
        config, plan, chunk = self.config, self.plan, self.plan.chunks[number]
        images, labels_B = sample_chunk(policy, plan, chunk, of.how, config)
        levels = rounded(images, config.rounding or policy.rounding)
        numbers = self.judge(images, labels_B, levels)
        pixels = levels.permute(0, 2, 3, 1).cpu().numpy()
        if config.save == "png":
            save_pngs(self.folder.path / "images" / of.name, pixels, plan, chunk)
        if self.export is not None:
            self.export.save(of.name, pixels, plan, chunk)
        kept = [row for row, index in enumerate(chunk) if config.save == "npz" or plan.shown(index)]
        self.folder.save_chunk(of.name, number, {**numbers, "levels": pixels[kept], "weights": np.array(weights)})


def sample_chunk(
    policy: Policy, plan: Plan, chunk: list[int], how: Sampling, config: EvaluateConfig
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [0, 1], of the size that is measured, and labels (B,) of a chunk."""
    parts = []
    for indices in plan.ranges(chunk, config.micro_batch):
        prompts = Prompts(torch.tensor([plan.label(index) for index in indices]))
        rollout, images = policy.sample_images(prompts, how, Key(config.seed, EVAL_STEP, indices[0]))
        check_finite(rollout, images)
        parts.append(resized(images, config.image_size or policy.image_size))
    return torch.cat(parts), torch.tensor([plan.label(index) for index in chunk], device=policy.device)


def resized(images: Tensor, size: int) -> Tensor:
    """Images in [0, 1], bicubic without antialiasing, to size x size."""
    if images.shape[2] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic").clamp_(0.0, 1.0)


def rounded(images: Tensor, rounding: Literal["nearest", "truncate"]) -> Tensor:
    """Images in [0, 1] -> uint8."""
    if rounding == "truncate":
        return images.float().clamp(0.0, 1.0).mul(255.0).to(torch.uint8)
    return to_levels(images)


def weights_hash(policy: Policy) -> str:
    """By which a chunk's weights are recognised: 16 hex digits over both models."""
    digest = hashlib.sha256()
    for model in policy.parts.values():
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
