"""From a scored rollout to new weights: minibatches -> gradients -> optimizer steps.

Axes: B image, L token over all scales.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from varfast import kernels
from varfast.config import GRPOConfig, UpdateConfig
from varfast.distributed import ALONE, World, whole
from varfast.optim.gradients import Gradients
from varfast.perf.graphs import Replayed
from varfast.perf.stages import stage
from varfast.policies import strict
from varfast.policies.protocol import Checkpointing, Policy
from varfast.randomness import Purpose, keyed_generator
from varfast.types import InputError, Prompts, Rollout, ScoredRollout, StepStats


def learning_rate(config: UpdateConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then constant, or linear or cosine down to 0 at the end of the run."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.lr_schedule == "linear":
        return config.lr * (1.0 - progress)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


class Updater:
    """Owns the optimizer, the frozen reference and the average of the weights.

    Nothing here waits for the device before the whole rollout is used up: gradients are clipped, and steps whose
    gradient is not finite left out, on the device.

    Exact shortcuts: the log-probabilities of the rollout stand for an old policy's, so none are computed; without a KL
    term there is no reference, and an image whose advantage is 0 has no gradient, so it is left out.

    Args:
        policy: its transformer is updated in place.
        reference: the base of the KL term, or None with kl_beta = 0.
        grpo, update: settings; of `update`, micro_batch and checkpointing as they are to be used.
        total_steps: of the run, for the schedule.
        seed: of the run, for the order of the images.
        world: the processes that share the work. Each gets the whole scored rollout and takes its part of every
            minibatch; gradients, and so weights and statistics, are those of one process, up to the order of sums.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        grpo: GRPOConfig,
        update: UpdateConfig,
        total_steps: int,
        seed: int,
        world: World = ALONE,
    ) -> None:
        assert (reference is None) == (grpo.kl_beta == 0.0)
        self.policy, self.reference, self.world = policy, reference, world
        self.grpo, self.config, self.total_steps, self.seed = grpo, update, total_steps, seed
        self._checkpointing: Checkpointing = "none" if update.checkpointing == "auto" else update.checkpointing
        self._parameters = [p for p in policy.trainable.parameters() if p.requires_grad]
        alone = world.size == 1  # DistributedDataParallel and FSDP have gradients of their own
        self._captures = update.cuda_graph is True and policy.device.type == "cuda" and alone
        # A captured pass needs gradients that stay where they are. Else each product's own tensor is the gradient, and
        # is not copied: 8 bytes a parameter and optimizer step.
        self._gradients = Gradients(self._parameters) if update.cuda_graph is True and alone else None
        self._reference_pass = Replayed(self._reference_logp, policy.graph_pool)
        self._policy_pass = Replayed(self._accumulate, policy.graph_pool)
        self._reference_version = -1
        groups = [
            {"params": [p for p in self._parameters if p.ndim >= 2], "weight_decay": update.weight_decay},
            {"params": [p for p in self._parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        embeddings = [m.weight for m in policy.trainable.modules() if isinstance(m, nn.Embedding)]
        self.optimizer = _optimizer(groups, update, embeddings)
        self._averaged = {}  # weights by name, and their averages: float32, sharded as the weights are
        if update.ema_decay is not None:
            self._averaged = {name: p for name, p in policy.trainable.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().clone() for name, p in self._averaged.items()}
        # In strict mode, log-probabilities of this step that were not the rollout's. One tensor for all steps, and all
        # passes add to it: a captured one does so at each replay.
        self._differing = torch.zeros((), dtype=torch.int64, device=policy.device) if policy.strict else None
        self._skipped_in_a_row = 0

    def step(self, scored: ScoredRollout, step: int) -> StepStats:
        """One optimizer step a minibatch, over all images in an order that (seed, step) fixes.

        Raises:
            InputError: for a rollout drawn with guidance or filters, whose log-probabilities are not the policy's.
            InputError: in strict mode, for a log-probability before the first optimizer step that is not the rollout's.
            InputError: after update.max_skipped_steps gradients in a row that were not finite. None of them has reached
                a weight.
        """
        if not scored.rollout.on_policy:
            raise InputError("this rollout was drawn with cfg, top_k or top_p; GRPO needs the plain tempered policy")
        self._prepare_replays()
        lr = learning_rate(self.config, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        logp_ref_BL = None if self.reference is None else torch.zeros_like(scored.rollout.logp_BL)
        with_signal_B = None if self.reference is not None else (scored.advantages_B != 0).cpu()
        measured, norms, skipped = [], [], []
        differing = None  # of the first minibatch: after it the weights have moved
        if self._differing is not None:
            self._differing.zero_()
        for epoch in range(self.config.epochs):
            generator = keyed_generator(self.seed, Purpose.MINIBATCHES, step, epoch)
            for rows in torch.randperm(len(scored.advantages_B), generator=generator).split(self.config.minibatch):
                used = rows if with_signal_B is None else rows[with_signal_B[rows]]
                stats = self._gradient(scored, self._on_device(used), len(rows), logp_ref_BL, epoch == 0)
                if self._differing is not None and differing is None:
                    differing = self._differing.clone()
                with stage("optimizer"):
                    norm, not_finite = self._clipped_step()
                    self._average()
                if len(used):
                    measured.append(torch.where(not_finite, math.nan, stats))
                norms.append(norm)
                skipped.append(not_finite)
            if logp_ref_BL is not None and epoch == 0 and self.config.epochs > 1:
                self.world.sum(logp_ref_BL)  # other epochs split the images another way
        self.policy.gather()
        if differing is not None:
            strict.must_agree(int(self.world.sum(differing)), self.policy, scored.rollout, step)
        if not measured:  # no image had a gradient
            measured_N6 = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0, 0.0]], device=self.policy.device)
        else:
            measured_N6 = self._of_all_processes(torch.stack(measured))
        means = measured_N6.nanmean(dim=0)
        # Before the first optimizer step that is not left out, the policy is still the one that was sampled.
        gap = measured_N6[measured_N6[:, 0].isfinite().int().argmax(), 4:]
        norm = torch.stack(norms).nanmean()
        loss, kl, clip, ratio, gap_mean, gap_max, grad_norm = torch.cat([means[:4], gap, norm.unsqueeze(0)]).tolist()
        flags = torch.stack(skipped).tolist()
        self._count_skipped(flags)
        return StepStats(
            loss, kl if self.reference is not None else None, clip, ratio, gap_mean, gap_max, grad_norm, lr, sum(flags)
        )

    def further_state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What a run is beside weights and optimizer, by kind and name: to save, or to load into, in place.

        ema: the averages, with update.ema_decay. reference: its weights, where grpo.reference_every replaces them: the
        policy that they were is gone.
        """
        state: dict[str, dict[str, Tensor]] = {"ema": self._averages} if self._averages else {}
        if self.reference is not None and self.grpo.reference_every is not None:
            state["reference"] = {name: p.detach() for name, p in self.reference.trainable.named_parameters()}
        return state

    def deliver(self) -> None:
        """With update.ema_decay: make the average the policy's weights, of all processes. The run is over then."""
        if self._averages:
            torch._foreach_copy_(_local(self._averaged), _local(self._averages))
            self.policy.gather()

    def _average(self) -> None:
        """Move the averages after an optimizer step, taken or left out: towards weights that stayed, if left out."""
        if self.config.ema_decay is not None:
            torch._foreach_lerp_(_local(self._averages), _local(self._averaged), 1.0 - self.config.ema_decay)

    def _on_device(self, rows: Tensor) -> Tensor:
        """From pinned memory: a copy from other memory waits for all that was launched before."""
        if self.policy.device.type != "cuda":
            return rows.to(self.policy.device)
        return rows.pin_memory().to(self.policy.device, non_blocking=True)

    def _gradient(
        self, scored: ScoredRollout, rows: Tensor, minibatch: int, logp_ref_BL: Tensor | None, first_epoch: bool
    ) -> Tensor:
        """Set the gradient of a minibatch, of whose images `rows` have one.

        Returns: (6,) this process' part of loss and GRPO_STATS, if any have one.
        """
        if self._gradients is None:
            self.optimizer.zero_grad(set_to_none=True)
        if not len(rows):  # the gradient is 0, and Adam's moments still move the weights, those of 8 bits apart
            self._zero_gradient()
            return torch.empty(0)
        size = self.config.micro_batch or minibatch
        own = rows[self.world.rank :: self.world.size]
        parts = own.split(size) if len(own) else ()
        measured = [torch.zeros(1 + len(kernels.GRPO_STATS), device=rows.device)]
        # As many passes in every process as in process 0, which has the most images: each pass may be a collective.
        passes = -(-len(rows[:: self.world.size]) // size)
        for index in range(passes):
            with self.policy.backward(reduce=index == passes - 1):
                if index < len(parts):
                    stats = self._backward(scored, parts[index], minibatch, logp_ref_BL, first_epoch, index == 0)
                    share = len(parts[index]) / len(rows)
                    measured.append(torch.cat([stats[:1], stats[1:-1] * share, stats[-1:]]))
                else:  # no image left: a gradient of 0, by the same collectives: what is computed again counts
                    image = scored.rollout.rows(rows[:1])
                    logp_BL = self.policy.teacher_forced(image, checkpointing=self._checkpointing).logp_BL
                    (0.0 * logp_BL.sum()).backward()
        of_parts = torch.stack(measured)
        return torch.cat([of_parts[:, :-1].sum(dim=0), of_parts[:, -1:].amax(dim=0)])

    def _zero_gradient(self) -> None:
        if self._gradients is not None:
            self._gradients.zero()
            return
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)

    def _prepare_replays(self) -> None:
        """What a replayed graph does not look at: copies of changed weights, a reference that was replaced."""
        self.policy.low_precision_copies()
        if self.reference is not None:
            version = sum(p._version for p in self.reference.trainable.parameters() if not p.requires_grad)
            if version != self._reference_version:
                self._reference_pass.forget()
            self._reference_version = version

    def _backward(
        self,
        scored: ScoredRollout,
        rows: Tensor,
        minibatch: int,
        logp_ref_BL: Tensor | None,
        first_epoch: bool,
        first_pass: bool,
    ) -> Tensor:
        """Add the gradient of a micro-batch; (6,) its part of the minibatch's loss, and GRPO_STATS of its images.

        first_pass: of the minibatch: its gradient is the first.
        """
        rollout = scored.rollout.rows(rows)
        temperature, tokens_BL = rollout.temperature, rollout.tokens_BL
        var_input_BLC = rollout.teacher_input
        if var_input_BLC is None:
            var_input_BLC = self.policy.teacher_input(tokens_BL)
        inputs = (rollout.labels_B, tokens_BL, var_input_BLC)
        # A micro-batch of fewer images, the last of a minibatch or without those that have no signal, runs eagerly.
        captured = self._captures and len(rows) == (self.config.micro_batch or minibatch)
        if self.reference is not None and logp_ref_BL is not None and first_epoch:
            with stage("reference"):
                if captured:
                    (logp_ref_bL,) = self._reference_pass(temperature, *inputs)
                else:
                    (logp_ref_bL,) = self._reference_logp(temperature, *inputs)
                logp_ref_BL[rows] = logp_ref_bL
        with stage("update"):
            # On the device, without waiting for it: a captured pass reads it at each replay.
            share = torch.full((), len(rows) / minibatch, device=rows.device)
            logp_ref = () if logp_ref_BL is None else (logp_ref_BL[rows],)
            arguments = (*inputs, share, rollout.logp_BL, scored.advantages_B[rows], *logp_ref)
            run = self._policy_pass if captured else self._accumulate
            (stats,) = run((temperature, first_pass), *arguments)
            if self._gradients is not None:
                self._gradients.attach()
            return stats

    @torch.no_grad()
    def _reference_logp(
        self, temperature: float, labels_B: Tensor, tokens_BL: Tensor, var_input_BLC: Tensor
    ) -> tuple[Tensor]:
        assert self.reference is not None
        return (self.reference.teacher_forced(_given(temperature, labels_B, tokens_BL, var_input_BLC)).logp_BL,)

    def _accumulate(
        self,
        how: tuple[float, bool],
        labels_B: Tensor,
        tokens_BL: Tensor,
        var_input_BLC: Tensor,
        share: Tensor,
        logp_old_BL: Tensor,
        advantages_B: Tensor,
        logp_ref_BL: Tensor | None = None,
    ) -> tuple[Tensor]:
        """Forward and backward of a micro-batch, whose gradient is added to what is there.

        Args:
            how: temperature, and whether the gradient replaces what is there.
            share: scalar, of the minibatch's loss: what is minimised is the micro-batch's mean times this.
        Returns: (6,) its part of the loss, and GRPO_STATS.
        """
        temperature, first_pass = how
        if first_pass and self._gradients is not None:
            self._gradients.overwrite()
        given = _given(temperature, labels_B, tokens_BL, var_input_BLC)
        logp_BL = self.policy.teacher_forced(given, checkpointing=self._checkpointing).logp_BL
        if self._differing is not None:
            self._differing += (logp_BL.detach() != logp_old_BL).sum()
        loss, stats = kernels.grpo_token_loss(
            logp_BL, logp_old_BL, logp_ref_BL, advantages_B, clip_eps=self.grpo.clip_eps, kl_beta=self.grpo.kl_beta
        )
        loss = loss * share
        (loss * self.world.size).backward()  # of the processes' gradients the mean is taken
        return (torch.cat([loss.detach().unsqueeze(0), stats]),)

    def _of_all_processes(self, stats_N6: Tensor) -> Tensor:
        """Sums of the processes' parts; of the last, ratio_gap_max, the largest."""
        return torch.cat([self.world.sum(stats_N6[:, :-1].clone()), self.world.max(stats_N6[:, -1:].clone())], dim=1)

    def _clipped_step(self) -> tuple[Tensor, Tensor]:
        """Clip, step, write 16-bit copies, unless the gradient is not finite; its norm, and whether it was not."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = self._gradients.norm() if self._gradients else whole(torch.nn.utils.get_total_norm(gradients))
        not_finite = ~norm.isfinite()
        too_long = ((norm + 1e-6) / self.config.grad_clip).clamp_min(1.0)
        if self.config.optimizer == "adamw" and not isinstance(self._parameters[0], DTensor):
            group, tensors = self.optimizer.param_groups[0], self._adamw_tensors()
            kernels.adamw_step(tensors, group["lr"], group["betas"], group["eps"], too_long, not_finite.float())
            self.policy.weights_changed(copies_written=True)
            return norm, not_finite
        if isinstance(self.optimizer, torch.optim.AdamW):
            # The hooks of torch.amp.GradScaler: the kernel divides by the one, and does nothing where the other is 1.
            self.optimizer.grad_scale, self.optimizer.found_inf = too_long, not_finite.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        # apex and bitsandbytes have no such hooks: this waits for the device, once an optimizer step.
        elif not bool(not_finite) and not (self.config.optimizer == "adamw8bit" and norm == 0.0):
            # A gradient of 0 everywhere (no image has one) is left out with 8 bits: see adamw8bit, float32.
            torch._foreach_div_(gradients, too_long)
            self.optimizer.step()
        self.policy.weights_changed()
        return norm, not_finite

    def _adamw_tensors(self) -> kernels.AdamWTensors:
        """Of the parameters that have a gradient. The state is torch.optim.AdamW's, which saves and loads it."""
        copy_of = {id(weight): low for weight, low in self.policy.low_precision_copies()}
        trained = [
            (p, group["weight_decay"])
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        states = [self.optimizer.state[p] for p, _ in trained]
        for state, (p, _) in zip(states, trained, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return kernels.AdamWTensors(
            parameters=[p for p, _ in trained],
            gradients=[p.grad for p, _ in trained if p.grad is not None],
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            steps=[state["step"] for state in states],
            weight_decays=[decay for _, decay in trained],
            copies=[copy_of.get(id(p)) for p, _ in trained],
        )

    def _count_skipped(self, skipped: list[bool]) -> None:
        for flag in skipped:
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if flag else 0
            if self._skipped_in_a_row >= self.config.max_skipped_steps:
                raise InputError(
                    f"{self._skipped_in_a_row} gradients in a row were not finite; none of them reached a weight. The "
                    "same command goes on from the last checkpoint; if it stops again, lower update.lr or "
                    "update.grad_clip, in another run.dir; with run.dtype=bfloat16 try float32"
                )


def _given(temperature: float, labels_B: Tensor, tokens_BL: Tensor, teacher_input: Tensor) -> Rollout:
    nothing_BL = torch.empty(0)
    return Rollout(Prompts(labels_B), tokens_BL, nothing_BL, nothing_BL, temperature, True, teacher_input)


@torch.no_grad()
def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """What this process holds of them; writing there writes them."""
    return [(t.to_local() if isinstance(t, DTensor) else t).detach() for t in tensors.values()]


def _optimizer(groups: list[dict[str, Any]], config: UpdateConfig, embeddings: list[Tensor]) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    if config.optimizer == "adamw8bit":
        try:
            from varfast.optim.adamw8bit import AdamW8bit
        except ImportError as error:
            raise InputError(
                "update.optimizer=adamw8bit: bitsandbytes cannot be imported; pip install 'varfast[adamw8bit]', or use "
                f"adamw ({error})"
            ) from error
        device = groups[0]["params"][0].device
        probe = torch.nn.Parameter(torch.zeros(4096, device=device))
        probe.grad = torch.zeros_like(probe)
        try:
            AdamW8bit([{"params": [probe]}], config.lr, config.betas, float32=()).step()
        except RuntimeError as error:  # no kernel for this device or this version of CUDA
            raise InputError(
                f"update.optimizer=adamw8bit: bitsandbytes cannot step on {device}: {str(error).splitlines()[0]}; "
                "python -m bitsandbytes says what it found, or use adamw"
            ) from error
        return AdamW8bit(groups, config.lr, config.betas, float32=embeddings)
    try:
        fused_adam = importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError) as error:
        raise InputError(
            "update.optimizer=apex: NVIDIA Apex cannot be imported (the apex on PyPI is another package); build it "
            "from github.com/NVIDIA/apex, or use adamw"
        ) from error
    optimizer: torch.optim.Optimizer = fused_adam(groups, lr=config.lr, betas=config.betas, adam_w_mode=True)
    return optimizer
