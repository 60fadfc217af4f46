"""The section of the config that describes the loss. Defaults are the settings of arXiv:2505.23331. No PyTorch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from varfast.settings.section import MANY, Section


class GRPOConfig(Section):
    """The loss."""

    clip_eps: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped to 1 +- this")
    kl_beta: float = Field(
        0.2,
        ge=0,
        le=1e6,
        description="weight of the KL to the base model; 0: no reference is held, unless kl_every asks for it",
    )
    kl_every: int | None = Field(
        None,
        ge=1,
        description="with kl_beta=0, steps between measurements of the KL to the base, for which the base is held as "
        "with kl_beta > 0 (that of an adapter takes no memory) and runs forward once. Default: 10 with an adapter, "
        "else the KL is not measured. With kl_beta > 0 every step measures it",
    )
    reference_every: int | None = Field(
        None,
        ge=1,
        le=MANY,
        description="steps (rollouts) after which, again and again, the policy becomes the reference of the KL; "
        "default: the base model stays it",
    )
    advantage_eps: float = Field(1e-6, ge=1e-30, le=1e6, description="added to a group's standard deviation")
    combine: Literal["sum_then_normalise", "normalise_then_sum"] = Field(
        "sum_then_normalise",
        description="several rewards: advantages of their weighted sum, or the weighted sum of each one's advantages",
    )

    @model_validator(mode="after")
    def _has_reference(self) -> GRPOConfig:
        if self.reference_every is not None and self.kl_beta == 0.0:
            raise ValueError(
                f"reference_every={self.reference_every} with kl_beta=0, which holds no reference; set kl_beta > 0, or "
                "leave reference_every out"
            )
        return self
