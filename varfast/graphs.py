"""CUDA graphs: a sequence of kernels recorded once and launched as one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class CudaGraph:
    """A function of tensors, captured for the shapes of its first arguments.

    The function must not look at values on the host. Weights that it reads may change in place, not move.

    Args:
        function: returns a tuple of tensors.
        inputs: on a CUDA device.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
        self._inputs = tuple(x.clone() for x in inputs)
        # Once outside the graph: kernels are compiled, tables made and workspaces allocated on a first call.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()  # the graph's own memory pool cannot take what the first call left in the common one
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: other threads use the device meanwhile, NCCL's watchdog and one that saves a checkpoint.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Copy the arguments in, replay, copy the results out."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return tuple(x.clone() for x in self._outputs)
