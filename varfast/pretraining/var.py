"""Training a VQ-VAE of several scales, and a VAR transformer on its tokens.

Small on purpose: there is no adversarial and no perceptual loss.

Axes: B image, L token over all scales, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from varfast.config import Config
from varfast.data.datasets import Images
from varfast.policies.var.config import VARPolicyConfig
from varfast.policies.var.tokenizer import VQVAE
from varfast.policies.var.transformer import VAR
from varfast.pretraining.common import LINE_EVERY, REVIVE_EVERY, batches, learning_rate, optimizer_step, pixels
from varfast.pretraining.tokenizer import Tokenized, fit_tokenizer
from varfast.progress import Progress
from varfast.types import InputError


def train_tokenizer(config: Config, images: Images, device: torch.device) -> tuple[VQVAE, Tokenized]:
    """A VQ-VAE of several scales."""
    assert isinstance(config.policy, VARPolicyConfig)
    vqvae = VQVAE(config.policy.vqvae).to(device)
    torch.nn.init.normal_(vqvae.quantize.embedding.weight, std=0.5)

    def residuals(batch: Tensor) -> Tensor:
        """What is left before each scale of each image."""
        quantizer, rest, found = vqvae.quantize, vqvae.latents(batch), []
        for scale, tokens_Bl in enumerate(quantizer.split(quantizer.encode(rest))):
            found.append(quantizer.next_input(rest, scale).flatten(0, 1))
            rest = rest - quantizer.contribution(tokens_Bl, scale)
        return torch.cat(found)

    return vqvae, fit_tokenizer(config, images, vqvae, vqvae.quantize.embedding.weight, residuals, device)


def train_transformer(config: Config, images: Images, vqvae: VQVAE, device: torch.device) -> tuple[VAR, float]:
    """A VAR transformer on the tokens of the images, and its loss at the end in nats a token."""
    assert isinstance(config.policy, VARPolicyConfig)
    settings, steps, sizes = config.pretrain, config.pretrain.var_steps, config.policy.sizes
    if settings.token_noise:
        raise InputError(f"pretrain.token_noise={settings.token_noise:g}: policy.family=var reads no tokens; use 0")
    var = VAR(sizes).to(device).init_weights(config.run.seed)
    matrices = [p for n, p in var.named_parameters() if p.ndim >= 2 and not _undecayed(n)]
    others = [p for n, p in var.named_parameters() if p.ndim < 2 or _undecayed(n)]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    losses: list[Tensor] = []
    dataset: Images = images
    if isinstance(images, TensorDataset):  # no random crops: the tokens are the same in every pass
        parts = [_tokens(vqvae, part.to(device)) for part in images.tensors[0].split(settings.batch_size)]
        dataset = TensorDataset(*(torch.cat(pieces).cpu() for pieces in zip(*parts, strict=True)), images.tensors[1])
    progress, note = Progress("var", steps, every=LINE_EVERY), ""
    for step, (*given, labels_B) in enumerate(batches(dataset, config, steps, device)):
        tokens_BL, var_input_BLC = given if len(given) == 2 else _tokens(vqvae, given[0])
        dropped_B = torch.rand(len(labels_B), device=device) < settings.class_dropout
        labels_B = torch.where(dropped_B, sizes.num_classes, labels_B)
        logits_BLV = var(labels_B, var_input_BLC, drop_path=settings.drop_path)
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten())
        optimizer_step(var, optimizer, loss, learning_rate(step, steps, settings.var_lr))
        losses.append(loss.detach())
        if (step + 1) % REVIVE_EVERY == 0:
            note = f"loss={float(losses[-1]):.3f}"
        progress.update(note)
    progress.close()
    return var, float(torch.stack(losses[-REVIVE_EVERY:]).mean())


@torch.no_grad()
def _tokens(vqvae: VQVAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """From images in [0, 1]: tokens (B, L), and the transformer's input (B, L - first, C)."""
    tokens_BL = vqvae.encode(pixels(images))
    return tokens_BL, vqvae.var_input(tokens_BL)


def _undecayed(name: str) -> bool:
    return name.endswith("bias") or any(part in name for part in ("emb", "pos_", "ada_gss", "scale_mul"))
