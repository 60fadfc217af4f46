"""CUDA graphs: a sequence of kernels recorded once and launched as one; and the memory that they hold.

A graph keeps the memory of everything that it computes, for as long as it exists. Graphs that never run at the same
time take it from one pool, so that together they hold what the largest needs: see GraphPool.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


class GraphPool:
    """Memory that several graphs share, which are replayed one after the other on one stream.

    What a graph computes may be overwritten by the replay of any other: results are copied out at once (CudaGraph does
    that), and what must outlive a replay, such as gradients, is allocated outside of all graphs. Graphs on another
    stream, such as the decoder's, which runs beside the rollout, need a pool of their own.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._users: weakref.WeakSet[CudaGraph] = weakref.WeakSet()

    def handle_for(self, graph: CudaGraph) -> Any:
        """The handle to capture with. A new one where no graph is left: the allocator refuses one without a user."""
        if not self._users:
            self._handle = torch.cuda.graph_pool_handle()
        self._users.add(graph)
        return self._handle


class CudaGraph:
    """A function of tensors, captured for the shapes of its first arguments.

    The function must not look at values on the host. Weights that it reads may change in place, not move.

    Args:
        function: returns a tuple of tensors, without autograd's graph.
        inputs: on a CUDA device.
        pool: shared with other graphs; default: memory of its own.
        warm_up: run the function once outside of the graph first: kernels are compiled, tables made and workspaces
            allocated on a first call. False where it has run with these shapes already, and must where it changes
            something, as a function does that adds to gradients: capturing itself executes nothing.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        *inputs: Tensor,
        pool: GraphPool | None = None,
        warm_up: bool = True,
    ) -> None:
        self._inputs = tuple(x.clone() for x in inputs)
        if warm_up:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                function(*self._inputs)
            torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()  # the pool cannot take what earlier calls left in the common one
        self._graph = torch.cuda.CUDAGraph()
        handle = None if pool is None else pool.handle_for(self)
        # thread_local: other threads use the device meanwhile, NCCL's watchdog and one that saves a checkpoint.
        with torch.cuda.graph(self._graph, pool=handle, capture_error_mode="thread_local"):
            self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Copy the arguments in, replay, copy the results out."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return tuple(x.clone() for x in self._outputs)


class Replayed:
    """A function of tensors that runs eagerly at first, and is captured and replayed from its second call on.

    One graph is kept for each `key`, which is whatever the function must know beside tensors. Calls with shapes other
    than those of a key's first call run eagerly.

    Args:
        function: of a key and tensors, as CudaGraph wants it; it may change memory outside: it is not run to warm up.
        pool: of its graphs.
        say: gets one line where a capture fails; the function runs eagerly from then on.
    """

    make: Callable[..., CudaGraph] = CudaGraph

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], pool: GraphPool, say: Callable[[str], object] = print
    ) -> None:
        self._function, self._pool, self._say = function, pool, say
        self._seen: dict[object, tuple[torch.Size, ...]] = {}  # shapes by key, of the first call
        self._graphs: dict[object, CudaGraph] = {}
        self._fails = False

    def forget(self) -> None:
        """Drop the graphs: what they read has moved or is to be prepared anew."""
        self._seen.clear()
        self._graphs.clear()

    def __call__(self, key: object, *inputs: Tensor) -> tuple[Tensor, ...]:
        shapes = tuple(x.shape for x in inputs)
        first = key not in self._seen
        if self._fails or self._seen.setdefault(key, shapes) != shapes or first:
            return self._function(key, *inputs)
        if key not in self._graphs:
            try:
                self._graphs[key] = self.make(partial(self._function, key), *inputs, pool=self._pool, warm_up=False)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # CUDA's, for a call that cannot be captured; nothing has been executed
                self.forget()
                self._fails = True
                self._say(
                    f"a CUDA graph cannot be captured here, kernels are launched one by one: {_first_line(error)}"
                )
                return self._function(key, *inputs)
        return self._graphs[key](*inputs)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
