"""LoRA: the matrices of a model are frozen, and low-rank products beside them are trained.

y = W x + (alpha / rank) B A x, by the layers of the package peft. The policy without its adapter is the model that it
came from, so a reference that stays the base costs no weights, and one that moves those of an adapter.

Axes: C channel, R rank.
Source: Hu et al., arXiv:2106.09685.
"""

from __future__ import annotations

import copy
import importlib
import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from varfast.policies.config import LoRAConfig
from varfast.policies.precision import Linear, MixedPrecision
from varfast.randomness import Purpose, keyed_generator
from varfast.types import InputError

_Model = TypeVar("_Model", bound=nn.Module)
_ADAPTER = "default"  # the name that peft gives to an adapter without one


def import_peft() -> Any:
    """The package peft. Raises: InputError if it is not installed."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise InputError(
            f"policy.lora: the package peft cannot be imported ({error}); pip install 'varfast[lora]', or "
            "policy.lora=null"
        ) from error


def add_lora(model: MixedPrecision, config: LoRAConfig, seed: int) -> None:
    """Freeze a model and put an adapter into it, in place; its function stays what it was until B moves from 0.

    The frozen matrices are stored in its compute_dtype from here on: the same numbers in every product. The adapter is
    float32. Rollout and update call the very same modules, so that both have the policy's own log-probabilities.
    (Merged into 16-bit matrices for the rollout, an update of less than 1/512 of an element would be rounded away, and
    another policy sampled.)

    Args:
        config: rank, scale and matrices.
        seed: A is a function of it, the sizes and the targets alone; B is 0.
    Raises: InputError if peft is not installed.
    """
    peft = import_peft()
    model.requires_grad_(False)
    model.store_in_compute_dtype()
    # low_cpu_mem_usage: peft's own matrices are made without memory and without a draw from the global generator.
    peft.inject_adapter_in_model(_peft_config(model, config), model, _ADAPTER, low_cpu_mem_usage=True)
    generator = keyed_generator(seed, Purpose.ADAPTER)
    for layer in lora_layers(model).values():
        # Our Linear: weights float32, products in the dtype of the activations. peft's would turn those into float32.
        device = layer.get_base_layer().weight.device
        a_RC = torch.empty(config.rank, layer.in_features)
        nn.init.kaiming_uniform_(a_RC, a=math.sqrt(5), generator=generator)  # as peft, and as the paper's code
        b_CR = torch.zeros(layer.out_features, config.rank)
        layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER] = _linear(a_RC.to(device)), _linear(b_CR.to(device))
        layer.cast_input_dtype_enabled = False


def _linear(weight: Tensor) -> Linear:
    with torch.device("meta"):
        module = Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight)
    return module


def _peft_config(model: MixedPrecision, config: LoRAConfig) -> Any:
    modules = "|".join(pattern for name, pattern in model.lora_targets.items() if name in config.targets)
    return import_peft().LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=modules)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers by the name of the matrix they stand for, as blocks.0.attn.proj; none without an adapter."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def without_lora(model: _Model) -> _Model:
    """The model without its adapter: a module of its own, all of whose tensors are those of `model`."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo |= {id(layer): layer.get_base_layer() for layer in lora_layers(model).values()}
    return copy.deepcopy(model, memo)


def frozen_copy(model: _Model, moves: bool) -> _Model:
    """A reference on the frozen weights of `model`, all of which it shares.

    moves: it has a copy of the adapter, which becomes another one as the reference is replaced; else it has none.
    """
    if not moves:
        return without_lora(model)
    adapters = [part for layer in lora_layers(model).values() for part in (layer.lora_A, layer.lora_B)]
    # A matrix of an adapter, and its low-precision copy.
    own = {id(t) for adapter in adapters for t in (*adapter.parameters(), *adapter.buffers())}
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in own}
    return copy.deepcopy(model, memo).requires_grad_(False)


@torch.no_grad()
def merged_state(model: nn.Module, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + (alpha / rank) B A, in float32 on the CPU, with the names of the public checkpoints.

    Args:
        model: with the adapter. Its own W may have been rounded to 16 bits, so they are not used.
        base: state_dict of the model that it came from, in float32.
    """
    merged = {name: tensor.detach().cpu() for name, tensor in base.items()}
    for name, layer in lora_layers(model).items():
        a_RC, b_CR = (matrix[_ADAPTER].weight.cpu() for matrix in (layer.lora_A, layer.lora_B))
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + layer.scaling[_ADAPTER] * (b_CR @ a_RC)
    return merged


def peft_adapter(model: MixedPrecision, config: LoRAConfig, base: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What peft keeps of an adapter: the content of adapter_config.json and of adapter_model.safetensors.

    Args:
        base: where the weights of the model beneath came from, for adapter_config.json.
    """
    described = _peft_config(model, config)
    described.base_model_name_or_path, described.inference_mode = base, True
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in described.to_dict().items()}
    tensors = {
        # The prefix of peft.PeftModel.
        f"base_model.model.{name}.{kind}.weight": getattr(layer, kind)[_ADAPTER].weight.detach().cpu().contiguous()
        for name, layer in lora_layers(model).items()
        for kind in ("lora_A", "lora_B")
    }
    return settings, tensors
