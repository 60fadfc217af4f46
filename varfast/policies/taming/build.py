"""A policy of this family from random weights or from files: see varfast.policies.families.Family."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from varfast.perf.cost import Cost
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.nexttoken.tokenizer_config import VQGANConfig
from varfast.policies.nexttoken.tokenizer_weights import load_tokenizer
from varfast.policies.taming.config import MinGPTConfig, TamingPolicyConfig
from varfast.policies.taming.cost import count
from varfast.policies.taming.policy import TamingPolicy
from varfast.policies.taming.transformer import MinGPT
from varfast.policies.taming.weights import load_mingpt

section = TamingPolicyConfig


def _sizes(config: TamingPolicyConfig) -> MinGPTConfig:
    sizes = config.sizes
    assert isinstance(sizes, MinGPTConfig)
    return sizes


def empty_model(config: TamingPolicyConfig) -> MinGPT:
    """The transformer, with weights that are still to be loaded."""
    return MinGPT(_sizes(config))


def load_part(part: str, address: str, config: TamingPolicyConfig) -> nn.Module:
    """A part with the weights at `address`, on the CPU.

    Raises: InputError if the file cannot be read, or does not have the sizes of the config.
    """
    if part == "transformer":
        return load_mingpt(address, _sizes(config))
    return load_tokenizer(address, VQGANConfig, config.vqgan)


def random_parts(config: TamingPolicyConfig, seed: int, device: torch.device) -> dict[str, nn.Module]:
    """All parts with random weights of the configured sizes, a function of the seed: for benchmarks and tests."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        tokenizer = Tokenizer(config.vqgan)
        return {"transformer": MinGPT(_sizes(config)).init_weights(seed), "vqgan": tokenizer}


def assemble(
    parts: Mapping[str, nn.Module], device: torch.device, dtype: str, fast: bool = True, strict: bool = False
) -> TamingPolicy:
    """The policy of all parts, by name. Raises: as TamingPolicy."""
    transformer, tokenizer = parts["transformer"], parts["vqgan"]
    assert isinstance(transformer, MinGPT)
    assert isinstance(tokenizer, Tokenizer)
    return TamingPolicy(transformer, tokenizer, device, dtype, fast, strict)


def from_files(
    trained: str, frozen: str | None, device: torch.device, dtype: str, fast: bool = True, strict: bool = False
) -> TamingPolicy:
    """The policy of transformer and VQGAN (paths or hf:// addresses); the sizes are the files'.

    frozen: None: `trained` is a checkpoint of the whole model.
    Raises: InputError if a file cannot be read or does not fit.
    """
    parts = {"transformer": load_mingpt(trained), "vqgan": load_tokenizer(frozen or trained, VQGANConfig)}
    return assemble(parts, device, dtype, fast, strict)


def cost_of(config: TamingPolicyConfig, dtype: str) -> Cost:
    """What one image costs. dtype: "float32" or "bfloat16", of activations."""
    return count(_sizes(config), config.tokenizer, dtype, config.lora)


def model_card(config: TamingPolicyConfig, trained: str, frozen: str) -> tuple[str, str, str]:
    """For a model card: what the model is, its sizes, and how taming's public code loads it."""
    sizes, side = _sizes(config), config.image_size
    described = (
        f"{config.preset or f'{sizes.depth} blocks of width {sizes.width}'}, images of {side} x {side} pixels, "
        f"{sizes.num_classes} labels"
    )
    public = (
        "The public code (github.com/CompVis/taming-transformers) has these names below `transformer.` and "
        f"`first_stage_model.` of its Net2NetTransformer: load {trained} into `model.transformer` (with strict=False, "
        f"for the causal masks, which the file leaves out) and {frozen} into `model.first_stage_model`."
    )
    return "A class-conditional transformer of taming-transformers", described, public
