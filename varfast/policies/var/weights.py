"""Reading weights: public checkpoints, our own, or those of a trainer that wrapped the model.

From a path (safetensors or PyTorch) or a hub address. varfast/weights/ opens files and selects the tensors of a model;
here their names and shapes become sizes, and they become a model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from varfast.policies.var.config import HEAD_DIM, PRESETS, VARConfig, VQVAEConfig
from varfast.policies.var.tokenizer import VQVAE
from varfast.policies.var.transformer import VAR, scale_buffers
from varfast.types import InputError
from varfast.weights.containers import read_checkpoint
from varfast.weights.files import resolve, shown
from varfast.weights.state import (
    Known,
    State,
    assign,
    axis_size,
    count_parts,
    inferred,
    kind_of_tensor,
    other_model,
    select,
    unallocated,
    unusable,
)

_VAR_ANCHOR = "pos_1LC"
_VQVAE_ANCHOR = "quantize.embedding.weight"
_VAR = Known(
    "a VAR transformer",
    _VAR_ANCHOR,
    frozenset({"pos_start", "pos_1LC", "word_embed", "class_emb", "lvl_embed", "lvl_1L", "shared_ada_lin", "blocks",
               "head_nm", "head", "attn_bias_for_masking"}),
)  # fmt: skip
_VQVAE = Known(
    "a multi-scale VQ-VAE",
    _VQVAE_ANCHOR,
    frozenset({"encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"}),
)
_USAGE = "quantize.ema_vocab_hit_SV"  # statistics of a training; the weights serve any
# Buffers that a file may lack: the sizes fix the first two, the others are 0.
_OPTIONAL = re.compile(rf"lvl_1L|attn_bias_for_masking|(.*\.)?zero_k_bias|{re.escape(_USAGE)}")
# Far more than any model has: a crafted file must not keep us making layers for hours.
_MOST_BLOCKS, _MOST_LEVELS, _MOST_RES_BLOCKS, _MOST_TOKENS = 512, 16, 64, 2**17


def _refuse_other_vqvae(state: State, path: Path) -> None:
    """Other tokenizers have a codebook of the same name."""
    if not any(n.startswith("quantize.quant_resi.") for n in state):
        found = other_model(state)
        raise InputError(
            f"checkpoint {shown(path)} is not a multi-scale VQ-VAE: it has no quantize.quant_resi; it is "
            f"{found or 'a VQ-VAE or VQGAN of one scale, as of taming-transformers'}"
        )


def _sides(state: State) -> tuple[int, ...]:
    """The sides of the scales: of lvl_1L, the scale of each token, or, without it, of the preset of as many tokens."""
    num_tokens = axis_size(state, _VAR_ANCHOR, 1, 3)
    if num_tokens > _MOST_TOKENS:
        raise InputError(f"{_VAR_ANCHOR} is of {num_tokens} tokens, want at most {_MOST_TOKENS}")
    if "lvl_1L" not in state:
        num_scales = axis_size(state, "lvl_embed.weight", 0, 2)
        for preset in PRESETS.values():
            if (preset.num_tokens, len(preset.patch_nums)) == (num_tokens, num_scales):
                return preset.patch_nums
        raise InputError(f"no lvl_1L, and {num_tokens} tokens in {num_scales} scales are of no preset: give "
                         "policy.var.patch_nums")  # fmt: skip
    level = state["lvl_1L"]
    if level.is_meta or level.is_complex() or level.is_quantized or level.layout != torch.strided:
        raise InputError(f"lvl_1L is {kind_of_tensor(level)}")
    if level.numel() != num_tokens:
        raise InputError(f"lvl_1L names the scales of {level.numel()} tokens, {_VAR_ANCHOR} has {num_tokens}")
    level_L = level.flatten().double()
    # Whole numbers from 0 that stay or grow by 1; runs of them are the scales.
    steps = level_L.diff()
    counts: Sequence[int] = ()
    if float(level_L[0]) == 0.0 and bool(((steps == 0) | (steps == 1)).all()):
        counts = torch.bincount(level_L.long()).tolist()
    sides = tuple(round(count**0.5) for count in counts)
    if not sides or any(side * side != count for side, count in zip(sides, counts, strict=True)):
        raise InputError("lvl_1L does not number the tokens of square scales: 0, then 1 four times, and so on")
    return sides


def infer_var_config(state: State, sides: tuple[int, ...] | None = None) -> VARConfig:
    """Sizes of the transformer that a state_dict belongs to.

    Args:
        sides: of the scales; default: those of lvl_1L in the state_dict.
    Raises: InputError that names a part that is missing or makes no sense.
    """
    depth = count_parts(state, "blocks", _MOST_BLOCKS)
    width = axis_size(state, "class_emb.weight", 1, 2)
    if width != HEAD_DIM * depth:
        raise InputError(f"class_emb.weight is {width} wide, want {HEAD_DIM} for each of the {depth} blocks")
    return VARConfig(
        depth=depth,
        patch_nums=sides or _sides(state),
        vocab_size=axis_size(state, "head.weight", 0, 2),
        code_width=axis_size(state, "word_embed.weight", 1, 2),
        num_classes=axis_size(state, "class_emb.weight", 0, 2) - 1,
        shared_adaln="shared_ada_lin.1.weight" in state,
        qk_l2_norm="blocks.0.attn.scale_mul_1H11" in state,
        mlp_ratio=axis_size(state, "blocks.0.ffn.fc1.weight", 0, 2) / width,
    )


def infer_vqvae_config(state: State, patch_nums: tuple[int, ...]) -> VQVAEConfig:
    """Sizes of the VQ-VAE that a state_dict belongs to; the sides of its scales are not in the file.

    Raises: InputError that names a part that is missing or makes no sense.
    """
    base = axis_size(state, "encoder.conv_in.weight", 0, 4)
    levels = count_parts(state, "encoder.down", _MOST_LEVELS)
    phis = [n for n in state if n.startswith("quantize.quant_resi.") and n.endswith(".weight")]
    if "quantize.quant_resi.qresi.weight" in state:
        num_phi = 1
    else:
        num_phi = len(phis) if any("qresi_ls" in n for n in phis) else 0
    if num_phi > _MOST_RES_BLOCKS:
        raise InputError(f"quantize.quant_resi has {num_phi} parts, want at most {_MOST_RES_BLOCKS}")
    channels = [axis_size(state, f"encoder.down.{level}.block.0.conv2.weight", 0, 4) for level in range(levels)]
    if any(count % base for count in channels):
        raise InputError(f"levels of {channels} channels are no multiples of encoder.conv_in's {base}")
    return VQVAEConfig(
        vocab_size=axis_size(state, _VQVAE_ANCHOR, 0, 2),
        code_width=axis_size(state, _VQVAE_ANCHOR, 1, 2),
        patch_nums=patch_nums,
        base_channels=base,
        channel_multipliers=tuple(count // base for count in channels),
        num_res_blocks=count_parts(state, "encoder.down.0.block", _MOST_RES_BLOCKS),
        num_phi=num_phi,
    )


def load_var(address: str, config: VARConfig | None = None) -> VAR:
    """A transformer with the weights at `address`, on the CPU.

    Args:
        address: path or hf://owner/repo/file.
        config: sizes it must have; default: those the file has.
    Raises: InputError if the file cannot be read or does not fit, naming keys, shapes and the preset that would fit, or
        if its weights are not finite real numbers.
    """
    path = resolve(address)
    state = select(read_checkpoint(path), _VAR, path)
    sides = config.patch_nums if config is not None and "lvl_1L" not in state else None
    found = inferred(lambda: infer_var_config(state, sides), path)
    model = unallocated(VAR, config or found)
    fits = next((f"preset {name}" for name, preset in PRESETS.items() if preset == found), None)
    sizes = ", ".join(f"{k}={v}" for k, v in found.model_dump(exclude_defaults=True).items())
    fits = f"it fits {fits or f'policy.var with {sizes}'}"
    computed = scale_buffers(model.config.patch_nums)
    assign(model, state, path, fits, _OPTIONAL, _other_sides(found.patch_nums, model.config.patch_nums), computed)
    return model


def load_vqvae(address: str, patch_nums: tuple[int, ...], config: VQVAEConfig | None = None) -> VQVAE:
    """A VQ-VAE with the weights at `address`, on the CPU. Arguments and errors as load_var."""
    path = resolve(address)
    state = select(read_checkpoint(path), _VQVAE, path)
    _refuse_other_vqvae(state, path)
    found = inferred(lambda: infer_vqvae_config(state, patch_nums), path)
    model = unallocated(VQVAE, config or found)
    sizes = ", ".join(f"{k}={v}" for k, v in found.model_dump(exclude={"patch_nums"}, exclude_defaults=True).items())
    if _USAGE in state and (state[_USAGE].shape != model.get_buffer(_USAGE).shape or unusable(state[_USAGE])):
        del state[_USAGE]  # of a training with another number of scales, or damaged
    fits = f"it fits policy.vqvae with {sizes or 'its defaults'}"
    assign(model, state, path, fits, _OPTIONAL, _other_sides(patch_nums, model.config.patch_nums))
    return model


def _other_sides(of_file: tuple[int, ...], of_model: tuple[int, ...]) -> list[str]:
    """The line that says that a file has scales of other sides, if it has."""
    return [] if of_file == of_model else [f"  patch_nums: file {list(of_file)}, model {list(of_model)}"]
