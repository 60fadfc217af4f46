"""What one image costs of VAR and its VQ-VAE, counted from their sizes alone: FLOPs, bytes, memory, parameters.

How work is counted: varfast.perf.cost. Nothing here needs PyTorch or a GPU.

Axes: B image, L token over all scales, V vocabulary, C channel, H head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from varfast.perf.cost import FLOAT32_BYTES, ITEM_BYTES, Checkpointing, Count, Weights
from varfast.policies import autoencoder_cost
from varfast.policies.autoencoder_cost import Layer, conv, encoder_layers
from varfast.policies.config import LoRAConfig
from varfast.policies.var.config import VARConfig, VQVAEConfig


@dataclass(frozen=True)
class VARCost:
    """The cost of one model in one compute dtype; see varfast.perf.cost.Cost, which this is.

    Attributes:
        sizes, vqvae: of the transformer and of the VQ-VAE.
        dtype: of activations.
        lora: an adapter, whose products are counted with those of its matrices; None: all weights are trained.
    """

    sizes: VARConfig
    vqvae: VQVAEConfig
    dtype: str
    lora: LoRAConfig | None = None

    @property
    def base(self) -> VARCost:
        return replace(self, lora=None)

    @property
    def _item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def weights(self) -> Weights:
        """310 283 520 numbers (d16), 2 010 020 356 (d30)."""
        sizes, C, hidden = self.sizes, self.sizes.width, _hidden(self.sizes)
        adaln = [6 * C * C]
        matrices = [3 * C * C, C * C, C * hidden, hidden * C, *([] if sizes.shared_adaln else adaln)]
        block = [C, C, C, hidden, C, 6 * C]  # biases of q and v, proj, fc1, fc2 and adaLN, whose place ada_gss takes
        block += [sizes.depth] if sizes.qk_l2_norm else []
        before = [sizes.patch_nums[0] ** 2 * C, sizes.num_tokens * C, sizes.code_width * C, C]
        head = [2 * C * C, 2 * C, sizes.vocab_size]
        shared = [6 * C] if sizes.shared_adaln else []
        return Weights(
            self._item_bytes,
            matrices * sizes.depth + (adaln if sizes.shared_adaln else []) + [C * sizes.vocab_size],
            before + block * sizes.depth + shared + head,
            [(sizes.num_classes + 1) * C, len(sizes.patch_nums) * C],
            _adapter_tensors(sizes, self.lora),
        )

    @property
    def decoder_read_bytes(self) -> int:
        return sum(layer.parameters for layer in decoder_layers(self.vqvae)) * self._item_bytes

    @property
    def tokenizer_bytes(self) -> int:
        return FLOAT32_BYTES * num_vqvae_parameters(self.vqvae)

    # Work of one image

    @property
    def num_tokens(self) -> int:
        return self.sizes.num_tokens

    @property
    def rollout(self) -> Count:
        """A forward pass and the cache: every scale but the last writes its keys and values once, and each scale reads
        those of the scales before it.
        """
        ends = (0, *self.sizes.scale_ends)
        tokens = ends[-2] + sum(ends[:-1])
        forward = self.forward
        return Count(forward.flop, forward.io_bytes + tokens * self._cache_bytes_per_token)

    @property
    def rollout_passes(self) -> int:
        return len(self.sizes.patch_nums)

    @property
    def decode(self) -> Count:
        return decode_count(self.vqvae, self.dtype)

    @property
    def forward(self) -> Count:
        return Count(forward_flop(self.sizes, self.lora).total, self.forward_bytes)

    @property
    def forward_bytes(self) -> float:
        """Activations that the products of a forward pass read and write.

        With an MLP of ratio 4, 16 C a block and token: qkv reads C and writes 3 C, proj C and C, fc1 C and 4 C, fc2
        4 C and C. The head reads C and writes V in float32. Today's kernels also pass over the stream in adaLN (6 C),
        attention (4 C) and GELU (8 C). An adapter reads the input and writes the output of its matrix once more.
        """
        C, L = self.sizes.width, self.sizes.num_tokens
        block = (4 + 2 + 2) * C + 2 * _hidden(self.sizes)
        if self.lora is not None:
            adapted = _adapted(self.sizes, self.lora).items()
            block += sum(sum(widths) + 2 * self.lora.rank for name, widths in adapted if name != "ada_lin")
        return float(L * (self.sizes.depth * block * self._item_bytes + (C + self.sizes.vocab_size) * FLOAT32_BYTES))

    @property
    def backward(self) -> Count:
        """Gradients of weights and of activations: a forward pass each.

        With an adapter only its weights have gradients. Embeddings get none, and adaLN only if it has an adapter.
        """
        if self.lora is None:
            return self.forward * 2.0
        base, flop = forward_flop(self.sizes), forward_flop(self.sizes, self.lora).total
        frozen = Count(base.linear + base.head, self.base.forward_bytes)
        twice = Count(base.attention + flop - base.total, self.forward_bytes - frozen.io_bytes)
        return frozen + twice * 2.0

    def recomputed_share(self, checkpointing: Checkpointing) -> float:
        flop = forward_flop(self.sizes, self.lora)
        again = {
            "none": 0.0,
            "attention": flop.attention_branch + flop.attention,
            "full": flop.linear + flop.attention + flop.adaln,
        }
        return again[checkpointing] / flop.total

    # Memory of one image

    @property
    def image_bytes(self) -> int:
        return 3 * self.vqvae.image_size**2 * FLOAT32_BYTES

    @property
    def input_bytes(self) -> int:
        """The transformer's input at every scale but the first."""
        return (self.sizes.num_tokens - self.sizes.patch_nums[0] ** 2) * self.sizes.code_width * FLOAT32_BYTES

    @property
    def _cache_bytes_per_token(self) -> int:
        """Keys and values of all blocks."""
        return 2 * self.sizes.depth * self.sizes.width * self._item_bytes

    @property
    def kv_cache_bytes(self) -> int:
        """Keys and values of all blocks, of every scale but the last, which no later scale reads.

        d16 in bfloat16: 27.8 MB for 424 tokens. (All 680 tokens: 44.6 MB, 22.8 GB for 512 images; d30 80.2 GB.)
        """
        return (0, *self.sizes.scale_ends)[-2] * self._cache_bytes_per_token

    @property
    def rollout_activation_bytes(self) -> int:
        """At the last scale, without gradients: the larger of a block at work and of the head.

        In a block the scale's input, the block's and its normalised form, the stream, its normalised form, a branch,
        and the MLP's hidden layer before and after GELU exist at once (6 C + 2 x 4 C); in the head the input, the
        stream, two float32 forms of it, and the logits of this scale and of the one before. Beside them each block's
        6 C constants. With an adapter the hidden layer exists once more, as base, adapter's part and sum.
        """
        C, item = self.sizes.width, self._item_bytes
        tokens = self.sizes.patch_nums[-1] ** 2
        before = self.sizes.patch_nums[-2] ** 2 if len(self.sizes.patch_nums) > 1 else 0
        logits = self.sizes.vocab_size * FLOAT32_BYTES
        block = max(6 * C + (3 if self.lora else 2) * _hidden(self.sizes), 12 * C) * item
        head = 2 * C * item + 2 * C * FLOAT32_BYTES + logits
        return tokens * max(block, head) + before * logits + 6 * self.sizes.depth * C * item

    @property
    def decode_activation_bytes(self) -> int:
        """The most that exists at once in the decoder, in the compute dtype; 85 MB in bfloat16 at 256 px.

        In a residual block at full resolution: the block's input, and map, normalised map and result of its second
        half, 21 MB each.
        """
        return self._item_bytes * max(layer.live for layer in decoder_layers(self.vqvae)) + self.image_bytes

    def update_activation_bytes(self, checkpointing: Checkpointing) -> int:
        """What the forward pass keeps for the backward pass, and the most that comes on top while that runs.

        Kept a token and block, in the compute dtype (h = 4 C, the hidden layer; as the kernels for a GPU keep it):

            none       normed C, q k v 3 C, attention C, branch C, stream C, normed C, hidden 2 h, branch C, stream C:
                       18 C
            attention  all of it but q k v and attention, which are computed again from normed: 14 C
            full       the stream that enters the block, and its normalised form: 2 C

        and float32 numbers: the mean and scale of two norms, a head's softmax (2) and norms of q and k (2). On top
        comes the larger of a block at work (what it recomputes, gradients of hidden layer and stream: 2 h + 2 C) and of
        the head (logits, whose place their gradient takes, two forms of the stream and their gradients, in float32). An
        adapter keeps what lies between A and B, rank numbers a matrix, and has the hidden layer at work once more.
        (With an adapter on only some matrices this counts too much: a frozen product without one keeps no input.)
        """
        C, hidden, item = self.sizes.width, _hidden(self.sizes), self._item_bytes
        statistics_bytes = (4 + 4 * self.sizes.depth) * FLOAT32_BYTES
        adapted = set(self.lora.targets) - {"ada_lin"} if self.lora else set()
        rank = self.lora.rank if self.lora else 0
        block = (10 * C + 2 * hidden + rank * len(adapted)) * item + statistics_bytes
        in_attention = 4 * C + rank * len(adapted & {"mat_qkv", "proj"})
        kept = {"none": block, "attention": block - in_attention * item, "full": 2 * C * item}[checkpointing]
        head_at_work = (self.sizes.vocab_size + 4 * C) * FLOAT32_BYTES
        block_at_work = block - kept + max(2 * C + (3 if self.lora else 2) * hidden, 8 * C) * item
        return self.sizes.num_tokens * (self.sizes.depth * kept + C * item + max(head_at_work, block_at_work))


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


def _hidden(sizes: VARConfig) -> int:
    return round(sizes.width * sizes.mlp_ratio)


def _adapted(sizes: VARConfig, lora: LoRAConfig | None) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a matrix of each kind that has an adapter."""
    C, hidden = sizes.width, _hidden(sizes)
    sides = {"mat_qkv": (C, 3 * C), "proj": (C, C), "fc1": (C, hidden), "fc2": (hidden, C), "ada_lin": (C, 6 * C)}
    return {name: side for name, side in sides.items() if lora is not None and name in lora.targets}


def _adapter_tensors(sizes: VARConfig, lora: LoRAConfig | None) -> list[int]:
    """How many numbers each A and each B has: 14 745 600 in all for d30, rank 16 beside the blocks' four matrices."""
    tensors = []
    for name, widths in _adapted(sizes, lora).items():
        times = 1 if name == "ada_lin" and sizes.shared_adaln else sizes.depth
        tensors += [lora.rank * width for width in widths if lora] * times
    return tensors


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


# ---------------------------------------------------------------------------------------------------------------------
# The VQ-VAE


def _encoder(config: VQVAEConfig) -> Iterator[Layer]:
    yield from encoder_layers(config, config.image_size, config.code_width)
    yield conv(config.code_width, config.code_width, 3, config.patch_nums[-1])  # quant_conv


def decoder_layers(config: VQVAEConfig) -> Iterator[Layer]:
    """From the sum of quantized scales to pixels: post_quant_conv and decoder."""
    yield conv(config.code_width, config.code_width, 3, config.patch_nums[-1])  # post_quant_conv
    yield from autoencoder_cost.decoder_layers(config, config.patch_nums[-1], config.code_width)


def num_vqvae_parameters(config: VQVAEConfig) -> int:
    """Encoder, decoder, codebook and residual convolutions: 108 948 355 for the public one."""
    phi = conv(config.code_width, config.code_width, 3, 1).parameters
    both = sum(layer.parameters for layer in (*_encoder(config), *decoder_layers(config)))
    return both + (config.num_phi or len(config.patch_nums)) * phi + config.vocab_size * config.code_width


def decode_count(config: VQVAEConfig, dtype: str) -> Count:
    """One image from tokens to pixels, the residual convolutions of every scale included; its weights are not.

    393.8 GFLOP for the public VQ-VAE: 181 in the level at 256x256, 30 in the upsampling to it.
    """
    phi = conv(config.code_width, config.code_width, 3, config.patch_nums[-1])
    layers = [*decoder_layers(config), *[phi] * len(config.patch_nums)]
    return Count(sum(x.flop for x in layers), ITEM_BYTES[dtype] * sum(x.elements for x in layers))
