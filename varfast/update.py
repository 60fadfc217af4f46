"""From a scored rollout to new weights: minibatches -> gradients -> optimizer steps.

Axes: B image, L token over all scales.
"""

from __future__ import annotations

import math

import torch

from varfast import kernels
from varfast.config import GRPOConfig, UpdateConfig
from varfast.policy import Policy
from varfast.randomness import Purpose, keyed_generator
from varfast.types import InputError, ScoredRollout, StepStats


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
    """Owns the optimizer and the frozen reference.

    Args:
        policy: its transformer is updated in place.
        reference: the base of the KL term, or None with kl_beta = 0.
        grpo, update: settings.
        total_steps: of the run, for the schedule.
        seed: of the run, for the order of the images.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        grpo: GRPOConfig,
        update: UpdateConfig,
        total_steps: int,
        seed: int,
    ) -> None:
        assert (reference is None) == (grpo.kl_beta == 0.0)
        self.policy, self.reference = policy, reference
        self.grpo, self.config, self.total_steps, self.seed = grpo, update, total_steps, seed
        parameters = list(policy.var.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": update.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=update.lr, betas=update.betas)

    def step(self, scored: ScoredRollout, step: int) -> StepStats:
        """One optimizer step a minibatch, over all images in an order that (seed, step) fixes.

        Raises:
            InputError: for a rollout drawn with guidance or filters, whose log-probabilities are not the policy's.
            RuntimeError: for a gradient that is not finite; the weights are then those before that minibatch.
        """
        if not scored.rollout.on_policy:
            raise InputError("this rollout was drawn with cfg, top_k or top_p; GRPO needs the plain tempered policy")
        lr = learning_rate(self.config, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        measured, first_gap = [], None
        grad_norms = []
        num_images = len(scored.advantages_B)
        for epoch in range(self.config.epochs):
            order_B = torch.randperm(num_images, generator=keyed_generator(self.seed, Purpose.MINIBATCHES, step, epoch))
            for rows in order_B.to(self.policy.device).split(self.config.minibatch):
                stats, grad_norm = self._optimizer_step(scored, rows)
                measured.append(stats)
                grad_norms.append(grad_norm)
                if first_gap is None:
                    first_gap = stats
        assert first_gap is not None
        loss, kl, clip_fraction, ratio_mean, _, _ = torch.stack(measured).mean(dim=0).tolist()
        return StepStats(
            loss=loss,
            kl=kl,
            clip_fraction=clip_fraction,
            ratio_mean=ratio_mean,
            ratio_gap_mean=float(first_gap[-2]),
            ratio_gap_max=float(first_gap[-1]),
            grad_norm=float(torch.stack(grad_norms).mean()),
            learning_rate=lr,
        )

    def _optimizer_step(self, scored: ScoredRollout, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Accumulate the gradient of a minibatch and take one step; (6,) loss and GRPO_STATS, and the gradient norm."""
        self.optimizer.zero_grad(set_to_none=True)
        parts = rows.split(self.config.micro_batch or len(rows))
        measured = []
        for part in parts:
            rollout = scored.rollout.rows(part)
            logp_ref_BL = None
            if self.reference is not None:
                with torch.no_grad():
                    logp_ref_BL = self.reference.token_logp(rollout.labels_B, rollout.tokens_BL, rollout.temperature)
            logp_BL = self.policy.token_logp(rollout.labels_B, rollout.tokens_BL, rollout.temperature)
            loss, stats = kernels.grpo_token_loss(
                logp_BL,
                rollout.logp_BL,
                logp_ref_BL,
                scored.advantages_B[part],
                clip_eps=self.grpo.clip_eps,
                kl_beta=self.grpo.kl_beta,
            )
            (loss / len(parts)).backward()
            measured.append(torch.cat([loss.detach().unsqueeze(0), stats]))
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.policy.var.parameters(), self.config.grad_clip, error_if_nonfinite=True
        )
        self.optimizer.step()
        combined = torch.stack(measured).mean(dim=0)
        combined[-1] = torch.stack(measured)[:, -1].max()
        return combined, grad_norm
