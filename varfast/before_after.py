"""The table of before and after that training prints: fresh samples, scored, and read by a classifier.

Axes: B image.
"""

from __future__ import annotations

import torch

from varfast.config import EvalConfig
from varfast.data import DigitsClassifier
from varfast.policy import Policy
from varfast.randomness import EVAL_STEP
from varfast.rewards import WeightedSum

_CHUNK_IMAGES = 256


def evaluate(
    policy: Policy,
    reward: WeightedSum,
    labels: list[int],
    config: EvalConfig,
    temperature: float,
    seed: int,
    micro_batch: int | None = None,
) -> dict[str, float]:
    """Mean reward, each of its components, entropy, and the classifier's accuracy, over samples of each label.

    The same seed draws with the same random numbers before and after training.

    Args:
        labels: to sample, samples_per_label images each, the first max_labels of them.
        temperature, seed: of the samples: the rollout's.
        micro_batch: images at a time; default 256.
    Returns: numbers by name; empty with samples_per_label = 0.
    """
    labels_B = torch.tensor(labels[: config.max_labels]).repeat_interleave(config.samples_per_label)
    if not len(labels_B):
        return {}
    classifier = DigitsClassifier() if config.classifier == "digits" else None
    sums: dict[str, float] = {}
    chunk = micro_batch or _CHUNK_IMAGES
    for first in range(0, len(labels_B), chunk):
        rollout = policy.sample(
            labels_B[first : first + chunk], temperature, seed=seed, step=EVAL_STEP, first_sample=first
        )
        images = policy.decode(rollout.tokens_BL)
        rewards = reward(images, rollout.labels_B)
        means = {"reward": float(rewards.total_B.mean())}
        means |= {f"reward/{name}": float(score_B.mean()) for name, score_B in rewards.components.items()}
        means["entropy"] = float(rollout.entropy_BL.mean())
        if classifier is not None:
            means["accuracy"] = classifier.accuracy(images, rollout.labels_B)
        for name, mean in means.items():
            sums[name] = sums.get(name, 0.0) + mean * len(images)
    return {name: total / len(labels_B) for name, total in sums.items()}
