"""Reading Janus-Pro's language model: public checkpoints, our own, or those of a trainer that wrapped the model."""

from __future__ import annotations

import re
from typing import Any

from varfast.policies.janus.config import PRESETS, JanusConfig
from varfast.policies.janus.transformer import Janus
from varfast.policies.nexttoken.config import TransformerConfig
from varfast.policies.nexttoken.weights import MOST_BLOCKS, heads_of, load_transformer
from varfast.types import InputError
from varfast.weights.state import Known, State, axis_size, count_parts

_JANUS = Known(
    "Janus-Pro's language model",
    "gen_embed.weight",
    frozenset({"language_model", "gen_embed", "gen_aligner", "gen_head"}),
)
# Of a whole checkpoint: what understands images and writes text, the tokenizer of images, and old rotary tables.
_IGNORED = re.compile(
    r"vision_model\..*|aligner\..*|gen_vision_model\..*|language_model\.lm_head\.weight|.*\.rotary_emb\.inv_freq"
)
_UNUSED = re.compile(r"(vision_model|aligner|language_model\.lm_head)\.")
# Of a whole checkpoint, all that is not the tokenizer of images.
NOT_TOKENIZER = re.compile(r"(vision_model|aligner|language_model|gen_embed|gen_aligner|gen_head)\..*")
_BLOCKS = "language_model.model.layers"


def infer_janus_config(state: State, config: TransformerConfig | None = None) -> JanusConfig:
    """Sizes of the transformer that a state_dict belongs to.

    Args:
        config: its number of heads, where the file's depth and width are of no preset, its side, norm_eps and
            rope_theta.
    Raises: InputError that names a part that is missing or makes no sense.
    """
    depth = count_parts(state, _BLOCKS, MOST_BLOCKS)
    table = "language_model.model.embed_tokens.weight"
    width = axis_size(state, table, 1, 2)
    heads = heads_of(depth, width, PRESETS, config, "policy.transformer")
    if width % heads:
        raise InputError(f"{table} is {width} wide, want a multiple of the {heads} heads")
    rows, head_dim = axis_size(state, f"{_BLOCKS}.0.self_attn.k_proj.weight", 0, 2), width // heads
    kv_heads, left = divmod(rows, head_dim)
    if left or kv_heads < 1:
        raise InputError(
            f"{_BLOCKS}.0.self_attn.k_proj.weight has {rows} rows, want those of heads of {head_dim} channels"
        )
    head_width = axis_size(state, "gen_head.output_mlp_projector.weight", 0, 2)
    other: dict[str, Any] = {}
    if isinstance(config, JanusConfig):
        other = {"side": config.side, "norm_eps": config.norm_eps, "rope_theta": config.rope_theta}
    found = JanusConfig(
        depth=depth,
        width=width,
        num_heads=heads,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        mlp_width=axis_size(state, f"{_BLOCKS}.0.mlp.gate_proj.weight", 0, 2),
        vocab_size=axis_size(state, "gen_head.vision_head.weight", 0, 2),
        text_vocab_size=axis_size(state, table, 0, 2),
        code_width=axis_size(state, "gen_embed.weight", 1, 2),
        head_width=None if head_width == width else head_width,
        **other,
    )
    return found.model_copy(update={"mlp_width": None}) if found.mlp_width == found.usual_hidden else found


def load_janus(address: str, config: JanusConfig | None = None) -> Janus:
    """A transformer with the weights at `address`, on the CPU. Arguments and errors as of load_transformer.

    Of a whole checkpoint what understands images and writes text is left out, by its name, and a line says so.
    """
    section = "policy.transformer"
    return load_transformer(address, _JANUS, _IGNORED, infer_janus_config, Janus, PRESETS, config, section, _unused)


def _unused(name: str) -> str | None:
    """The part of a whole model that an entry is of, if it is one of those that only understanding and text need."""
    found = _UNUSED.match(name)
    return None if found is None else found[1]
