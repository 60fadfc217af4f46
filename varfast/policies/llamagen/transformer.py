"""LlamaGen's class-conditional transformer, with the parameter names of the public checkpoints c2i_B_256.pt and others.

Axes: B image, C channel, F channel of the MLP.
Source: Sun et al., arXiv:2406.06525.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from varfast import kernels
from varfast.policies.llamagen.config import GPTConfig
from varfast.policies.nexttoken.rotary import rotary_2d
from varfast.policies.nexttoken.transformer import Block, CausalTransformer, Positions, RMSNorm
from varfast.policies.precision import Head, Linear


class Attention(nn.Module):
    """Its two matrices; rows of wqkv are queries, keys, values."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wqkv = Linear(config.width, (config.num_heads + 2 * config.kv_heads) * config.head_dim, bias=False)
        self.wo = Linear(config.width, config.width, bias=False)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.width, config.hidden, bias=False)
        self.w3 = Linear(config.width, config.hidden, bias=False)
        self.w2 = Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(kernels.swiglu(self.w1(x), self.w3(x)))


class LlamaGenBlock(Block):
    """RMSNorm, no biases."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)

    def qkv(self, x_BLC: Tensor) -> Tensor:
        return self.attention.wqkv(self.attention_norm(x_BLC))

    def attention_out(self, heads_BLC: Tensor) -> Tensor:
        return self.attention.wo(heads_BLC)

    def mlp_branch(self, x_BLC: Tensor) -> Tensor:
        return self.feed_forward(self.ffn_norm(x_BLC))


class LabelEmbedding(nn.Module):
    """One row a label, and a last one for 'no label'."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, ids_B: Tensor) -> Tensor:
        return self.embedding_table(ids_B)


class LlamaGen(CausalTransformer):
    """Two-dimensional rotary positions, SwiGLU, grouped-query attention.

    Args:
        config: sizes.
    """

    lora_targets: ClassVar = {
        "wqkv": r"layers\.\d+\.attention\.wqkv",
        "wo": r"layers\.\d+\.attention\.wo",
    } | {name: rf"layers\.\d+\.feed_forward\.{name}" for name in ("w1", "w3", "w2")}

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.cls_embedding = LabelEmbedding(config.num_classes, config.width)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(LlamaGenBlock(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.output = Head(config.width, config.vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> LlamaGen:
        """Random weights, a function of `seed` and the sizes alone: normal, of the public deviation 0.02.

        The public training starts with a head of zeros; here it is as all others, so that random models differ.
        """
        rng = torch.Generator(device=self.norm.weight.device).manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02, generator=rng)
            else:
                parameter.fill_(1.0)
        return self

    def transformer_blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))

    def positions(self, device: torch.device) -> Positions:
        return Positions(rotary_2d(self.config.side, self.config.head_dim, device))

    def unguided(self, ids_B: Tensor) -> Tensor:
        """The label for 'no label'."""
        return torch.full_like(ids_B, self.config.num_classes)

    def embed_prompt(self, ids_B: Tensor) -> Tensor:
        return self.cls_embedding(ids_B)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.tok_embeddings.weight)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def head_layer(self) -> Head:
        return self.output

    def large_modules(self) -> Iterator[nn.Module]:
        for block in self.layers:
            assert isinstance(block, LlamaGenBlock)
            yield from (block.attention.wqkv, block.attention.wo, block.feed_forward)
