"""An exponential moving average of the trained weights, which a run delivers in their place where the config asks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from varfast.distributed import local


class Averages:
    """Averages of a model's trained weights: float32, sharded as the weights are.

    Args:
        model: its parameters that require a gradient are averaged.
        decay: after each optimizer step, average = decay * average + (1 - decay) * weight. None: no averages are kept,
            and every method does nothing.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self._decay = decay
        trained = {} if decay is None else dict(model.named_parameters())
        self._weights = {name: p for name, p in trained.items() if p.requires_grad}
        self.by_name = {name: p.detach().clone() for name, p in self._weights.items()}

    def update(self) -> None:
        """After an optimizer step; after a skipped one too, in which the weights stayed where they were."""
        if self._decay is not None:
            torch._foreach_lerp_(_parts(self.by_name), _parts(self._weights), 1.0 - self._decay)

    @torch.no_grad()
    def copy_to_weights(self) -> None:
        """Make the averages the weights. Training is over then."""
        if self.by_name:
            torch._foreach_copy_(_parts(self._weights), _parts(self.by_name))


def _parts(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """What this process holds of them; writing there writes them."""
    return [local(tensor) for tensor in tensors.values()]
