"""What the networks of rewards cost, counted from the config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from varfast.perf.cost import ITEM_BYTES, Count, Network
from varfast.rewards import RewardConfig
from varfast.rewards.clip import ClipModel
from varfast.rewards.imagereward import ImageRewardReward
from varfast.rewards.loo_fid import LooFidReward

# Image towers of CLIP models: width, layers, patch side, width of the embedding. The image is 224 x 224.
_TOWERS = {
    "ViT-B-32": (768, 12, 32, 512),
    "ViT-B-16": (768, 12, 16, 512),
    "ViT-L-14": (1024, 24, 14, 768),
    "ViT-H-14": (1280, 32, 14, 1024),
}
# ImageReward: an image tower of 1024, 24 layers, patches of 16; a text encoder of 768, 12 layers, 30524 words, 512
# places. A text such as "a photo of a {name}" has 10 tokens or so.
_BLIP_IMAGE, _BLIP_TEXT = (1024, 24, 16), (768, 12, 30524, 512)
_TEXT_TOKENS = 10
# Inception-v3 of 299 x 299 pixels to its pooled features: FLOP, and activations, each written once and read once.
_INCEPTION_FLOP, _INCEPTION_ACTIVATIONS, _INCEPTION_PARAMETERS = 11.4e9, 18.5e6, 21_785_568


def reward_networks(rewards: Mapping[str, RewardConfig]) -> list[Network]:
    """The networks that rewards run; one that several share is there once.

    Not counted: CLIP models other than the four above, DINO, classifiers and a user's own; and the moments of loo_fid,
    which are work on a step, not on an image (rewards/moments.py).
    """
    sets = [reward for reward in rewards.values() if isinstance(reward, LooFidReward)]
    # By their weights too: HPSv2 and PickScore are two models of one architecture.
    named = {(*reward.network, reward.dtype) for reward in rewards.values() if isinstance(reward, ClipModel)}
    named |= {(*of_set.clip_network, of_set.dtype) for of_set in sets if of_set.features == "clip"}
    found = [_tower(name, dtype) for name, _, dtype in sorted(named) if name in _TOWERS]
    rating = Counter((r.pretrained, r.dtype) for r in rewards.values() if isinstance(r, ImageRewardReward))
    found += [_blip(dtype, texts) for (_, dtype), texts in sorted(rating.items())]
    inceptions = {(of_set.features, of_set.pretrained) for of_set in sets if of_set.features.startswith("inception")}
    moved = Count(_INCEPTION_FLOP, 2.0 * _INCEPTION_ACTIVATIONS * ITEM_BYTES["float32"])
    return found + [Network(moved, _INCEPTION_PARAMETERS)] * len(inceptions)


def _tower(name: str, dtype: str) -> Network:
    """ViT-L-14: 162 GFLOP an image."""
    width, layers, patch, embedding = _TOWERS[name]
    count, parameters = _image_layers(width, layers, patch, dtype)
    return Network(count + Count(2.0 * width * embedding, 0.0), parameters + width * (5 + embedding))


def _image_layers(width: int, layers: int, patch: int, dtype: str) -> tuple[Count, int]:
    """Work on an image, and parameters, of patches, places and layers; 20 tensors of tokens x width are read or
    written a layer."""
    tokens = (224 // patch) ** 2 + 1
    pixels = 3 * patch**2
    of_layers = layers * (24.0 * tokens * width**2 + 4.0 * tokens**2 * width)
    flop = of_layers + 2.0 * (tokens - 1) * pixels * width
    parameters = layers * (12 * width**2 + 13 * width) + width * (pixels + tokens)
    return Count(flop, 20.0 * layers * tokens * width * ITEM_BYTES[dtype]), parameters


def _blip(dtype: str, texts: int) -> Network:
    """ImageReward's network, whose text encoder reads each image once for each of `texts` rewards: 132 GFLOP for one.

    Most of the text encoder's work, 7 GFLOP, makes keys and values of the image's 197 places.
    """
    width, layers, patch = _BLIP_IMAGE
    count, parameters = _image_layers(width, layers, patch, dtype)
    depth, text_layers, words, places = _BLIP_TEXT
    tokens, image = _TEXT_TOKENS, (224 // patch) ** 2 + 1
    a_layer = 28.0 * tokens * depth**2 + 4.0 * image * width * depth + 4.0 * tokens * (tokens + image) * depth
    read = Count(text_layers * a_layer, text_layers * image * (width + 4.0 * depth) * ITEM_BYTES[dtype])
    parameters += 4 * width + depth * (words + places + 2)
    parameters += text_layers * (14 * depth**2 + 2 * width * depth + 19 * depth)
    parameters += sum(a * b + b for a, b in ((depth, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)))
    return Network(count + read * texts, parameters)
