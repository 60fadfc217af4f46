"""Reading LlamaGen's transformer: public checkpoints, our own, or those of a trainer that wrapped the model."""

from __future__ import annotations

import re
from typing import Any

from varfast.policies.llamagen.config import PRESETS, GPTConfig
from varfast.policies.llamagen.transformer import LlamaGen
from varfast.policies.nexttoken.config import TransformerConfig
from varfast.policies.nexttoken.weights import MOST_BLOCKS, heads_of, load_transformer
from varfast.types import InputError
from varfast.weights.state import Known, State, axis_size, count_parts

_GPT = Known(
    "LlamaGen's class-conditional transformer",
    "cls_embedding.embedding_table.weight",
    frozenset({"cls_embedding", "tok_embeddings", "layers", "norm", "output"}),
)
# Old files hold the rotary table, which the sizes fix.
_IGNORED = re.compile(r"freqs_cis")


def infer_gpt_config(state: State, config: TransformerConfig | None = None) -> GPTConfig:
    """Sizes of the transformer that a state_dict belongs to.

    Args:
        config: its number of heads, where the file's depth and width are of no preset, its side and norm_eps.
    Raises: InputError that names a part that is missing or makes no sense.
    """
    depth = count_parts(state, "layers", MOST_BLOCKS)
    width = axis_size(state, "tok_embeddings.weight", 1, 2)
    heads = heads_of(depth, width, PRESETS, config, "policy.gpt")
    if width % heads:
        raise InputError(f"tok_embeddings.weight is {width} wide, want a multiple of the {heads} heads")
    columns, head_dim = axis_size(state, "layers.0.attention.wqkv.weight", 0, 2), width // heads
    kv_heads, left = divmod(columns - width, 2 * head_dim)
    if left or kv_heads < 1:
        raise InputError(
            f"layers.0.attention.wqkv.weight has {columns} rows, want {width} of {heads} query heads and those of key "
            "and value heads of the same size"
        )
    other: dict[str, Any] = {} if config is None else {"side": config.side, "norm_eps": config.norm_eps}
    found = GPTConfig(
        depth=depth,
        width=width,
        num_heads=heads,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        mlp_width=axis_size(state, "layers.0.feed_forward.w1.weight", 0, 2),
        vocab_size=axis_size(state, "output.weight", 0, 2),
        num_classes=axis_size(state, "cls_embedding.embedding_table.weight", 0, 2) - 1,
        **other,
    )
    return found.model_copy(update={"mlp_width": None}) if found.mlp_width == found.usual_hidden else found


def load_gpt(address: str, config: GPTConfig | None = None) -> LlamaGen:
    """A transformer with the weights at `address`, on the CPU. Arguments and errors as of load_transformer."""
    return load_transformer(address, _GPT, _IGNORED, infer_gpt_config, LlamaGen, PRESETS, config, "policy.gpt")
