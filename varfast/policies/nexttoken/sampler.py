"""Sampling from a causal transformer: token by token, with a static key-value cache.

All steps are the same work on the same memory: place, randomness and results are kept on the device, so that one
captured step serves all tokens. The number of a draw depends on (seed, step, image, place in the image) alone, as if
the image were one scale of VAR.

Axes: B image, R row (B, or with guidance 2 B: first the images with their prompt, then without), N token of an image,
V vocabulary, C channel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from varfast import kernels
from varfast.policies.nexttoken.transformer import CausalTransformer, KVCache
from varfast.types import Sampling


class Guidance(NamedTuple):
    """Classifier-free guidance: logits (1 + strength) cond - strength uncond.

    Attributes:
        strength: > 0.
        null_id: of the prompt that says nothing.
        tokens: so many tokens are guided, the first ones; None: all. Later ones are drawn from cond alone.
    """

    strength: float
    null_id: int
    tokens: int | None = None


class Decoding:
    """A batch of images that is being sampled: `step` draws one token of each.

    Args:
        model: is read, not changed.
        ids_B: (B,) int64, prompts.
        key: (3,) int64 on the same device: seed, step, index of the first image.
        how: temperature and filters; its cfg is not read.
        guidance: None: there is none.
    Attributes:
        place: () int64, of the next token; all that a step knows of it.
        tokens_BN, logp_BN, entropy_BN: results up to `place`; log-probability and entropy are those of the distribution
            that is drawn from: after guidance, temperature and filters.
    """

    def __init__(
        self, model: CausalTransformer, ids_B: Tensor, key: Tensor, how: Sampling, guidance: Guidance | None = None
    ) -> None:
        self._model, self._how, self._guidance, self._key = model, how, guidance, key
        self._batch, device, num_tokens = len(ids_B), ids_B.device, model.config.num_tokens
        if guidance is not None:
            ids_B = torch.cat([ids_B, torch.full_like(ids_B, guidance.null_id)])
        self._cache = KVCache(model.config, len(ids_B), model.compute_dtype, device)
        self._x_RC = model.embed_prompt(ids_B)
        self.place = torch.zeros((), dtype=torch.int64, device=device)
        self._place_1N = torch.arange(num_tokens, device=device).unsqueeze(0)
        self.tokens_BN = ids_B.new_zeros(self._batch, num_tokens)
        self.logp_BN, self.entropy_BN = torch.zeros(2, self._batch, num_tokens, device=device).unbind()

    def step(self, guided: bool = True) -> None:
        """Draw the token at `place` and go on to the next. guided: False leaves out the guidance."""
        logits_R1V = self._model.step(self._x_RC, self.place, self._cache).unsqueeze(1)
        guide = self._guidance if guided else None
        drawn = kernels.sample_tokens(
            logits_R1V[: self._batch],
            self._key,
            0,
            self._how.temperature,
            uncond_logits_BlV=None if guide is None else logits_R1V[self._batch :],
            guidance=0.0 if guide is None else guide.strength,
            top_k=self._how.top_k,
            top_p=self._how.top_p,
            first_token=self.place,
        )
        here_1N = self._place_1N == self.place
        for kept_BN, new_B1 in zip((self.tokens_BN, self.logp_BN, self.entropy_BN), drawn, strict=True):
            kept_BN.copy_(torch.where(here_1N, new_B1, kept_BN))
        embedded_BC = self._model.embed_tokens(drawn[0].squeeze(1))
        self._x_RC.copy_(embedded_BC if self._guidance is None else embedded_BC.repeat(2, 1))
        self.place.add_(1)


@torch.no_grad()
def sample(
    model: CausalTransformer, ids_B: Tensor, key: Tensor, how: Sampling, guidance: Guidance | None = None
) -> Decoding:
    """All tokens of one image a prompt, without looking at a value on the host. Arguments as of Decoding."""
    decoding = Decoding(model, ids_B, key, how, guidance)
    num_tokens = model.config.num_tokens
    guided = num_tokens if guidance is None or guidance.tokens is None else guidance.tokens
    for place in range(num_tokens):
        decoding.step(place < guided)
    return decoding
