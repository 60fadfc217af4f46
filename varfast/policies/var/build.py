"""A VAR policy from random weights or from files: see varfast.policies.families.Family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from varfast.perf.cost import Cost
from varfast.policies.var.config import VARConfig, VARPolicyConfig, VQVAEConfig
from varfast.policies.var.cost import VARCost
from varfast.policies.var.policy import VARPolicy
from varfast.policies.var.tokenizer import VQVAE
from varfast.policies.var.transformer import VAR
from varfast.policies.var.weights import load_var, load_vqvae
from varfast.types import InputError

section = VARPolicyConfig


def empty_model(config: VARPolicyConfig) -> VAR:
    """The transformer, with weights that are still to be loaded."""
    return VAR(config.sizes)


def load_part(part: str, address: str, config: VARPolicyConfig) -> nn.Module:
    """A part with the weights at `address`, on the CPU.

    Raises: InputError if the file cannot be read, or does not have the sizes of the config.
    """
    if part == "var":
        return load_var(address, config.sizes)
    return load_vqvae(address, config.sizes.patch_nums, config.vqvae)


def assemble(
    parts: Mapping[str, nn.Module], device: torch.device, dtype: str, fast: bool = True, strict: bool = False
) -> VARPolicy:
    """The policy of all parts, by name. Raises: as VARPolicy."""
    var, vqvae = parts["var"], parts["vqvae"]
    assert isinstance(var, VAR)
    assert isinstance(vqvae, VQVAE)
    return VARPolicy(var, vqvae, device, dtype, fast, strict)


def random_parts(config: VARPolicyConfig, seed: int, device: torch.device) -> dict[str, nn.Module]:
    """All parts with random weights of the configured sizes, a function of the seed: for benchmarks and tests."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        vqvae = VQVAE(config.vqvae)
        return {"var": VAR(config.sizes).init_weights(seed), "vqvae": vqvae}


def from_files(
    trained: str,
    frozen: str | None,
    device: torch.device,
    dtype: str,
    fast: bool = True,
    strict: bool = False,
    var_config: VARConfig | None = None,
    vqvae_config: VQVAEConfig | None = None,
) -> VARPolicy:
    """The policy of transformer and VQ-VAE (paths or hf:// addresses); sizes that are not given are the files'.

    Raises: InputError if a file cannot be read or does not fit, or the VQ-VAE's is not given.
    """
    if frozen is None:
        raise InputError(f"{trained} is not a run folder, so vqvae=... is needed too")
    var = load_var(trained, var_config)
    vqvae = load_vqvae(frozen, var.config.patch_nums, vqvae_config)
    return assemble({"var": var, "vqvae": vqvae}, device, dtype, fast, strict)


def cost_of(config: VARPolicyConfig, dtype: str) -> Cost:
    """What one image costs. dtype: "float32" or "bfloat16", of activations."""
    return VARCost(config.sizes, config.vqvae, dtype, config.lora)


def model_card(config: VARPolicyConfig, trained: str, frozen: str) -> tuple[str, str, str]:
    """For a model card: what the model is, its sizes, and how VAR's public code loads it."""
    sizes, side = config.sizes, config.image_size
    described = (
        f"{config.preset or f'depth {sizes.depth}'}, images of {side} x {side} pixels, {sizes.num_classes} labels"
    )
    return "A VAR transformer", described, _with_public_code(trained, frozen, sizes, config.vqvae)


def _with_public_code(name: str, vqvae_name: str, var: VARConfig, vqvae: VQVAEConfig) -> str:
    # The sizes that build_vae_var of the public code fixes.
    public = VQVAEConfig()
    fixed = {key: getattr(public, key) for key in ("channel_multipliers", "num_res_blocks", "phi_ratio")}
    if any(getattr(vqvae, key) != value for key, value in fixed.items()) or (var.mlp_ratio, var.norm_eps) != (
        4.0,
        1e-6,
    ):
        return (
            "The public code (github.com/FoundationVision/VAR) reads the weights, which have its names and shapes, but "
            "its `build_vae_var` makes no model of these sizes: the VQ-VAE's levels and blocks, or the transformer's "
            "mlp_ratio and norm_eps, are others than there."
        )
    safe = name.endswith(".safetensors")

    def load(file: str) -> str:
        if file.endswith(".safetensors"):
            return f"safetensors.torch.load_file({file!r})"
        return f"torch.load({file!r}, map_location='cpu')"

    imports = "import safetensors.torch\nimport torch" if safe else "import torch"
    return f"""With the public code, in a checkout of github.com/FoundationVision/VAR:

```python
{imports}
from models import build_vae_var

vae, var = build_vae_var(
    device="cuda", patch_nums={var.patch_nums}, V={var.vocab_size}, Cvae={var.code_width}, ch={vqvae.base_channels},
    share_quant_resi={vqvae.num_phi}, num_classes={var.num_classes}, depth={var.depth}, shared_aln={var.shared_adaln},
    attn_l2_norm={var.qk_l2_norm},
)
vae.load_state_dict({load(Path(vqvae_name).name)})
var.load_state_dict({load(name)})
```"""
