"""A CLIP saved by transformers, under the names that open_clip has for the same weights."""

from __future__ import annotations

import re

import torch
from torch import Tensor

# From the names of transformers' CLIPModel to those of open_clip's CLIP, a part each; the rest of a name stays.
_PARTS = (
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # their spelling
    (r"vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"visual_projection\.weight", "visual.proj"),
    (r"vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.", "ln_final."),
    (r"text_projection\.weight", "text_projection"),
    (r"text_model\.encoder\.layers\.", "transformer.resblocks."),
)
_IN_A_LAYER = (
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
_QKV = re.compile(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)")
_TRANSPOSED = ("visual.proj", "text_projection")
# Buffers that versions before 4.31 saved: 0, 1, 2 and so on.
_COUNTS = re.compile(r"(text|vision)_model\.embeddings\.position_ids")


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of transformers' CLIPModel as that of open_clip's CLIP.

    open_clip keeps query, key and value in one matrix, and the two projections transposed. A name that a CLIPModel does
    not have stays as it is, for a strict load_state_dict to name it.
    """
    qkv: dict[str, dict[str, Tensor]] = {}
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if _COUNTS.fullmatch(name):
            continue
        layer = _QKV.fullmatch(name)
        if layer:
            qkv.setdefault(f"{_renamed(layer[1] + '.')}attn.in_proj_{layer[3]}", {})[layer[2]] = tensor
            continue
        new = _renamed(name)
        converted[new] = tensor.T if new != name and new in _TRANSPOSED else tensor
    for name, parts in qkv.items():
        converted[name] = torch.cat([parts[part] for part in "qkv" if part in parts])
    return converted


def _renamed(name: str) -> str:
    for pattern, new in _PARTS:
        if found := re.match(pattern, name):
            name = new + name[found.end() :]
            break
    for old, new in _IN_A_LAYER:
        name = name.replace(old, new)
    return name
