"""bitsandbytes' AdamW, whose moments take 8 bits, as the trainer needs it. Imported where update.optimizer asks for it.

A block of 256 numbers shares one float32, its largest magnitude; each number is one of 256 steps between 0 and that,
finer towards 0 (arXiv:2110.02861). Tensors of fewer than 4096 numbers keep float32 moments.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# On import bitsandbytes warns that a kernel for 4-bit products, which nothing here uses, cannot be had.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from bitsandbytes.optim.adamw import AdamW8bit as _AdamW8bit  # noqa: E402
from bitsandbytes.optim.optimizer import GlobalOptimManager  # noqa: E402

_SHARED = ("qmap1", "qmap2")  # the tables of steps: the same for every parameter


class AdamW8bit(_AdamW8bit):
    """bitsandbytes.optim.AdamW8bit with a state_dict of tensors alone, as torch.distributed.checkpoint takes it.

    Args:
        groups: parameter groups.
        lr, betas: as in torch.optim.AdamW.
        float32: parameters whose moments stay float32: those of which a step leaves parts without a gradient, as
            embeddings. The smallest second moment but 0 is 3e-7 of its block's largest: where gradients are below 4e-4
            of the block's largest, 0 is kept, and if the next gradient is exactly 0, Adam divides the first moment by
            eps alone. Simulated with the nearest of the 256 steps, an embedding of 1001 x 1024 of which each step meets
            16 rows, with normal gradients of 1e-3 and log-normal scales of the columns (sigma 1), made steps of 2358 lr
            within 60; with float32 moments, of 1.05 lr. Dense gradients are not quite safe from it: with such scales
            9e-5 of the steps were above 3 lr, the largest 17 lr at gradients of 1e-5, 437 lr at 1e-3. (bitsandbytes'
            kernel for a CPU rounds 0 up to 1.6e-5 of the largest, and does not show it.)
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], float32: Iterable[Tensor]
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas)
        # Its own: bitsandbytes' is one for the process and knows parameters by id, which a later run's may get again.
        self.mng = object.__new__(GlobalOptimManager)
        self.mng.initialize()
        self.mng.override_config(list(float32), "optim_bits", 32)

    def state_dict(self) -> dict[str, Any]:
        """As PyTorch's optimizers', `step` a tensor; the tables that all parameters share are left out."""
        content = torch.optim.Optimizer.state_dict(self)
        content["state"] = {
            index: {
                name: torch.tensor(value) if name == "step" else value
                for name, value in of_one.items()
                if name not in _SHARED
            }
            for index, of_one in content["state"].items()
        }
        return content

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load what `state_dict` made."""
        state = {index: of_one | {"step": int(of_one["step"])} for index, of_one in state_dict["state"].items()}
        super().load_state_dict(state_dict | {"state": state}, move_to_device)
        for parameter, of_one in self.state.items():
            if of_one["state1"].dtype == torch.uint8:
                for name, table in zip(_SHARED, ("dynamic", "udynamic"), strict=True):
                    self.name2qmap[table] = self.name2qmap[table].to(parameter.device)
                    of_one[name] = self.name2qmap[table]
