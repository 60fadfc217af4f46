"""The models: VAR and its multi-scale VQ-VAE, with the parameter names of the public checkpoints."""

from varfast.config import PRESETS, VARConfig, VQVAEConfig
from varfast.models.var import VAR, KVCache
from varfast.models.vqvae import VQVAE

__all__ = ["PRESETS", "VAR", "VQVAE", "KVCache", "VARConfig", "VQVAEConfig"]
