"""What one image costs of a next-token transformer and its VQ tokenizer, counted from their sizes alone.

How work is counted: varfast.perf.cost. Nothing here needs PyTorch or a GPU.

Sampling is bound by memory. Each of the N steps of a rollout reads all weights once, whatever the number of images, and
of each image the keys and values of all tokens before: N (N + 1) / 2 tokens in all, its own writes included. LlamaGen-L
at 256 px in bfloat16: 0.65 GB of weights a step, and 3.2 GB an image.

A prompt of T places is computed with its image: L = T + N - 1 places go through the blocks, and N through the head. All
prompts are padded to the longest, and padding is computed.

Axes: B image, N token, T place of the longest prompt, L place, V vocabulary, C channel, H query head, G key-value head,
D channel of a head, F channel of the MLP's hidden layer, X = (H + 2 G) D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from varfast.perf.cost import FLOAT32_BYTES, ITEM_BYTES, Checkpointing, Count, Weights
from varfast.policies.autoencoder_cost import Layer, conv, decoder_layers, encoder_layers
from varfast.policies.config import LoRAConfig
from varfast.policies.nexttoken.config import TransformerConfig
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig


@dataclass(frozen=True)
class Layout:
    """What a family's transformer is made of.

    Attributes:
        attention, mlp: inputs and outputs of the matrices of a block, by the names that an adapter's targets have; the
            last of each leads back to the stream.
        biases: whether the matrices and the norms have biases.
        embeddings: rows, of the width of the stream, of the tables of codes, labels and text tokens.
        places: rows of a learned table of places.
        prompt_places: T, 1 for a label.
        code_width: of a table of codes of their own width, which two layers with biases bring to the stream; 0: codes
            are among the embeddings.
        head_width: hidden channels of a head of two layers with biases; 0: it is one matrix.
    """

    attention: dict[str, tuple[int, int]]
    mlp: dict[str, tuple[int, int]]
    biases: bool
    embeddings: int
    places: int = 0
    prompt_places: int = 1
    code_width: int = 0
    head_width: int = 0

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        return self.attention | self.mlp

    @property
    def hidden(self) -> int:
        """F."""
        return [*self.mlp.values()][-1][0]

    @property
    def gated(self) -> bool:
        """SwiGLU: two matrices make the hidden layer."""
        return len(self.mlp) == 3


@dataclass(frozen=True)
class NextTokenCost:
    """The cost of one model in one compute dtype; see varfast.perf.cost.Cost, which this is.

    Attributes:
        sizes, layout: of the transformer.
        vq: of the tokenizer.
        dtype: of activations.
        lora: an adapter, whose products are counted with those of its matrices; None: all weights are trained.
    """

    sizes: TransformerConfig
    layout: Layout
    vq: TokenizerConfig
    dtype: str
    lora: LoRAConfig | None = None

    @property
    def base(self) -> NextTokenCost:
        return replace(self, lora=None)

    @property
    def _item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    def _rank(self, name: str) -> int:
        """Of the adapter of a matrix; 0: it has none."""
        return self.lora.rank if self.lora is not None and name in self.lora.targets else 0

    # Weights

    @property
    def weights(self) -> Weights:
        layout, depth, C = self.layout, self.sizes.depth, self.sizes.width
        widths = layout.matrices
        matrices = [a * b for a, b in widths.values()]
        norm = [C, C] if layout.biases else [C]
        biases = [b for _, b in widths.values()] if layout.biases else []
        adapter = [self._rank(name) * width for name in widths if self._rank(name) for width in widths[name]]
        apart = [*self._aligner, *self._head]
        apart_biases = [b for _, b in self._aligner] + ([b for _, b in self._head] if layout.head_width else [])
        codes = [self.sizes.vocab_size * layout.code_width] if layout.code_width else []
        return Weights(
            self._item_bytes,
            matrices * depth + [a * b for a, b in apart],
            (2 * norm + biases) * depth + norm + apart_biases + ([layout.places * C] if layout.places else []),
            [layout.embeddings * C, *codes],
            adapter * depth,
        )

    @property
    def _aligner(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the matrices between the table of codes and the stream."""
        C, width = self.sizes.width, self.layout.code_width
        return [(width, C), (C, C)] if width else []

    @property
    def _head(self) -> list[tuple[int, int]]:
        """Those between the stream and the logits."""
        C, V, width = self.sizes.width, self.sizes.vocab_size, self.layout.head_width
        return [(C, width), (width, V)] if width else [(C, V)]

    @property
    def _decoder(self) -> list[Layer]:
        side = self.sizes.side
        first = conv(self.vq.code_width, self.vq.latent_width, 1, side)  # post_quant_conv
        return [first, *decoder_layers(self.vq, side, self.vq.latent_width)]

    @property
    def tokenizer_parameters(self) -> int:
        """71 883 403 for VQ-16."""
        encoder = [*encoder_layers(self.vq, self._image_size, self.vq.latent_width)]
        encoder.append(conv(self.vq.latent_width, self.vq.code_width, 1, self.sizes.side))  # quant_conv
        return sum(x.parameters for x in (*encoder, *self._decoder)) + self.vq.vocab_size * self.vq.code_width

    @property
    def tokenizer_bytes(self) -> int:
        return FLOAT32_BYTES * self.tokenizer_parameters

    @property
    def decoder_read_bytes(self) -> int:
        return self._item_bytes * sum(layer.parameters for layer in self._decoder)

    # Work of one image

    @property
    def num_tokens(self) -> int:
        return self.sizes.num_tokens

    @property
    def _places(self) -> int:
        """L."""
        return self.layout.prompt_places + self.sizes.num_tokens - 1

    @property
    def _attention_flop(self) -> float:
        """Of the pairs of a place with itself and those before."""
        sizes, L = self.sizes, self._places
        return 4.0 * sizes.depth * (L * (L + 1) // 2) * sizes.num_heads * sizes.head_dim

    def _linear_flop(self, matrices: Mapping[str, tuple[int, int]]) -> float:
        """Of matrices of all blocks, with their adapters."""
        numbers = sum(a * b + self._rank(name) * (a + b) for name, (a, b) in matrices.items())
        return 2.0 * self.sizes.depth * self._places * numbers

    @property
    def _head_flop(self) -> float:
        """And of what brings codes to the stream."""
        N = self.sizes.num_tokens
        return 2.0 * (N * sum(a * b for a, b in self._head) + (N - 1) * sum(a * b for a, b in self._aligner))

    @property
    def forward(self) -> Count:
        """L places through the blocks, N through the head.

        Bytes: of the activations that products read and write; the matrices that read the same input read it once. An
        adapter reads the input and writes the output of its matrix once more.
        """
        sizes, layout, C = self.sizes, self.layout, self.sizes.width
        moved = 2 * C + sizes.num_heads * sizes.head_dim + layout.hidden  # inputs of the four products of a block
        moved += sum(b for _, b in layout.matrices.values())
        moved += sum(a + b + 2 * self._rank(name) for name, (a, b) in layout.matrices.items() if self._rank(name))
        narrow = C + 2 * layout.head_width + sum(a + b for a, b in self._aligner)
        head_bytes = narrow * self._item_bytes + sizes.vocab_size * FLOAT32_BYTES
        return Count(
            self._linear_flop(layout.matrices) + self._attention_flop + self._head_flop,
            float(self._places * sizes.depth * moved * self._item_bytes + sizes.num_tokens * head_bytes),
        )

    @property
    def backward(self) -> Count:
        """Gradients of weights and of activations: a forward pass each. Of frozen weights there is no gradient."""
        forward = self.forward
        if self.lora is None:
            return forward * 2.0
        base = self.base.forward
        once = Count(base.flop - self._attention_flop, base.io_bytes)
        return once + Count(forward.flop - once.flop, forward.io_bytes - once.io_bytes) * 2.0

    def recomputed_share(self, checkpointing: Checkpointing) -> float:
        """But for the last product of what is recomputed: no result of it is kept."""
        layout = self.layout
        first = dict([*layout.attention.items()][:-1])
        again = {"none": {}, "attention": first, "full": layout.attention | dict([*layout.mlp.items()][:-1])}
        attention = 0.0 if checkpointing == "none" else self._attention_flop
        return (self._linear_flop(again[checkpointing]) + attention) / self.forward.flop

    @property
    def rollout(self) -> Count:
        """A forward pass, and the cache: the prompt is written, and a step writes its place and reads those before.

        (The last place of a prompt is computed twice: less than 1 / N, not counted.)
        """
        forward, N, T = self.forward, self.sizes.num_tokens, self.layout.prompt_places
        places = N * T + N * (N - 1) // 2 + (T if T > 1 else 0)
        return Count(forward.flop, forward.io_bytes + places * self._cache_bytes_per_token)

    @property
    def rollout_passes(self) -> int:
        """The prompt predicts the first token, token N - 2 the last; a prompt of several places is a pass before."""
        return self.sizes.num_tokens + (1 if self.layout.prompt_places > 1 else 0)

    @property
    def decode(self) -> Count:
        layers = self._decoder
        return Count(sum(x.flop for x in layers), self._item_bytes * sum(x.elements for x in layers))

    # Memory of one image

    @property
    def _image_size(self) -> int:
        return self.sizes.side * self.vq.downsampling

    @property
    def image_bytes(self) -> int:
        return 3 * self._image_size**2 * FLOAT32_BYTES

    @property
    def input_bytes(self) -> int:
        """The tokens, int64."""
        return 8 * self.sizes.num_tokens

    @property
    def _cache_bytes_per_token(self) -> int:
        """Keys and values of all blocks."""
        return 2 * self.sizes.depth * self.sizes.kv_heads * self.sizes.head_dim * self._item_bytes

    @property
    def kv_cache_bytes(self) -> int:
        """25 MB for LlamaGen-L at 256 px in bfloat16, 57 MB at 384."""
        return self._places * self._cache_bytes_per_token

    @property
    def rollout_activation_bytes(self) -> int:
        """Of one step, whose largest is the head's, or of the prompt, whose largest is a block's; the results of all
        steps, and the codes that the decoder reads.

        A captured rollout holds the graph of one step, which all tokens share.
        """
        C, item, N = self.sizes.width, self._item_bytes, self.sizes.num_tokens
        head = 2 * C * item + self.sizes.vocab_size * FLOAT32_BYTES
        block = (4 * C + 3 * self.layout.hidden) * item * self.layout.prompt_places
        results = (8 + 2 * FLOAT32_BYTES) * N + 8 * N  # tokens, log-probability, entropy; one of them as it is written
        return C * FLOAT32_BYTES + max(head, block) + results + self.vq.code_width * N * FLOAT32_BYTES

    @property
    def decode_activation_bytes(self) -> int:
        """The most that exists at once in the decoder, in the compute dtype; 68 MB in bfloat16 at 256 px."""
        latents = self.vq.latent_width * self.sizes.num_tokens
        return self._item_bytes * (latents + max(layer.live for layer in self._decoder)) + self.image_bytes

    def update_activation_bytes(self, checkpointing: Checkpointing) -> int:
        """What the forward pass keeps for the backward pass, and the most that comes on top while that runs.

        Kept a token and block, in the compute dtype:

            none       the stream twice and its normalised forms 4 C, q k v X, attention H D, and of the MLP F a matrix
            attention  all of it but q k v, attention, and the normalised form that they are computed from
            full       the stream that enters the block

        and float32 numbers: those of two norms, and a head's softmax. On top comes the larger of a block at work (all
        of it where it is recomputed whole, and the gradients of the stream and of the MLP's hidden layers but the last,
        whose place is free by then) and of the head: its input, before and after the norm, the logits, whose place
        their gradient takes, and that gradient in 16 bits, or in float32 that of the input; of a head of two layers
        also what is between them, before and after GELU, and its gradient. An attention that is recomputed takes the
        place of the MLP.
        """
        sizes, layout, C, item = self.sizes, self.layout, self.sizes.width, self._item_bytes
        heads, qkv = sizes.num_heads * sizes.head_dim, (sizes.num_heads + 2 * sizes.kv_heads) * sizes.head_dim
        statistics_bytes = ((4 if layout.biases else 2) + sizes.num_heads) * FLOAT32_BYTES
        hidden = len(layout.mlp) * layout.hidden
        ranks = sum(map(self._rank, layout.matrices))
        block = (4 * C + qkv + heads + hidden + ranks) * item + statistics_bytes
        in_attention = C + qkv + heads + sum(map(self._rank, layout.attention))
        kept = {"none": block, "attention": block - in_attention * item, "full": C * item}[checkpointing]
        of_head = C if self.dtype == "float32" else sizes.vocab_size
        head_at_work = sizes.vocab_size * FLOAT32_BYTES + (of_head + 2 * C + 3 * layout.head_width) * item
        of_mlp = (hidden - layout.hidden + C + (layout.hidden if self.lora else 0)) * item
        block_at_work = of_mlp + (block - kept if checkpointing == "full" else 0)
        of_codes = 2 * C * item if layout.code_width and not self.lora else 0  # between the aligner's two layers
        L, N = self._places, sizes.num_tokens
        return L * sizes.depth * kept + N * of_codes + max(N * head_at_work, L * block_at_work)
