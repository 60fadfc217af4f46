"""Sampling the images of an evaluation and measuring them, chunk by chunk.

Axes: B image of a chunk; H, W pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from varfast.distributed import Launch
from varfast.evaluation.config import EvaluateConfig
from varfast.evaluation.folder import EvaluationFolder
from varfast.evaluation.judge import Judge
from varfast.evaluation.pictures import save_pngs
from varfast.evaluation.plan import Plan
from varfast.features.networks import to_levels
from varfast.policies.checks import check_finite
from varfast.policies.protocol import Policy
from varfast.progress import Progress
from varfast.randomness import EVAL_STEP, Key
from varfast.types import InputError, Prompts, Sampling


@dataclass(frozen=True)
class Evaluation:
    """What the two models of an evaluation share.

    Attributes:
        config: the arguments.
        plan: which images are sampled.
        judge: measures them.
        folder: keeps them.
        process: this process among those that share the chunks.
    """

    config: EvaluateConfig
    plan: Plan
    judge: Judge
    folder: EvaluationFolder
    process: Launch

    def sample(self, side: str, policy: Policy) -> None:
        """Sample and measure this process's chunks of a model that are not there yet.

        Args:
            side: "reference" or "checkpoint".
        Raises: InputError if chunks of other weights are there.
        """
        weights = _weights_hash(policy)
        todo = self._missing(side, weights)
        with Progress(side, len(todo), unit="chunk", quiet=self.process.rank != 0) as progress:
            for number in todo:
                self._sample_chunk(side, number, policy, weights)
                progress.update()

    def _missing(self, side: str, weights: str) -> list[int]:
        """Numbers of the chunks that this process has to sample."""
        missing = []
        for number in range(self.process.rank, len(self.plan.chunks), self.process.size):
            if not self.folder.chunk(side, number).exists():
                missing.append(number)
            elif self.folder.weights(side, number) != weights:
                raise InputError(
                    f"{self.folder.chunk(side, number)} holds images of other weights than {side} has now; choose "
                    "another out folder, or delete this one"
                )
        return missing

    def _sample_chunk(self, side: str, number: int, policy: Policy, weights: str) -> None:
        config, plan, chunk = self.config, self.plan, self.plan.chunks[number]
        images, labels_B = sample_chunk(policy, plan, chunk, config)
        numbers = self.judge(images, labels_B)
        levels = to_levels(images).permute(0, 2, 3, 1).cpu().numpy()
        if config.save == "png":
            save_pngs(self.folder.path / "images" / side, levels, plan, chunk)
        kept = [row for row, index in enumerate(chunk) if config.save == "npz" or plan.shown(index)]
        self.folder.save_chunk(side, number, {**numbers, "levels": levels[kept], "weights": np.array(weights)})


def sample_chunk(policy: Policy, plan: Plan, chunk: list[int], config: EvaluateConfig) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [0, 1] and labels (B,) of a chunk."""
    how = Sampling(config.temperature, config.cfg, config.top_k, config.top_p)
    parts = []
    for indices in plan.ranges(chunk, config.micro_batch):
        prompts = Prompts(torch.tensor([plan.label(index) for index in indices]))
        rollout, images = policy.sample_images(prompts, how, Key(config.seed, EVAL_STEP, indices[0]))
        check_finite(rollout, images)
        parts.append(images)
    return torch.cat(parts), torch.tensor([plan.label(index) for index in chunk], device=policy.device)


def _weights_hash(policy: Policy) -> str:
    """By which a chunk's weights are recognised: 16 hex digits over both models."""
    digest = hashlib.sha256()
    for model in policy.parts.values():
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
