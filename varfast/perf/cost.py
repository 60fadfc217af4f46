"""Units of work, and what a family of models says about its cost so that a step can be planned and limited.

How work is counted
- FLOPs: two for each multiply and add of a matrix product, a convolution or attention; of attention only the pairs that
  the mask keeps (0.619 of all for VAR at 256 px). Elementwise work counts none. A backward pass is two forward passes.
  (Attention's is 2.5, because the scores are computed again: 1 % of d16's update, not counted.) With an adapter
  (policy.lora) the frozen matrices get no gradient, so their backward pass is one forward pass. (The first block's qkv
  product needs none at all: 0.5 % of d16's update, not counted.)
- Bytes are a lower bound: a product or convolution reads its input and writes its output once; a GroupNorm, whose
  statistics need the whole image, reads and writes it once more; everything else (attention, LayerNorm, gates, GELU,
  residuals) is assumed to be fused into these. Weights are read once a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

Checkpointing = Literal["none", "attention", "full"]

FLOAT32_BYTES = 4
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Count:
    """Work: FLOPs, and the least bytes that go through the device's memory."""

    flop: float
    io_bytes: float

    def __add__(self, other: Count) -> Count:
        return Count(self.flop + other.flop, self.io_bytes + other.io_bytes)

    def __mul__(self, times: float) -> Count:
        return Count(self.flop * times, self.io_bytes * times)


@dataclass(frozen=True)
class Weights:
    """How many numbers each tensor of a trained model has, and how many bytes hold them.

    Weights are stored in float32. Computed with in 16 bits, each matrix has a low-precision copy, which products read.
    With an adapter (policy.lora) the model is frozen: its matrices are stored in the compute dtype, and those of the
    adapter have copies.

    Attributes:
        item_bytes: of a number of the compute dtype.
        matrices: of linear layers.
        others: what is always read in float32, such as biases and norms.
        embeddings: tables of which a pass reads a row an image or token.
        adapter: matrices of an adapter: with one, these alone are trained.
    """

    item_bytes: int
    matrices: Sequence[int]
    others: Sequence[int] = ()
    embeddings: Sequence[int] = ()
    adapter: Sequence[int] = ()

    @property
    def parameters(self) -> int:
        """Numbers of the model without the adapter."""
        return sum(self.matrices) + sum(self.others) + sum(self.embeddings)

    @property
    def trained(self) -> int:
        """Numbers that have a gradient."""
        return sum(self.adapter) if self.adapter else self.parameters

    @property
    def read_bytes(self) -> int:
        """Read by one pass through the model."""
        rest = sum(self.others) + sum(self.adapter)
        return sum(self.matrices) * self.item_bytes + rest * FLOAT32_BYTES

    @property
    def frozen_bytes(self) -> int:
        """Held by a frozen copy, which stores the matrices in the compute dtype."""
        return self.read_bytes + sum(self.embeddings) * FLOAT32_BYTES

    @property
    def held_bytes(self) -> int:
        """Held for the weights themselves."""
        return self.frozen_bytes if self.adapter else FLOAT32_BYTES * self.parameters

    @property
    def copy_bytes(self) -> int:
        """Held for the low-precision copies, which an optimizer step writes; 0 in float32."""
        return 0 if self.item_bytes == FLOAT32_BYTES else self.item_bytes * sum(self.adapter or self.matrices)

    def moment_bytes(self, optimizer: str) -> int:
        """Adam's two moments: float32, or for adamw8bit (varfast.optim.adamw8bit) 8 bits and a float32 a block of 256.

        With adamw8bit, embeddings and tensors of fewer than 4096 numbers stay float32.
        """
        if optimizer != "adamw8bit":
            return 2 * FLOAT32_BYTES * self.trained
        sizes = self.adapter or (*self.matrices, *self.others)
        small = sum(n for n in sizes if n < 4096) + (0 if self.adapter else sum(self.embeddings))
        large = sum(n + FLOAT32_BYTES * -(-n // 256) for n in sizes if n >= 4096)
        return 2 * (FLOAT32_BYTES * small + large)


class Network(NamedTuple):
    """A network that rewards run: its work on one image, and its parameters."""

    per_image: Count
    parameters: int


class Cost(Protocol):
    """What a policy of one family costs in one compute dtype. Work and activations are those of one image,
    without guidance; with it, perf.work counts every image twice where the transformer runs.

    Attributes:
        dtype: "float32" or "bfloat16", of activations.
        base: the cost of the model without its adapter; itself if there is none.
        weights: of the trained model.
        num_tokens: of an image.
        rollout: sampling, without reading the weights; the key-value cache is included.
        rollout_passes: how often one rollout reads all weights.
        decode: from tokens to pixels, without the decoder's weights.
        forward, backward: teacher-forced, without the weights and without what checkpointing computes again.
        decoder_read_bytes: of the decoder's weights.
        tokenizer_bytes: of the frozen tokenizer, float32.
        image_bytes: the pixels, float32.
        input_bytes: `teacher_input`.
        kv_cache_bytes, rollout_activation_bytes: of sampling; the activations where they are largest.
        decode_activation_bytes: the most that exists at once in the decoder.
    """

    @property
    def dtype(self) -> str: ...
    @property
    def base(self) -> Cost: ...
    @property
    def weights(self) -> Weights: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def rollout(self) -> Count: ...
    @property
    def rollout_passes(self) -> int: ...
    @property
    def decode(self) -> Count: ...
    @property
    def forward(self) -> Count: ...
    @property
    def backward(self) -> Count: ...
    @property
    def decoder_read_bytes(self) -> int: ...
    @property
    def tokenizer_bytes(self) -> int: ...
    @property
    def image_bytes(self) -> int: ...
    @property
    def input_bytes(self) -> int: ...
    @property
    def kv_cache_bytes(self) -> int: ...
    @property
    def rollout_activation_bytes(self) -> int: ...
    @property
    def decode_activation_bytes(self) -> int: ...

    def recomputed_share(self, checkpointing: Checkpointing) -> float:
        """FLOPs that the backward pass computes again, as a share of a forward pass."""
        ...

    def update_activation_bytes(self, checkpointing: Checkpointing) -> int:
        """What the forward pass keeps for the backward pass, and the most that comes on top while that runs."""
        ...
