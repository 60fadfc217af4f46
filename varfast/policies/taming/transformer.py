"""taming-transformers' class-conditional minGPT, with the parameter names of public checkpoints below "transformer.".

Axes: B image, N place, C channel.
Source: Esser et al., arXiv:2012.09841.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from varfast.policies.nexttoken.transformer import Block, CausalTransformer, LayerNorm, Positions
from varfast.policies.precision import Head, Linear
from varfast.policies.taming.config import MinGPTConfig


class Attention(nn.Module):
    """Its four matrices, in the order of the public code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.key = Linear(width, width)
        self.query = Linear(width, width)
        self.value = Linear(width, width)
        self.proj = Linear(width, width)


class MinGPTBlock(Block):
    """LayerNorm, exact GELU, biases."""

    def __init__(self, config: MinGPTConfig) -> None:
        super().__init__(config)
        width = config.width
        self.ln1, self.ln2 = LayerNorm(width, config.norm_eps), LayerNorm(width, config.norm_eps)
        self.attn = Attention(width)
        self.mlp = nn.Sequential(Linear(width, config.hidden), nn.GELU(), Linear(config.hidden, width))

    def qkv(self, x_BLC: Tensor) -> Tensor:
        normed = self.ln1(x_BLC)
        return torch.cat([self.attn.query(normed), self.attn.key(normed), self.attn.value(normed)], dim=-1)

    def attention_out(self, heads_BLC: Tensor) -> Tensor:
        return self.attn.proj(heads_BLC)

    def mlp_branch(self, x_BLC: Tensor) -> Tensor:
        return self.mlp(self.ln2(x_BLC))


class MinGPT(CausalTransformer):
    """Learned positions; the label of place 0 is looked up in the same table as the codes.

    Args:
        config: sizes.
    """

    lora_targets: ClassVar = {
        "fc1": r"blocks\.\d+\.mlp\.0",
        "fc2": r"blocks\.\d+\.mlp\.2",
    } | {name: rf"blocks\.\d+\.attn\.{name}" for name in ("query", "key", "value", "proj")}

    def __init__(self, config: MinGPTConfig) -> None:
        super().__init__(config)
        self.tok_emb = nn.Embedding(config.vocab_size, config.width)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.num_places, config.width))
        self.blocks = nn.ModuleList(MinGPTBlock(config) for _ in range(config.depth))
        self.ln_f = LayerNorm(config.width, config.norm_eps)
        self.head = Head(config.width, config.vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> MinGPT:
        """Random weights, a function of `seed` and the sizes alone: normal, of the public deviation 0.02.

        The public training starts with positions of zeros; here they are as all others.
        """
        rng = torch.Generator(device=self.pos_emb.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02, generator=rng)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return self

    def transformer_blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def positions(self, device: torch.device) -> Positions:
        return Positions(None)

    def embed_prompt(self, ids_B: Tensor) -> Tensor:
        return self.tok_emb(ids_B)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.tok_emb.weight)

    def place_embedding(self) -> Tensor | None:
        return self.pos_emb[0]

    def final_norm(self, x: Tensor) -> Tensor:
        return self.ln_f(x)

    def head_layer(self) -> Head:
        return self.head

    def large_modules(self) -> Iterator[nn.Module]:
        for block in self.blocks:
            assert isinstance(block, MinGPTBlock)
            attention = block.attn
            yield from (attention.query, attention.key, attention.value, attention.proj, block.mlp)
