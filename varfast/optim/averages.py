"""An exponential moving average of the trained weights, which a run delivers in their place where the config asks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from varfast.distributed import is_sharded, local, whole


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

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and weights, tensor by tensor. Done twice, every bit is where it was."""
        for average, weight in zip(_parts(self.by_name), _parts(self._weights), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Make them the weights of another model of the same names, which is whole: all processes must call it."""
        weights = dict(model.named_parameters())
        if any(is_sharded(average) for average in self.by_name.values()):
            for name, average in self.by_name.items():  # one at a time: little memory
                weights[name].copy_(whole(average.to(weights[name].dtype)))
        else:
            torch._foreach_copy_([weights[name].detach() for name in self.by_name], list(self.by_name.values()))


def _parts(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """What this process holds of them; writing there writes them."""
    return [local(tensor) for tensor in tensors.values()]
