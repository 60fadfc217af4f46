"""Reading weights: public checkpoints, our own, or those of a trainer that wrapped the model.

From a path, safetensors or PyTorch, or a hub address. What a file is, is varfast.weights.containers' business; here its
tensors become a model, or an error that names what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from varfast.policies.var.config import HEAD_DIM, PRESETS, VARConfig, VQVAEConfig
from varfast.policies.var.tokenizer import VQVAE
from varfast.policies.var.transformer import VAR, scale_buffers
from varfast.types import InputError
from varfast.weights.containers import read_checkpoint
from varfast.weights.files import resolve, shown
from varfast.weights.hub import one_line

State = dict[str, Tensor]

# What DDP, FSDP, torch.compile and activation checkpointing put into parameter names.
_WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_VAR_ANCHOR = "pos_1LC"
_VQVAE_ANCHOR = "quantize.embedding.weight"
_PARTS = {
    _VAR_ANCHOR: {"pos_start", "pos_1LC", "word_embed", "class_emb", "lvl_embed", "lvl_1L", "shared_ada_lin", "blocks",
                  "head_nm", "head", "attn_bias_for_masking"},
    _VQVAE_ANCHOR: {"encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"},
}  # fmt: skip
_USAGE = "quantize.ema_vocab_hit_SV"  # statistics of a training; the weights serve any
# Buffers that a file may lack: the sizes fix the first two, the others are 0.
_OPTIONAL = re.compile(rf"lvl_1L|attn_bias_for_masking|(.*\.)?zero_k_bias|{re.escape(_USAGE)}")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOST_NODES, _MOST_DEEP = 200_000, 20  # of the dictionaries in a checkpoint
# A tensor may be stored once and declared larger (expand). Beyond this, a small file would fill the memory.
_MOST_EXPANDED_BYTES = 2**30
# Far more than any model has: a crafted file must not keep us making layers for hours.
_MOST_BLOCKS, _MOST_LEVELS, _MOST_RES_BLOCKS, _MOST_TOKENS = 512, 16, 64, 2**17

# Other models, by a name that only they have.
_OTHERS = (
    (r"encoder\.conv_blocks\.", "LlamaGen's VQ tokenizer, which has one scale"),
    (r"tok_embeddings\.weight$", "LlamaGen's transformer, or another of Llama's names"),
    (r"encoder\.down_blocks\.", "an autoencoder of diffusers (VQModel or AutoencoderKL)"),
    (r"(^|\.)down_blocks\.", "a U-Net of diffusers"),
    (r"(^|\.)loss\.(discriminator|perceptual_loss)\.", "a VQGAN of taming-transformers, which has one scale"),
    (r"transformer\.blocks\.\d+\.attn\.key\.", "a transformer of taming-transformers"),
    (r"adaLN_modulation\.", "a diffusion transformer (DiT)"),
    (r"lora_[AB]\.", "a LoRA adapter without its base; python -m varfast.export merges the two"),
    (r"(^|\.)(exp_avg|exp_avg_sq|momentum_buffer)$", "the state of an optimizer"),
    (r"visual\.(conv1|trunk|transformer)\.", "a CLIP model"),
    (r"self_attn\.q_proj\.", "a language model"),
)


def _flatten(
    node: Any, path: Path, prefix: str = "", deep: int = 0, seen: list[int] | None = None
) -> Iterator[tuple[str, str, Tensor]]:
    """Full name, name of the dictionary that it stands in, and tensor."""
    seen = [0] if seen is None else seen
    seen[0] += 1
    if seen[0] > _MOST_NODES or deep > _MOST_DEEP:
        raise InputError(
            f"checkpoint {shown(path)} holds dictionaries more than {_MOST_DEEP} deep, or more than {_MOST_NODES} "
            "entries; save the state_dict alone"
        )
    if isinstance(node, Tensor):
        yield prefix, prefix.rpartition(".")[0], node
    elif isinstance(node, dict):
        for key, value in node.items():
            if isinstance(value, Tensor):
                seen[0] += 1
                yield (f"{prefix}.{key}" if prefix else str(key)), prefix, value
            elif isinstance(value, dict):
                yield from _flatten(value, path, f"{prefix}.{key}" if prefix else str(key), deep + 1, seen)


def _select(content: Any, anchor: str, what: str, path: Path) -> State:
    """The tensors of the one model whose names end with `anchor`, without the prefix and wrappers round them."""
    plain: State = {}
    nested = set()  # names that stand in a dictionary inside the file's own
    for name, within, tensor in _flatten(content, path):
        bare = _WRAPPERS.sub("", name.replace("/", "."))
        if bare in plain and plain[bare] is not tensor:
            raise InputError(f"checkpoint {shown(path)} holds {one_line(bare, 80)} twice, with and without a prefix "
                             "that trainers add; save the state_dict of one model alone")  # fmt: skip
        plain[bare] = tensor
        if within:
            nested.add(bare)
    prefixes = [n[: -len(anchor)] for n in plain if n == anchor or n.endswith("." + anchor)]
    if not prefixes:
        raise InputError(f"checkpoint {shown(path)} is not {what}: {_instead(plain, anchor)}")
    if len(prefixes) > 1 and "" not in prefixes:
        named = one_line(", ".join(p.rstrip(".") for p in prefixes), 120)
        raise InputError(f"checkpoint {shown(path)} holds several models ({named}); save the state_dict of one alone")
    prefix = "" if "" in prefixes else prefixes[0]
    state = {n.removeprefix(prefix): t for n, t in plain.items() if n.startswith(prefix)}
    if not prefix:
        # Beside a model without prefix stand other entries (an optimizer), in dictionaries of another name.
        state = {n: t for n, t in state.items() if n not in nested or n.partition(".")[0] in _PARTS[anchor]}
    return state


def _instead(state: State, anchor: str) -> str:
    """What a state_dict without the anchor is."""
    shown_names = one_line(", ".join(list(state)[:4]), 200) or "no tensors"
    found = next((what for pattern, what in _OTHERS if any(re.search(pattern, name) for name in state)), None)
    if found is None and anchor != _VAR_ANCHOR and any(n.endswith(_VAR_ANCHOR) for n in state):
        found = "a VAR transformer"
    if found is None and anchor != _VQVAE_ANCHOR and any(n.endswith(_VQVAE_ANCHOR) for n in state):
        found = "a VQ-VAE"
    return f"it has no {anchor}, but {shown_names}" + (f"; it is {found}" if found else "")


def _refuse_other_vqvae(state: State, path: Path) -> None:
    """Other tokenizers have a codebook of the same name."""
    if not any(n.startswith("quantize.quant_resi.") for n in state):
        found = next((what for pattern, what in _OTHERS if any(re.search(pattern, name) for name in state)), None)
        raise InputError(
            f"checkpoint {shown(path)} is not a multi-scale VQ-VAE: it has no quantize.quant_resi; it is "
            f"{found or 'a VQ-VAE or VQGAN of one scale, as of taming-transformers'}"
        )


def _count(state: State, part: str, most: int) -> int:
    """How many numbered parts there are; they must be 0, 1, 2 and so on."""
    pattern = re.compile(re.escape(part) + r"\.(\d{1,18})\.")
    numbers = {int(found[1]) for n in state if (found := pattern.match(n))}
    lacking = next((k for k in range(len(numbers)) if k not in numbers), None)
    if not numbers or lacking is not None:
        raise InputError(f"no {part}.{lacking or 0}" + (f", though it has {part}.{max(numbers)}" if numbers else ""))
    if len(numbers) > most:
        raise InputError(f"{part} has {len(numbers)} parts, want at most {most}")
    return len(numbers)


def _size(state: State, name: str, axis: int, dims: int | None = None) -> int:
    """Of a tensor that must be there, with so many axes and no empty one."""
    if name not in state:
        raise InputError(f"no {name}")
    shape = tuple(state[name].shape)
    if len(shape) <= axis or (dims and len(shape) != dims) or not all(shape):
        raise InputError(f"{name} is {shape}")
    return shape[axis]


def _sides(state: State) -> tuple[int, ...]:
    """The sides of the scales: of lvl_1L, the scale of each token, or, without it, of the preset of as many tokens."""
    num_tokens = _size(state, _VAR_ANCHOR, 1, 3)
    if num_tokens > _MOST_TOKENS:
        raise InputError(f"{_VAR_ANCHOR} is of {num_tokens} tokens, want at most {_MOST_TOKENS}")
    if "lvl_1L" not in state:
        num_scales = _size(state, "lvl_embed.weight", 0, 2)
        for preset in PRESETS.values():
            if (preset.num_tokens, len(preset.patch_nums)) == (num_tokens, num_scales):
                return preset.patch_nums
        raise InputError(f"no lvl_1L, and {num_tokens} tokens in {num_scales} scales are of no preset: give "
                         "policy.var.patch_nums")  # fmt: skip
    level = state["lvl_1L"]
    if level.is_meta or level.is_complex() or level.is_quantized or level.layout != torch.strided:
        raise InputError(f"lvl_1L is {_kind(level)}")
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
    depth = _count(state, "blocks", _MOST_BLOCKS)
    width = _size(state, "class_emb.weight", 1, 2)
    if width != HEAD_DIM * depth:
        raise InputError(f"class_emb.weight is {width} wide, want {HEAD_DIM} for each of the {depth} blocks")
    return VARConfig(
        depth=depth,
        patch_nums=sides or _sides(state),
        vocab_size=_size(state, "head.weight", 0, 2),
        code_width=_size(state, "word_embed.weight", 1, 2),
        num_classes=_size(state, "class_emb.weight", 0, 2) - 1,
        shared_adaln="shared_ada_lin.1.weight" in state,
        qk_l2_norm="blocks.0.attn.scale_mul_1H11" in state,
        mlp_ratio=_size(state, "blocks.0.ffn.fc1.weight", 0, 2) / width,
    )


def infer_vqvae_config(state: State, patch_nums: tuple[int, ...]) -> VQVAEConfig:
    """Sizes of the VQ-VAE that a state_dict belongs to; the sides of its scales are not in the file.

    Raises: InputError that names a part that is missing or makes no sense.
    """
    base = _size(state, "encoder.conv_in.weight", 0, 4)
    levels = _count(state, "encoder.down", _MOST_LEVELS)
    phis = [n for n in state if n.startswith("quantize.quant_resi.") and n.endswith(".weight")]
    if "quantize.quant_resi.qresi.weight" in state:
        num_phi = 1
    else:
        num_phi = len(phis) if any("qresi_ls" in n for n in phis) else 0
    if num_phi > _MOST_RES_BLOCKS:
        raise InputError(f"quantize.quant_resi has {num_phi} parts, want at most {_MOST_RES_BLOCKS}")
    channels = [_size(state, f"encoder.down.{level}.block.0.conv2.weight", 0, 4) for level in range(levels)]
    if any(count % base for count in channels):
        raise InputError(f"levels of {channels} channels are no multiples of encoder.conv_in's {base}")
    return VQVAEConfig(
        vocab_size=_size(state, _VQVAE_ANCHOR, 0, 2),
        code_width=_size(state, _VQVAE_ANCHOR, 1, 2),
        patch_nums=patch_nums,
        base_channels=base,
        channel_multipliers=tuple(count // base for count in channels),
        num_res_blocks=_count(state, "encoder.down.0.block", _MOST_RES_BLOCKS),
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
    state = _select(read_checkpoint(path), _VAR_ANCHOR, "a VAR transformer", path)
    sides = config.patch_nums if config is not None and "lvl_1L" not in state else None
    found = _inferred(lambda: infer_var_config(state, sides), path)
    model = _unallocated(VAR, config or found)
    fits = next((f"preset {name}" for name, preset in PRESETS.items() if preset == found), None)
    sizes = ", ".join(f"{k}={v}" for k, v in found.model_dump(exclude_defaults=True).items())
    _assign(model, state, path, f"it fits {fits or f'policy.var with {sizes}'}", found.patch_nums)
    return model


def load_vqvae(address: str, patch_nums: tuple[int, ...], config: VQVAEConfig | None = None) -> VQVAE:
    """A VQ-VAE with the weights at `address`, on the CPU. Arguments and errors as load_var."""
    path = resolve(address)
    state = _select(read_checkpoint(path), _VQVAE_ANCHOR, "a multi-scale VQ-VAE", path)
    _refuse_other_vqvae(state, path)
    found = _inferred(lambda: infer_vqvae_config(state, patch_nums), path)
    model = _unallocated(VQVAE, config or found)
    sizes = ", ".join(f"{k}={v}" for k, v in found.model_dump(exclude={"patch_nums"}, exclude_defaults=True).items())
    if _USAGE in state and state[_USAGE].shape != model.get_buffer(_USAGE).shape:
        del state[_USAGE]  # of a training with another number of scales
    _assign(model, state, path, f"it fits policy.vqvae with {sizes or 'its defaults'}", model.config.patch_nums)
    return model


def _inferred(infer: Any, path: Path) -> Any:
    try:
        return infer()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"checkpoint {shown(path)} has sizes that cannot be: {where} = {one_line(first['input'], 60)} "
            f"({one_line(first['msg'], 100)})"
        ) from error
    except InputError as error:
        raise InputError(f"checkpoint {shown(path)} is incomplete or of another model: {error}") from error


def _unallocated(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        return kind(config)


def _kind(tensor: Tensor) -> str:
    """What a tensor is that is no plain tensor of floats."""
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype})"
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout})"
    if tensor.is_meta:
        return "without content (device meta)"
    return str(tensor.dtype).removeprefix("torch.")


def _wrong(tensor: Tensor) -> str:
    """What keeps a tensor from being weights; "" if nothing does."""
    if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _FLOATS:
        return f"is {_kind(tensor)}; weights are float32, bfloat16, float16 or float64"
    # Where one number is not finite the sum is not; it may also overflow, so then they are counted.
    rounded = tensor.float() if tensor.dtype == torch.float64 else tensor
    if not bool(rounded.sum(dtype=torch.float32).isfinite()) and (count := int((~rounded.isfinite()).sum())):
        return f"holds {count} of {tensor.numel()} numbers that are not finite in float32 (NaN or infinite)"
    return ""


def _assign(model: Any, state: State, path: Path, fits: str, sides: tuple[int, ...]) -> None:
    wanted = model.state_dict()
    missing = [n for n in wanted if n not in state and not _OPTIONAL.fullmatch(n)]
    unexpected = [n for n in state if n not in wanted]
    reshaped = [n for n in wanted if n in state and wanted[n].shape != state[n].shape]
    if missing or unexpected or reshaped or sides != model.config.patch_nums:
        lines = [f"checkpoint {shown(path)} does not fit the configured {type(model).__name__}; {fits}"]
        for title, names in (("missing", missing), ("unexpected", unexpected)):
            if names:
                listed = one_line(", ".join(names[:4]), 200)
                lines.append(f"  {len(names)} {title}: {listed}{' ...' if len(names) > 4 else ''}")
        lines.extend(f"  {n}: file {tuple(state[n].shape)}, model {tuple(wanted[n].shape)}" for n in reshaped[:4])
        if sides != model.config.patch_nums:
            lines.append(f"  patch_nums: file {list(sides)}, model {list(model.config.patch_nums)}")
        raise InputError("\n".join(lines))
    stored_bytes, needed_bytes = path.stat().st_size, sum(4 * t.numel() for t in wanted.values())
    if needed_bytes > max(8 * stored_bytes, _MOST_EXPANDED_BYTES):
        raise InputError(
            f"checkpoint {shown(path)} declares {needed_bytes} bytes of weights in a file of {stored_bytes}: its "
            "tensors are expanded views; save their .contiguous() copies"
        )
    computed = scale_buffers(model.config.patch_nums) if isinstance(model, VAR) else {}
    used = {n: t for n, t in state.items() if n not in computed and not (n == _USAGE and _wrong(t))}
    wrong = {n: why for n, t in used.items() if (why := _wrong(t))}
    if wrong:
        lines = [f"checkpoint {shown(path)} cannot be used: {len(wrong)} of its tensors hold what cannot be weights"]
        lines.extend(f"  {n} {why}" for n, why in list(wrong.items())[:4])
        lines.append("  take an earlier checkpoint, or save this one anew in float32")
        raise InputError("\n".join(lines))
    # float32 whatever the file holds: bfloat16 has steps of 5e-4 at 0.1, and loses an update of 1e-4.
    loaded = computed | {n: t.to(wanted[n].dtype, copy=True) for n, t in used.items()}
    absent = {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in wanted.items() if n not in loaded}
    model.load_state_dict(loaded | absent, assign=True)
