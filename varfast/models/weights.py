"""Reading weights: public checkpoints, our own, or those of a trainer that wrapped the model.

From a path, safetensors or PyTorch, or a hub address. Nothing in a file is executed: weights_only throughout.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varfast.config import HEAD_DIM, PRESETS, VARConfig, VQVAEConfig
from varfast.models.var import VAR
from varfast.models.vqvae import VQVAE
from varfast.types import InputError

State = dict[str, Tensor]

# What DDP, FSDP, torch.compile and activation checkpointing put into parameter names.
_WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_VAR_ANCHOR = "pos_1LC"
_VQVAE_ANCHOR = "quantize.embedding.weight"


def resolve(address: str) -> Path:
    """The local file of a path or of hf://owner/repo/file (downloaded once, then from the hub's cache).

    Raises: InputError if there is no such file, or if the hub cannot be reached and the file is not in its cache.
    """
    if not address.startswith("hf://"):
        path = Path(address).expanduser()
        if not path.is_file():
            what = "is a folder, want a file" if path.is_dir() else "does not exist"
            raise InputError(f"checkpoint {address} {what}; give a .pth or .safetensors file, or hf://owner/repo/file")
        return path
    owner, _, rest = address.removeprefix("hf://").partition("/")
    repo, _, filename = rest.partition("/")
    if not (owner and repo and filename):
        raise InputError(f"checkpoint {address}: want hf://owner/repo/file, as hf://FoundationVision/var/var_d16.pth")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id=f"{owner}/{repo}", filename=filename))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"checkpoint {address} cannot be fetched and is not in the hub's cache: {error}\n"
            "  check the address and the network, or download the file and give its path"
        ) from error


def read_checkpoint(path: Path) -> Any:
    """The content of a .safetensors or PyTorch file, tensors on the CPU; nothing in it is executed.

    Raises: InputError if the file is truncated, no checkpoint, or a pickle that would run code.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"checkpoint {path} is truncated or no safetensors file: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"checkpoint {path} holds more than tensors, or is no checkpoint. Loading it could run code, so it was not "
            f"loaded. Save the state_dict alone, or as safetensors. Detail: {str(error).splitlines()[0]}"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"checkpoint {path} ({path.stat().st_size} bytes) is truncated or no checkpoint; fetch it again. "
            f"Detail: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield prefix, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))


def _select(tensors: State, anchor: str, what: str, path: Path) -> State:
    """The tensors of the one model whose names end with `anchor`, without the prefix and wrappers round them."""
    plain = {_WRAPPERS.sub("", name.replace("/", ".")): tensor for name, tensor in tensors.items()}
    prefixes = [n[: -len(anchor)] for n in plain if n == anchor or n.endswith("." + anchor)]
    if not prefixes:
        shown = ", ".join(list(plain)[:4]) or "no tensors"
        raise InputError(f"checkpoint {path} is not {what}: it has no {anchor}, but {shown}")
    if len(prefixes) > 1 and "" not in prefixes:
        named = ", ".join(p.rstrip(".") for p in prefixes)
        raise InputError(f"checkpoint {path} holds several models ({named}); save the state_dict of one alone")
    prefix = "" if "" in prefixes else prefixes[0]
    # Beside a model without prefix, other entries of the file (an optimizer) are told apart by their top-level name.
    return {n.removeprefix(prefix): t for n, t in plain.items() if n.startswith(prefix)}


def infer_var_config(state: State) -> VARConfig:
    """Sizes of the transformer that a state_dict belongs to."""
    depth = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))
    level_L = state["lvl_1L"].flatten()
    patch_nums = tuple(round(int(count) ** 0.5) for count in torch.bincount(level_L))
    return VARConfig(
        depth=depth,
        patch_nums=patch_nums,
        vocab_size=state["head.weight"].shape[0],
        code_width=state["word_embed.weight"].shape[1],
        num_classes=state["class_emb.weight"].shape[0] - 1,
        shared_adaln="shared_ada_lin.1.weight" in state,
        qk_l2_norm="blocks.0.attn.scale_mul_1H11" in state,
        mlp_ratio=state["blocks.0.ffn.fc1.weight"].shape[0] / (HEAD_DIM * depth),
    )


def infer_vqvae_config(state: State, patch_nums: tuple[int, ...]) -> VQVAEConfig:
    """Sizes of the VQ-VAE that a state_dict belongs to; the sides of its scales are not in the file."""
    base = state["encoder.conv_in.weight"].shape[0]
    levels = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("encoder.down."))
    phis = [n for n in state if n.startswith("quantize.quant_resi.") and n.endswith(".weight")]
    if "quantize.quant_resi.qresi.weight" in state:
        num_phi = 1
    else:
        num_phi = len(phis) if any("qresi_ls" in n for n in phis) else 0
    return VQVAEConfig(
        vocab_size=state["quantize.embedding.weight"].shape[0],
        code_width=state["quantize.embedding.weight"].shape[1],
        patch_nums=patch_nums,
        base_channels=base,
        channel_multipliers=tuple(
            state[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] // base for level in range(levels)
        ),
        num_res_blocks=1 + max(int(n.split(".")[4]) for n in state if n.startswith("encoder.down.0.block.")),
        num_phi=num_phi,
    )


def load_var(address: str, config: VARConfig | None = None) -> VAR:
    """A transformer with the weights at `address`, on the CPU.

    Args:
        address: path or hf://owner/repo/file.
        config: sizes it must have; default: those the file has.
    Raises: InputError if the file cannot be read or does not fit, naming keys, shapes and the preset that would fit.
    """
    path = resolve(address)
    state = _select(dict(_flatten(read_checkpoint(path))), _VAR_ANCHOR, "a VAR transformer", path)
    found = _infer(lambda: infer_var_config(state), path)
    with torch.device("meta"):
        model = VAR(config or found)
    fits = next((f"preset {name}" for name, preset in PRESETS.items() if preset == found), None)
    sizes = ", ".join(f"{k}={v}" for k, v in found.model_dump(exclude_defaults=True).items())
    _assign(model, state, path, f"it fits {fits or f'policy.var with {sizes}'}")
    return model


def load_vqvae(address: str, patch_nums: tuple[int, ...], config: VQVAEConfig | None = None) -> VQVAE:
    """A VQ-VAE with the weights at `address`, on the CPU. Arguments and errors as load_var."""
    path = resolve(address)
    state = _select(dict(_flatten(read_checkpoint(path))), _VQVAE_ANCHOR, "a multi-scale VQ-VAE", path)
    found = _infer(lambda: infer_vqvae_config(state, patch_nums), path)
    with torch.device("meta"):
        model = VQVAE(config or found)
    sizes = ", ".join(f"{k}={v}" for k, v in found.model_dump(exclude={"patch_nums"}, exclude_defaults=True).items())
    usage = "quantize.ema_vocab_hit_SV"
    if usage in state and state[usage].shape != model.get_buffer(usage).shape:
        # Statistics of a training with another number of scales; the weights serve any.
        state[usage] = torch.zeros(model.get_buffer(usage).shape)
    _assign(model, state, path, f"it fits policy.vqvae with {sizes or 'its defaults'}")
    return model


def _infer(infer: Any, path: Path) -> Any:
    try:
        return infer()
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"checkpoint {path} is incomplete: no usable {error}") from error


def _assign(model: torch.nn.Module, state: State, path: Path, fits: str) -> None:
    wanted = model.state_dict()
    missing = [n for n in wanted if n not in state]
    unexpected = [n for n in state if n not in wanted]
    reshaped = [n for n in wanted if n in state and wanted[n].shape != state[n].shape]
    if missing or unexpected or reshaped:
        lines = [f"checkpoint {path} does not fit the configured {type(model).__name__}; {fits}"]
        for title, names in (("missing", missing), ("unexpected", unexpected)):
            if names:
                lines.append(f"  {len(names)} {title}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}")
        lines.extend(f"  {n}: file {tuple(state[n].shape)}, model {tuple(wanted[n].shape)}" for n in reshaped[:4])
        raise InputError("\n".join(lines))
    # float32 whatever the file holds: bfloat16 has steps of 5e-4 at 0.1, and loses an update of 1e-4.
    model.load_state_dict({n: t.to(wanted[n].dtype, copy=True) for n, t in state.items()}, assign=True)
