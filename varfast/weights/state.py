"""From the content of a file to the tensors of one model, and into the model; or an error that names what they are.

The same for all families: each says what its models are known by (`Known`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from varfast.types import InputError
from varfast.weights.files import shown
from varfast.weights.hub import one_line
from varfast.weights.shards import stored_bytes as size_of_model

State = dict[str, Tensor]
_Model = TypeVar("_Model", bound=nn.Module)
_Sizes = TypeVar("_Sizes")

# What DDP, FSDP, torch.compile and activation checkpointing put into parameter names.
_WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MOST_NODES, _MOST_DEEP = 200_000, 20  # of the dictionaries in a checkpoint
# A tensor may be stored once and declared larger (expand). Beyond this, a small file would fill the memory.
_MOST_EXPANDED_BYTES = 2**30

# Models by a name that only they have; first those of other families than VAR.
_OTHERS = (
    (r"(^|\.)gen_(aligner|embed|head)\.", "Janus-Pro's model (family janus)"),
    (
        r"(^|\.)generation_(embeddings|aligner|head)\.",
        "Janus under the names of transformers' own port; take the files of deepseek-ai/Janus-Pro-1B or -7B",
    ),
    (r"encoder\.conv_blocks\.", "LlamaGen's VQ tokenizer, which has one scale (family llamagen)"),
    (r"cls_embedding\.embedding_table\.weight$", "LlamaGen's class-conditional transformer (family llamagen)"),
    (r"cls_embedding\.cap_proj\.", "LlamaGen's text-conditioned transformer"),
    (r"tok_embeddings\.weight$", "LlamaGen's transformer (family llamagen), or another of Llama's names"),
    (r"encoder\.down_blocks\.", "an autoencoder of diffusers (VQModel or AutoencoderKL)"),
    (r"(^|\.)down_blocks\.", "a U-Net of diffusers"),
    (
        r"(^|\.)loss\.(discriminator|perceptual_loss)\.",
        "a VQGAN of taming-transformers (family taming)",
    ),
    (r"(^|\.)blocks\.\d+\.attn\.key\.", "a transformer of taming-transformers (family taming)"),
    (r"adaLN_modulation\.", "a diffusion transformer (DiT)"),
    (r"lora_[AB]\.", "a LoRA adapter without its base; python -m varfast.export merges the two"),
    (r"(^|\.)(exp_avg|exp_avg_sq|momentum_buffer)$", "the state of an optimizer"),
    (r"visual\.(conv1|trunk|transformer)\.", "a CLIP model"),
    (r"self_attn\.q_proj\.", "a language model"),
)
# Names of the embedding of a transformer, whose second axis is its width.
_EMBEDDING = re.compile(r"(^|\.)(class_emb|tok_embeddings|tok_emb)\.weight$")
_BLOCK = re.compile(r"(^|\.)(blocks|layers)\.(\d{1,9})\.")
_VARS = (
    (r"(^|\.)pos_1LC$", "a VAR transformer"),
    (r"(^|\.)quantize\.embedding\.weight$", "a VQ-VAE"),
)


@dataclass(frozen=True)
class Known:
    """What the state_dict of a model is known by.

    Attributes:
        what: it is, in words.
        anchor: name of a tensor that no other model has.
        parts: what the names of its tensors begin with, up to the first dot.
    """

    what: str
    anchor: str
    parts: frozenset[str]


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


def select(content: Any, known: Known, path: Path) -> State:
    """The tensors of the one model in a file, without the prefix and the wrappers around their names.

    Raises: InputError if the file holds another model, or several.
    """
    found: State = {}
    nested = set()  # names that stand in a dictionary inside the file's own
    for name, within, tensor in _flatten(content, path):
        bare = _WRAPPERS.sub("", name.replace("/", "."))
        if bare in found and found[bare] is not tensor:
            raise InputError(f"checkpoint {shown(path)} holds {one_line(bare, 80)} twice, with and without a prefix "
                             "that trainers add; save the state_dict of one model alone")  # fmt: skip
        found[bare] = tensor
        if within:
            nested.add(bare)
    prefixes = [n[: -len(known.anchor)] for n in found if n == known.anchor or n.endswith("." + known.anchor)]
    if not prefixes:
        raise InputError(f"checkpoint {shown(path)} is not {known.what}: {_instead(found, known.anchor)}")
    if len(prefixes) > 1 and "" not in prefixes:
        named = one_line(", ".join(p.rstrip(".") for p in prefixes), 120)
        raise InputError(f"checkpoint {shown(path)} holds several models ({named}); save the state_dict of one alone")
    prefix = "" if "" in prefixes else prefixes[0]
    state = {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}
    if not prefix:
        # Beside a model without prefix stand other entries (an optimizer), in dictionaries of another name.
        state = {n: t for n, t in state.items() if n not in nested or n.partition(".")[0] in known.parts}
    return state


def _instead(state: State, anchor: str) -> str:
    """What a state_dict without the anchor is."""
    names = one_line(", ".join(list(state)[:4]), 200) or "no tensors"
    found = other_model(state) or _named(state, _VARS)
    return f"it has no {anchor}, but {names}" + (f"; it is {found}" if found else "")


def other_model(state: State) -> str | None:
    """Which well-known model of another family than VAR a state_dict belongs to, and of which size."""
    return _named(state, _OTHERS)


def _named(state: State, models: tuple[tuple[str, str], ...]) -> str | None:
    what = next((what for pattern, what in models if any(re.search(pattern, name) for name in state)), None)
    return None if what is None else what + _size(state)


def _size(state: State) -> str:
    """The sizes of a transformer in words, if its names are of one that is known."""
    widths = {tensor.shape[1] for name, tensor in state.items() if _EMBEDDING.search(name) and tensor.ndim == 2}
    blocks = {found[3] for name in state if (found := _BLOCK.search(name))}
    return f" of {len(blocks)} blocks, {max(widths)} wide" if widths and blocks else ""


def count_parts(state: State, part: str, most: int) -> int:
    """How many numbered parts there are; they must be 0, 1, 2 and so on."""
    pattern = re.compile(re.escape(part) + r"\.(\d{1,18})\.")
    numbers = {int(found[1]) for n in state if (found := pattern.match(n))}
    lacking = next((k for k in range(len(numbers)) if k not in numbers), None)
    if not numbers or lacking is not None:
        raise InputError(f"no {part}.{lacking or 0}" + (f", though it has {part}.{max(numbers)}" if numbers else ""))
    if len(numbers) > most:
        raise InputError(f"{part} has {len(numbers)} parts, want at most {most}")
    return len(numbers)


def axis_size(state: State, name: str, axis: int, dims: int | None = None) -> int:
    """Of a tensor that must be there, with so many axes and no empty one."""
    if name not in state:
        raise InputError(f"no {name}")
    shape = tuple(state[name].shape)
    if len(shape) <= axis or (dims and len(shape) != dims) or not all(shape):
        raise InputError(f"{name} is {shape}")
    return shape[axis]


def inferred(infer: Callable[[], _Sizes], path: Path) -> _Sizes:
    """The sizes that `infer` reads from a state_dict. Raises: InputError that names the file, where it raises one."""
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


def unallocated(kind: Callable[[Any], _Model], config: Any) -> _Model:
    """A model without memory for its weights: they are assigned."""
    with torch.device("meta"):
        return kind(config)


def kind_of_tensor(tensor: Tensor) -> str:
    """What a tensor is that is no dense tensor of floats."""
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype})"
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout})"
    if tensor.is_meta:
        return "without content (device meta)"
    return str(tensor.dtype).removeprefix("torch.")


def unusable(tensor: Tensor) -> str:
    """What keeps a tensor from being weights; "" if nothing does."""
    if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _FLOATS:
        return f"is {kind_of_tensor(tensor)}; weights are float32, bfloat16, float16 or float64"
    # Where one number is not finite the sum is not; it may also overflow, so then they are counted.
    rounded = tensor.float() if tensor.dtype == torch.float64 else tensor
    if not bool(rounded.sum(dtype=torch.float32).isfinite()) and (count := int((~rounded.isfinite()).sum())):
        return f"holds {count} of {tensor.numel()} numbers that are not finite in float32 (NaN or infinite)"
    return ""


def assign(
    model: nn.Module,
    state: State,
    path: Path,
    fits: str,
    optional: re.Pattern[str],
    differs: Collection[str] = (),
    computed: Mapping[str, Tensor] | None = None,
) -> None:
    """Give a model without memory the tensors of a file, in float32.

    Args:
        fits: what they would fit, for the error where they do not.
        optional: names of buffers that a file may lack; they are 0 then.
        differs: how the file differs from the model otherwise, a line each.
        computed: buffers that the sizes fix, in place of what the file says.
    Raises: InputError that names keys and shapes that do not fit, and weights that are not finite real numbers.
    """
    computed = computed or {}
    wanted = model.state_dict()
    _check_names(type(model).__name__, wanted, state, path, fits, optional, differs)
    stored_bytes, needed_bytes = size_of_model(path), sum(4 * t.numel() for t in wanted.values())
    if needed_bytes > max(8 * stored_bytes, _MOST_EXPANDED_BYTES):
        raise InputError(
            f"checkpoint {shown(path)} declares {needed_bytes} bytes of weights in a file of {stored_bytes}: its "
            "tensors are expanded views; save their .contiguous() copies"
        )
    used = {n: t for n, t in state.items() if n not in computed}
    wrong = {n: why for n, t in used.items() if (why := unusable(t))}
    if wrong:
        lines = [f"checkpoint {shown(path)} cannot be used: {len(wrong)} of its tensors hold what cannot be weights"]
        lines.extend(f"  {n} {why}" for n, why in list(wrong.items())[:4])
        lines.append("  take an earlier checkpoint, or save this one anew in float32")
        raise InputError("\n".join(lines))
    # float32 whatever the file holds: bfloat16 has steps of 5e-4 at 0.1, and loses an update of 1e-4.
    loaded = {**computed, **{n: t.to(wanted[n].dtype, copy=True) for n, t in used.items()}}
    absent = {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in wanted.items() if n not in loaded}
    model.load_state_dict(loaded | absent, assign=True)


def _check_names(
    kind: str,
    wanted: Mapping[str, Tensor],
    state: State,
    path: Path,
    fits: str,
    optional: re.Pattern[str],
    differs: Collection[str],
) -> None:
    missing = [n for n in wanted if n not in state and not optional.fullmatch(n)]
    unexpected = [n for n in state if n not in wanted]
    reshaped = [n for n in wanted if n in state and wanted[n].shape != state[n].shape]
    if not (missing or unexpected or reshaped or differs):
        return
    lines = [f"checkpoint {shown(path)} does not fit the configured {kind}; {fits}"]
    for title, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            listed = one_line(", ".join(names[:4]), 200)
            lines.append(f"  {len(names)} {title}: {listed}{' ...' if len(names) > 4 else ''}")
    lines.extend(f"  {n}: file {tuple(state[n].shape)}, model {tuple(wanted[n].shape)}" for n in reshaped[:4])
    raise InputError("\n".join([*lines, *differs]))
