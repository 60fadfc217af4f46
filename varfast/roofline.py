"""What one GRPO step must compute, move and hold: counted from a config alone, without a GPU, a model or the network.

    python -m varfast.roofline configs/d30.yaml [device=H200] [a.b=c ...]

prints, for a device, the speed-of-light time of every stage, the memory with the micro-batches that fit, and what many
GPUs would lose to communication. Nothing here is measured, save the ceilings of `device=here`, the H100 and the H200.

How things are counted
- FLOPs: two for each multiply and add of a matrix product, a convolution or attention; of attention the pairs that the
  mask keeps (0.619 of all at 256 px). Elementwise work counts none. A backward pass is two forward passes. (Attention's
  is 2.5: the scores are computed again. That is 1 % of d16's update, and left out.) With an adapter (policy.lora) the
  frozen matrices get no gradient, so their backward pass is one forward pass. (The first block's qkv product has none
  at all: 0.5 % of d16's update, and left out.)
- Bytes, at least: a product or convolution reads its input and writes its output once; a GroupNorm, whose statistics
  need the whole image, reads and writes it once more; everything else (attention, LayerNorm, gates, GELU, residuals)
  is taken to ride along. Weights are read once a pass.
- Memory: see `memory`.

Axes: B image, L token over all scales, l token of one scale, V vocabulary, C channel, H head, D head dim.
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a typo are answered before the imports below, which take 6 s
    from varfast.command import run_command

    run_command("roofline")

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch

from varfast.command import read_roofline
from varfast.config import Config
from varfast.perf.allocator import ALLOCATOR_VARIABLES
from varfast.policies.config import DECODE_GRAPH_IMAGES
from varfast.policies.var.config import LoRAConfig, VARConfig, VQVAEConfig
from varfast.rewards.aesthetic import AestheticReward
from varfast.rewards.clip import ClipReward
from varfast.rewards.hpsv2 import HPSv2Reward
from varfast.types import InputError

Checkpointing = Literal["none", "attention", "full"]

_FLOAT32 = 4  # bytes
_ITEM = {"float32": 4, "bfloat16": 2}
STAGES = ("rollout", "decode", "reward", "reference", "update", "optimizer")


@dataclass(frozen=True)
class Count:
    """Work: FLOPs, and bytes that go through the device's memory at least."""

    flop: float
    io_bytes: float

    def __add__(self, other: Count) -> Count:
        return Count(self.flop + other.flop, self.io_bytes + other.io_bytes)

    def __mul__(self, times: float) -> Count:
        return Count(self.flop * times, self.io_bytes * times)


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


def num_parameters(sizes: VARConfig) -> int:
    """Trainable numbers of VAR: 310 283 520 (d16), 2 010 020 356 (d30)."""
    embeddings, others = _tensors(sizes)
    return sum(embeddings) + sum(others)


def _tensors(sizes: VARConfig) -> tuple[list[int], list[int]]:
    """How many numbers each trainable tensor has: embeddings of labels and scales; all others."""
    C, hidden = sizes.width, _hidden(sizes)
    adaln = [6 * C * C, 6 * C]
    block = [3 * C * C, C, C, C * C, C, C * hidden, hidden, hidden * C, C]  # qkv, q and v biases, proj, fc1, fc2
    block += [sizes.depth] if sizes.qk_l2_norm else []
    block += [6 * C] if sizes.shared_adaln else adaln
    before = [sizes.patch_nums[0] ** 2 * C, sizes.num_tokens * C, sizes.code_width * C, C]
    head = [2 * C * C, 2 * C, C * sizes.vocab_size, sizes.vocab_size]
    shared = adaln if sizes.shared_adaln else []
    return [(sizes.num_classes + 1) * C, len(sizes.patch_nums) * C], before + block * sizes.depth + shared + head


def moment_bytes(sizes: VARConfig, optimizer: str, lora: LoRAConfig | None = None) -> int:
    """Adam's two moments: float32, or with adamw8bit (varfast.optim.adamw8bit) 8 bits and a float32 a block of 256.

    There embeddings and tensors of fewer than 4096 numbers stay float32.
    """
    embeddings, others = ([], _adapter_tensors(sizes, lora)) if lora else _tensors(sizes)
    eight_bits = optimizer == "adamw8bit"
    small = [n for n in others if n < 4096 or not eight_bits]
    large = [n for n in others if n >= 4096 and eight_bits]
    return 2 * (_FLOAT32 * sum(embeddings + small) + sum(n + _FLOAT32 * -(-n // 256) for n in large))


def num_matrix_parameters(sizes: VARConfig) -> int:
    """Numbers in the blocks' matrices: those that are computed with in run.dtype. The rest stays float32."""
    C = sizes.width
    adaln = 6 * C * C
    block = 4 * C * C + 2 * C * _hidden(sizes) + (0 if sizes.shared_adaln else adaln)
    return sizes.depth * block + (adaln if sizes.shared_adaln else 0)


def _hidden(sizes: VARConfig) -> int:
    return round(sizes.width * sizes.mlp_ratio)


def _adapted(sizes: VARConfig, lora: LoRAConfig | None) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a matrix of each kind that has an adapter."""
    C, hidden = sizes.width, _hidden(sizes)
    sides = {"mat_qkv": (C, 3 * C), "proj": (C, C), "fc1": (C, hidden), "fc2": (hidden, C), "ada_lin": (C, 6 * C)}
    return {name: side for name, side in sides.items() if lora is not None and name in lora.targets}


def _adapter_tensors(sizes: VARConfig, lora: LoRAConfig | None) -> list[int]:
    """How many numbers each A and each B has."""
    tensors = []
    for name, widths in _adapted(sizes, lora).items():
        times = 1 if name == "ada_lin" and sizes.shared_adaln else sizes.depth
        tensors += [lora.rank * width for width in widths if lora] * times
    return tensors


def num_adapter_parameters(sizes: VARConfig, lora: LoRAConfig | None) -> int:
    """Numbers of A and B: 14 745 600 for d30 with rank 16 beside the blocks' four matrices; 0 without an adapter."""
    return sum(_adapter_tensors(sizes, lora))


def num_trained_parameters(config: Config) -> int:
    """Numbers that have a gradient: the adapter's, or all."""
    sizes, lora = config.policy.sizes, config.policy.lora
    return num_adapter_parameters(sizes, lora) if lora else num_parameters(sizes)


def num_pairs(sizes: VARConfig) -> int:
    """Pairs of query and key that the scale mask keeps, of L^2: 286 434 of 462 400 at 256 px."""
    return sum(side * side * end for side, end in zip(sizes.patch_nums, sizes.scale_ends, strict=True))


@dataclass(frozen=True)
class ForwardFlop:
    """FLOPs of a forward pass of VAR over one image, without guidance.

    Attributes:
        attention_branch: qkv and output projection of all blocks.
        mlp: both layers of all blocks.
        attention: of the pairs that the mask keeps.
        attention_dense: of all pairs; not in the total.
        head: from width to vocabulary.
        adaln: modulation of blocks and head, once an image. (The rollout's engine computes it anew at each scale.)
        embed: from code width to width.
    """

    attention_branch: float
    mlp: float
    attention: float
    attention_dense: float
    head: float
    adaln: float
    embed: float

    @property
    def linear(self) -> float:
        return self.attention_branch + self.mlp

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.head + self.adaln + self.embed


def forward_flop(sizes: VARConfig, lora: LoRAConfig | None = None) -> ForwardFlop:
    """Per image; the same for a rollout with a key-value cache and for a teacher-forced pass.

    lora: an adapter, whose products are counted with those of its matrices.
    """
    C, L, depth = sizes.width, sizes.num_tokens, sizes.depth
    rank = lora.rank if lora else 0
    widths = {name: sum(widths) for name, widths in _adapted(sizes, lora).items()}
    in_attention = rank * sum(width for name, width in widths.items() if name in ("mat_qkv", "proj"))
    in_mlp = rank * sum(width for name, width in widths.items() if name in ("fc1", "fc2"))
    in_adaln = rank * widths.get("ada_lin", 0)
    return ForwardFlop(
        attention_branch=2.0 * depth * L * (4 * C * C + in_attention),
        mlp=2.0 * depth * L * (2 * C * _hidden(sizes) + in_mlp),
        attention=4.0 * depth * num_pairs(sizes) * C,
        attention_dense=4.0 * depth * L * L * C,
        head=2.0 * L * C * sizes.vocab_size,
        adaln=2.0 * (1 if sizes.shared_adaln else depth) * (6 * C * C + in_adaln) + 2.0 * 2 * C * C,
        embed=2.0 * (L - sizes.patch_nums[0] ** 2) * sizes.code_width * C,
    )


def forward_bytes(sizes: VARConfig, dtype: str, lora: LoRAConfig | None = None) -> float:
    """Activations that the products of a forward pass read and write, an image; weights are not counted here.

    With an MLP of ratio 4, 16 C a block and token: qkv reads C and writes 3 C, proj C and C, fc1 C and 4 C, fc2 4 C and
    C. The head reads C and writes V in float32. Today's kernels also pass over the stream in adaLN (6 C), attention
    (4 C) and GELU (8 C). An adapter reads the input and writes the output of its matrix once more.
    """
    C, L = sizes.width, sizes.num_tokens
    block = (4 + 2 + 2) * C + 2 * _hidden(sizes)
    if lora is not None:
        block += sum(sum(widths) + 2 * lora.rank for name, widths in _adapted(sizes, lora).items() if name != "ada_lin")
    return float(L * (sizes.depth * block * _ITEM[dtype] + (C + sizes.vocab_size) * _FLOAT32))


def _weight_bytes(sizes: VARConfig, dtype: str, lora: LoRAConfig | None = None) -> float:
    """What a pass reads of the weights: the blocks' matrices in `dtype`, the rest and an adapter in float32."""
    matrices = num_matrix_parameters(sizes)
    rest = num_parameters(sizes) - matrices + num_adapter_parameters(sizes, lora)
    return float(matrices * _ITEM[dtype] + rest * _FLOAT32)


def _backward(sizes: VARConfig, dtype: str, lora: LoRAConfig | None) -> Count:
    """Of one image, without what is recomputed: gradients of weights and of activations, a forward pass each.

    With an adapter its weights alone have gradients; neither the embeddings nor, but for an adapter of its own, adaLN
    are reached.
    """
    flop, io_bytes = forward_flop(sizes, lora).total, forward_bytes(sizes, dtype, lora)
    if lora is None:
        return Count(2.0 * flop, 2.0 * io_bytes)
    base = forward_flop(sizes)
    frozen_flop, frozen_bytes = base.linear + base.head, forward_bytes(sizes, dtype)
    twice = Count(base.attention + flop - base.total, io_bytes - frozen_bytes)
    return Count(frozen_flop, frozen_bytes) + twice * 2.0


def _recomputed_share(sizes: VARConfig, checkpointing: Checkpointing, lora: LoRAConfig | None) -> float:
    """Of a forward pass, in FLOPs, computed again in the backward pass."""
    flop = forward_flop(sizes, lora)
    again = {
        "none": 0.0,
        "attention": flop.attention_branch + flop.attention,
        "full": flop.linear + flop.attention + flop.adaln,
    }
    return again[checkpointing] / flop.total


# ---------------------------------------------------------------------------------------------------------------------
# The VQ-VAE


class _Layer(NamedTuple):
    """One layer on a square map, of one image.

    parameters, flop; elements: numbers read and written; live: numbers that exist at once while its block runs.
    """

    parameters: int
    flop: float
    elements: int
    live: int


def _conv(channels_in: int, channels_out: int, kernel: int, side: int, side_in: int | None = None) -> _Layer:
    weights = channels_in * channels_out * kernel * kernel
    read, written = channels_in * (side_in or side) ** 2, channels_out * side * side
    return _Layer(weights + channels_out, 2.0 * weights * side * side, read + written, read + written)


def _norm(channels: int, side: int) -> _Layer:
    # Map, normalised map and its SiLU exist together.
    return _Layer(2 * channels, 0.0, 2 * channels * side * side, 3 * channels * side * side)


def _resnet(channels_in: int, channels_out: int, side: int) -> Iterator[_Layer]:
    yield _norm(channels_in, side)
    yield _conv(channels_in, channels_out, 3, side)
    # The block's input waits for the sum while the second half runs.
    yield _norm(channels_out, side)._replace(live=(channels_in + 3 * channels_out) * side * side)
    yield _conv(channels_out, channels_out, 3, side)
    if channels_in != channels_out:
        yield _conv(channels_in, channels_out, 1, side)


def _attention(channels: int, side: int) -> Iterator[_Layer]:
    positions = side * side
    yield _norm(channels, side)
    yield _conv(channels, 3 * channels, 1, side)
    # Input, q, k, v, output, and the scores where no fused kernel takes a head of this width.
    yield _Layer(0, 4.0 * positions**2 * channels, 0, 8 * channels * positions + 2 * positions**2)
    yield _conv(channels, channels, 1, side)


def _middle(channels: int, side: int) -> Iterator[_Layer]:
    yield from _resnet(channels, channels, side)
    yield from _attention(channels, side)
    yield from _resnet(channels, channels, side)


def _level(channels_in: int, channels_out: int, blocks: int, side: int, attention: bool) -> Iterator[_Layer]:
    widths = [channels_in] + [channels_out] * blocks
    for index, (narrow, wide) in enumerate(pairwise(widths)):
        held = channels_in * side * side if index else 0  # the level's input, until the level is done
        for layer in _resnet(narrow, wide, side):
            yield layer._replace(live=layer.live + held)
        if attention:
            yield from _attention(channels_out, side)


def _encoder(config: VQVAEConfig) -> Iterator[_Layer]:
    widths = [config.base_channels * m for m in (1, *config.channel_multipliers)]
    side, last = config.image_size, len(widths) - 2
    yield _conv(3, widths[0], 3, side)
    for index, (channels_in, channels_out) in enumerate(pairwise(widths)):
        yield from _level(channels_in, channels_out, config.num_res_blocks, side, index == last)
        if index != last:
            yield _conv(channels_out, channels_out, 3, side // 2, side)
            side //= 2
    yield from _middle(widths[-1], side)
    yield _norm(widths[-1], side)
    yield _conv(widths[-1], config.code_width, 3, side)
    yield _conv(config.code_width, config.code_width, 3, side)  # quant_conv


def _decoder(config: VQVAEConfig) -> Iterator[_Layer]:
    """From the sum of quantized scales to pixels: post_quant_conv and decoder."""
    side = config.patch_nums[-1]
    yield _conv(config.code_width, config.code_width, 3, side)  # post_quant_conv
    widths = [config.base_channels * m for m in (*config.channel_multipliers, config.channel_multipliers[-1])]
    levels = list(pairwise(widths))
    yield _conv(config.code_width, widths[-1], 3, side)
    yield from _middle(widths[-1], side)
    for index in reversed(range(len(levels))):
        channels_out, channels_in = levels[index]
        yield from _level(channels_in, channels_out, config.num_res_blocks + 1, side, index == len(levels) - 1)
        if index != 0:
            side *= 2  # the convolution reads the upsampled map
            yield _conv(channels_out, channels_out, 3, side)
    yield _norm(widths[0], side)
    yield _conv(widths[0], 3, 3, side)


def num_vqvae_parameters(config: VQVAEConfig) -> int:
    """Encoder, decoder, codebook and residual convolutions: 108 948 355 for the public one."""
    phi = _conv(config.code_width, config.code_width, 3, 1).parameters
    both = sum(layer.parameters for layer in (*_encoder(config), *_decoder(config)))
    return both + (config.num_phi or len(config.patch_nums)) * phi + config.vocab_size * config.code_width


def decode_count(config: VQVAEConfig, dtype: str) -> Count:
    """One image from tokens to pixels, the residual convolutions of every scale included; its weights are not.

    393.8 GFLOP for the public VQ-VAE: 181 in the level at 256x256, 30 in the upsampling to it.
    """
    phi = _conv(config.code_width, config.code_width, 3, config.patch_nums[-1])
    layers = [*_decoder(config), *[phi] * len(config.patch_nums)]
    return Count(sum(x.flop for x in layers), _ITEM[dtype] * sum(x.elements for x in layers))


# ---------------------------------------------------------------------------------------------------------------------
# A step


class _Network(NamedTuple):
    """A network that rewards run: work of one image, and its parameters."""

    per_image: Count
    parameters: int


# Image towers of CLIP models: width, layers, patch side, width of the embedding. The image is 224 x 224.
_TOWERS = {
    "ViT-B-32": (768, 12, 32, 512),
    "ViT-B-16": (768, 12, 16, 512),
    "ViT-L-14": (1024, 24, 14, 768),
    "ViT-H-14": (1280, 32, 14, 1024),
}


def _tower(name: str, dtype: str) -> _Network:
    """ViT-L-14: 162 GFLOP an image; 20 tensors of tokens x width are read or written a layer."""
    width, layers, patch, embedding = _TOWERS[name]
    tokens = (224 // patch) ** 2 + 1
    pixels = 3 * patch**2
    of_layers = layers * (24.0 * tokens * width**2 + 4.0 * tokens**2 * width)
    flop = of_layers + 2.0 * (tokens - 1) * pixels * width + 2.0 * width * embedding
    parameters = layers * (12 * width**2 + 13 * width) + width * (pixels + tokens + 5 + embedding)
    return _Network(Count(flop, 20.0 * layers * tokens * width * _ITEM[dtype]), parameters)


def _reward_networks(config: Config) -> set[_Network]:
    """What the rewards run, once each. CLIP models other than these, classifiers and a user's own are not counted."""
    named = set()
    for reward in config.reward.values():
        if isinstance(reward, AestheticReward):
            named.add(("ViT-L-14", reward.dtype))
        elif isinstance(reward, HPSv2Reward):
            named.add(("ViT-H-14", reward.dtype))
        elif isinstance(reward, ClipReward):
            named.add((reward.model.removesuffix("-quickgelu"), reward.dtype))
    return {_tower(name, dtype) for name, dtype in named if name in _TOWERS}


def _checkpointing(config: Config) -> Checkpointing:
    return "none" if config.update.checkpointing == "auto" else config.update.checkpointing


def stage_counts(config: Config, checkpointing: Checkpointing | None = None) -> dict[str, Count]:
    """Work of every stage of one step, that is of rollout.images images and all their optimizer steps.

    The number of passes, and with it how often weights are read, follows rollout.micro_batch and update.micro_batch;
    where they are null all images, or a minibatch, go through at once. decode is counted in run.dtype.

    Args:
        checkpointing: what the update recomputes: nothing, the attention branch of each block, or whole blocks.
            Default: update.checkpointing, where auto counts as none.
    Returns: by the names in STAGES.
    """
    sizes, dtype, images = config.policy.sizes, config.run.dtype, config.rollout.images
    lora, trained = config.policy.lora, num_trained_parameters(config)
    flop, activations = forward_flop(sizes, lora).total, forward_bytes(sizes, dtype, lora)
    weights = _weight_bytes(sizes, dtype, lora)

    rollout_passes = images // (config.rollout.micro_batch or images)
    # Keys and values: written once, all but the last scale's; each scale reads those of the scales before it.
    ends = (0, *sizes.scale_ends)
    tokens = ends[-2] + sum(ends[:-1])
    cache = tokens * _cache_bytes_per_token(config)
    rollout = Count(flop, activations + cache) * images
    rollout += Count(0.0, weights) * (rollout_passes * len(sizes.patch_nums))

    decode = decode_count(config.policy.vqvae, dtype) * images
    decoder_weights = sum(layer.parameters for layer in _decoder(config.policy.vqvae)) * _ITEM[dtype]
    decode += Count(0.0, decoder_weights) * rollout_passes

    reward = Count(0.0, _image_bytes(config) * len(config.reward))
    for network in _reward_networks(config):
        reward += network.per_image

    optimizer_steps, micro_batches = _optimizer_steps(config), _micro_batches(config)
    trained_images, passes = images * config.update.epochs, optimizer_steps * micro_batches
    forward, one_read = Count(flop, activations) * trained_images, Count(0.0, weights) * passes
    reference = Count(0.0, 0.0)
    if config.grpo.kl_beta > 0.0:
        reference = Count(forward_flop(sizes).total, forward_bytes(sizes, dtype)) * trained_images
        reference += Count(0.0, _weight_bytes(sizes, dtype)) * passes

    # Forward and backward read the weights; the gradient, float32, is written, then read and written by each further
    # micro-batch: for d30 with whole minibatches 16 x (8 + 8) GB a step, beside 1.95 TB of activations.
    again = _recomputed_share(sizes, checkpointing or _checkpointing(config), lora)
    update = forward * (1.0 + again) + _backward(sizes, dtype, lora) * trained_images + one_read * (2.0 + again)
    update += Count(0.0, trained * _FLOAT32 * (2 * micro_batches - 1)) * optimizer_steps

    # AdamW reads weight, gradient and two moments, writes weight and moments; and the matrices' copy in 16 bits, if
    # they move. The norm for clipping is taken to be summed up where the gradient is made. The average of the weights
    # is a pass of its own: it reads weight and average and writes the average.
    copied = num_matrix_parameters(sizes) * _ITEM[dtype] if dtype != "float32" and lora is None else 0
    moments = moment_bytes(sizes, config.update.optimizer, lora)
    numbers = 3 if config.update.ema_decay is None else 6
    optimizer = Count(0.0, numbers * _FLOAT32 * trained + 2 * moments + copied) * optimizer_steps

    return dict(zip(STAGES, (rollout, decode, reward * images, reference, update, optimizer), strict=True))


def _optimizer_steps(config: Config) -> int:
    return config.update.epochs * config.rollout.images // config.update.minibatch


def _micro_batches(config: Config) -> int:
    return config.update.minibatch // (config.update.micro_batch or config.update.minibatch)


def _cache_bytes_per_token(config: Config) -> int:
    """Keys and values of all blocks."""
    sizes = config.policy.sizes
    return 2 * sizes.depth * sizes.width * _ITEM[config.run.dtype]


# ---------------------------------------------------------------------------------------------------------------------
# Memory

# Of the memory that is free, what plans may use: the rest is the allocator's fragmentation and libraries' workspaces.
_USABLE = 0.9
# update_plan: below this many images at a time, recomputing costs less than more passes over the weights.
_ENOUGH_IMAGES = 8


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: of the transformer, float32. With an adapter its blocks' matrices are frozen in run.dtype, and the
            adapter is float32.
        compute_copy: the matrices of blocks and head in 16 bits, which rollout and update read; of an adapter its own.
            0 in float32. Where weights are sharded, all of the transformer as it samples.
        gradients: float32, of what is trained.
        moments: see `moment_bytes`.
        average: of what is trained, float32; 0 without update.ema_decay.
        reference: the base model of the KL term, matrices in run.dtype; 0 where none is held, and with an adapter,
            whose frozen weights are the reference.
        vqvae, reward: their weights, float32.
        images: of a step, float32 pixels, and the transformer's input, twice while micro-batches are put together.
        kv_cache: of a micro-batch, without the last scale, whose keys and values no later scale needs.
        rollout_activations: of a micro-batch at the last scale, where they are largest.
        decode: of a micro-batch, at the level where most exists at once.
        update: of a micro-batch: what autograd keeps, logits, and the block at work.
        captured: what the rollout's CUDA graph holds on to during the update: cache and activations.
        captured_decode: what the decoder's graph holds on to, in a pool of its own: it runs beside the rollout.
        captured_update: what the update's CUDA graph holds on to during the rollout; it shares a pool with that's.
    """

    weights: int
    compute_copy: int
    gradients: int
    moments: int
    average: int
    reference: int
    vqvae: int
    reward: int
    images: int
    kv_cache: int
    rollout_activations: int
    decode: int
    update: int
    captured: int
    captured_decode: int
    captured_update: int

    @property
    def states(self) -> int:
        """What is there all the time."""
        trained = self.weights + self.compute_copy + self.gradients + self.moments
        return trained + self.average + self.reference + self.vqvae + self.reward

    @property
    def rollout(self) -> int:
        """Cache, activations and decode together: buffers of a captured graph are not given back between them.

        A captured update's pool is as large as the larger of the two graphs, all the time.
        """
        pool_grown = max(0, self.captured_update - self.captured)
        return self.images + self.kv_cache + self.rollout_activations + self.decode + pool_grown

    @property
    def peak(self) -> int:
        shared = min(self.captured, self.captured_update)
        return self.states + max(self.rollout, self.update + self.captured - shared + self.captured_decode)

    def fits(self, device_bytes: int) -> bool:
        """Whether the plan's share of what the states leave is enough."""
        return self.peak - self.states <= _USABLE * (device_bytes - self.states)


def memory(config: Config, shards: int = 1) -> Memory:
    """What a step needs with the config's micro-batches and checkpointing.

    shards: processes that weights, gradients, moments and average are spread over; 1: each holds them all.

    rollout.micro_batch null counts as all images, update.micro_batch null as a minibatch, update.checkpointing auto as
    none: what `planned` fills in for a device is what counts there.
    """
    sizes, dtype, images = config.policy.sizes, config.run.dtype, config.rollout.images
    lora, trained_parameters = config.policy.lora, num_trained_parameters(config)
    weights = round(_weight_bytes(sizes, dtype, lora)) if lora else _FLOAT32 * trained_parameters
    sampled = config.rollout.micro_batch or images
    trained = config.update.micro_batch or config.update.minibatch
    matrices = num_matrix_parameters(sizes) + sizes.width * sizes.vocab_size
    copied = num_adapter_parameters(sizes, lora) if lora else matrices
    copy = _ITEM[dtype] * copied if dtype != "float32" else 0
    update = trained * update_activation_bytes(config, _checkpointing(config))
    if shards > 1:
        copy = round(_weight_bytes(sizes, dtype))
    return Memory(
        weights=weights // shards,
        compute_copy=copy,
        gradients=_FLOAT32 * trained_parameters // shards,
        moments=moment_bytes(sizes, config.update.optimizer, lora) // shards,
        average=_FLOAT32 * trained_parameters // shards if config.update.ema_decay is not None else 0,
        reference=round(_weight_bytes(sizes, dtype)) if config.holds_reference and not lora else 0,
        vqvae=_FLOAT32 * num_vqvae_parameters(config.policy.vqvae),
        reward=_FLOAT32 * sum(network.parameters for network in _reward_networks(config)),
        images=images * _kept_bytes(config),
        kv_cache=sampled * kv_cache_bytes(config),
        rollout_activations=sampled * rollout_activation_bytes(config),
        decode=sampled * decode_activation_bytes(config),
        update=update,
        captured=captured_rollout_bytes(config, sampled),
        captured_decode=captured_decode_bytes(config, sampled),
        captured_update=update if config.update.cuda_graph else 0,
    )


def _image_bytes(config: Config) -> int:
    return 3 * config.policy.vqvae.image_size**2 * _FLOAT32


def _input_bytes(config: Config) -> int:
    """Of one image: the transformer's input of each scale but the first."""
    sizes = config.policy.sizes
    return (sizes.num_tokens - sizes.patch_nums[0] ** 2) * sizes.code_width * _FLOAT32


def _kept_bytes(config: Config) -> int:
    """Of one image, from the rollout to the end of the step."""
    return _image_bytes(config) + 2 * _input_bytes(config)


def kv_cache_bytes(config: Config) -> int:
    """Of one image: the keys and values of all blocks, of every scale but the last, which no later scale reads.

    d16 in bfloat16: 27.8 MB for 424 tokens. (All 680 tokens: 44.6 MB, 22.8 GB for 512 images; d30 80.2 GB.)
    """
    return (0, *config.policy.sizes.scale_ends)[-2] * _cache_bytes_per_token(config)


def rollout_activation_bytes(config: Config) -> int:
    """Of one image, at the last scale, without gradients: the larger of a block at work and of the head.

    In a block the scale's input, the block's and its normalised form, the stream, its normalised form, a branch, and
    the MLP's hidden layer before and after GELU exist at once (6 C + 2 x 4 C); in the head the input, the stream, two
    float32 forms of it, and the logits of this scale and of the one before. Beside them each block's 6 C constants.
    With an adapter the hidden layer exists once more, as base, adapter's part and sum.
    """
    sizes = config.policy.sizes
    C, item = sizes.width, _ITEM[config.run.dtype]
    tokens = sizes.patch_nums[-1] ** 2
    before = sizes.patch_nums[-2] ** 2 if len(sizes.patch_nums) > 1 else 0
    logits = sizes.vocab_size * _FLOAT32
    block = max(6 * C + (3 if config.policy.lora else 2) * _hidden(sizes), 12 * C) * item
    head = 2 * C * item + 2 * C * _FLOAT32 + logits
    return tokens * max(block, head) + before * logits + 6 * sizes.depth * C * item


def decode_activation_bytes(config: Config) -> int:
    """Of one image: the most that exists at once in the decoder, in run.dtype; 106 MB in bfloat16 at 256 px.

    In a residual block at full resolution: the level's input, the block's, and map, normalised map and SiLU of its
    second half, 21 MB each.
    """
    return _ITEM[config.run.dtype] * max(layer.live for layer in _decoder(config.policy.vqvae)) + _image_bytes(config)


def update_activation_bytes(config: Config, checkpointing: Checkpointing) -> int:
    """Of one image: what the forward pass keeps for the backward pass, and the most that comes on top while it runs.

    Kept a token and block, in run.dtype (h = 4 C, the hidden layer; as the kernels for a GPU keep it):

        none       normed C, q k v 3 C, attention C, branch C, stream C, normed C, hidden 2 h, branch C, stream C = 18 C
        attention  all of it but q k v and attention, which are computed again from normed: 14 C
        full       the stream that enters the block, and its normalised form: 2 C

    and float32 numbers: the mean and scale of two norms, a head's softmax (2) and norms of q and k (2). On top comes
    the larger of a block at work (what it recomputes, gradients of hidden layer and stream: 2 h + 2 C) and of the head
    (logits, whose place their gradient takes, two forms of the stream and their gradients, in float32). An adapter
    keeps what lies between A and B, rank numbers a matrix, and has the hidden layer at work once more. (One beside a
    part of the matrices keeps less than counted: a frozen product without adapter does not need its input.)
    """
    sizes = config.policy.sizes
    C, hidden, item = sizes.width, _hidden(sizes), _ITEM[config.run.dtype]
    statistics_bytes = (4 + 4 * sizes.depth) * _FLOAT32
    lora = config.policy.lora
    adapted = set(lora.targets) - {"ada_lin"} if lora else set()
    rank = lora.rank if lora else 0
    block = (10 * C + 2 * hidden + rank * len(adapted)) * item + statistics_bytes
    in_attention = 4 * C + rank * len(adapted & {"mat_qkv", "proj"})
    kept = {"none": block, "attention": block - in_attention * item, "full": 2 * C * item}[checkpointing]
    again = block - kept
    head_at_work = (sizes.vocab_size + 4 * C) * _FLOAT32
    block_at_work = again + max(2 * C + (3 if lora else 2) * hidden, 8 * C) * item
    return sizes.num_tokens * (sizes.depth * kept + C * item + max(head_at_work, block_at_work))


def captured_rollout_bytes(config: Config, sampled: int) -> int:
    """What the CUDA graph of a rollout of so many images holds on to; 0 where there is none."""
    one = kv_cache_bytes(config) + rollout_activation_bytes(config) + _input_bytes(config)
    return sampled * one if _captures(config) else 0


def captured_decode_bytes(config: Config, sampled: int) -> int:
    """What the CUDA graph of their decoder holds on to; 0 where there is none."""
    return min(sampled, DECODE_GRAPH_IMAGES) * decode_activation_bytes(config) if _captures(config) else 0


def _captures(config: Config) -> bool:
    return config.run.fast and config.rollout.cuda_graph is not False


def rollout_micro_batch(config: Config, free_bytes: float) -> int:
    """Images to sample and decode at a time: what the config names, else the most that fits, at least 1.

    The largest divisor of rollout.images whose key-value cache, activations and decode take at most 0.9 of
    `free_bytes`. d16 in bfloat16: 27.8 + 10.1 + 106 MB an image, so 512 images want 83 GB free.

    Args:
        free_bytes: the device's memory less `memory(config).states`.
    """
    if config.rollout.micro_batch is not None:
        return config.rollout.micro_batch
    one = kv_cache_bytes(config) + rollout_activation_bytes(config) + decode_activation_bytes(config)
    images = config.rollout.images
    return _largest_divisor(images, (_USABLE * free_bytes - images * _kept_bytes(config)) / one)


def update_plan(config: Config, free_bytes: float) -> tuple[int, Checkpointing]:
    """Images to forward and backward at a time, and what to recompute: what the config names, else what fits best.

    The largest divisor of update.minibatch that fits into 0.9 of `free_bytes` without checkpointing, if it is the
    minibatch or at least 8 images; else with attention; else the largest that fits with full, at least 1. A
    micro-batch that the config names is kept, with the first of these that it fits with.

    Why 8: each further micro-batch reads the weights and adds to the gradient once more, 12 bytes a parameter; for d30
    24 GB, 5.6 ms on an H200. Forward and backward of 8 of its images take 57 ms, so at 8 that is 10 % more; at 4, 20 %.
    Recomputing the attention branch costs 12 % (d30; full: 33 %), so above 8 smaller micro-batches are cheaper than
    recomputing, below 8 dearer.

    Args:
        free_bytes: the device's memory less `memory(config).states`.
    Returns: (micro_batch, checkpointing).
    """
    minibatch, asked = config.update.minibatch, config.update.checkpointing
    enough = config.update.micro_batch or min(_ENOUGH_IMAGES, minibatch)
    modes: tuple[Checkpointing, ...] = ("none", "attention", "full") if asked == "auto" else (asked,)
    for mode in modes:
        largest = _largest_divisor(minibatch, _USABLE * free_bytes / update_activation_bytes(config, mode))
        if largest >= enough:
            break
    return config.update.micro_batch or largest, mode


def _largest_divisor(total: int, limit: float) -> int:
    return max((d for d in range(1, total + 1) if total % d == 0 and d <= limit), default=1)


def share(config: Config, images: int, minibatch: int) -> Config:
    """What one of several processes does of a step, as a config: for plans and limits, not to be run.

    Args:
        images: of the step, its part of rollout.images.
        minibatch: the part of update.minibatch of the process that has the most.
    """
    sampled, trained = config.rollout.micro_batch, config.update.micro_batch
    sampled = sampled and _largest_divisor(images, sampled)
    of_rollout = {"labels_per_step": images, "group_size": 1, "micro_batch": sampled}
    of_update = {"minibatch": minibatch, "micro_batch": trained and min(trained, minibatch)}
    rollout, update = config.rollout.model_copy(update=of_rollout), config.update.model_copy(update=of_update)
    return config.model_copy(update={"rollout": rollout, "update": update})


def planned(config: Config, device_bytes: int | None, shards: int = 1) -> Config:
    """The config with both micro-batches, both cuda_graph and update.checkpointing filled in for a device; None:
    memory is no limit.

    shards: as in `memory`.
    """
    free = math.inf if device_bytes is None else device_bytes - memory(config, shards).states
    sampled, plan = rollout_micro_batch(config, free), update_plan(config, free)
    # A captured rollout holds on to its memory while the update runs. Where that would cost the update its room, it is
    # launched kernel by kernel: with images enough to fill the memory, the kernels are longer than their launches.
    held = captured_rollout_bytes(config, sampled) + captured_decode_bytes(config, sampled)
    beside_graph = update_plan(config, free - held / _USABLE)
    # A captured update takes its memory from the pool that the rollout's graph has.
    if config.update.cuda_graph:
        beside_graph = plan
    graph = config.rollout.cuda_graph
    if graph is None:
        graph = beside_graph == plan
    micro_batch, checkpointing = beside_graph if graph else plan
    rollout = config.rollout.model_copy(update={"micro_batch": sampled, "cuda_graph": graph})
    filled = {"micro_batch": micro_batch, "checkpointing": checkpointing, "cuda_graph": bool(config.update.cuda_graph)}
    update = config.update.model_copy(update=filled)
    found = config.model_copy(update={"rollout": rollout, "update": update})
    # The pool of a captured update is held during the rollout, which has less room then.
    while config.rollout.micro_batch is None and device_bytes is not None and found.update.cuda_graph:
        now = found.rollout.micro_batch or config.rollout.images
        if now == 1 or memory(found, shards).fits(device_bytes):
            break
        smaller = _largest_divisor(config.rollout.images, now / 2)
        found = found.model_copy(update={"rollout": rollout.model_copy(update={"micro_batch": smaller})})
    return found


def lower_memory(config: Config, part: str) -> str:
    """What to change where memory ran out: the next smaller setting, with the one in use.

    Args:
        config: as `planned` filled it in.
        part: "rollout", "reward" or "update".
    """
    update = config.update
    now = update.micro_batch or update.minibatch
    advice: str | None = None
    if part != "reward" and update.cuda_graph:
        held = f"its graph holds {_number(memory(config).captured_update / 2**30)} GiB during the rollout too"
        advice = f"use update.cuda_graph=false, now true ({held})"
    elif part == "rollout":
        now = config.rollout.micro_batch or config.rollout.images
        advice = _halved("rollout.micro_batch", now, config.rollout.images)
    elif part == "reward":
        sizes = {f"reward.{n}.batch_size": r.batch_size for n, r in config.reward.items() if hasattr(r, "batch_size")}
        advice = "; ".join(f"use {key}={size // 2}, now {size}" for key, size in sizes.items() if size > 1)
    elif held_bytes := memory(config).captured + memory(config).captured_decode:
        held = f"its graph holds {_number(held_bytes / 2**30)} GiB meanwhile"
        advice = f"use rollout.cuda_graph=false, now true ({held})"
    else:
        if now < 2 * _ENOUGH_IMAGES and update.checkpointing != "full":
            more = "attention" if update.checkpointing == "none" else "full"
            advice = f"use update.checkpointing={more}, now {update.checkpointing} with update.micro_batch={now}"
        else:
            advice = _halved("update.micro_batch", now, update.minibatch)
    others = ["run.dtype=bfloat16", "grpo.kl_beta=0 (no reference is held)"]
    if update.optimizer != "adamw8bit" and config.run.parallel != "fsdp":
        policy, both = config.policy, (update.optimizer, "adamw8bit")
        now_bytes, then_bytes = (moment_bytes(policy.sizes, name, policy.lora) for name in both)
        saved = f"moments of {_number(then_bytes / 2**30)} instead of {_number(now_bytes / 2**30)} GiB"
        others.insert(1, f"update.optimizer=adamw8bit ({saved})")
    if config.policy.lora is None and config.run.parallel != "fsdp":
        others.append("policy.lora.rank=16 (an adapter is trained in place of all weights)")
    return advice or (
        f"nothing smaller can be set there: try {', '.join(others)}, a smaller model or a device with more memory; see "
        "what else runs on this one"
    )


def reserved_and_allocated() -> tuple[int, int]:
    """Bytes that CUDA's allocator holds, and those of them in use; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.memory_reserved(), torch.cuda.memory_allocated()


def scattered_memory(reserved_bytes: int, allocated_bytes: int) -> str | None:
    """What to do where memory ran out with a tenth of it, and 1 GiB, reserved but in pieces too small to be used."""
    unused = reserved_bytes - allocated_bytes
    if unused < max(2**30, reserved_bytes / 10):
        return None
    size = f"{_number(unused / 2**30)} GiB are reserved and free, in pieces too small: memory is fragmented"
    set_by = [name for name in ALLOCATOR_VARIABLES if "expandable_segments:True" in os.environ.get(name, "")]
    if set_by:
        return f"{size}, although {set_by[0]} has expandable_segments:True; use a smaller rollout.micro_batch"
    return f"{size}; set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


def _halved(key: str, now: int, total: int) -> str | None:
    return f"use {key}={_largest_divisor(total, now / 2)}, now {now}" if now > 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# Devices


@dataclass(frozen=True)
class Ceilings:
    """What a device does at best: FLOP/s of a large product, bytes/s of a copy (read plus write); memory if known."""

    flop_per_s: float
    byte_per_s: float
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Device:
    """Ceilings of a GPU by dtype.

    Attributes:
        bfloat16, float32: FLOP/s of dense products, without sparsity; float32 without TF32.
        byte_per_s, memory_bytes: of its memory.
        source: where these come from.
    """

    bfloat16: float
    float32: float
    byte_per_s: float
    memory_bytes: int
    source: str

    def ceilings(self, dtype: str) -> Ceilings:
        return Ceilings(self.float32 if dtype == "float32" else self.bfloat16, self.byte_per_s, self.memory_bytes)


_DATASHEET = "datasheet, not measured: expect less (the H200's product reaches 80 % of its datasheet, its copy 90 %)"
DEVICES = {
    "H200": Device(
        790e12, 67e12, 4.3e12, 139 * 2**30,
        "measured with an 8192^3 bf16 product and a device copy on an H200; float32 from the datasheet",
    ),
    "H100": Device(
        790e12, 67e12, 3.02e12, int(80e9),
        "measured with an 8192^3 bf16 product and a device copy on an H100 SXM 80 GB (its datasheet: 989 TFLOP/s, "
        "3.35 TB/s); float32 from the datasheet",
    ),
    "A100": Device(312e12, 19.5e12, 2.039e12, int(80e9), f"A100 SXM 80 GB, {_DATASHEET}"),
    "A100-40GB": Device(312e12, 19.5e12, 1.555e12, int(40e9), f"A100 SXM 40 GB, {_DATASHEET}"),
    "L40S": Device(362e12, 91.6e12, 0.864e12, int(48e9), _DATASHEET),
    "RTX4090": Device(165e12, 82.6e12, 1.008e12, int(24e9), f"GeForce RTX 4090, {_DATASHEET}"),
    "RTX4080": Device(97.5e12, 48.7e12, 0.717e12, int(16e9), f"GeForce RTX 4080, {_DATASHEET}"),
}  # fmt: skip


def speed_of_light_s(count: Count, ceilings: Ceilings) -> float:
    """Seconds below which no implementation can get: computing and moving overlap perfectly."""
    return max(count.flop / ceilings.flop_per_s, count.io_bytes / ceilings.byte_per_s)


def measure_here(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Ceilings of this machine, now: a square product in `dtype` and a copy, medians of 5.

    Sides of 8192 and 2 GiB on a GPU, of 1024 and 64 MiB on a CPU, where both take a fraction of a second.
    """
    on_gpu = device.type == "cuda"
    side, size = (8192, 2**31) if on_gpu else (1024, 2**26)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_s = _median_s(lambda: torch.mm(a, b), device)
    copy_s = _median_s(lambda: target.copy_(source), device)
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else _cpu_memory()[0]
    return Ceilings(2 * side**3 / product_s, 2 * size / copy_s, total)


def _median_s(call: Callable[[], object], device: torch.device) -> float:
    repeats = 10 if device.type == "cuda" else 1  # so that a launch and a synchronisation do not count
    times = []
    for _ in range(1 + 5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - begin) / repeats)
    return statistics.median(times[1:])  # the first warms up


def with_dtype(config: Config, device: torch.device) -> Config:
    """The config with run.dtype auto replaced by what it means on a device."""
    if config.run.dtype != "auto":
        return config
    run = config.run.model_copy(update={"dtype": _fastest_dtype(device)})
    return config.model_copy(update={"run": run})


def _fastest_dtype(device: torch.device) -> str:
    if device.type == "cuda":  # every GPU since 2020
        return "bfloat16"
    # Other CPUs compute in bfloat16 too, many times slower than in float32.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def available_bytes(device: torch.device) -> int:
    """Memory of a device that is free now, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _cpu_memory()[1]


def usual_bytes(device: torch.device) -> int:
    """Memory of a device that a run may count on whatever else is there now: the same at every start."""
    return int(0.9 * whole_bytes(device)) if device.type == "cuda" else whole_bytes(device) // 2


def whole_bytes(device: torch.device) -> int:
    """Memory of a device, in bytes."""
    return int(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else _cpu_memory()[0]


def check_states(config: Config, device: torch.device, shards: int = 1) -> None:
    """Raises: InputError if what a run holds all the time is more than the device's memory, before it is asked for."""
    needed, whole = memory(config, shards).states, whole_bytes(device)
    if needed > whole:
        raise InputError(
            f"weights, gradients, moments and reference take {needed / 2**30:.1f} GiB, and {device} has "
            f"{whole / 2**30:.1f} GiB; choose a smaller policy, an adapter (policy.lora={{}}), or another device"
        )


def _cpu_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of memory that this process may use in all, and that are free of it: the machine's, or its container's.

    A container, a job of Slurm or a systemd scope has a limit of its own (cgroup v1 or v2), which psutil does not know;
    whoever goes beyond it is killed.
    """
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for limit, used in _cgroup_memory(root):
        if limit < machine.total:
            total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _cgroup_memory(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes, cache of files aside, of each control group with a limit that this process is in.

    Source: Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst of Linux.
    """
    mounts = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return  # not Linux, or no /proc
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:  # v2
            mount, names = mounts, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount, names = mounts / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Limits of the groups above count too. In a container the path may be the host's, of which there is the end
        # alone: the mount itself.
        folder = mount / path.lstrip("/")
        for group in (folder, *folder.parents):
            found = _limit_and_use(group, *names)
            if found is not None:
                yield found
            if group == mount:
                break


def _limit_and_use(group: Path, limit_name: str, use_name: str, cache_name: str) -> tuple[int, int] | None:
    try:
        limit, used = int((group / limit_name).read_text()), int((group / use_name).read_text())
        entries = dict(line.split(maxsplit=1) for line in (group / "memory.stat").read_text().splitlines())
        return limit, max(0, used - int(entries.get(cache_name, 0)))  # the kernel gives up cache before it kills
    except (OSError, ValueError):  # no such group, or no limit: "max"
        return None


def _here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _find_ceilings(name: str, dtype: str) -> tuple[Ceilings, str]:
    """Ceilings of a device by name, and where they come from. Raises: InputError for a name that is not known."""
    if name == "here":
        device = _here()
        what = f"CPU, torch threads: {torch.get_num_threads()}"
        if device.type == "cuda":
            what = torch.cuda.get_device_name(device)
        return measure_here(device, getattr(torch, dtype)), f"{what}; measured now with a product and a copy"
    if name not in DEVICES:
        raise InputError(f"device={name}: known are {', '.join(DEVICES)}, and 'here' for this machine, measured")
    return DEVICES[name].ceilings(dtype), DEVICES[name].source


# ---------------------------------------------------------------------------------------------------------------------
# Many GPUs

_GPUS_A_NODE = 8
_NVLINK_BYTE_PER_S = 450e9  # a GPU and direction: NVLink of H100 and H200
_NETWORK_BYTE_PER_S = 50e9  # a GPU: a 400 Gb/s port each


def all_gather_s(size_bytes: float, gpus: int) -> float:
    """Seconds until each of `gpus` has all of `size_bytes`, of which each held an equal part; a reduce-scatter takes as
    long, an all-reduce twice.

    Across nodes each GPU fetches its eighth over its own port, then the eight of a node exchange over NVLink.
    """
    local = min(gpus, _GPUS_A_NODE)
    nodes = gpus / local
    between_s = size_bytes / local * (1 - 1 / nodes) / _NETWORK_BYTE_PER_S
    within_s = size_bytes * (1 - 1 / local) / _NVLINK_BYTE_PER_S
    return between_s + within_s


@dataclass(frozen=True)
class Scaling:
    """One way to spread a run over GPUs, each with the config's images a step and minibatch.

    Attributes:
        gpus: how many.
        bytes_per_gpu: that a GPU receives in one optimizer step.
        communication_s: of one optimizer step.
        efficiency, efficiency_overlapped: time of a step alone over its time here, without and with communication
            hidden behind computing.
        states_bytes: of `Memory.states`, a GPU.
    """

    gpus: int
    bytes_per_gpu: float
    communication_s: float
    efficiency: float
    efficiency_overlapped: float
    states_bytes: float


def scale_data_parallel(config: Config, ceilings: Ceilings, gpus: int, gradient_item: int) -> Scaling:
    """Each GPU holds everything; gradients are averaged by an all-reduce in every optimizer step.

    Only the backward pass of the last micro-batch can hide it. config: as `planned`; gradient_item: bytes a number.
    """
    counts, optimizer_steps = stage_counts(config), _optimizer_steps(config)
    step_s = sum(speed_of_light_s(count, ceilings) for count in counts.values())
    size = gradient_item * num_trained_parameters(config)
    each_s = 2 * all_gather_s(size, gpus)
    backward_s = 2 / 3 * speed_of_light_s(counts["update"], ceilings) / optimizer_steps / _micro_batches(config)
    exposed_s = max(0.0, each_s - backward_s)
    return Scaling(
        gpus=gpus,
        bytes_per_gpu=2 * size * (1 - 1 / gpus),
        communication_s=each_s,
        efficiency=step_s / (step_s + optimizer_steps * each_s),
        efficiency_overlapped=step_s / (step_s + optimizer_steps * exposed_s),
        states_bytes=memory(config).states,
    )


def scale_fully_sharded(config: Config, ceilings: Ceilings, gpus: int) -> Scaling:
    """Weights, gradients, moments and reference in equal parts (FSDP).

    The blocks' matrices travel in run.dtype, gradients in float32. Every micro-batch gathers the weights for its
    forward and again for its backward pass, those of the reference once, and scatters its gradients. The rollout's one
    gather is kept for the whole rollout. config: as `planned`.
    """
    counts, optimizer_steps = stage_counts(config), _optimizer_steps(config)
    step_s = sum(speed_of_light_s(count, ceilings) for count in counts.values())
    sizes, held = config.policy.sizes, memory(config)
    weights = _weight_bytes(sizes, config.run.dtype)
    whole = held.vqvae + held.reward  # on every GPU
    gathers = 3 if config.grpo.kl_beta > 0.0 else 2
    size = _micro_batches(config) * (gathers * weights + _FLOAT32 * num_parameters(sizes))
    each_s, rollout_s = all_gather_s(size, gpus), all_gather_s(weights, gpus)
    hiding_s = sum(speed_of_light_s(counts[name], ceilings) for name in ("reference", "update")) / optimizer_steps
    exposed_s = max(0.0, each_s - hiding_s)
    return Scaling(
        gpus=gpus,
        bytes_per_gpu=size * (1 - 1 / gpus),
        communication_s=each_s,
        efficiency=step_s / (step_s + optimizer_steps * each_s + rollout_s),
        efficiency_overlapped=step_s / (step_s + optimizer_steps * exposed_s + rollout_s),
        states_bytes=(held.states - whole) / gpus + whole,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command


def report(config: Config, ceilings: Ceilings, title: str) -> str:
    """The tables that the command prints; `title` names the device and where its ceilings come from."""
    config = planned(config, ceilings.memory_bytes)
    lines = [title, *_stage_table(config, ceilings), "", *_memory_table(config, ceilings), ""]
    lines += [*_scaling_table(config, ceilings), "", "Predictions from counts, not measurements."]
    return "\n".join(lines)


def _number(x: float) -> str:
    """Three digits at least, and a decimal in any case: 1220.4, 0.00731."""
    decimals = 1 if x == 0.0 else max(1, 2 - math.floor(math.log10(abs(x))))
    return f"{x:.{decimals}f}"


def _stage_table(config: Config, ceilings: Ceilings) -> list[str]:
    counts, images = stage_counts(config), config.rollout.images
    total_s = sum(speed_of_light_s(count, ceilings) for count in counts.values())
    apart_s = sum(c.flop / ceilings.flop_per_s + c.io_bytes / ceilings.byte_per_s for c in counts.values())
    names = ("GFLOP/image", "TFLOP/step", "GB/step", "compute ms", "bytes ms", "limit ms", "share")
    lines = [
        f"{ceilings.flop_per_s / 1e12:.4g} TFLOP/s in {config.run.dtype}, {ceilings.byte_per_s / 1e12:.4g} TB/s",
        "",
        f"one step of {images} images, {_optimizer_steps(config)} optimizer steps of {config.update.minibatch}",
        f"{'stage':10}" + "".join(f"{name:>13}" for name in names),
    ]
    for name, count in counts.items():
        limit_s = speed_of_light_s(count, ceilings)
        numbers = (count.flop / images / 1e9, count.flop / 1e12, count.io_bytes / 1e9)
        times = (count.flop / ceilings.flop_per_s, count.io_bytes / ceilings.byte_per_s, limit_s)
        cells = "".join(f"{_number(x):>13}" for x in (*numbers, *(s * 1e3 for s in times)))
        lines.append(f"{name:10}{cells}{limit_s / total_s:13.1%}")
    hours = config.run.steps * total_s / 3600
    return [
        *lines,
        f"limit, computing and moving overlapped: {total_s:.3g} s a step, {images / total_s:.4g} images/s",
        f"one after the other: {apart_s:.3g} s a step, {images / apart_s:.4g} images/s",
        f"run.steps={config.run.steps}: at least {hours:.3g} h ({hours * apart_s / total_s:.3g} h not overlapped), "
        "without evaluation and checkpoints",
    ]


def _memory_table(config: Config, ceilings: Ceilings) -> list[str]:
    held = memory(config)
    lines = [
        f"memory, GiB: rollout.micro_batch={config.rollout.micro_batch}, "
        f"rollout.cuda_graph={str(config.rollout.cuda_graph).lower()}, "
        f"update.micro_batch={config.update.micro_batch}, update.checkpointing={config.update.checkpointing}"
    ]
    parts = {field.name: getattr(held, field.name) for field in fields(held)}
    parts |= {"all states": held.states, "peak": held.peak}
    lines += [f"{name.replace('_', ' '):20}{_number(size / 2**30):>10}" for name, size in parts.items()]
    if ceilings.memory_bytes is None:
        return [*lines, "the memory of this device is not known"]
    fits = held.fits(ceilings.memory_bytes)
    return [
        *lines,
        f"{'fits' if fits else 'does not fit'} into {ceilings.memory_bytes / 2**30:.1f} GiB, "
        f"of which a tenth of what the states leave is kept for fragmentation and workspaces",
    ]


def _scaling_table(config: Config, ceilings: Ceilings) -> list[str]:
    lines = [
        "many GPUs, predicted: each does the step above; a node has 8, with NVLink of 450 GB/s a GPU and direction,",
        "and 50 GB/s a GPU (a 400 Gb/s port each) between nodes, both fully used; no latency, no stragglers. GB and ms",
        "of communication are an optimizer step's. Overlapped: data parallel hides in the backward pass of the last",
        "micro-batch, FSDP in reference and update; its rollout gathers the weights once, before it starts, and holds",
        "them. 100 % is the speed of light of one GPU times their number.",
        f"{'':27}{'GPUs':>6}{'GB/GPU':>10}{'ms':>10}{'efficiency':>12}{'overlapped':>12}{'states GiB':>12}",
    ]
    for gpus in (8, 64, 512):
        ways = {
            "data parallel, float32 sums": scale_data_parallel(config, ceilings, gpus, 4),
            "data parallel, bf16 sums": scale_data_parallel(config, ceilings, gpus, 2),
        }
        if config.policy.lora is None:  # an adapter is not sharded
            ways["FSDP"] = scale_fully_sharded(config, ceilings, gpus)
        for name, way in ways.items():
            lines.append(
                f"{name:27}{way.gpus:6}{_number(way.bytes_per_gpu / 1e9):>10}{_number(way.communication_s * 1e3):>10}"
                f"{way.efficiency:12.1%}{way.efficiency_overlapped:12.1%}{_number(way.states_bytes / 2**30):>12}"
            )
    return lines


def main(arguments: list[str]) -> int:
    """python -m varfast.roofline config.yaml [device=H200] [a.b=c ...]"""
    path, found = read_roofline(arguments)
    name = found.device
    config = with_dtype(found, _here() if name == "here" else torch.device("cuda"))
    ceilings, source = _find_ceilings(name, config.run.dtype)
    print(report(config, ceilings, f"{path} on {name} ({source})"))
    return 0
