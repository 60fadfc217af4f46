"""CUDA graphs, sequences of kernels that are recorded once and launched as one; and the memory that they hold.

A graph holds the memory of everything that it computes for as long as it exists. Graphs that never run at the same time
can share a GraphPool: together they hold only what the largest needs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

_State = TypeVar("_State")


class GraphPool:
    """Memory that is shared by graphs which are replayed one after the other on one stream.

    The replay of one graph may overwrite what another has computed. So CudaGraph copies results out at once, and what
    must outlive a replay, such as gradients, is allocated outside of all graphs. A graph on another stream, such as the
    decoder's, which runs beside the rollout, needs a pool of its own.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._users: weakref.WeakSet[CudaGraph | CudaLoop] = weakref.WeakSet()

    def handle_for(self, graph: CudaGraph | CudaLoop) -> Any:
        """The handle to capture with. A new one if no graph is left: the allocator refuses a pool without users."""
        if not self._users:
            self._handle = torch.cuda.graph_pool_handle()
        self._users.add(graph)
        return self._handle


class CudaGraph:
    """A function of tensors, captured for the shapes of the tensors that it is captured with.

    The function must not read values on the host. Weights that it reads may change in place, but must not move.

    Args:
        function: returns a tuple of tensors, without autograd's graph.
        inputs: on a CUDA device.
        pool: shared with other graphs; default: memory of its own.
        warm_up: run the function once outside of the graph first, because a first call compiles kernels, makes tables
            and allocates workspaces. Set False if it has already run with these shapes. This is required for a function
            with side effects, such as adding to gradients; capturing executes nothing.
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
        torch.cuda.empty_cache()  # a graph's pool cannot use blocks that the common pool keeps cached
        self._graph = torch.cuda.CUDAGraph()
        handle = None if pool is None else pool.handle_for(self)
        # thread_local: other threads may use the device meanwhile, as NCCL's watchdog and one that saves a checkpoint.
        with torch.cuda.graph(self._graph, pool=handle, capture_error_mode="thread_local"):
            self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Copy the arguments in, replay, and copy the results out."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return tuple(x.clone() for x in self._outputs)


class CudaLoop:
    """Equal steps after each other as three graphs: what begins the loop, one step that is replayed, and its results.

    So a rollout of 576 tokens is a graph of one token: a thousand nodes, not half a million.

    Args:
        begin: of tensors, returns the state, which is made of tensors that it allocates.
        step: changes the tensors of the state in place. What differs from step to step is read from them.
        end: of the state; returns a tuple of tensors.
        times: number of steps.
        inputs, pool: as of CudaGraph. All three functions must have run with these shapes.
    """

    def __init__(
        self,
        begin: Callable[..., _State],
        step: Callable[[_State], None],
        end: Callable[[_State], tuple[Tensor, ...]],
        times: int,
        *inputs: Tensor,
        pool: GraphPool,
    ) -> None:
        self._inputs, self._times = tuple(x.clone() for x in inputs), times
        torch.cuda.empty_cache()  # see CudaGraph
        self._begin, self._step, self._end = (torch.cuda.CUDAGraph() for _ in range(3))
        # The state's memory is the pool's. When it is no longer referenced, other graphs of the pool may use it: they
        # run before `begin` or after `end`.
        how: Any = {"pool": pool.handle_for(self), "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self._begin, **how):
            state = begin(*self._inputs)
        with torch.cuda.graph(self._step, **how):
            step(state)
        with torch.cuda.graph(self._end, **how):
            self._outputs = end(state)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Copy the arguments in, replay all steps, and copy the results out."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._begin.replay()
        for _ in range(self._times):
            self._step.replay()
        self._end.replay()
        return tuple(x.clone() for x in self._outputs)


class Replayed:
    """A function of tensors that runs eagerly on its first call, and is captured and replayed from its second call on.

    One graph is kept for each `key`, which holds what the function must know beside tensors. A call with other shapes
    than the first call of its key runs eagerly.

    Args:
        function: of a key and tensors; see CudaGraph. It may have side effects: it is not run to warm up.
        pool: of its graphs.
        say: gets one line if a capture fails; from then on the function runs eagerly.
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
        """Drop the graphs, because what they read has moved or must be prepared again."""
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
            except RuntimeError as error:  # CUDA refuses to capture a call; nothing has been executed
                self.forget()
                self._fails = True
                self._say(
                    f"a CUDA graph cannot be captured here, kernels are launched one by one: {_first_line(error)}"
                )
                return self._function(key, *inputs)
        return self._graphs[key](*inputs)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
