"""From a scored rollout to new weights: minibatches -> gradients -> optimizer steps.

Axes: B image, L token over all scales, M minibatch, S statistic of the loss.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from varfast.distributed import ALONE, World
from varfast.losses import Loss
from varfast.optim.config import UpdateConfig
from varfast.optim.gradients import Gradients
from varfast.optim.schedule import learning_rate
from varfast.perf.graphs import Replayed
from varfast.perf.memory import UpdatePlan
from varfast.perf.stages import stage
from varfast.policies import strict
from varfast.policies.protocol import Policy
from varfast.randomness import Purpose, keyed_generator
from varfast.state import State
from varfast.types import Batch, InputError, Prompts, Rollout, Sampling


class Learner:
    """Makes the policy of a run better by one batch at a time.

    Nothing here waits for the device before the whole batch is used up: gradients are clipped, and steps whose gradient
    is not finite skipped, on the device.

    Args:
        state: its policy is updated in place, by its optimizer.
        loss: what is minimised. Images that it does not keep have no gradient and are not computed.
        update, plan: settings, and how the work is split so that it fits into memory.
        total_steps, seed: of the run, for the schedule and the order of the images.
        world: the processes that share the work. Each gets the whole batch and takes its part of every minibatch;
            gradients, and so weights and statistics, are those of one process, up to the order of sums.
    """

    def __init__(
        self,
        state: State,
        loss: Loss,
        update: UpdateConfig,
        plan: UpdatePlan,
        total_steps: int,
        seed: int,
        world: World = ALONE,
    ) -> None:
        assert (state.reference is not None) or not loss.needs_reference
        self.state, self.loss, self.world = state, loss, world
        self.config, self.plan, self.total_steps, self.seed = update, plan, total_steps, seed
        policy = state.policy
        alone = world.size == 1  # DistributedDataParallel and FSDP have gradients of their own
        self._captures = plan.cuda_graph and policy.device.type == "cuda" and alone
        # A captured pass needs gradients that stay where they are. Else each product's own tensor is the gradient, and
        # is not copied: 8 bytes a parameter and optimizer step.
        self._buffer = Gradients(state.adamw.parameters) if plan.cuda_graph and alone else None
        self._reference_pass = Replayed(self._reference_logp, policy.graph_pool)
        self._policy_pass = Replayed(self._accumulate, policy.graph_pool)
        # In strict mode, log-probabilities of this step that were not the rollout's. One tensor for all steps, and all
        # passes add to it: a captured one does so at each replay.
        self._differing = torch.zeros((), dtype=torch.int64, device=policy.device) if policy.strict else None
        self._skipped_in_a_row = 0
        # Of the loss, then of each statistic: whether a part of a minibatch counts by its images (the loss counts them
        # already), whether the largest part is taken, and whether the first minibatch alone counts.
        stats, device = loss.stats, policy.device
        self._is_mean = torch.tensor([False, *(s.over_images == "mean" for s in stats)], device=device)
        self._is_max = torch.tensor([False, *(s.over_images == "max" for s in stats)], device=device)
        self._is_first = torch.tensor([False, *(s.over_minibatches == "first" for s in stats)], device=device)
        self._nothing_measured = torch.tensor([0.0, *(s.without for s in stats)], device=device)

    def step(self, batch: Batch, step: int, total_steps: int | None = None) -> dict[str, float]:
        """One optimizer step a minibatch, over all images in an order that (seed, step) fixes.

        total_steps: of the run, for the schedule, where a budget may end it before; default: as at the beginning.
        Returns: by the names of metrics.jsonl loss, the loss's statistics, and
            grad_norm: gradient norm before clipping, mean over the optimizer steps;
            learning_rate: of the last optimizer step;
            skipped_steps: optimizer steps that were skipped because their gradient was not finite; no mean counts them;
            update_images: images of all processes that went forward and backward, in each epoch anew;
            reference_images: images that the reference has read.
        Raises:
            InputError: for a rollout drawn with filters, whose log-probabilities are not the policy's.
            InputError: in strict mode, for a log-probability before the first optimizer step that is not the rollout's.
            InputError: after update.max_skipped_steps gradients in a row that were not finite. None of them has reached
                a weight.
        """
        if not batch.rollout.on_policy:
            raise InputError("this rollout was drawn with top_k or top_p; training needs the policy itself")
        self._prepare_replays()
        total_steps = total_steps or self.total_steps
        lr = learning_rate(self.config, step, total_steps)
        self.state.adamw.set_lr(lr)
        if self._reference is not None:
            batch = replace(batch, logp_ref_BL=torch.zeros_like(batch.rollout.logp_BL))
        self.loss.begin(batch, step, total_steps)
        keep_B = self.loss.keep(batch)
        measured, norms, skipped = [], [], []
        learned, referenced = [], 0  # images of each minibatch that have a gradient; of all that the reference reads
        differing = None  # of the first minibatch: after it the weights have moved
        if self._differing is not None:
            self._differing.zero_()
        for epoch in range(self.config.epochs):
            for rows in self._minibatches(len(batch), step, epoch):
                kept = rows if keep_B is None else rows[keep_B[rows]]
                count = len(kept) if self.loss.mean_of_kept else len(rows)
                stats = self._gradient(batch, self._on_device(kept), count, epoch == 0)
                learned.append(len(kept))
                referenced += len(kept) if epoch == 0 and self._reference is not None else 0
                if self._differing is not None and differing is None:
                    differing = self._differing.clone()
                with stage("optimizer"):
                    norm, not_finite = self.state.adamw.step(self._buffer)
                    self.state.averages.update()
                if len(kept):
                    measured.append(torch.where(not_finite, math.nan, stats))
                norms.append(norm)
                skipped.append(not_finite)
            if batch.logp_ref_BL is not None and epoch == 0 and self.config.epochs > 1:
                self.world.sum(batch.logp_ref_BL)  # other epochs split the images another way
        self.state.policy.gather()
        if differing is not None:
            strict.must_agree(int(self.world.sum(differing)), self.state.policy, batch.rollout, step)
        found = [*self._reduced(measured, moved=learned[0] == 0), torch.stack(norms).nanmean()]
        *values, grad_norm = torch.stack(found).tolist()
        flags = torch.stack(skipped).tolist()
        self._count_skipped(flags)
        names = ["loss", *(stat.name for stat in self.loss.stats)]
        of_steps = {"grad_norm": grad_norm, "learning_rate": lr, "skipped_steps": sum(flags)}
        computed = {"update_images": float(sum(learned)), "reference_images": float(referenced)}
        return dict(zip(names, values, strict=True)) | of_steps | computed

    @property
    def _reference(self) -> Policy | None:
        return self.state.reference if self.loss.needs_reference else None

    def _minibatches(self, images: int, step: int, epoch: int) -> list[Tensor]:
        """Rows of each, on the CPU, in random order; the loss's units stay whole."""
        unit = self.loss.unit
        generator = keyed_generator(self.seed, Purpose.MINIBATCHES, step, epoch)
        order = torch.randperm(images // unit, generator=generator)
        if unit > 1:
            order = (order.unsqueeze(1) * unit + torch.arange(unit)).flatten()
        return list(order.split(self.config.minibatch))

    def _on_device(self, rows: Tensor) -> Tensor:
        """From pinned memory: a copy from other memory waits for all that was launched before."""
        device = self.state.policy.device
        return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)

    def _gradient(self, batch: Batch, rows: Tensor, count: int, first_epoch: bool) -> Tensor:
        """Set the gradient of a minibatch, of whose images `rows` have one.

        count: images that the minibatch's loss is the mean of.
        Returns: (1 + S,) this process' part of loss and statistics, if any image has a gradient.
        """
        if self._buffer is None:
            self.state.adamw.zero_grad()
        if not len(rows):  # the gradient is 0, and Adam's moments still move the weights, those of 8 bits apart
            self._zero_gradient()
            return torch.empty(0)
        size = self.plan.micro_batch
        # This process's shard: whole units, dealt out in turn.
        own = rows.view(-1, self.loss.unit)[self.world.rank :: self.world.size].flatten()
        parts = own.split(size) if len(own) else ()
        measured = [torch.zeros(1 + len(self.loss.stats), device=rows.device)]
        # As many passes in every process as in process 0, which has the most images: each pass may be a collective.
        passes = -(-len(rows.view(-1, self.loss.unit)[:: self.world.size]) * self.loss.unit // size)
        policy = self.state.policy
        for index in range(passes):
            with policy.backward(reduce=index == passes - 1):
                if index < len(parts):
                    stats = self._backward(batch, parts[index], count, first_epoch, index == 0)
                    measured.append(stats * torch.where(self._is_mean, len(parts[index]) / len(rows), 1.0))
                else:
                    # This rank has no rows left: run forward and backward on a zero loss, so that FSDP's collectives
                    # stay in step. Recomputed activations count among them.
                    image = batch.rollout.rows(rows[:1])
                    (0.0 * policy.teacher_forced(image, checkpointing=self.plan.checkpointing).logp_BL.sum()).backward()
        of_parts = torch.stack(measured)
        return torch.where(self._is_max, of_parts.amax(dim=0), of_parts.sum(dim=0))

    def _reduced(self, measured: list[Tensor], moved: bool) -> Tensor:
        """(1 + S,) loss and statistics of the step, from this process' parts of each minibatch.

        moved: Adam's moments had moved the weights before the first of them, so what is to be measured before any
            optimizer step was not: NaN.
        """
        if not measured:  # no image had a gradient
            return self._nothing_measured
        parts_MS = torch.stack(measured)
        measured_MS = torch.where(self._is_max, self.world.max(parts_MS.clone()), self.world.sum(parts_MS.clone()))
        # Before the first optimizer step that is not skipped, the policy is still the one that was sampled.
        first_S = measured_MS[measured_MS[:, 0].isfinite().int().argmax()]
        first_S = torch.full_like(first_S, math.nan) if moved else first_S
        return torch.where(self._is_first, first_S, measured_MS.nanmean(dim=0))

    def _zero_gradient(self) -> None:
        if self._buffer is not None:
            self._buffer.zero()
            return
        for parameter in self.state.adamw.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def _prepare_replays(self) -> None:
        """Bring the copies of changed weights up to date, those of a reference that moved too: a graph does not look.

        Weights change in place, so what a graph reads stays where it is.
        """
        self.state.policy.low_precision_copies()
        if self._reference is not None:
            self._reference.low_precision_copies()

    def _backward(self, batch: Batch, rows: Tensor, count: int, first_epoch: bool, first_pass: bool) -> Tensor:
        """Add the gradient of a micro-batch; (1 + S,) its part of the minibatch's loss, and statistics of its images.

        first_pass: of the minibatch: its gradient is the first.
        """
        part = batch.rows(rows)
        rollout = part.rollout
        read = (
            self.state.policy.teacher_input(rollout.tokens_BL)
            if rollout.teacher_input is None
            else rollout.teacher_input
        )
        inputs = (rollout.prompts.ids_B, rollout.tokens_BL, read)
        # A micro-batch of fewer images, the last of a minibatch or without those that have no signal, runs eagerly.
        captured = self._captures and len(rows) == self.plan.micro_batch
        reference: tuple[Tensor, ...] = ()
        if batch.logp_ref_BL is not None and part.logp_ref_BL is not None:
            reference = (part.logp_ref_BL,)
            if first_epoch:
                with stage("reference"):
                    reference = (self._reference_pass if captured else self._reference_logp)(rollout.how, *inputs)
                    batch.logp_ref_BL[rows] = reference[0]
        with stage("update"):
            # On the device, without waiting for it: a captured pass reads it at each replay.
            share = torch.full((), len(rows) / count, device=rows.device)
            arguments = (*inputs, share, rollout.logp_BL, part.advantages_BL, *reference)
            (stats,) = (self._policy_pass if captured else self._accumulate)((rollout.how, first_pass), *arguments)
            if self._buffer is not None:
                self._buffer.attach()
            return stats

    @torch.no_grad()
    def _reference_logp(self, how: Sampling, *inputs: Tensor) -> tuple[Tensor]:
        """Of prompts' ids, tokens and what is read in their place."""
        assert self._reference is not None
        return (self._reference.teacher_forced(_given(how, *inputs)).logp_BL,)

    def _accumulate(
        self,
        key: tuple[Sampling, bool],
        ids_B: Tensor,
        tokens_BL: Tensor,
        teacher_input: Tensor,
        share: Tensor,
        logp_old_BL: Tensor,
        advantages_BL: Tensor,
        logp_ref_BL: Tensor | None = None,
    ) -> tuple[Tensor]:
        """Forward and backward of a micro-batch, whose gradient is added to what is there.

        Args:
            key: temperature and guidance, and whether the gradient replaces what is there.
            share: scalar, of the minibatch's loss: what is minimised is the micro-batch's mean times this.
        Returns: (1 + S,) its part of the loss, and the loss's statistics.
        """
        how, first_pass = key
        if first_pass and self._buffer is not None:
            self._buffer.overwrite()
        rollout = _given(how, ids_B, tokens_BL, teacher_input, logp_old_BL)
        logp = self.state.policy.teacher_forced(
            rollout, checkpointing=self.plan.checkpointing, entropy=self.loss.needs_entropy
        )
        if self._differing is not None:
            self._differing += (logp.logp_BL.detach() != logp_old_BL).sum()
        loss, stats = self.loss(logp, Batch(rollout, advantages_BL, logp_ref_BL))
        loss = loss * share
        (loss * self.world.size).backward()  # of the processes' gradients the mean is taken
        return (torch.cat([loss.detach().unsqueeze(0), stats]),)

    def _count_skipped(self, skipped: list[bool]) -> None:
        for flag in skipped:
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if flag else 0
            if self._skipped_in_a_row >= self.config.max_skipped_steps:
                raise InputError(
                    f"{self._skipped_in_a_row} gradients in a row were not finite; none of them reached a weight. The "
                    "same command goes on from the last checkpoint; if it stops again, lower update.lr or "
                    "update.grad_clip, in another run.dir; with run.dtype=bfloat16 try float32"
                )


def _given(
    how: Sampling, ids_B: Tensor, tokens_BL: Tensor, teacher_input: Tensor, logp_BL: Tensor | None = None
) -> Rollout:
    """A rollout of tensors that a graph may have captured; entropies are not read."""
    logp_BL = torch.empty(0) if logp_BL is None else logp_BL
    return Rollout(Prompts(ids_B), tokens_BL, logp_BL, torch.empty(0), how.temperature, True, teacher_input, how.cfg)
