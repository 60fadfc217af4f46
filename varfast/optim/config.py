"""The section of the config that leads from a scored rollout to new weights. No PyTorch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from varfast.settings.section import MANY, Section, check_divides

Beta = Annotated[float, Field(ge=0, lt=1)]


class UpdateConfig(Section):
    """From a scored rollout to new weights."""

    minibatch: int = Field(32, ge=1, le=MANY, description="images an optimizer step")
    micro_batch: int | None = Field(
        None, ge=1, description="images a forward and backward pass; default: chosen from free memory"
    )
    checkpointing: Literal["auto", "none", "attention", "full"] = Field(
        "auto",
        description="activations recomputed in the backward pass to save memory: none, each block's attention branch, "
        "or whole blocks; auto: chosen from free memory",
    )
    cuda_graph: bool | None = Field(
        None,
        description="on one GPU, replay captured forward and backward passes, which hold on to the memory of a "
        "micro-batch during the rollout; default: where memory allows it",
    )
    epochs: int = Field(
        1,
        ge=1,
        le=MANY,
        description="K, passes over a rollout, each in an order of its own; ratios stay those to the policy that "
        "sampled it (arXiv:2603.23086 has 2)",
    )
    optimizer: Literal["adamw", "apex", "adamw8bit"] = Field(
        "adamw",
        description="PyTorch's fused AdamW, NVIDIA Apex's FusedAdam, or bitsandbytes' AdamW with moments of 8 bits: "
        "a quarter of their memory",
    )
    lr: float = Field(1e-4, gt=0, le=1e9, description="learning rate")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up, to 0")
    warmup_steps: int = Field(0, ge=0, le=MANY, description="steps (rollouts) of linear warm-up")
    warmup_share: float = Field(
        0.0, ge=0, lt=1, description="share of run.steps of linear warm-up, rounded up; in place of warmup_steps"
    )
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), strict=False, description="of AdamW: how much of the moments stays from step to step"
    )
    weight_decay: float = Field(
        0.0, ge=0, le=1e6, description="of AdamW, for matrices; the KL already holds the weights"
    )
    grad_clip: float = Field(1.0, gt=0, le=1e30, description="largest gradient norm; 1e30: none")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="the run delivers an average of the weights, which begins with the base model and becomes decay * "
        "average + (1 - decay) * weights after every optimizer step: the last 1 / (1 - decay) steps or so. Default: "
        "the weights themselves",
    )
    max_skipped_steps: int = Field(
        10,
        ge=1,
        le=MANY,
        description="optimizer steps in a row left out for a gradient that is not finite, before the run stops",
    )

    @property
    def depends_on_steps(self) -> str | None:
        """The key by which a step's learning rate depends on run.steps; None: it does not."""
        if self.lr_schedule != "constant":
            return "lr_schedule"
        return "warmup_share" if self.warmup_share else None

    @model_validator(mode="after")
    def _divides(self) -> UpdateConfig:
        if self.warmup_steps and self.warmup_share:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} with warmup_share={self.warmup_share:g}: leave one of them out"
            )
        check_divides("update.micro_batch", self.micro_batch, self.minibatch, "images of a minibatch")
        return self
