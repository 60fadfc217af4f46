"""Training a base model from images: first the VQ-VAE, then the transformer on its tokens.

Small on purpose: there is no adversarial and no perceptual loss.

Axes: B image, L token over all scales, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from varfast.config import Config
from varfast.data.datasets import FolderImages, Images, load_images
from varfast.data.labels import label_table, labels_of
from varfast.optim.schedule import scheduled
from varfast.policies.var.tokenizer import VQVAE
from varfast.policies.var.transformer import VAR
from varfast.progress import Progress
from varfast.types import InputError, NotFinitePolicy

_GRAD_CLIP = 1.0
# After so many batches, codes that none of them used are moved to where the data is.
_REVIVE_EVERY = 25
# Steps between lines of progress without a terminal; a step of the digits' base takes 20 to 100 ms on a CPU.
_LINE_EVERY = 100


@dataclass(frozen=True)
class PretrainReport:
    """What pre-training measured.

    Attributes:
        reconstruction_mse: of pixels in [-1, 1], mean over the last batches.
        pixel_variance: mean square around the mean colour, in the same units: the error of a VQ-VAE that has learned
            only the mean colour.
        codebook_usage: fraction of the codes that the last batches used.
        token_loss: cross-entropy of the transformer, nats a token, mean over the last batches.
        seconds: wall time of both trainings.
    """

    reconstruction_mse: float
    pixel_variance: float
    codebook_usage: float
    token_loss: float
    seconds: float


def pretrain(config: Config, device: torch.device) -> tuple[VAR, VQVAE, PretrainReport]:
    """Train VQ-VAE and transformer from scratch; on one machine, the result is a function of the config and its seed.

    Raises: InputError if the images' labels or sizes do not fit the models; NotFinitePolicy, an InputError, if a model
        diverges, so that it does not get into the cache.
    """
    start = time.perf_counter()
    size, num_classes = config.policy.vqvae.image_size, config.policy.sizes.num_classes
    images = load_images(config.pretrain.dataset, size, num_classes)
    if isinstance(images, FolderImages):
        print(f"{images.folder}: {len(images)} images\n{label_table(labels_of(images))}")
        print("".join(f"note: {note}\n" for note in images.notes), end="")
    if len(images) < config.pretrain.batch_size:  # type: ignore[arg-type]
        raise InputError(
            f"{config.pretrain.dataset} has {len(images)} images, fewer than "  # type: ignore[arg-type]
            f"pretrain.batch_size={config.pretrain.batch_size}"
        )
    torch.manual_seed(config.run.seed)
    vqvae, mse, variance, usage = _train_vqvae(config, images, device)
    _refuse_diverged(vqvae, "VQ-VAE", f"pretrain.vqvae_lr (now {config.pretrain.vqvae_lr:g})")
    var, token_loss = _train_var(config, images, vqvae, device)
    _refuse_diverged(var, "transformer", f"pretrain.var_lr (now {config.pretrain.var_lr:g})")
    return var, vqvae, PretrainReport(mse, variance, usage, token_loss, time.perf_counter() - start)


def _refuse_diverged(model: torch.nn.Module, what: str, key: str) -> None:
    wrong = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    if wrong:
        raise NotFinitePolicy(
            f"pre-training of the {what} diverged: {len(wrong)} of its weights hold NaN or infinite numbers, first "
            f"{wrong[0]}; nothing was kept. Set a lower {key}"
        )


def _batches(dataset: Images, config: Config, steps: int, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """`steps` shuffled batches, over as many passes as that takes; labels are the last tensor of each."""
    loader = DataLoader(
        _Answers(dataset),
        collate_fn=_collated,
        batch_size=config.pretrain.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=config.pretrain.num_workers,
        generator=torch.Generator().manual_seed(config.run.seed),
    )
    done = 0
    while True:
        for batch in loader:
            if done == steps:
                return
            if isinstance(batch, InputError):
                raise batch
            largest = int(batch[-1].max())
            if largest >= config.policy.sizes.num_classes:
                raise InputError(
                    f"{config.pretrain.dataset} has label {largest}, but policy.var.num_classes="
                    f"{config.policy.sizes.num_classes}; raise it"
                )
            yield tuple(tensor.to(device) for tensor in batch)
            done += 1


class _Answers(Dataset[Any]):
    """A data set that returns errors as items, since a DataLoader worker would put its traceback into their message."""

    def __init__(self, dataset: Images) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except InputError as error:
            return error


def _collated(items: list[Any]) -> Any:
    error = next((item for item in items if isinstance(item, InputError)), None)
    return default_collate(items) if error is None else error


def _pixels(images: Tensor) -> Tensor:
    """Images in [0, 1] to [-1, 1], as the VQ-VAE takes them."""
    return images.mul(2.0).sub(1.0)


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth of the steps, then a cosine down to a hundredth of the peak."""
    return scheduled(peak, step, steps, max(1, steps // 20), "cosine", floor=0.01)


def _optimizer_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _GRAD_CLIP, foreach=True)
    optimizer.step()


def _train_vqvae(config: Config, images: Images, device: torch.device) -> tuple[VQVAE, float, float, float]:
    settings, steps = config.pretrain, config.pretrain.vqvae_steps
    vqvae = VQVAE(config.policy.vqvae).to(device)
    torch.nn.init.normal_(vqvae.quantize.embedding.weight, std=0.5)
    optimizer = torch.optim.AdamW(vqvae.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    hits_V = torch.zeros(config.policy.vqvae.vocab_size, device=device)
    errors: list[Tensor] = []
    usage, variance = 0.0, 0.0
    progress, note = Progress("vq-vae", steps, every=_LINE_EVERY), ""
    for step, (images_B3HW, _) in enumerate(_batches(images, config, steps, device)):
        batch = _pixels(images_B3HW)
        reconstruction, vq_loss, tokens_BL = vqvae(batch)
        error = F.mse_loss(reconstruction, batch)
        _optimizer_step(vqvae, optimizer, error + vq_loss, _learning_rate(step, steps, settings.vqvae_lr))
        hits_V += torch.bincount(tokens_BL.flatten(), minlength=len(hits_V))
        errors.append(error.detach())
        if (step + 1) % _REVIVE_EVERY == 0:
            usage, variance = float((hits_V > 0).float().mean()), _variance(batch)
            note = f"mse={float(errors[-1]):.4f} codes={usage:.0%}"
            if step < steps * 3 // 4:
                _revive(vqvae, optimizer, hits_V, batch)
            hits_V.zero_()
        progress.update(note)
    progress.close()
    mse = float(torch.stack(errors[-_REVIVE_EVERY:]).mean())
    if steps < _REVIVE_EVERY:
        usage, variance = float((hits_V > 0).float().mean()), _variance(batch)
    return vqvae.requires_grad_(False), mse, variance, usage


def _variance(images: Tensor) -> float:
    """Mean square of pixels (B, 3, H, W) around the mean colour of the batch."""
    return float((images - images.mean(dim=(0, 2, 3), keepdim=True)).square().mean())


@torch.no_grad()
def _revive(vqvae: VQVAE, optimizer: torch.optim.Optimizer, hits_V: Tensor, batch: Tensor) -> None:
    """Move each unused code to a residual that is left before some scale of some image of the batch."""
    dead = (hits_V == 0).nonzero().flatten()
    quantizer = vqvae.quantize
    rest = vqvae.latents(batch)
    candidates = []
    for scale, tokens_Bl in enumerate(quantizer.split(quantizer.encode(rest))):
        candidates.append(quantizer.next_input(rest, scale).flatten(0, 1))
        rest = rest - quantizer.contribution(tokens_Bl, scale)
    rows = torch.cat(candidates)
    chosen = torch.randint(len(rows), (len(dead),), device="cpu").to(rows.device)
    quantizer.embedding.weight[dead] = rows[chosen]
    for moment in optimizer.state[quantizer.embedding.weight].values():
        if moment.ndim == 2:
            moment[dead] = 0.0


def _train_var(config: Config, images: Images, vqvae: VQVAE, device: torch.device) -> tuple[VAR, float]:
    settings, steps, sizes = config.pretrain, config.pretrain.var_steps, config.policy.sizes
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
    progress, note = Progress("var", steps, every=_LINE_EVERY), ""
    for step, (*given, labels_B) in enumerate(_batches(dataset, config, steps, device)):
        tokens_BL, var_input_BLC = given if len(given) == 2 else _tokens(vqvae, given[0])
        dropped_B = torch.rand(len(labels_B), device=device) < settings.class_dropout
        labels_B = torch.where(dropped_B, sizes.num_classes, labels_B)
        logits_BLV = var(labels_B, var_input_BLC, drop_path=settings.drop_path)
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten())
        _optimizer_step(var, optimizer, loss, _learning_rate(step, steps, settings.var_lr))
        losses.append(loss.detach())
        if (step + 1) % _REVIVE_EVERY == 0:
            note = f"loss={float(losses[-1]):.3f}"
        progress.update(note)
    progress.close()
    return var, float(torch.stack(losses[-_REVIVE_EVERY:]).mean())


@torch.no_grad()
def _tokens(vqvae: VQVAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """From images in [0, 1]: tokens (B, L), and the transformer's input (B, L - first, C)."""
    tokens_BL = vqvae.encode(_pixels(images))
    return tokens_BL, vqvae.var_input(tokens_BL)


def _undecayed(name: str) -> bool:
    return name.endswith("bias") or any(part in name for part in ("emb", "pos_", "ada_gss", "scale_mul"))
