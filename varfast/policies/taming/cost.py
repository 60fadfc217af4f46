"""What one image costs of taming-transformers' minGPT: see varfast.policies.nexttoken.cost. No PyTorch."""

from __future__ import annotations

from varfast.policies.config import LoRAConfig
from varfast.policies.nexttoken.cost import Layout, NextTokenCost
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig
from varfast.policies.taming.config import MinGPTConfig


def count(sizes: MinGPTConfig, tokenizer: TokenizerConfig, dtype: str, lora: LoRAConfig | None) -> NextTokenCost:
    """dtype: "float32" or "bfloat16", of activations."""
    C, F = sizes.width, sizes.hidden
    attention = dict.fromkeys(("query", "key", "value", "proj"), (C, C))
    mlp = {"fc1": (C, F), "fc2": (F, C)}
    layout = Layout(attention, mlp, biases=True, embeddings=sizes.vocab_size, places=sizes.num_places)
    return NextTokenCost(sizes, layout, tokenizer, dtype, lora)
