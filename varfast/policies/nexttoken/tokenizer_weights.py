"""Reading the VQ tokenizers: public checkpoints, those of a whole model, our own, or those of a trainer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from varfast.policies.convolutional import LLAMAGEN_NAMES, VQGAN_NAMES
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.nexttoken.tokenizer_config import TOKENIZERS, TokenizerConfig, VQGANConfig
from varfast.types import InputError
from varfast.weights.files import shown
from varfast.weights.shards import read_model, resolve_model
from varfast.weights.state import (
    Known,
    State,
    assign,
    axis_size,
    count_parts,
    inferred,
    other_model,
    select,
    unallocated,
)

_ANCHOR = "quantize.embedding.weight"
_PARTS = frozenset({"encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"})
# Not weights: LlamaGen's log of the codes in use, and the discriminator and perceptual loss of a VQGAN's training.
_IGNORED = re.compile(r"quantize\.codebook_used|loss\..*")
_NONE = re.compile(r"(?!)")
_OPTIONAL = re.compile(r"quantize\.codebook_used")
# Far more than any model has: a crafted file must not keep us making layers for hours.
_MOST_LEVELS, _MOST_RES_BLOCKS = 16, 64


def load_tokenizer(
    address: str,
    kind: type[TokenizerConfig],
    config: TokenizerConfig | None = None,
    ignored: re.Pattern[str] = _NONE,
) -> Tokenizer:
    """A tokenizer with the weights at `address`, on the CPU.

    Args:
        address: path or hf://owner/repo/file, as varfast.weights.shards.resolve_model takes it; of a whole model too.
        kind: TokenizerConfig for LlamaGen's, VQGANConfig for taming's.
        config: sizes it must have; default: those the file has.
        ignored: names of entries of a whole model that need not be read.
    Raises: InputError if the file cannot be read or does not fit, saying whose tokenizer of which sizes it is, or if
        its weights are not finite real numbers.
    """
    path = resolve_model(address)
    content = read_model(path, lambda name: ignored.fullmatch(name) is None)
    state = select(_weights(content), Known(kind.title, _ANCHOR, _PARTS), path)
    state = {name: tensor for name, tensor in state.items() if not _IGNORED.fullmatch(name)}
    _refuse_others(state, kind, path)
    found = inferred(lambda: infer_tokenizer_config(state), path)
    if type(found) is not kind:
        raise InputError(f"checkpoint {shown(path)} is not {kind.title}: it is {found.title} {_sizes(found)}")
    model = unallocated(Tokenizer, config or found)
    assign(model, state, path, f"it is {found.title} {_sizes(found)}", _OPTIONAL)
    return model


def _weights(content: Any) -> Any:
    """The weights in what the public trainers save: beside "model" may stand its average, "ema"."""
    if isinstance(content, dict):
        for key in ("model", "state_dict"):
            if isinstance(content.get(key), dict):
                return content[key]
    return content


def _refuse_others(state: State, kind: type[TokenizerConfig], path: Path) -> None:
    """Other tokenizers have a codebook of the same name."""
    named = f"checkpoint {shown(path)} is not {kind.title}: it is"
    if any(name.startswith("quantize.quant_resi.") for name in state):
        raise InputError(f"{named} VAR's multi-scale VQ-VAE, for policy.family=var")
    levels = (f"encoder.{names.encoder_levels}." for names in (LLAMAGEN_NAMES, VQGAN_NAMES))
    if not any(name.startswith(start) for start in levels for name in state):
        raise InputError(f"{named} {other_model(state) or 'another model with a codebook'}")


def infer_tokenizer_config(state: State) -> TokenizerConfig:
    """Family and sizes of the tokenizer that a state_dict belongs to.

    Raises: InputError that names a part that is missing or makes no sense.
    """
    of_llamagen = any(name.startswith(f"encoder.{LLAMAGEN_NAMES.encoder_levels}.") for name in state)
    kind, names = (TokenizerConfig, LLAMAGEN_NAMES) if of_llamagen else (VQGANConfig, VQGAN_NAMES)
    base, part = axis_size(state, "encoder.conv_in.weight", 0, 4), f"encoder.{names.encoder_levels}"
    levels = count_parts(state, part, _MOST_LEVELS)
    channels = [axis_size(state, f"{part}.{level}.{names.blocks}.0.conv2.weight", 0, 4) for level in range(levels)]
    if any(count % base for count in channels):
        raise InputError(f"levels of {channels} channels are no multiples of encoder.conv_in's {base}")
    return kind(
        vocab_size=axis_size(state, _ANCHOR, 0, 2),
        code_width=axis_size(state, _ANCHOR, 1, 2),
        latent_width=axis_size(state, "quant_conv.weight", 1, 4),
        base_channels=base,
        channel_multipliers=tuple(count // base for count in channels),
        num_res_blocks=count_parts(state, f"{part}.0.{names.blocks}", _MOST_RES_BLOCKS),
    )


def _sizes(config: TokenizerConfig) -> str:
    """The public tokenizer of these sizes, or the sizes as the config has them."""
    for name, public in TOKENIZERS.items():
        if public == config:
            return name
    given = ", ".join(f"{key}={value}" for key, value in config.model_dump(exclude_defaults=True).items())
    return f"with {given}" if given else "of the default sizes"
