"""Training a base model from images: first the VQ-VAE, then the transformer on its tokens.

Small on purpose: there is no adversarial and no perceptual loss.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from varfast.config import Config
from varfast.data.captioned import CaptionedFolder, load_captioned
from varfast.data.datasets import FolderImages, Images, load_images
from varfast.data.labels import label_table, labels_of
from varfast.policies.nexttoken.config import NextTokenPolicyConfig
from varfast.pretraining import nexttoken, var
from varfast.types import InputError, NotFinitePolicy


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


def pretrain(config: Config, device: torch.device) -> tuple[nn.Module, nn.Module, PretrainReport]:
    """Train VQ-VAE and transformer from scratch; on one machine, the result is a function of the config and its seed.

    Returns: the transformer, the VQ-VAE, and what was measured.

    Raises: InputError if the images' labels or sizes do not fit the models; NotFinitePolicy, an InputError, if a model
        diverges, so that it does not get into the cache.
    """
    start = time.perf_counter()
    policy = config.policy
    images = _images(config)
    if len(images) < config.pretrain.batch_size:  # type: ignore[arg-type]
        raise InputError(
            f"{config.pretrain.dataset} has {len(images)} images, fewer than "  # type: ignore[arg-type]
            f"pretrain.batch_size={config.pretrain.batch_size}"
        )
    torch.manual_seed(config.run.seed)
    family = nexttoken if isinstance(policy, NextTokenPolicyConfig) else var
    vqvae, tokenized = family.train_tokenizer(config, images, device)
    _refuse_diverged(vqvae, "VQ-VAE", f"pretrain.vqvae_lr (now {config.pretrain.vqvae_lr:g})")
    model, token_loss = family.train_transformer(config, images, vqvae, device)
    _refuse_diverged(model, "transformer", f"pretrain.var_lr (now {config.pretrain.var_lr:g})")
    seconds = time.perf_counter() - start
    return model, vqvae, PretrainReport(tokenized.mse, tokenized.variance, tokenized.usage, token_loss, seconds)


def _images(config: Config) -> Images:
    """What the base learns from, told to the user where it is a folder."""
    policy, dataset = config.policy, config.pretrain.dataset
    if policy.conditioned_on == "text":
        captioned = load_captioned(dataset, policy.image_size, config.run.seed)
        if isinstance(captioned, CaptionedFolder):
            print(f"{captioned.folder}: {len(captioned)} images, {len(captioned.texts)} different captions")
        nexttoken.words_of(config, captioned.texts)  # what does not fit is said before anything is trained
        return captioned
    images = load_images(dataset, policy.image_size, policy.num_classes, policy.sizes_key)
    if isinstance(images, FolderImages):
        print(f"{images.folder}: {len(images)} images\n{label_table(labels_of(images))}")
        print("".join(f"note: {note}\n" for note in images.notes), end="")
    return images


def _refuse_diverged(model: torch.nn.Module, what: str, key: str) -> None:
    wrong = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    if wrong:
        raise NotFinitePolicy(
            f"pre-training of the {what} diverged: {len(wrong)} of its weights hold NaN or infinite numbers, first "
            f"{wrong[0]}; nothing was kept. Set a lower {key}"
        )
