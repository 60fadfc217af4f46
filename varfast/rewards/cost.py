"""What the networks of rewards cost, counted from the config alone."""

from __future__ import annotations

from collections.abc import Mapping

from varfast.perf.cost import ITEM_BYTES, Count, Network
from varfast.rewards import RewardConfig
from varfast.rewards.clip import ClipModel

# Image towers of CLIP models: width, layers, patch side, width of the embedding. The image is 224 x 224.
_TOWERS = {
    "ViT-B-32": (768, 12, 32, 512),
    "ViT-B-16": (768, 12, 16, 512),
    "ViT-L-14": (1024, 24, 14, 768),
    "ViT-H-14": (1280, 32, 14, 1024),
}


def reward_networks(rewards: Mapping[str, RewardConfig]) -> set[Network]:
    """The networks that rewards run; one that several share is there once.

    Not counted: CLIP models other than the four above, classifiers and a user's own.
    """
    named = {(reward.clip_model, reward.dtype) for reward in rewards.values() if isinstance(reward, ClipModel)}
    return {_tower(name, dtype) for name, dtype in named if name in _TOWERS}


def _tower(name: str, dtype: str) -> Network:
    """ViT-L-14: 162 GFLOP an image; 20 tensors of tokens x width are read or written a layer."""
    width, layers, patch, embedding = _TOWERS[name]
    tokens = (224 // patch) ** 2 + 1
    pixels = 3 * patch**2
    of_layers = layers * (24.0 * tokens * width**2 + 4.0 * tokens**2 * width)
    flop = of_layers + 2.0 * (tokens - 1) * pixels * width + 2.0 * width * embedding
    parameters = layers * (12 * width**2 + 13 * width) + width * (pixels + tokens + 5 + embedding)
    return Network(Count(flop, 20.0 * layers * tokens * width * ITEM_BYTES[dtype]), parameters)
