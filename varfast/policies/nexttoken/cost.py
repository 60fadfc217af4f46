"""What one image costs of a next-token transformer and its VQ tokenizer, counted from their sizes alone.

How work is counted: varfast.perf.cost. Nothing here needs PyTorch or a GPU.

Sampling is bound by memory. Each of the N steps of a rollout reads all weights once, whatever the number of images, and
of each image the keys and values of all tokens before: N (N + 1) / 2 tokens in all, its own writes included. LlamaGen-L
at 256 px in bfloat16: 0.65 GB of weights a step, and 3.2 GB an image.

Axes: B image, N token, V vocabulary, C channel, H query head, G key-value head, D channel of a head, F channel of the
MLP's hidden layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from varfast.perf.cost import FLOAT32_BYTES, ITEM_BYTES, Count, Weights
from varfast.policies import autoencoder_cost
from varfast.policies.autoencoder_cost import Layer, conv, encoder_layers
from varfast.policies.nexttoken.config import NextTokenPolicyConfig


@dataclass(frozen=True)
class TransformerSizes:
    """Of a causal transformer over one place for the class and N - 1 for tokens.

    Attributes:
        layers, width, heads, kv_heads, head_dim, hidden: number of blocks, C, H, G, D, F.
        vocab_size: V, of the head.
        num_tokens: N, that are predicted.
        embeddings: rows of the tables of codes and classes.
        places: rows of a learned table of places; 0: rotary embeddings.
        gated: SwiGLU, whose hidden layer takes two products; else GELU.
        biases: of the blocks' matrices and norms.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab_size: int
    num_tokens: int
    embeddings: int
    places: int = 0
    gated: bool = True
    biases: bool = False

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each matrix of a block."""
        C, F, D = self.width, self.hidden, self.head_dim
        attention = {"qkv": (C, (self.heads + 2 * self.kv_heads) * D), "proj": (self.heads * D, C)}
        gate = {"gate": (C, F)} if self.gated else {}
        return attention | gate | {"fc1": (C, F), "fc2": (F, C)}


@dataclass(frozen=True)
class TokenizerSizes:
    """Of a VQ tokenizer: VQ-16 and VQ-8 of LlamaGen, VQGAN f16 of taming.

    Attributes:
        side: of the square map of codes.
        codes, code_width: of the codebook.
        latent_width: channels between the autoencoder and the 1x1 convolutions from and to codes.
        base_channels, multipliers, num_res_blocks: of the autoencoder; see autoencoder_cost.
    """

    side: int
    codes: int = 16384
    code_width: int = 8
    latent_width: int = 256
    base_channels: int = 128
    multipliers: Sequence[int] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2

    @property
    def image_size(self) -> int:
        return self.side * 2 ** (len(self.multipliers) - 1)

    @property
    def decoder(self) -> list[Layer]:
        """From codes to pixels."""
        layout = (self.side, self.base_channels, self.multipliers, self.num_res_blocks, self.latent_width)
        first = conv(self.code_width, self.latent_width, 1, self.side)
        return [first, *autoencoder_cost.decoder_layers(*layout)]

    @property
    def parameters(self) -> int:
        layout = (self.image_size, self.base_channels, self.multipliers, self.num_res_blocks, self.latent_width)
        encoder = [*encoder_layers(*layout), conv(self.latent_width, self.code_width, 1, self.side)]
        return sum(layer.parameters for layer in (*encoder, *self.decoder)) + self.codes * self.code_width


@dataclass(frozen=True)
class NextTokenCost:
    """The cost of one model in one compute dtype; see varfast.perf.cost.Cost, which this is.

    Attributes:
        sizes, tokenizer: of the transformer and of the tokenizer.
        dtype: of activations.
        rank, targets: of an adapter, and which matrices have one; rank 0: all weights are trained.
    """

    sizes: TransformerSizes
    tokenizer: TokenizerSizes
    dtype: str
    rank: int = 0
    targets: Sequence[str] = ()

    @property
    def base(self) -> NextTokenCost:
        return replace(self, rank=0, targets=())

    @property
    def _item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def weights(self) -> Weights:
        sizes = self.sizes
        C, V = sizes.width, sizes.vocab_size
        matrices = [a * b for a, b in sizes.matrices.values()]
        norms = [C] * (4 if sizes.biases else 2)
        biases = [b for _, b in sizes.matrices.values()] if sizes.biases else []
        places = [sizes.places * C] if sizes.places else []
        final = [C] * (2 if sizes.biases else 1)
        adapter = [self.rank * width for name in self.targets for width in sizes.matrices[name]]
        return Weights(
            self._item_bytes,
            matrices * sizes.layers + [C * V],
            (norms + biases) * sizes.layers + places + final,
            [sizes.embeddings * C],
            adapter * sizes.layers,
        )

    # Work of one image

    @property
    def forward(self) -> Count:
        """N places through the blocks and the head; of attention the pairs of a token with itself and those before.

        Bytes: of the activations that products read and write. The gate and the layer beside it read their input once.
        """
        sizes = self.sizes
        N, C, V = sizes.num_tokens, sizes.width, sizes.vocab_size
        linear = sum(a * b + self._rank(name) * (a + b) for name, (a, b) in sizes.matrices.items())
        block = 2.0 * N * linear + 4.0 * (N * (N + 1) // 2) * sizes.heads * sizes.head_dim
        moved = sum(a + b + self._adapter_moves(name) for name, (a, b) in sizes.matrices.items())
        moved -= C if sizes.gated else 0
        head_bytes = C * self._item_bytes + V * FLOAT32_BYTES
        return Count(
            sizes.layers * block + 2.0 * N * C * V,
            float(N * (sizes.layers * moved * self._item_bytes + head_bytes)),
        )

    def _rank(self, name: str) -> int:
        return self.rank if name in self.targets else 0

    def _adapter_moves(self, name: str) -> int:
        """Numbers that the adapter of a matrix reads and writes a token."""
        return sum(self.sizes.matrices[name]) + 2 * self.rank if name in self.targets else 0

    @property
    def backward(self) -> Count:
        """Gradients of weights and of activations: a forward pass each. Of frozen weights there is no gradient."""
        forward = self.forward
        if not self.rank:
            return forward * 2.0
        sizes, base = self.sizes, self.base.forward
        N = sizes.num_tokens
        attention = 4.0 * sizes.layers * (N * (N + 1) // 2) * sizes.heads * sizes.head_dim
        frozen = Count(base.flop - attention, base.io_bytes)
        return frozen + Count(forward.flop - frozen.flop, forward.io_bytes - frozen.io_bytes) * 2.0

    @property
    def rollout(self) -> Count:
        """A forward pass, and the cache: step i writes place i and reads those before it."""
        forward, N = self.forward, self.sizes.num_tokens
        return Count(forward.flop, forward.io_bytes + N * (N + 1) // 2 * self.cache_bytes_per_token)

    @property
    def rollout_passes(self) -> int:
        """The class predicts the first token, token N - 2 the last."""
        return self.sizes.num_tokens

    @property
    def decode(self) -> Count:
        layers = self.tokenizer.decoder
        return Count(sum(x.flop for x in layers), self._item_bytes * sum(x.elements for x in layers))

    @property
    def decoder_read_bytes(self) -> int:
        return self._item_bytes * sum(layer.parameters for layer in self.tokenizer.decoder)

    # Memory of one image

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of all blocks."""
        return 2 * self.sizes.layers * self.sizes.kv_heads * self.sizes.head_dim * self._item_bytes

    @property
    def kv_cache_bytes(self) -> int:
        """25 MB for LlamaGen-L at 256 px in bfloat16, 57 MB at 384."""
        return self.sizes.num_tokens * self.cache_bytes_per_token


def tokenizer_sizes(config: NextTokenPolicyConfig) -> TokenizerSizes:
    """Of the tokenizer of a section `policy`."""
    tokenizer = config.tokenizer
    return TokenizerSizes(
        side=config.sizes.side,
        codes=tokenizer.vocab_size,
        code_width=tokenizer.code_width,
        latent_width=tokenizer.latent_width,
        base_channels=tokenizer.base_channels,
        multipliers=tokenizer.channel_multipliers,
        num_res_blocks=tokenizer.num_res_blocks,
    )
