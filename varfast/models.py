"""The models: VAR and its multi-scale VQ-VAE, with the parameter names of the public checkpoints."""

from varfast.policies.var.config import PRESETS, VARConfig, VQVAEConfig
from varfast.policies.var.tokenizer import VQVAE
from varfast.policies.var.transformer import VAR, KVCache

__all__ = ["PRESETS", "VAR", "VQVAE", "KVCache", "VARConfig", "VQVAEConfig"]
