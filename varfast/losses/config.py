"""The section of the config that describes the loss. Defaults are the settings of arXiv:2505.23331. No PyTorch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from varfast.settings.section import MANY, Section

Coefficient = Annotated[float, Field(ge=0, le=1e6)]


class EntropyConfig(Section):
    """A bonus for the policy's entropy, whose weight follows that entropy. Defaults are those of arXiv:2603.23086."""

    coef: Coefficient = Field(
        2.2e-3,
        description="c: loss -= c * H, with H the mean entropy of the tokens' distributions, nats a token. It grows to "
        "this over the first 5 % of run.steps, and falls to 0 over the last 15 %",
    )
    target: float = Field(
        0.78,
        gt=0,
        lt=1,
        description="of H / ln V, V the size of the vocabulary; where the rollout's is more than 0.015 away, c is "
        "multiplied by exp(3 (target - H / ln V))",
    )
    clamp: tuple[Coefficient, Coefficient] = Field(
        (7e-5, 4e-3), strict=False, description="smallest and largest c after that"
    )

    @model_validator(mode="after")
    def _in_order(self) -> EntropyConfig:
        if self.clamp[0] > self.clamp[1]:
            raise ValueError(f"clamp={list(self.clamp)}: want the smaller number first")
        return self


class GRPOConfig(Section):
    """The loss."""

    clip_eps: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped to 1 +- this")
    ratio: Literal["token", "sequence"] = Field(
        "token",
        description="what is clipped: new to old probability of each token, or one ratio an image, exp of the mean "
        "over its tokens of log new - log old (GSPO, arXiv:2507.18071; arXiv:2603.23086)",
    )
    kl_beta: float = Field(
        0.2,
        ge=0,
        le=1e6,
        description="weight of the KL to the base model; 0: no reference is held, unless kl_every asks for it",
    )
    kl_gradient: Literal["k3", "unbiased"] = Field(
        "k3",
        description="of the KL in the loss: that of k3, or of k3 times the token's ratio, whose expectation is the "
        "gradient of the KL after the first optimizer step of a rollout too (arXiv:2510.01555; arXiv:2506.09477)",
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
    reference_ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="the reference of the KL is an average of the policy, which begins with the base model and becomes "
        "this * average + (1 - this) * policy after every step (rollout); arXiv:2603.23086 has 0.999. Default: the "
        "base model stays it",
    )
    entropy: EntropyConfig | None = Field(
        None, description="bonus for the policy's entropy; {} for the defaults; null: none"
    )
    normalise_std: bool = Field(
        True,
        description="divide advantages by their group's standard deviation; false (Dr. GRPO, arXiv:2503.20783): they "
        "are in units of the reward, and groups whose rewards differ little move the policy little",
    )
    advantage_eps: float = Field(1e-6, ge=1e-30, le=1e6, description="added to a group's standard deviation")
    scale_alpha: float = Field(
        0.0,
        ge=0,
        le=2,
        description="of families that sample scale by scale: an advantage counts for a token of a scale of side^2 "
        "tokens by 1 / (side^2)^alpha, with mean 1 over an image (arXiv:2601.02256 found 0.6 to 0.8 best); 0: alike",
    )
    combine: Literal["sum_then_normalise", "normalise_then_sum"] = Field(
        "sum_then_normalise",
        description="several rewards: advantages of their weighted sum, or the weighted sum of each one's advantages",
    )

    @model_validator(mode="after")
    def _has_reference(self) -> GRPOConfig:
        for name in ("reference_every", "reference_ema"):
            value = getattr(self, name)
            if value is not None and self.kl_beta == 0.0:
                raise ValueError(
                    f"{name}={value} with kl_beta=0, which holds no reference; set kl_beta > 0, or leave {name} out"
                )
        if self.reference_every is not None and self.reference_ema is not None:
            raise ValueError(
                f"reference_every={self.reference_every} with reference_ema={self.reference_ema}: the reference is a "
                "policy of before or an average; leave one of them out"
            )
        return self

    @property
    def reference_moves(self) -> str | None:
        """The key by which the reference does not stay the base model; None: it does."""
        moves = [name for name in ("reference_every", "reference_ema") if getattr(self, name) is not None]
        return moves[0] if moves else None
