"""AdamW with gradient clipping. A step whose gradient is not finite is skipped on the device."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from varfast import kernels
from varfast.distributed import is_sharded, whole
from varfast.optim.config import UpdateConfig
from varfast.optim.gradients import Gradients
from varfast.policies.protocol import Policy
from varfast.types import InputError


class ClippedAdamW:
    """Clips the gradient, steps, and brings the low-precision copies of the weights up to date.

    Matrices have weight decay; vectors have none.

    Attributes:
        policy: whose low-precision copies are brought up to date.
        parameters: those of the policy that are trained.
        optimizer: what holds the moments; its state is part of a checkpoint.
    """

    def __init__(self, policy: Policy, config: UpdateConfig) -> None:
        """Raises: InputError if update.optimizer needs a package that is not here, or that cannot run here."""
        self.policy, self._config = policy, config
        self.parameters = [p for p in policy.trainable.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        embeddings = [m.weight for m in policy.trainable.modules() if isinstance(m, nn.Embedding)]
        self.optimizer = _optimizer(groups, config, embeddings)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, buffer: Gradients | None = None) -> tuple[Tensor, Tensor]:
        """Clip and step, unless the gradient is not finite.

        Args:
            buffer: the one that holds the gradients, if there is one.
        Returns: two scalars on the device: the gradient's norm before clipping, and whether the step was skipped.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = buffer.norm() if buffer else whole(torch.nn.utils.get_total_norm(gradients))
        not_finite = ~norm.isfinite()
        too_long = ((norm + 1e-6) / self._config.grad_clip).clamp_min(1.0)
        if self._config.optimizer == "adamw" and not is_sharded(self.parameters[0]):
            group, tensors = self.optimizer.param_groups[0], self._tensors()
            kernels.adamw_step(tensors, group["lr"], group["betas"], group["eps"], too_long, not_finite.float())
            self.policy.weights_changed(copies_written=True)
            return norm, not_finite
        if isinstance(self.optimizer, torch.optim.AdamW):
            # The hooks of torch.amp.GradScaler: the kernel divides by the one, and does nothing where the other is 1.
            self.optimizer.grad_scale, self.optimizer.found_inf = too_long, not_finite.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        # apex and bitsandbytes have no such hooks: this waits for the device, once an optimizer step.
        elif not bool(not_finite) and not (self._config.optimizer == "adamw8bit" and norm == 0.0):
            # With 8 bits a gradient of 0 everywhere (no image has one) is skipped too: see adamw8bit, float32.
            torch._foreach_div_(gradients, too_long)
            self.optimizer.step()
        self.policy.weights_changed()
        return norm, not_finite

    def _tensors(self) -> kernels.AdamWTensors:
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


def _optimizer(
    groups: list[dict[str, Any]], config: UpdateConfig, embeddings: Iterable[Tensor]
) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    if config.optimizer == "adamw8bit":
        return _adamw8bit(groups, config, embeddings)
    try:
        fused_adam = importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError) as error:
        raise InputError(
            "update.optimizer=apex: NVIDIA Apex cannot be imported (the apex on PyPI is another package); build it "
            "from github.com/NVIDIA/apex, or use adamw"
        ) from error
    optimizer: torch.optim.Optimizer = fused_adam(groups, lr=config.lr, betas=config.betas, adam_w_mode=True)
    return optimizer


def _adamw8bit(
    groups: list[dict[str, Any]], config: UpdateConfig, embeddings: Iterable[Tensor]
) -> torch.optim.Optimizer:
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
    return AdamW8bit(groups, config.lr, config.betas, float32=list(embeddings))
