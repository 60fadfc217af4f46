"""The sections of the config that describe the loss, one a loss, and what both answer. No PyTorch.

GRPO's defaults are the settings of arXiv:2505.23331, DPO's those of arXiv:2505.17017.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from varfast.settings.section import MANY, LocalPath, Section

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


class LossConfig(Section):
    """What the trainer asks of the loss that a run has chosen, whichever it is: `Config.loss`.

    Attributes:
        name: of the loss; in the config, the section of its settings.
        unit: rows of a batch that stay together, as `Loss.unit`.
        kl_every, reference_every, reference_ema: keys that the section of each loss has, with its own description.
    """

    name: ClassVar[str]
    unit: ClassVar[int] = 1

    if TYPE_CHECKING:  # fields of each loss
        kl_every: int | None
        reference_every: int | None
        reference_ema: float | None

    @property
    @abstractmethod
    def reads_reference(self) -> bool:
        """Whether the loss reads the log-probabilities of a reference, as `Loss.needs_reference`."""

    @abstractmethod
    def measure_kl_every(self, adapter: bool) -> int | None:
        """Steps between measurements of the KL to the reference apart from the loss; None: the loss has it, or none is
        asked for. adapter: the policy is one, so that the base takes no memory.
        """

    @abstractmethod
    def learned(self, group_size: int) -> int:
        """Of a group's images those that the update reads."""

    @property
    @abstractmethod
    def summary(self) -> tuple[str, str]:
        """Names and values of its main settings, for a model card."""

    @property
    @abstractmethod
    def holds_closer(self) -> str:
        """Which key, with its value now, keeps the policy closer to the reference: advice after it has diverged."""

    @property
    def samples_reference(self) -> bool:
        """Whether a step samples its images from the reference in place of the policy."""
        return False

    @property
    def saved_pairs(self) -> str | None:
        """Folder of pairs that are learned from; None: each step samples and scores images."""
        return None

    @property
    def reference_moves(self) -> str | None:
        """The key by which the reference does not stay the base model; None: it does."""
        moves = [name for name in ("reference_every", "reference_ema") if getattr(self, name) is not None]
        return moves[0] if moves else None

    def _check_one_reference(self) -> None:
        if self.reference_every is not None and self.reference_ema is not None:
            raise ValueError(
                f"reference_every={self.reference_every} with reference_ema={self.reference_ema}: the reference is a "
                "policy of before or an average; leave one of them out"
            )


class GRPOConfig(LossConfig):
    """The loss, unless there is a section dpo."""

    name: ClassVar[str] = "grpo"

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
        self._check_one_reference()
        return self

    @property
    def reads_reference(self) -> bool:
        return self.kl_beta > 0.0

    def measure_kl_every(self, adapter: bool) -> int | None:
        if self.kl_beta > 0.0:
            return None
        return self.kl_every or (10 if adapter else None)

    def learned(self, group_size: int) -> int:
        return group_size

    @property
    def summary(self) -> tuple[str, str]:
        return "KL weight, clip", f"{self.kl_beta}, {self.clip_eps}"

    @property
    def holds_closer(self) -> str:
        return f"a higher grpo.kl_beta (now {self.kl_beta:g})"


class DPOConfig(LossConfig):
    """The loss in place of GRPO, if this section is there: {} for its defaults. Learns from pairs of a preferred and a
    rejected image (arXiv:2305.18290, arXiv:2505.17017).
    """

    name: ClassVar[str] = "dpo"
    unit: ClassVar[int] = 2

    beta: float = Field(
        0.1,
        gt=0,
        le=1e6,
        description="loss = -log sigma(beta * margin), margin = log pi/pi_ref of the preferred image minus that of the "
        "rejected one, summed over an image's tokens; larger: the policy stays closer to the reference",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="chance that a preference is wrong, by which the loss of the pair the other way round counts "
        "(conservative DPO); 0: none",
    )
    loss_type: Literal["sigmoid", "hinge", "ipo"] = Field(
        "sigmoid",
        description="of the scaled margin z = beta * margin: sigmoid: -log sigma(z), DPO; hinge: max(0, 1 - z); ipo: "
        "(margin - 1 / (2 beta))^2, with the mean over tokens in place of the sum (arXiv:2310.12036)",
    )
    pairs_per_prompt: int = Field(
        1,
        ge=1,
        le=MANY,
        description="k: of a prompt's rollout.group_size samples the best and the worst by the reward are a pair; with "
        "k > 1 the second best and the second worst are the next one, and so on to k",
    )
    min_margin: float = Field(
        0.0,
        ge=0,
        le=1e9,
        description="pairs whose rewards are closer than this, in units of the reward, are left out; equal ones always",
    )
    samples: Literal["policy", "reference"] = Field(
        "policy",
        description="whose samples the pairs are made of: the policy's of now, or the reference's: with "
        "reference_every, those of the policy that the round began with (iterative DPO)",
    )
    pairs: LocalPath | None = Field(
        None,
        description="learn from the pairs in this folder, which a run with save_pairs has written (its folder, or "
        "pairs/ in it): steps neither sample nor score, and read labels_per_step * pairs_per_prompt pairs each, in an "
        "order that run.seed fixes anew in every pass. Default: each step samples its own",
    )
    save_pairs: bool = Field(
        False, description="keep the pairs of every step in the folder pairs/ of the run, for dpo.pairs of another run"
    )
    reference_every: int | None = Field(
        None,
        ge=1,
        le=MANY,
        description="steps (rollouts) of a round: after as many, again and again, the policy becomes the reference; "
        "default: the base model stays it",
    )
    reference_ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="the reference is an average of the policy, which begins with the base model and becomes this * "
        "average + (1 - this) * policy after every step (rollout). Default: the base model stays it",
    )
    kl_every: int | None = Field(
        10,
        ge=1,
        description="steps between measurements of the KL of the policy to the reference, over all samples of the "
        "step: one forward pass of the reference; null: it is not measured, nor is it where the policy does not sample",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> DPOConfig:
        self._check_one_reference()
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(
                f"label_smoothing={self.label_smoothing:g} with loss_type={self.loss_type}: only the sigmoid has a "
                "smoothed version; leave one of them out"
            )
        if self.pairs is not None and (self.save_pairs or self.samples == "reference" or self.min_margin):
            what = (
                "save_pairs=true"
                if self.save_pairs
                else "samples=reference"
                if self.samples_reference
                else "min_margin"
            )
            raise ValueError(
                f"{what} with pairs={self.pairs}: saved pairs are neither sampled nor chosen; leave it out"
            )
        return self

    @property
    def reads_reference(self) -> bool:
        return True

    @property
    def samples_reference(self) -> bool:
        return self.samples == "reference"

    @property
    def saved_pairs(self) -> str | None:
        return self.pairs

    def measure_kl_every(self, adapter: bool) -> int | None:
        # It is estimated from the policy's own samples.
        return self.kl_every if self.samples == "policy" and self.pairs is None else None

    def learned(self, group_size: int) -> int:
        return 2 * self.pairs_per_prompt

    @property
    def summary(self) -> tuple[str, str]:
        return "beta of DPO", f"{self.beta:g}"

    @property
    def holds_closer(self) -> str:
        return f"a higher dpo.beta (now {self.beta:g})"
