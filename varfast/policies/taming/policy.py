"""taming-transformers' class-conditional transformer and its VQGAN as a policy."""

from __future__ import annotations

import torch

from varfast.policies.nexttoken.policy import NextTokenPolicy
from varfast.policies.nexttoken.sampler import Guidance
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.taming.transformer import MinGPT
from varfast.types import InputError, Sampling


class TamingPolicy(NextTokenPolicy):
    """Parts "transformer" and "vqgan". There is no guidance: the model knows no prompt that says nothing."""

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

    def _guidance(self, how: Sampling) -> Guidance | None:
        if how.cfg:
            raise InputError(
                f"cfg={how.cfg}: taming's transformer was trained without a null class, so there is nothing to guide "
                "away from; use cfg=0, and top_k and top_p"
            )
        return None
