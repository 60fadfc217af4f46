"""Training a VQ tokenizer, and a causal transformer on its tokens: for all next-token families.

Small on purpose: there is no adversarial and no perceptual loss.

Axes: B image, N token in raster order, V vocabulary, C code width.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from varfast.config import Config
from varfast.data.captioned import CaptionedFolder, CaptionedScenes
from varfast.data.datasets import Images
from varfast.policies.families import family_of
from varfast.policies.janus.config import JanusPolicyConfig
from varfast.policies.janus.text import TextTokenizer, word_tokenizer
from varfast.policies.janus.transformer import Janus
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.nexttoken.transformer import CausalTransformer
from varfast.pretraining.common import LINE_EVERY, REVIVE_EVERY, batches, learning_rate, optimizer_step, pixels
from varfast.pretraining.tokenizer import Tokenized, fit_tokenizer
from varfast.progress import Progress
from varfast.types import InputError


def train_tokenizer(config: Config, images: Images, device: torch.device) -> tuple[Tokenizer, Tokenized]:
    """A VQ tokenizer of the configured sizes."""
    _, tokenizer = family_of(config.policy).random_parts(config.policy, config.run.seed, device).values()
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer, fit_vq(config, images, tokenizer, device)


def fit_vq(config: Config, images: Images, tokenizer: Tokenizer, device: torch.device) -> Tokenized:
    """Train a tokenizer in place, and freeze it."""
    quantizer = tokenizer.quantize
    nn.init.normal_(quantizer.embedding.weight, std=0.5)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(quantizer.codes())  # of length 1, as the rows that replace unused codes

    def latents(batch: Tensor) -> Tensor:
        return quantizer.normalised(tokenizer.latents(batch).permute(0, 2, 3, 1).flatten(0, 2))

    return fit_tokenizer(config, images, tokenizer, quantizer.embedding.weight, latents, device)


def train_transformer(
    config: Config, images: Images, tokenizer: Tokenizer, device: torch.device
) -> tuple[CausalTransformer, float]:
    """A causal transformer on the tokens of the images, and its loss at the end in nats a token.

    Raises: InputError for DropPath, which these families do not have.
    """
    if config.pretrain.drop_path:
        raise InputError(
            f"pretrain.drop_path={config.pretrain.drop_path:g}: policy.family={config.policy.family} has no DropPath; "
            "use 0"
        )
    model, _ = family_of(config.policy).random_parts(config.policy, config.run.seed, device).values()
    assert isinstance(model, CausalTransformer)
    if isinstance(images, CaptionedScenes | CaptionedFolder):
        assert isinstance(model, Janus)
        model.text = words_of(config, images.texts)
        model.set_prompts(images.texts)
    return model, fit_causal(config, images, model, tokenizer, device)


def words_of(config: Config, texts: list[str]) -> TextTokenizer:
    """A text tokenizer of the words of captions.

    Raises: InputError for a table of text tokens that has fewer rows than there are words, or a caption that is longer
        than policy.max_prompt_tokens.
    """
    assert isinstance(config.policy, JanusPolicyConfig)
    words = {word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)}
    tokenizer = word_tokenizer(words, config.policy.max_prompt_tokens)
    rows = getattr(config.policy.sizes, "text_vocab_size")  # noqa: B009 - sizes are of any next-token model
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"the captions of pretrain.dataset={config.pretrain.dataset} have {len(words)} words, and "
            f"{config.policy.sizes_key}.text_vocab_size={rows}; set {config.policy.sizes_key}.text_vocab_size="
            f"{tokenizer.vocab_size}"
        )
    tokenizer.encode(texts)
    return tokenizer


def fit_causal(
    config: Config, images: Images, model: CausalTransformer, tokenizer: Tokenizer, device: torch.device
) -> float:
    """Train a transformer in place. Prompts are dropped where the family has one that says nothing.

    Returns: nats a token, mean over the last batches.
    """
    settings, steps = config.pretrain, config.pretrain.var_steps
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if not _undecayed(n, p)], "weight_decay": settings.weight_decay},
        {"params": [p for n, p in named if _undecayed(n, p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    losses: list[Tensor] = []
    dataset: Images = images
    if isinstance(images, TensorDataset):  # no random crops: the tokens are the same in every pass
        parts = [_tokens(tokenizer, part.to(device)) for part in images.tensors[0].split(settings.batch_size)]
        dataset = TensorDataset(torch.cat(parts).cpu(), images.tensors[1])
    progress, note = Progress("transformer", steps, every=LINE_EVERY), ""
    for step, (given, labels_B) in enumerate(batches(dataset, config, steps, device)):
        tokens_BN = given if given.ndim == 2 else _tokens(tokenizer, given)
        if (unguided_B := model.unguided(labels_B)) is not None:
            dropped_B = torch.rand(len(labels_B), device=device) < settings.class_dropout
            labels_B = torch.where(dropped_B, unguided_B, labels_B)
        logits_BNV = model(labels_B, _with_noise(tokens_BN, settings.token_noise, tokenizer.config.vocab_size))
        loss = F.cross_entropy(logits_BNV.flatten(0, 1), tokens_BN.flatten())
        optimizer_step(model, optimizer, loss, learning_rate(step, steps, settings.var_lr))
        losses.append(loss.detach())
        if (step + 1) % REVIVE_EVERY == 0:
            note = f"loss={float(losses[-1]):.3f}"
        progress.update(note)
    progress.close()
    return float(torch.stack(losses[-REVIVE_EVERY:]).mean())


@torch.no_grad()
def _tokens(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """(B, N), from images in [0, 1]."""
    return tokenizer.encode(pixels(images))


def _with_noise(tokens_BN: Tensor, share: float, vocab_size: int) -> Tensor:
    """A share of the tokens replaced by random ones."""
    if not share:
        return tokens_BN
    replaced_BN = torch.rand(tokens_BN.shape, device=tokens_BN.device) < share
    return torch.where(replaced_BN, torch.randint_like(tokens_BN, vocab_size), tokens_BN)


def _undecayed(name: str, parameter: Tensor) -> bool:
    return parameter.ndim < 2 or "emb" in name
