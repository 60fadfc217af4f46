"""What one image costs of taming-transformers' minGPT: see varfast.policies.nexttoken.cost. No PyTorch."""

from __future__ import annotations

from varfast.policies.nexttoken.cost import Layout, NextTokenCost
from varfast.policies.taming.config import MinGPTConfig, TamingPolicyConfig


def cost_of(config: TamingPolicyConfig, dtype: str) -> NextTokenCost:
    """dtype: "float32" or "bfloat16", of activations."""
    sizes = config.sizes
    assert isinstance(sizes, MinGPTConfig)
    return NextTokenCost(sizes, layout_of(sizes), config.tokenizer, dtype, config.lora)


def layout_of(sizes: MinGPTConfig) -> Layout:
    C, F = sizes.width, sizes.hidden
    attention = dict.fromkeys(("query", "key", "value", "proj"), (C, C))
    mlp = {"fc1": (C, F), "fc2": (F, C)}
    return Layout(attention, mlp, biases=True, embeddings=sizes.vocab_size, places=sizes.num_places)
