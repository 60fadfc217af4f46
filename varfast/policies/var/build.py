"""A VAR policy from random weights or from files, part by part.

A part is one of the models of a policy by its name: `PARTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from varfast.policies.var.config import PolicyConfig, VARConfig, VQVAEConfig
from varfast.policies.var.policy import VARPolicy
from varfast.policies.var.tokenizer import VQVAE
from varfast.policies.var.transformer import VAR
from varfast.policies.var.weights import load_var, load_vqvae

Part = Literal["var", "vqvae"]
# The trained one first.
PARTS: tuple[Part, ...] = ("var", "vqvae")


def empty_model(config: PolicyConfig) -> VAR:
    """The transformer, with weights that are still to be loaded."""
    return VAR(config.sizes)


def load_part(part: Part, address: str, config: PolicyConfig) -> nn.Module:
    """A part with the weights at `address`, on the CPU.

    Raises: InputError if the file cannot be read, or does not have the sizes of the config.
    """
    if part == "var":
        return load_var(address, config.sizes)
    return load_vqvae(address, config.sizes.patch_nums, config.vqvae)


def assemble(
    parts: Mapping[Part, nn.Module], device: torch.device, dtype: str, fast: bool = True, strict: bool = False
) -> VARPolicy:
    """The policy of all parts, by name. Raises: as VARPolicy."""
    var, vqvae = parts["var"], parts["vqvae"]
    assert isinstance(var, VAR)
    assert isinstance(vqvae, VQVAE)
    return VARPolicy(var, vqvae, device, dtype, fast, strict)


def random_parts(config: PolicyConfig, seed: int, device: torch.device) -> dict[Part, nn.Module]:
    """All parts with random weights of the configured sizes, a function of the seed: for benchmarks and tests."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        vqvae = VQVAE(config.vqvae)
        return {"var": VAR(config.sizes).init_weights(seed), "vqvae": vqvae}


def from_files(
    files: Mapping[Part, str],
    device: torch.device,
    dtype: str,
    fast: bool = True,
    strict: bool = False,
    var_config: VARConfig | None = None,
    vqvae_config: VQVAEConfig | None = None,
) -> VARPolicy:
    """The policy of files (paths or hf:// addresses) by part; sizes that are not given are those of the files.

    Raises: InputError if a file cannot be read or does not fit.
    """
    var = load_var(files["var"], var_config)
    vqvae = load_vqvae(files["vqvae"], var.config.patch_nums, vqvae_config)
    return assemble({"var": var, "vqvae": vqvae}, device, dtype, fast, strict)
