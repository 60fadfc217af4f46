"""Training a tokenizer with a codebook, of any family, and moving the codes that nothing uses.

Axes: B image, N vector, C code width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varfast.config import Config
from varfast.data.datasets import Images
from varfast.pretraining.common import (
    LINE_EVERY,
    REVIVE_EVERY,
    batches,
    learning_rate,
    optimizer_step,
    pixels,
    variance,
)
from varfast.progress import Progress


@dataclass(frozen=True)
class Tokenized:
    """How good a tokenizer is; see training.PretrainReport."""

    mse: float
    variance: float
    usage: float


def fit_tokenizer(
    config: Config,
    images: Images,
    model: nn.Module,
    codebook_VC: Tensor,
    candidates: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Tokenized:
    """Train a tokenizer in place, and freeze it.

    Args:
        model: images (B, 3, H, W) in [-1, 1], and whether to use codes -> reconstruction, loss of the codes, tokens.
        codebook_VC: its codes.
        candidates: images -> (N, C), where codes are needed: unused ones are moved to some of these.
    """
    settings, steps = config.pretrain, config.pretrain.vqvae_steps
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    hits_V = torch.zeros(len(codebook_VC), device=device)
    errors: list[Tensor] = []
    usage, spread = 0.0, 0.0
    progress, note = Progress("vq-vae", steps, every=LINE_EVERY), ""
    for step, (images_B3HW, _) in enumerate(batches(images, config, steps, device)):
        batch = pixels(images_B3HW)
        reconstruction, vq_loss, tokens_BL = model(batch, step >= settings.codes_after * steps)
        error = F.mse_loss(reconstruction, batch)
        optimizer_step(model, optimizer, error + vq_loss, learning_rate(step, steps, settings.vqvae_lr))
        hits_V += torch.bincount(tokens_BL.flatten(), minlength=len(hits_V))
        errors.append(error.detach())
        if (step + 1) % REVIVE_EVERY == 0:
            usage, spread = float((hits_V > 0).float().mean()), variance(batch)
            note = f"mse={float(errors[-1]):.4f} codes={usage:.0%}"
            if step < steps * 3 // 4:
                _revive(codebook_VC, optimizer, hits_V, candidates, batch)
            hits_V.zero_()
        progress.update(note)
    progress.close()
    mse = float(torch.stack(errors[-REVIVE_EVERY:]).mean())
    if steps < REVIVE_EVERY:
        usage, spread = float((hits_V > 0).float().mean()), variance(batch)
    model.requires_grad_(False)
    return Tokenized(mse, spread, usage)


@torch.no_grad()
def _revive(
    codebook_VC: Tensor,
    optimizer: torch.optim.Optimizer,
    hits_V: Tensor,
    candidates: Callable[[Tensor], Tensor],
    batch: Tensor,
) -> None:
    """Move each unused code to a vector of the batch."""
    dead = (hits_V == 0).nonzero().flatten()
    rows = candidates(batch)
    chosen = torch.randint(len(rows), (len(dead),), device="cpu").to(rows.device)
    codebook_VC[dead] = rows[chosen]
    for moment in optimizer.state[codebook_VC].values():
        if moment.ndim == 2:
            moment[dead] = 0.0
