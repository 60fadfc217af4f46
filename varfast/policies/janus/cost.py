"""What one image costs of Janus-Pro: see varfast.policies.nexttoken.cost. No PyTorch."""

from __future__ import annotations

from varfast.policies.config import LoRAConfig
from varfast.policies.janus.config import JanusConfig
from varfast.policies.nexttoken.cost import Layout, NextTokenCost
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig


def count(
    sizes: JanusConfig, tokenizer: TokenizerConfig, dtype: str, lora: LoRAConfig | None, prompt_places: int
) -> NextTokenCost:
    """
    Args:
        dtype: "float32" or "bfloat16", of activations.
        prompt_places: of the longest prompt, to which all are padded.
    """
    C, D, F = sizes.width, sizes.head_dim, sizes.hidden
    of_keys = (C, sizes.kv_heads * D)
    attention = {"q_proj": (C, C), "k_proj": of_keys, "v_proj": of_keys, "o_proj": (C, C)}
    mlp = {"gate_proj": (C, F), "up_proj": (C, F), "down_proj": (F, C)}
    layout = Layout(
        attention,
        mlp,
        biases=False,
        embeddings=sizes.text_vocab_size,
        prompt_places=prompt_places,
        code_width=sizes.code_width,
        head_width=sizes.head_hidden,
    )
    return NextTokenCost(sizes, layout, tokenizer, dtype, lora)
