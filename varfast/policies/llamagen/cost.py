"""What one image costs of LlamaGen: see varfast.policies.nexttoken.cost. No PyTorch."""

from __future__ import annotations

from varfast.policies.llamagen.config import GPTConfig, LlamaGenPolicyConfig
from varfast.policies.nexttoken.cost import Layout, NextTokenCost


def cost_of(config: LlamaGenPolicyConfig, dtype: str) -> NextTokenCost:
    """dtype: "float32" or "bfloat16", of activations."""
    sizes = config.sizes
    assert isinstance(sizes, GPTConfig)
    return NextTokenCost(sizes, layout_of(sizes), config.tokenizer, dtype, config.lora)


def layout_of(sizes: GPTConfig) -> Layout:
    C, D, F = sizes.width, sizes.head_dim, sizes.hidden
    attention = {"wqkv": (C, (sizes.num_heads + 2 * sizes.kv_heads) * D), "wo": (C, C)}
    mlp = {"w1": (C, F), "w3": (C, F), "w2": (F, C)}
    return Layout(attention, mlp, biases=False, embeddings=sizes.vocab_size + sizes.num_classes + 1)
