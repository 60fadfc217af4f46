"""The sampling engine: static key-value cache, micro-batches, keyed randomness.

Axes: B image, L token over all scales, l token of one scale, V vocabulary, C channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varfast import kernels
from varfast.models import VAR, VQVAE, KVCache
from varfast.types import Rollout


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn. Training uses the temperature alone; the rest is for inference.

    Attributes:
        temperature: > 0.
        cfg: classifier-free guidance; scale k of K-1 is guided with t = cfg * k / (K - 1).
        top_k, top_p: filters of sample_tokens; 0 switches one off.
    """

    temperature: float = 1.0
    cfg: float = 0.0
    top_k: int = 0
    top_p: float = 0.0

    @property
    def on_policy(self) -> bool:
        """The tempered policy itself is sampled, unmixed and unfiltered."""
        return self.cfg == 0.0 and self.top_k == 0 and self.top_p in (0.0, 1.0)


@torch.no_grad()
def generate(
    var: VAR,
    vqvae: VQVAE,
    labels_B: Tensor,
    settings: SamplingSettings,
    seed: int,
    step: int = 0,
    first_sample: int = 0,
    micro_batch: int | None = None,
) -> Rollout:
    """Sample one image a label, scale by scale.

    The tokens of image i are a function of the weights, its label, the settings and (seed, step, first_sample + i): any
    split into micro-batches or calls gives the same ones, up to rounding in matrix products of another size.

    Args:
        labels_B: (B,) int64 on the models' device.
        settings: how to draw.
        seed, step, first_sample: key of the randomness.
        micro_batch: images at a time; default all.
    """
    size = micro_batch or len(labels_B)
    parts = [
        _generate_part(var, vqvae, labels_B[i : i + size], settings, seed, step, first_sample + i)
        for i in range(0, len(labels_B), size)
    ]
    tokens, logp, entropy = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return Rollout(labels_B, tokens, logp, entropy, settings.temperature, settings.on_policy)


def _generate_part(
    var: VAR, vqvae: VQVAE, labels_B: Tensor, settings: SamplingSettings, seed: int, step: int, first_sample: int
) -> tuple[Tensor, Tensor, Tensor]:
    config, batch = var.config, labels_B.shape[0]
    key = torch.tensor([seed, step, first_sample], device=labels_B.device)
    guided = settings.cfg > 0.0
    if guided:  # second half: the same images without their label
        labels_B = torch.cat([labels_B, torch.full_like(labels_B, config.num_classes)])
    cache = KVCache.empty(config, labels_B.shape[0], var.compute_dtype, labels_B.device)
    x_BlC, cond_BC = var.embed_start(labels_B)
    cond = var.block_condition(cond_BC)
    f_hat = vqvae.quantize.empty_f_hat(batch)
    tokens, logps, entropies = [], [], []
    last = len(config.patch_nums) - 1
    for scale in range(last + 1):
        logits_BlV = var.forward_scale(x_BlC, cond, cond_BC, scale, cache)
        tokens_Bl, logp_Bl, entropy_Bl = kernels.sample_tokens(
            logits_BlV[:batch],
            key,
            scale,
            settings.temperature,
            uncond_logits_BlV=logits_BlV[batch:] if guided else None,
            guidance=settings.cfg * scale / max(1, last),
            top_k=settings.top_k,
            top_p=settings.top_p,
        )
        tokens.append(tokens_Bl)
        logps.append(logp_Bl)
        entropies.append(entropy_Bl)
        if scale < last:
            f_hat = f_hat + vqvae.quantize.contribution(tokens_Bl, scale)
            input_BlC = vqvae.quantize.next_input(f_hat, scale + 1)
            x_BlC = var.embed_scale(input_BlC, scale + 1)
            if guided:
                x_BlC = x_BlC.repeat(2, 1, 1)
    return torch.cat(tokens, dim=1), torch.cat(logps, dim=1), torch.cat(entropies, dim=1)
