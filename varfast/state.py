"""What a run is: everything that changes while it trains, and so everything that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from varfast.losses.config import LossConfig
from varfast.optim.adamw import ClippedAdamW
from varfast.optim.averages import Averages
from varfast.optim.config import UpdateConfig
from varfast.perf.spent import Spent
from varfast.policies.protocol import Policy
from varfast.rewards import WeightedSum
from varfast.runs.checkpoint import Checkpoint


class State:
    """Policy, reference, optimizer, averages of the weights, and how far the run has come.

    Args:
        policy: it is trained from here on.
        reference: a frozen copy of it, which the loss or the measured KL compares it with; None: there is none.
        rewards: what images earn.
        update: settings of the optimizer and of the averages.
        loss: how the reference moves: reference_every, reference_ema.

    Attributes:
        sampler: what a step's images are sampled from: the policy, or its reference.
        step: rollouts that are done, skipped ones too.
        skipped_rollouts: the last ones in a row whose rewards were not finite; nothing was learned from them.
        spent: by the steps that are done, skipped ones too. learned_spent: by those that a checkpoint holds now.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        rewards: WeightedSum,
        update: UpdateConfig,
        loss: LossConfig | None = None,
    ) -> None:
        self.policy, self.reference, self.rewards = policy, reference, rewards
        self.sampler = reference if reference is not None and loss is not None and loss.samples_reference else policy
        self.adamw = ClippedAdamW(policy, update)
        self.averages = Averages(policy.trainable, update.ema_decay)
        self._reference_every = None if loss is None else loss.reference_every
        # Of its own, in float32: a reference stores matrices in the compute dtype, where 0.001 of a change is lost.
        self._reference_average = Averages(policy.trainable, None if loss is None else loss.reference_ema)
        self.step = self.skipped_rollouts = 0
        self.spent = self.learned_spent = Spent()

    @property
    def learned_steps(self) -> int:
        """Steps that a checkpoint holds now: a rollout that was skipped changed nothing, and is tried again."""
        return self.step - self.skipped_rollouts

    def further(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What a run is beside weights and optimizer, by kind and name: to save, or to load into, in place.

        ema: the averages, if any are kept. reward: what rewards keep from step to step. reference: its weights, where
        policies of earlier steps replace it: such a policy is nowhere else. reference_ema: the average that it is.
        """
        kept = {
            "ema": self.averages.by_name,
            "reference_ema": self._reference_average.by_name,
            "reward": self.rewards.state(),
        }
        state: dict[str, Mapping[str, Tensor]] = {kind: tensors for kind, tensors in kept.items() if tensors}
        if self.reference is not None and self._reference_every is not None:
            shared = {id(p) for p in self.policy.trainable.parameters()}  # beneath an adapter
            named = self.reference.trainable.named_parameters()
            state["reference"] = {name: p.detach() for name, p in named if id(p) not in shared}
        return state

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over what a checkpoint holds. Raises: InputError as Checkpoint.load."""
        checkpoint.load(self.policy.trainable, self.adamw.optimizer, self.further())
        self.policy.gather()
        self._move_reference()
        self.step = checkpoint.step
        self.spent = self.learned_spent = checkpoint.spent or Spent()

    def begin_step(self) -> None:
        """Before a rollout: replace the reference, if that is due in this step, or was in skipped ones before it.

        Before, because the rollout may be sampled from the reference. Where it is skipped, the same policy becomes the
        reference again in the next step.
        """
        every = self._reference_every
        if self.reference is not None and every and self.step // every > (self.learned_steps - 1) // every:
            self.reference.refresh(self.policy)

    def end_step(self, learned: bool, spent: Spent = Spent()) -> None:  # noqa: B008 - it cannot change
        """After each step. learned: False if its rollout was skipped. spent: by this step.

        An average that is the reference takes in the policy here, once a rollout: within one, all optimizer steps and
        epochs have the same reference, whose log-probabilities are computed once.
        """
        self.step += 1
        self.spent += spent
        if learned:
            self.learned_spent = self.spent
            self._reference_average.update()
            self._move_reference()
        self.skipped_rollouts = 0 if learned else self.skipped_rollouts + 1

    def _move_reference(self) -> None:
        if self._reference_average.by_name:
            assert self.reference is not None
            self._reference_average.copy_to(self.reference.trainable)

    def reference_step(self) -> int | None:
        """Steps done by the policy that is the reference; None if it is the base for the whole run, or an average."""
        every = self._reference_every
        return None if every is None else (self.step - 1) // every * every

    @contextmanager
    def delivered(self) -> Iterator[None]:
        """In the body the policy is what `deliver` would make of it now, and afterwards what it was."""
        if not self.averages.by_name:
            yield
            return
        self._swap_averages()
        try:
            yield
        finally:
            self._swap_averages()

    def _swap_averages(self) -> None:
        self.averages.swap()
        self.policy.weights_changed()
        self.policy.gather()

    def deliver(self) -> None:
        """The run is over: the average of the weights, if one is kept, becomes the policy's weights."""
        if self.averages.by_name:
            self.averages.copy_to_weights()
            self.policy.gather()
