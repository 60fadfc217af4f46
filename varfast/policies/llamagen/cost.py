"""What one image costs of LlamaGen: see varfast.policies.nexttoken.cost. No PyTorch."""

from __future__ import annotations

from varfast.policies.config import LoRAConfig
from varfast.policies.llamagen.config import GPTConfig
from varfast.policies.nexttoken.cost import Layout, NextTokenCost
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig


def count(sizes: GPTConfig, tokenizer: TokenizerConfig, dtype: str, lora: LoRAConfig | None) -> NextTokenCost:
    """dtype: "float32" or "bfloat16", of activations."""
    C, D, F = sizes.width, sizes.head_dim, sizes.hidden
    attention = {"wqkv": (C, (sizes.num_heads + 2 * sizes.kv_heads) * D), "wo": (C, C)}
    mlp = {"w1": (C, F), "w3": (C, F), "w2": (F, C)}
    layout = Layout(attention, mlp, biases=False, embeddings=sizes.vocab_size + sizes.num_classes + 1)
    return NextTokenCost(sizes, layout, tokenizer, dtype, lora)
