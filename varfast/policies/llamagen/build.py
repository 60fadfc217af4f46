"""A policy of this family from random weights or from files: see varfast.policies.families.Family."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from varfast.perf.cost import Cost
from varfast.policies.llamagen.config import GPTConfig, LlamaGenPolicyConfig
from varfast.policies.llamagen.policy import LlamaGenPolicy
from varfast.policies.llamagen.transformer import LlamaGen
from varfast.policies.llamagen.weights import load_gpt
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig
from varfast.policies.nexttoken.tokenizer_weights import load_tokenizer
from varfast.types import InputError


def _sizes(config: LlamaGenPolicyConfig) -> GPTConfig:
    sizes = config.sizes
    assert isinstance(sizes, GPTConfig)
    return sizes


def empty_model(config: LlamaGenPolicyConfig) -> LlamaGen:
    """The transformer, with weights that are still to be loaded."""
    return LlamaGen(_sizes(config))


def load_part(part: str, address: str, config: LlamaGenPolicyConfig) -> nn.Module:
    """A part with the weights at `address`, on the CPU.

    Raises: InputError if the file cannot be read, or does not have the sizes of the config.
    """
    if part == "gpt":
        return load_gpt(address, _sizes(config))
    return load_tokenizer(address, TokenizerConfig, config.vq)


def random_parts(config: LlamaGenPolicyConfig, seed: int, device: torch.device) -> dict[str, nn.Module]:
    """All parts with random weights of the configured sizes, a function of the seed: for benchmarks and tests."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        tokenizer = Tokenizer(config.vq)
        return {"gpt": LlamaGen(_sizes(config)).init_weights(seed), "vq": tokenizer}


def assemble(
    parts: Mapping[str, nn.Module], device: torch.device, dtype: str, fast: bool = True, strict: bool = False
) -> LlamaGenPolicy:
    """The policy of all parts, by name. Raises: as LlamaGenPolicy."""
    transformer, tokenizer = parts["gpt"], parts["vq"]
    assert isinstance(transformer, LlamaGen)
    assert isinstance(tokenizer, Tokenizer)
    return LlamaGenPolicy(transformer, tokenizer, device, dtype, fast, strict)
