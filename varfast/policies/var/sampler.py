"""Sampling from VAR: scale by scale, with a key-value cache.

Axes: B image, L token over all scales, l token of one scale, C channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varfast import kernels
from varfast.perf.stages import span
from varfast.policies.guidance import guided_logits
from varfast.policies.sampler import Sampled
from varfast.policies.var.config import VARConfig
from varfast.policies.var.tokenizer import VQVAE
from varfast.policies.var.transformer import VAR, KVCache
from varfast.types import Sampling


def guidance(config: VARConfig, cfg: float) -> list[float]:
    """Of each scale the strength t of guidance: none at the coarsest, cfg at the finest."""
    last = max(1, len(config.patch_nums) - 1)
    return [cfg * scale / last for scale in range(len(config.patch_nums))]


@torch.no_grad()
def sample(var: VAR, vqvae: VQVAE, labels_B: Tensor, key: Tensor, how: Sampling, keep: bool = False) -> Sampled:
    """Sample one image a label, without looking at a value on the host.

    Args:
        labels_B: (B,) int64.
        key: (3,) int64 on the same device: seed, step, index of the first image.
        how: see `guidance`.
        keep: return the latent, with the last scale, and the teacher_input: what VQVAE.f_hat and VQVAE.var_input make
            of the tokens, bit for bit for the same images.
    """
    config, batch = var.config, labels_B.shape[0]
    guided = how.cfg > 0.0
    if guided:  # second half: the same images without their label
        labels_B = torch.cat([labels_B, torch.full_like(labels_B, config.num_classes)])
    cache = KVCache(config, labels_B.shape[0], var.compute_dtype, labels_B.device)
    x_BlC, cond_BC = var.embed_start(labels_B)
    constants = var.constants(cond_BC)
    f_hat = vqvae.quantize.empty_f_hat(batch)
    sampled, inputs = [], [f_hat.new_zeros(batch, 0, f_hat.shape[1])]
    last, strengths = len(config.patch_nums) - 1, guidance(config, how.cfg)
    for scale in range(last + 1):
        with span(f"scale {scale}"):
            logits_BlV, bias_V = var.forward_scale(x_BlC, constants, scale, cache, bias_apart=True)
            tokens_Bl, logp_Bl, entropy_Bl = kernels.sample_tokens(
                logits_BlV[:batch],
                key,
                scale,
                how.temperature,
                uncond_logits_BlV=logits_BlV[batch:] if guided else None,
                guidance=strengths[scale],
                top_k=how.top_k,
                top_p=how.top_p,
                bias_V=bias_V,
            )
            if var.strict and how.on_policy:  # by the kernel of the update: sampling adds in another order
                if guided:
                    logits_BlV = guided_logits(logits_BlV, logits_BlV.new_full(logits_BlV.shape[1:2], strengths[scale]))
                logp_Bl, entropy_Bl = kernels.selective_log_softmax(
                    logits_BlV, tokens_Bl, how.temperature, bias_V=bias_V
                )
            sampled.append((tokens_Bl, logp_Bl, entropy_Bl))
            if scale < last or keep:
                f_hat = f_hat + vqvae.quantize.contribution(tokens_Bl, scale)
            if scale < last:
                inputs.append(vqvae.quantize.next_input(f_hat, scale + 1))
                x_BlC = var.embed_scale(inputs[-1], scale + 1)
                if guided:
                    x_BlC = x_BlC.repeat(2, 1, 1)
    tokens_BL, logp_BL, entropy_BL = (torch.cat(pieces, dim=1) for pieces in zip(*sampled, strict=True))
    if not keep:
        return Sampled(tokens_BL, logp_BL, entropy_BL)
    return Sampled(tokens_BL, logp_BL, entropy_BL, f_hat, torch.cat(inputs, dim=1))
