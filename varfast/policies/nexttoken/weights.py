"""Reading the transformers of the next-token families: what is the same for all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from varfast.policies.nexttoken.config import TransformerConfig
from varfast.policies.nexttoken.transformer import CausalTransformer
from varfast.types import InputError
from varfast.weights.files import shown
from varfast.weights.shards import read_model, resolve_model
from varfast.weights.state import Known, State, assign, inferred, select, unallocated

_Config = TypeVar("_Config", bound=TransformerConfig)
_Model = TypeVar("_Model", bound=CausalTransformer)

# Far more than any model has: a crafted file must not keep us making layers for hours.
MOST_BLOCKS = 512
_NONE = re.compile(r"(?!)")


def load_transformer(
    address: str,
    known: Known,
    ignored: re.Pattern[str],
    infer: Callable[[State, TransformerConfig | None], _Config],
    kind: Callable[[_Config], _Model],
    presets: Mapping[str, TransformerConfig],
    config: _Config | None,
    section: str,
    note: Callable[[str], str | None] = lambda name: None,
) -> _Model:
    """A transformer with the weights at `address`, on the CPU.

    Args:
        address: path or hf://owner/repo/file; as varfast.weights.shards.resolve_model takes it.
        ignored: names of entries that are not of this model.
        infer: sizes of a state_dict; what is not in a file is that of a second argument, if one is given.
        config: sizes it must have; default: those the file has.
        section: of the config where sizes stand, for errors.
        note: what part of a model, of no use here, an ignored entry is of; the parts that a file has are printed.
    Raises: InputError if the file cannot be read or does not fit, naming keys, shapes and the preset that would fit, or
        if its weights are not finite real numbers.
    """
    path = resolve_model(address)
    left_out: dict[str, None] = {}  # in order

    def wanted(name: str) -> bool:
        if ignored.fullmatch(name) is None:
            return True
        if (part := note(name)) is not None:
            left_out[part] = None
        return False

    state = select(_model_of(read_model(path, wanted)), known, path)
    state = {name: tensor for name, tensor in state.items() if wanted(name)}
    if left_out:
        print(f"{shown(path)}: {', '.join(left_out)} are left out; no image needs them")
    found = inferred(lambda: infer(state, config), path)
    model = unallocated(kind, config or found)
    assign(model, state, path, f"it fits {_described(found, presets, section)}", _NONE)
    return model


def _model_of(content: Any) -> Any:
    """The weights in what the public trainers save: beside "model" may stand its average, "ema"."""
    if isinstance(content, dict):
        for key in ("model", "module", "state_dict"):
            if isinstance(content.get(key), dict):
                return content[key]
    return content


def _described(found: TransformerConfig, presets: Mapping[str, TransformerConfig], section: str) -> str:
    """The preset that has the sizes, or the sizes."""
    for name, preset in presets.items():
        if _weights_of(preset) == _weights_of(found):
            return f"preset {name}"
    given = {key: value for key, value in found.model_dump(exclude_defaults=True).items() if key != "side"}
    return f"{section} with {', '.join(f'{key}={value}' for key, value in given.items()) or 'its defaults'}"


def _weights_of(config: TransformerConfig) -> dict[str, Any]:
    """The sizes that the shapes of the weights depend on, and the heads."""
    hidden = getattr(config, "hidden", config.mlp_width)
    return config.model_dump(exclude={"side", "mlp_width", "norm_eps"}) | {"hidden": hidden}


def heads_of(
    depth: int, width: int, presets: Mapping[str, TransformerConfig], config: TransformerConfig | None, section: str
) -> int:
    """Number of heads, which no file says: that of the preset of this depth and width, or of the config.

    Raises: InputError if neither is there.
    """
    for preset in presets.values():
        if (preset.depth, preset.width) == (depth, width):
            return preset.num_heads
    if config is None:
        raise InputError(
            f"{depth} blocks of width {width} are of no preset, and the number of heads is not in a file: give "
            f"{section}.num_heads in a config"
        )
    return config.num_heads if width % config.num_heads == 0 else 1
