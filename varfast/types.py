"""What flows between the rooms.

Axes: B image, L token over all scales; B = P labels x G samples, group-major (the G rows of a label are adjacent).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # varfast/command.py answers a typo before PyTorch is imported
    from torch import Tensor


# How a reward is normalised apart from the others: within each group, over the whole step, or not at all.
Normalise = Literal["group", "batch", "none"]


class InputError(ValueError):
    """Something the user gave cannot be used. Commands print its message alone, without a traceback.

    Attributes:
        told_by: which of several processes print it: each; the first on each machine, where all of them fail alike; or
            the first of all, which has the same error or the one that this follows from.
    """

    told_by: Literal["each", "machine", "first"] = "each"


class NotFiniteReward(InputError):
    """A reward gave NaN or Inf. A run leaves such a rollout out; run.max_bad_rollouts of them in a row end it."""


class NotFinitePolicy(InputError):
    """A policy's logits, weights or images are not finite: it has diverged, or its files are damaged."""


@dataclass(frozen=True)
class Prompts:
    """What each image of a batch is to show.

    Attributes:
        ids_B: (B,) int64; for a family that is conditioned on classes, their labels; for one that is conditioned on
            text, rows of the table of prompts that `Policy.set_prompts` has made.
    """

    ids_B: Tensor

    def __len__(self) -> int:
        return len(self.ids_B)

    def rows(self, index: Tensor | slice) -> Prompts:
        """The prompts of the images at `index`."""
        return Prompts(self.ids_B[index])

    def repeat(self, times: int) -> Prompts:
        """Each of them `times` times in a row."""
        return Prompts(self.ids_B.repeat_interleave(times))


@dataclass(frozen=True)
class TokenLogp:
    """What a policy thinks of given tokens, teacher-forced.

    Attributes:
        logp_BL: (B, L) float32, log-probability of each token; differentiable.
        entropy_BL: (B, L) float32, entropy in nats of the distribution that each token was drawn from; differentiable.
            None where it was not asked for.
    """

    logp_BL: Tensor
    entropy_BL: Tensor | None = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. Training uses temperature and guidance; the filters are for inference.

    Attributes:
        temperature: > 0; of the multinomial draw, after guidance.
        cfg: strength of classifier-free guidance, as the family of the policy counts it; 0 switches it off.
        top_k, top_p: filters of kernels.sample_tokens; 0 switches one off.
    Raises: InputError for a value out of range.
    """

    temperature: float = 1.0
    cfg: float = 0.0
    top_k: int = 0
    top_p: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature={self.temperature}: must be > 0; for greedy choice use top_k=1")
        if not self.cfg >= 0 or self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise InputError(
                f"cfg={self.cfg}, top_k={self.top_k}, top_p={self.top_p}: want cfg >= 0, top_k >= 0, 0 <= top_p <= 1"
            )

    @property
    def on_policy(self) -> bool:
        """The policy itself is sampled, guided or not, without filters: `teacher_forced` has its probabilities."""
        return self.top_k == 0 and self.top_p in (0.0, 1.0)


@dataclass(frozen=True)
class Rollout:
    """Sampled images as tokens, with their log-probabilities at the time of sampling.

    Attributes:
        prompts: of the B images.
        tokens_BL: (B, L) int64, in the order in which they were sampled; for VAR scale by scale, row-major within one.
        logp_BL: (B, L) float32, log-probability of each token under the distribution that it was sampled from.
        entropy_BL: (B, L) float32, entropy of that distribution in nats.
        temperature: of that distribution.
        on_policy: sampled without filters: the distribution is the policy itself, at this temperature and with this
            guidance, as an update needs.
        teacher_input: (B, ...), what `Policy.teacher_input` makes of the tokens, where sampling has kept it: an update
            need not compute it again. For VAR (B, L - first, code width) float32.
        cfg: guidance of that distribution.
    """

    prompts: Prompts
    tokens_BL: Tensor
    logp_BL: Tensor
    entropy_BL: Tensor
    temperature: float
    on_policy: bool
    teacher_input: Tensor | None = None
    cfg: float = 0.0

    @property
    def how(self) -> Sampling:
        """The distribution that teacher forcing is to describe."""
        return Sampling(self.temperature, self.cfg)

    @property
    def labels_B(self) -> Tensor:
        """(B,) int64, the ids of the prompts: class labels, for a family that is conditioned on classes."""
        return self.prompts.ids_B

    def rows(self, index: Tensor | slice) -> Rollout:
        """The images at `index`."""
        return replace(
            self,
            prompts=self.prompts.rows(index),
            tokens_BL=self.tokens_BL[index],
            logp_BL=self.logp_BL[index],
            entropy_BL=self.entropy_BL[index],
            teacher_input=None if self.teacher_input is None else self.teacher_input[index],
        )


@dataclass(frozen=True)
class Rewards:
    """The reward of each image.

    Attributes:
        total_B: (B,) float32, the weighted sum.
        components: (B,) float32 each, before their weights, by the name they have in the config.
        numbers: () each, of the step as a whole, by name.
    """

    total_B: Tensor
    components: dict[str, Tensor]
    numbers: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, index: Tensor | slice) -> Rewards:
        """Those of the images at `index`."""
        return Rewards(self.total_B[index], {name: score_B[index] for name, score_B in self.components.items()})


@dataclass(frozen=True)
class RewardBatch:
    """What a reward may ask of the images beside their pixels; docs/rewards.md.

    Attributes:
        labels: (B,) int64; for a family that is conditioned on text, rows of the run's table of prompts.
        names: the class name of each image; None where the labels have none.
        prompts: in words what each image is to show: its prompt, its class name, or else the number of its label.
        step: of the training, from 0; None in an evaluation.
        seed: of the run.
        tags: of each prompt, "" where it has none; [] for labels.
        metadata: likewise, what else the source of the prompts says of each; [] for labels.
    """

    labels: Tensor
    names: list[str] | None
    prompts: list[str]
    step: int | None
    seed: int
    tags: list[str] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)

    def copy(self) -> RewardBatch:
        """One whose tensors, lists and metadata may be written to."""
        names = None if self.names is None else list(self.names)
        return replace(
            self,
            labels=self.labels.clone(),
            names=names,
            prompts=list(self.prompts),
            tags=list(self.tags),
            metadata=copy.deepcopy(self.metadata),
        )


@dataclass(frozen=True)
class Batch:
    """The images of a step, or of a micro-batch, as a loss sees them.

    Attributes:
        rollout: what was sampled.
        advantages_BL: (B, L) float32 of any strides: how much the loss wants more (positive) or less of each token. One
            number an image is an expanded (B, 1): no memory. With DPO 1 for the preferred image of a pair, -1 for the
            rejected one, and 0 for both of a pair that is left out.
        logp_ref_BL: (B, L) float32 under the frozen reference, where the loss needs it.
        numbers: () each, of the step as a whole, by the names of metrics.jsonl; counts are integers.
    """

    rollout: Rollout
    advantages_BL: Tensor
    logp_ref_BL: Tensor | None = None
    numbers: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, rollout: Rollout, advantages_B: Tensor, weights_L: Tensor | None = None) -> Batch:
        """One advantage an image, (B,) float32: that of all its tokens, or of each times its weight, (L,) float32."""
        advantages_BL = advantages_B.unsqueeze(1).expand_as(rollout.tokens_BL)
        return cls(rollout, advantages_BL if weights_L is None else advantages_BL * weights_L)

    def __len__(self) -> int:
        return len(self.advantages_BL)

    def rows(self, index: Tensor | slice) -> Batch:
        """The images at `index`."""
        logp_ref_BL = None if self.logp_ref_BL is None else self.logp_ref_BL[index]
        # Indexing would write out what is expanded.
        expanded, tokens = self.advantages_BL.stride(1) == 0, self.advantages_BL.shape[1]
        advantages_BL = self.advantages_BL[:, :1][index].expand(-1, tokens) if expanded else self.advantages_BL[index]
        return Batch(self.rollout.rows(index), advantages_BL, logp_ref_BL)
