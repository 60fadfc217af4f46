"""LlamaGen and its VQ tokenizer as a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from varfast.policies.config import FamilyName, LoRAConfig
from varfast.policies.llamagen.config import GPTConfig
from varfast.policies.llamagen.cost import count
from varfast.policies.llamagen.transformer import LlamaGen
from varfast.policies.nexttoken.cost import NextTokenCost
from varfast.policies.nexttoken.policy import NextTokenPolicy
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.types import Sampling


class LlamaGenPolicy(NextTokenPolicy):
    """Parts "gpt" and "vq".

    cfg of `sample` is the scale s of the public code: logits uncond + s (cond - uncond), of all tokens. Up to 1, and so
    at the default 0, nothing is guided and the images without label are not computed. (VAR's cfg of t is s = 1 + t.)
    """

    family: ClassVar[FamilyName] = "llamagen"

    def __init__(
        self,
        gpt: LlamaGen,
        vq: Tokenizer,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        fast: bool = True,
        strict: bool = False,
    ) -> None:
        """Args and errors as of NextTokenPolicy."""
        super().__init__({"gpt": gpt, "vq": vq}, device, dtype, fast, strict)

    @property
    def published_sampling(self) -> Sampling:
        """By size: 2 for B and L, 1.75 for XL and XXL, 1.65 for 3B."""
        width = self.transformer.config.width
        return Sampling(cfg=2.0 if width <= 1024 else 1.75 if width <= 1536 else 1.65)

    def _strengths(self, cfg: float) -> Sequence[float]:
        """uncond + s (cond - uncond) is s cond - (s - 1) uncond."""
        return [cfg - 1.0] * self.transformer.config.num_tokens if cfg > 1.0 else []

    def cost(self, dtype: str, lora: LoRAConfig | None = None) -> NextTokenCost:
        sizes = self.transformer.config
        assert isinstance(sizes, GPTConfig)
        return count(sizes, self.tokenizer.config, dtype, lora)
