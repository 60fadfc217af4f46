"""Janus-Pro and its VQ tokenizer as a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch

from varfast.policies import text
from varfast.policies.config import FamilyName, LoRAConfig
from varfast.policies.janus.config import JanusConfig
from varfast.policies.janus.cost import count
from varfast.policies.janus.text import TextTokenizer
from varfast.policies.janus.transformer import Janus
from varfast.policies.nexttoken.cost import NextTokenCost
from varfast.policies.nexttoken.policy import NextTokenPolicy
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.types import InputError, Sampling


class JanusPolicy(NextTokenPolicy):
    """Parts "transformer" and "vq".

    cfg of `sample` is the weight w of the public code: logits uncond + w (cond - uncond), of all tokens. At w = 1 that
    is cond itself, and 0, the default, stands for it too: the images without text are then not computed.
    """

    family: ClassVar[FamilyName] = "janus"
    rounding: Literal["nearest", "truncate"] = "truncate"

    def __init__(
        self,
        transformer: Janus,
        vq: Tokenizer,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        fast: bool = True,
        strict: bool = False,
    ) -> None:
        """Args and errors as of NextTokenPolicy."""
        super().__init__({"transformer": transformer, "vq": vq}, device, dtype, fast, strict)

    @property
    def _janus(self) -> Janus:
        model = self.trainable
        assert isinstance(model, Janus)
        return model

    @property
    def published_sampling(self) -> Sampling:
        return Sampling(cfg=5.0)

    def set_tokenizer(self, tokenizer: text.TextTokenizer) -> None:
        assert isinstance(tokenizer, TextTokenizer)
        self._janus.text = tokenizer

    def tokenizer_json(self) -> str:
        if self._janus.text is None:
            raise InputError("the policy has no text tokenizer: give it one by set_tokenizer before it is saved")
        return self._janus.text.to_json()

    def text_settings(self) -> dict[str, Any]:
        return {} if self._janus.text is None else {"max_prompt_tokens": self._janus.text.max_tokens}

    def set_prompts(self, texts: Sequence[str]) -> None:
        self._janus.set_prompts(texts)

    def ids_of(self, texts: Sequence[str]) -> list[int]:
        return self._janus.prompt_ids(texts)

    def _strengths(self, cfg: float) -> Sequence[float]:
        """uncond + w (cond - uncond) is w cond - (w - 1) uncond."""
        return [] if cfg == 1.0 else [cfg - 1.0] * self._janus.config.num_tokens

    def cost(self, dtype: str, lora: LoRAConfig | None = None) -> NextTokenCost:
        sizes = self._janus.config
        assert isinstance(sizes, JanusConfig)
        return count(sizes, self.tokenizer.config, dtype, lora, self._janus.prompts.places)
