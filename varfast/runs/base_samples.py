"""Samples of the base that rewards of sets begin with, before the first step of a run.

Axes: N image, n image of this process.
"""

from __future__ import annotations

import torch

from varfast.config import Config
from varfast.data.labels import draw_labels
from varfast.distributed import World
from varfast.policies.checks import check_finite
from varfast.policies.protocol import Policy
from varfast.progress import Progress
from varfast.randomness import BASE_STEP, Key
from varfast.rewards import WeightedSum
from varfast.types import Prompts, Sampling

_CHUNK_IMAGES = 256


def begin_rewards(
    rewards: WeightedSum, policy: Policy, config: Config, labels: list[int], world: World, micro_batch: int | None
) -> None:
    """Sample the base, and let rewards of sets begin with its images.

    The images are sampled as in training, of labels drawn as for a step, one image each. They are a function of the
    seed: the same on any number of processes.

    Args:
        labels: that the run draws from.
        micro_batch: images that are sampled and decoded at a time.
    Raises: InputError if a reward cannot begin, as with too few images; NotFiniteReward or NotFinitePolicy, which are
        ones too.
    """
    count = rewards.base_images(config.rollout.images)
    if not count:
        return
    labels_N = draw_labels(labels, count, config.run.seed, BASE_STEP)
    shard, chunk = world.shard(count), micro_batch or _CHUNK_IMAGES
    parts: dict[str, list[torch.Tensor]] = {}
    firsts = range(shard.start, shard.stop, chunk)
    with Progress("images of the base", len(firsts), unit="chunk", quiet=not world.is_main) as progress:
        for first in firsts:
            labels_n = labels_N[first : min(first + chunk, shard.stop)]
            key = Key(config.run.seed, BASE_STEP, first)
            how = Sampling(config.rollout.temperature, config.rollout.cfg)
            rollout, images = policy.sample_images(Prompts(labels_n), how, key)
            check_finite(rollout, images)
            for name, value in rewards.measure_sets(images, rollout.labels_B, first).items():
                parts.setdefault(name, []).append(value)
            progress.update()
    rewards.begin({name: world.gather(torch.cat(values), count) for name, values in parts.items()})
