"""taming-transformers' class-conditional transformer and its VQGAN as a policy."""

from __future__ import annotations

from typing import ClassVar

import torch

from varfast.policies.config import FamilyName, LoRAConfig
from varfast.policies.nexttoken.cost import NextTokenCost
from varfast.policies.nexttoken.policy import NextTokenPolicy
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.taming.config import MinGPTConfig
from varfast.policies.taming.cost import count
from varfast.policies.taming.transformer import MinGPT
from varfast.types import Sampling


class TamingPolicy(NextTokenPolicy):
    """Parts "transformer" and "vqgan". There is no guidance: it was trained without a null class."""

    family: ClassVar[FamilyName] = "taming"
    rounding = "truncate"

    def __init__(
        self,
        transformer: MinGPT,
        vqgan: Tokenizer,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        fast: bool = True,
        strict: bool = False,
    ) -> None:
        """Args and errors as of NextTokenPolicy."""
        super().__init__({"transformer": transformer, "vqgan": vqgan}, device, dtype, fast, strict)

    @property
    def published_sampling(self) -> Sampling:
        return Sampling(top_k=600, top_p=0.92)

    def cost(self, dtype: str, lora: LoRAConfig | None = None) -> NextTokenCost:
        sizes = self.transformer.config
        assert isinstance(sizes, MinGPTConfig)
        return count(sizes, self.tokenizer.config, dtype, lora)
