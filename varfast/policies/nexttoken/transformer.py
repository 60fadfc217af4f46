"""A causal transformer over the tokens of an image, of which a family names the layers and chooses the norms.

The inputs of the first places are the prompt, that of each later place is the token before: the last place of the
prompt gives the logits of token 0, that of token n - 1 those of token n. A label is a prompt of one place. A text has a
place for each of its tokens, and the texts of a batch are of unequal length: row r has its prompt at places 0 to p - 1,
its image token j at place p + j, and padding behind them, where causal attention never looks (prompts.py).
`CausalTransformer.forward` computes all places of given tokens; `step` one place after those whose keys and values are
in a cache, `prefill` the places of the prompts before it. Parameter names are those of the published checkpoints, which
is why each family builds its own blocks (varfast/policies/llamagen, taming, janus).
Nothing here depends on train() or eval(): there is no dropout, or a log-probability would describe another policy than
the one that was sampled.

Axes: B image, L place, T place of the longest prompt, N token of an image, M place of the cache (T + N - 1),
V vocabulary, C channel, H head of the queries, G head of keys and values, D channel of a head, F channel of the MLP,
X channels of queries, keys and values together: (H + 2 G) D.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varfast import kernels
from varfast.perf.cost import Checkpointing
from varfast.policies.nexttoken.config import TransformerConfig
from varfast.policies.nexttoken.prompts import Prompted, places_of, sequence_of, token_places
from varfast.policies.precision import Head, MixedPrecision

Pairs = Literal["adjacent", "halves"]


class RMSNorm(nn.Module):
    """x / rms(x), times a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with float32 weights for activations of any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        # All rows as one image: scale and shift, (1, C), are the same for all.
        rows = x.reshape(1, -1, x.shape[-1])
        scale_1C, shift_1C = (self.weight - 1.0).unsqueeze(0), self.bias.unsqueeze(0)
        return kernels.layer_norm_modulate(rows, scale_1C, shift_1C, self.eps).view_as(x)


class KVCache:
    """Static keys and values of all blocks, one place written a step.

    Args:
        prompt_places: T.
    Attributes:
        k_SBGMD, v_SBGMD: S blocks; place m holds what the token's block computed from the input of place m.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        prompt_places: int = 1,
    ) -> None:
        places = prompt_places + config.num_tokens - 1
        shape = (2, config.depth, batch, config.kv_heads, places, config.head_dim)
        self.k_SBGMD, self.v_SBGMD = torch.empty(shape, dtype=dtype, device=device).unbind()


class Cached(NamedTuple):
    """Of a block.

    Attributes:
        k_BGMD, v_BGMD: keys and values.
        place: that comes next, () for all images or (B,), int64 on the device; None: all places from 0 on, of prompts.
    """

    k_BGMD: Tensor
    v_BGMD: Tensor
    place: Tensor | None


class Positions(NamedTuple):
    """What the blocks read of positions.

    Attributes:
        rotary_MP2: table of varfast.policies.nexttoken.rotary, or None for a model without.
        pairs: which two channels a pair is: "adjacent" (0, 1), (2, 3), ... or "halves" (0, D/2), (1, D/2 + 1), ...
    """

    rotary_MP2: Tensor | None
    pairs: Pairs = "adjacent"


# Attention in strict mode, by device: a row has the same bits alone and among all places.
STRICT_ATTENTION = {"cuda": "triton_invariant", "cpu": "sdpa_invariant"}


class Block(nn.Module):
    """Attention and MLP, each on the normalised residual stream and added to it. A family fills in the layers.

    Attributes:
        strict: as of precision.Linear.
    """

    strict = False

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads, self.kv_heads = config.num_heads, config.kv_heads
        self.scale = 1.0 / math.sqrt(config.head_dim)

    @abstractmethod
    def qkv(self, x_BLC: Tensor) -> Tensor:
        """Queries, keys and values (B, L, X) of the stream, which is normalised first."""

    @abstractmethod
    def attention_out(self, heads_BLC: Tensor) -> Tensor:
        """The projection of all heads (B, L, H D) back into the stream."""

    @abstractmethod
    def mlp_branch(self, x_BLC: Tensor) -> Tensor:
        """The MLP of the stream, which is normalised first."""

    def attend(self, x_BLC: Tensor, positions: Positions, cached: Cached | None = None) -> Tensor:
        """The attention branch: of all places, or of the one that follows those in the cache."""
        qkv_BLX, rotary, pairs = self.qkv(x_BLC), positions.rotary_MP2, positions.pairs
        impl = STRICT_ATTENTION[x_BLC.device.type] if self.strict else "auto"
        place = None if cached is None else cached.place
        if cached is not None and place is not None:
            k, v = cached.k_BGMD, cached.v_BGMD
            q = kernels.split_heads_rotary_to_cache(qkv_BLX.squeeze(1), rotary, place, k, v, self.num_heads, pairs)
            heads_BHD = kernels.decode_attention(q, k, v, place, self.scale, impl)
            return self.attention_out(heads_BHD.flatten(1).unsqueeze(1))
        places = qkv_BLX.shape[1]
        rotary = None if rotary is None else rotary[:places]
        q, k, v = kernels.split_heads_rotary(qkv_BLX, rotary, self.num_heads, self.kv_heads, pairs)
        if cached is not None:
            cached.k_BGMD[:, :, :places] = k
            cached.v_BGMD[:, :, :places] = v
        return self.attention_out(kernels.causal_attention(q, k, v, self.scale, impl).flatten(2))

    def forward(
        self, x_BLC: Tensor, positions: Positions, cached: Cached | None = None, recompute_attention: bool = False
    ) -> Tensor:
        """All places of given tokens; with a cache one place an image, or those of its prompt, whose keys and values
        are added to it.
        """
        given = (x_BLC, positions, cached)
        x_BLC = x_BLC + (recomputed(self.attend, *given) if recompute_attention else self.attend(*given))
        return x_BLC + self.mlp_branch(x_BLC)


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Any:
    """Call with activation checkpointing: the backward pass runs it again. Nothing in it is random."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class CausalTransformer(MixedPrecision):
    """See the top of this file.

    Attributes:
        config: sizes.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config

    # What a family fills in.

    @abstractmethod
    def transformer_blocks(self) -> list[Block]:
        """In order."""

    @abstractmethod
    def positions(self, device: torch.device) -> Positions:
        """What the blocks read, of T + N - 1 places."""

    @property
    def num_prompts(self) -> int:
        """Ids of prompts are below it: labels, or rows of a table of texts."""
        return self.config.num_classes

    @property
    def prompts_version(self) -> int:
        """Another one where the table of texts has been replaced."""
        return 0

    def unguided(self, ids_B: Tensor) -> Tensor | None:
        """Ids of the same prompts as guidance has them: without what they say. None: the family has no such thing."""
        return None

    def embed_prompt(self, ids_B: Tensor) -> Tensor:
        """Of a prompt of one place: its input, (B, C), in the dtype of the weights."""
        raise NotImplementedError

    def embed_prompts(self, ids_B: Tensor) -> Prompted:
        """Inputs of the places of prompts, without what `place_embedding` adds."""
        return Prompted(self.embed_prompt(ids_B).unsqueeze(1), None)

    @abstractmethod
    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Input of the places of tokens, (..., C), in the dtype of prompts, without what `place_embedding` adds."""

    def place_embedding(self) -> Tensor | None:
        """Learned positions (at least T + N - 1, C), in the dtype of the weights, added to the input; or None."""
        return None

    @abstractmethod
    def final_norm(self, x: Tensor) -> Tensor:
        """Before the head."""

    @abstractmethod
    def head_layer(self) -> Head:
        """From the normalised stream to logits."""

    # What is the same for all.

    def forward(
        self, ids_B: Tensor, tokens_BN: Tensor, checkpointing: Checkpointing = "none", bias_apart: bool = False
    ) -> Any:
        """Teacher-forced logits of all tokens at once.

        Args:
            ids_B: (B,) int64, ids of the prompts.
            tokens_BN: (B, N) int64; the last one is not read.
            checkpointing: what the backward pass computes again instead of keeping it: "none"; the "attention" branches
                from their input on; "full": the blocks.
            bias_apart: see Returns.
        Returns: (B, N, V) float32; row n is of token n. With bias_apart a tuple: the logits, and the bias of the head
            (V,) that they may still lack, or None.
        """
        prompted, num_tokens = self.embed_prompts(ids_B), tokens_BN.shape[1]
        x_BLC = torch.cat([prompted.x_BTC, self.embed_tokens(tokens_BN[:, :-1])], dim=1)
        if prompted.length_B is not None:
            x_BLC = places_of(x_BLC, sequence_of(prompted.length_B, prompted.x_BTC.shape[1], num_tokens))
        place_NC = self.place_embedding()
        if place_NC is not None:
            x_BLC = x_BLC + place_NC[: x_BLC.shape[1]]
        x_BLC, positions = x_BLC.to(self.compute_dtype), self.positions(x_BLC.device)
        for block in self.transformer_blocks():
            if checkpointing == "full":
                x_BLC = recomputed(block, x_BLC, positions)
            else:
                x_BLC = block(x_BLC, positions, None, checkpointing == "attention")
        if prompted.length_B is not None:
            x_BLC = places_of(x_BLC, token_places(prompted.length_B, num_tokens))
        head, x_BLC = self.head_layer(), self.final_norm(x_BLC)
        if not bias_apart:
            return head(x_BLC)
        return (head(x_BLC), None) if head.bias is None else head.logits_and_bias(x_BLC)

    def prefill(self, x_BTC: Tensor, cache: KVCache) -> None:
        """Write the keys and values of all places of prompts into a cache.

        x_BTC: of `embed_prompts`. What a shorter prompt writes at its padding `step` overwrites before it is read.
        """
        place_NC = self.place_embedding()
        if place_NC is not None:
            x_BTC = x_BTC + place_NC[: x_BTC.shape[1]]
        x_BTC, positions = x_BTC.to(self.compute_dtype), self.positions(x_BTC.device)
        for block, k_BGMD, v_BGMD in zip(self.transformer_blocks(), cache.k_SBGMD, cache.v_SBGMD, strict=True):
            x_BTC = block(x_BTC, positions, Cached(k_BGMD, v_BGMD, None))

    def step(self, x_BC: Tensor, place: Tensor, cache: KVCache) -> Tensor:
        """Logits of the token of one place, after the places that are in the cache; adds its own to the cache.

        Args:
            x_BC: what `embed_prompts` or `embed_tokens` gives for this place.
            place: () for all images or (B,), int64 on the device, so that a captured step reads the place of each
                replay.
            cache: of B images.
        Returns: (B, V) float32.
        """
        place_NC = self.place_embedding()
        if place_NC is not None:
            x_BC = x_BC + place_NC.index_select(0, place.view(-1))
        x_BLC, positions = x_BC.to(self.compute_dtype).unsqueeze(1), self.positions(x_BC.device)
        for block, k_BGMD, v_BGMD in zip(self.transformer_blocks(), cache.k_SBGMD, cache.v_SBGMD, strict=True):
            x_BLC = block(x_BLC, positions, Cached(k_BGMD, v_BGMD, place))
        logits_BV: Tensor = self.head_layer()(self.final_norm(x_BLC)).squeeze(1)
        return logits_BV
