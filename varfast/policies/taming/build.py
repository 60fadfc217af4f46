"""A policy of this family from random weights or from files: see varfast.policies.families.Family."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from varfast.perf.cost import Cost
from varfast.policies.taming.config import MinGPTConfig, TamingPolicyConfig
from varfast.policies.taming.policy import TamingPolicy
from varfast.policies.taming.transformer import MinGPT
from varfast.policies.taming.weights import load_mingpt
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.nexttoken.tokenizer_config import VQGANConfig
from varfast.policies.nexttoken.tokenizer_weights import load_tokenizer
from varfast.types import InputError


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
