"""The section of the config that says what is sampled, whatever the family of the policy. No PyTorch."""

from __future__ import annotations

from pydantic import Field, model_validator

from varfast.settings.section import AllOrLabels, Section, check_divides

# Images that the captured decoder takes at a time. Its buffers stay from step to step: 3.4 GB in bfloat16 at 256 px.
# Its smallest maps, 16 x 16, are 8192 rows then, 2.4 waves of tiles on an H100 and 5 % of the arithmetic.
DECODE_GRAPH_IMAGES = 32


class RolloutConfig(Section):
    """What is sampled in a step: labels_per_step * group_size images."""

    labels_per_step: int = Field(32, ge=1, le=1_000_000, description="P, labels drawn a step")
    group_size: int = Field(
        16, ge=2, le=1_000_000, description="G, images a label; the group within which advantages are relative"
    )
    temperature: float = Field(0.7, ge=1e-3, le=1000, description="of the multinomial draw, which has no filters")
    cfg: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="classifier-free guidance as a part of the policy; 0: none. Ratio, KL, entropy and the table of "
        "before and after are then of the guided distribution, for policy and reference, and its gradient goes through "
        "both halves: rollout, reference and update cost twice. The model must have been trained with class dropout. "
        "VAR: scale k of K - 1 is guided by cfg * k / (K - 1)",
    )
    labels: AllOrLabels = Field(
        "all", description="labels to draw from, uniformly: numbers, or names of ImageNet's classes or of your folders"
    )
    label_share: float = Field(1.0, gt=0, le=1, description="train on this share of the labels, chosen by run.seed")
    micro_batch: int | None = Field(
        None, ge=1, description="images sampled and decoded at a time; default: chosen from free memory"
    )
    cuda_graph: bool | None = Field(
        None,
        description="on a GPU, replay a captured rollout, which holds on to its memory during the update; default: "
        "where that leaves the update its room",
    )

    @property
    def images(self) -> int:
        """B, images a step."""
        return self.labels_per_step * self.group_size

    @property
    def rows(self) -> int:
        """Of the model an image: one, and with guidance a second one without the label."""
        return 2 if self.cfg > 0.0 else 1

    @model_validator(mode="after")
    def _divides(self) -> RolloutConfig:
        check_divides("rollout.micro_batch", self.micro_batch, self.images, "images a step")
        return self
