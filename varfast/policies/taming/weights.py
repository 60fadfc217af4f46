"""Reading taming's minGPT: from a checkpoint of the whole model, our own, or that of a trainer that wrapped it."""

from __future__ import annotations

import re

from varfast.policies.nexttoken.config import TransformerConfig
from varfast.policies.nexttoken.weights import MOST_BLOCKS, heads_of, load_transformer
from varfast.policies.taming.config import PRESETS, MinGPTConfig
from varfast.policies.taming.transformer import MinGPT
from varfast.weights.state import Known, State, axis_size, count_parts

_TRANSFORMER = Known(
    "a transformer of taming-transformers",
    "tok_emb.weight",
    frozenset({"tok_emb", "pos_emb", "blocks", "ln_f", "head"}),
)
# Causal masks, one a block.
_IGNORED = re.compile(r"blocks\.\d+\.attn\.mask")


def infer_mingpt_config(state: State, config: TransformerConfig | None = None) -> MinGPTConfig:
    """Sizes of the transformer that a state_dict belongs to.

    Args:
        config: its number of heads, where the file's depth and width are of no preset, its side, num_classes and
            norm_eps.
    Raises: InputError that names a part that is missing or makes no sense.
    """
    depth = count_parts(state, "blocks", MOST_BLOCKS)
    width = axis_size(state, "tok_emb.weight", 1, 2)
    hidden = axis_size(state, "blocks.0.mlp.0.weight", 0, 2)
    other = {} if config is None else {key: getattr(config, key) for key in ("side", "num_classes", "norm_eps")}
    return MinGPTConfig(
        depth=depth,
        width=width,
        num_heads=heads_of(depth, width, PRESETS, config, "policy.transformer"),
        mlp_width=None if hidden == 4 * width else hidden,
        vocab_size=axis_size(state, "head.weight", 0, 2),
        block_size=axis_size(state, "pos_emb", 1, 3),
        **other,
    )


def load_mingpt(address: str, config: MinGPTConfig | None = None) -> MinGPT:
    """A transformer with the weights at `address`, on the CPU. Arguments and errors as of load_transformer."""
    section = "policy.transformer"
    return load_transformer(address, _TRANSFORMER, _IGNORED, infer_mingpt_config, MinGPT, PRESETS, config, section)
