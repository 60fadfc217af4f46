"""Sampling from a causal transformer: token by token, with a static key-value cache.

All steps are the same work on the same memory: place, randomness and results are kept on the device, so that one
captured step serves all tokens. Before them all places of the prompts are computed at once; the first step computes the
last place of each again, as it would that of a prompt of one place. The number of a draw depends on (seed, step, image,
place in the image) alone, as if the image were one scale of VAR.

Axes: B image, R row (B, or with guidance 2 B: first the images with their prompt, then without), N token of an image,
T place of the longest prompt, V vocabulary, C channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varfast import kernels
from varfast.policies.guidance import guided_logits
from varfast.policies.nexttoken.prompts import places_of
from varfast.policies.nexttoken.transformer import CausalTransformer, KVCache
from varfast.types import Sampling


class Decoding:
    """A batch of images that is being sampled: `step` draws one token of each.

    Args:
        model: is read, not changed.
        ids_R: (R,) int64, prompts: of B images, and with guidance as many that stand for none.
        key: (3,) int64 on the same device: seed, step, index of the first image.
        how: temperature and filters; its cfg is not read.
        strength_N: of guidance, of each token; None: there is none. See varfast.policies.guidance.
    Attributes:
        place: () int64, of the next token in its image.
        tokens_BN, logp_BN, entropy_BN: results up to `place`; log-probability and entropy are those of the distribution
            that is drawn from: after guidance, temperature and filters.
    """

    def __init__(
        self, model: CausalTransformer, ids_R: Tensor, key: Tensor, how: Sampling, strength_N: Tensor | None = None
    ) -> None:
        self._model, self._how, self._strength_N, self._key = model, how, strength_N, key
        batch = len(ids_R) if strength_N is None else len(ids_R) // 2
        device, num_tokens = ids_R.device, model.config.num_tokens
        x_RTC, length_R = model.embed_prompts(ids_R)
        self._cache = KVCache(model.config, len(ids_R), model.compute_dtype, device, x_RTC.shape[1])
        self.place = torch.zeros((), dtype=torch.int64, device=device)
        if length_R is None:
            self._x_RC, self._input_place = x_RTC.squeeze(1), self.place
        else:
            model.prefill(x_RTC, self._cache)
            self._input_place = length_R - 1
            self._x_RC = places_of(x_RTC, self._input_place.unsqueeze(1)).squeeze(1)
        self._place_1N = torch.arange(num_tokens, device=device).unsqueeze(0)
        self.tokens_BN = ids_R.new_zeros(batch, num_tokens)
        self.logp_BN, self.entropy_BN = torch.zeros(2, batch, num_tokens, device=device).unbind()

    def step(self) -> None:
        """Draw the token at `place` and go on to the next."""
        logits = self._model.step(self._x_RC, self._input_place, self._cache).unsqueeze(1)
        if self._strength_N is not None:
            logits = guided_logits(logits, self._strength_N.index_select(0, self.place.view(1)))
        how = self._how
        drawn = kernels.sample_tokens(
            logits, self._key, 0, how.temperature, top_k=how.top_k, top_p=how.top_p, first_token=self.place
        )
        if self._model.strict and how.on_policy:  # by the kernel of the update: sampling adds in another order
            drawn = drawn[0], *kernels.selective_log_softmax(logits, drawn[0], how.temperature)
        here_1N = self._place_1N == self.place
        for kept_BN, new_B1 in zip((self.tokens_BN, self.logp_BN, self.entropy_BN), drawn, strict=True):
            kept_BN.copy_(torch.where(here_1N, new_B1, kept_BN))
        embedded_BC = self._model.embed_tokens(drawn[0].squeeze(1))
        self._x_RC.copy_(embedded_BC if self._strength_N is None else embedded_BC.repeat(2, 1))
        self.place.add_(1)
        if self._input_place is not self.place:
            self._input_place.add_(1)


@torch.no_grad()
def sample(
    model: CausalTransformer, ids_R: Tensor, key: Tensor, how: Sampling, strength_N: Tensor | None = None
) -> Decoding:
    """All tokens of one image a prompt, without looking at a value on the host. Arguments as of Decoding."""
    decoding = Decoding(model, ids_R, key, how, strength_N)
    for _ in range(model.config.num_tokens):
        decoding.step()
    return decoding
