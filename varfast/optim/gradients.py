"""The gradients of a model in one buffer that is allocated once, so that a captured backward pass can write there.

Axes: N number of all parameters, each padded to a multiple of 64, all of them to one of 4096.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_ALIGNED = 64  # numbers: 256 bytes, beyond what any vectorised kernel wants
_ROW = 4096  # numbers whose squares are added first: the error of one float32 sum over 20 million is 0.1 % on a CPU


class Gradients:
    """Views of one float32 buffer, the .grad of every parameter.

    The first backward pass of an optimizer step is written into the buffer as it comes (8 bytes a parameter: the new
    gradient read, the buffer written); zeroing the buffer and adding would take 16. Later passes add in place.

    Args:
        parameters: all that are trained, float32, on one device; not sharded, and not DistributedDataParallel's, which
            has buffers of its own.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        padded = [-(-p.numel() // _ALIGNED) * _ALIGNED for p in self._parameters]
        rows = -(-sum(padded) // _ROW)
        self.flat_N = torch.zeros(rows * _ROW, device=self._parameters[0].device)
        pieces = self.flat_N[: sum(padded)].split(padded)
        self._views = [piece[: p.numel()].view_as(p) for piece, p in zip(pieces, self._parameters, strict=True)]
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.register_post_accumulate_grad_hook(_moves_into(view))
        self.attach()

    def attach(self) -> None:
        """Make the buffer the .grad of every parameter: what a replayed pass has written is seen there."""
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def overwrite(self) -> None:
        """What the next backward pass computes replaces the gradient. Call `attach` after it."""
        for parameter in self._parameters:
            parameter.grad = None

    def zero(self) -> None:
        self.flat_N.zero_()
        self.attach()

    def norm(self) -> Tensor:
        """Length of the gradient, a scalar; not finite where a number of it is not. Two launches, no host sync."""
        return torch.linalg.vector_norm(torch.linalg.vector_norm(self.flat_N.view(-1, _ROW), dim=1))


def _moves_into(view: Tensor) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        if parameter.grad is not None and parameter.grad.data_ptr() != view.data_ptr():
            view.copy_(parameter.grad)
            parameter.grad = view

    return move
