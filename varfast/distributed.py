"""Several processes that train one policy: how they find each other, exchange tensors and spread weights.

torchrun starts them and tells each, by environment variables (RANK, WORLD_SIZE, LOCAL_RANK), which one it is. NCCL
carries tensors on GPUs; gloo carries those on the CPU and every barrier, so that a waiting process keeps no GPU busy.

Axes: B image of a step, b image of this process.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from varfast.types import InputError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class World:
    """This process among those of the run. With a single process, no method communicates.

    Attributes:
        rank: number of this process; 0 writes files.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, which writes files."""
        return self.rank == 0

    def shard(self, count: int) -> slice:
        """This process's rows of `count`: consecutive, and as many as every other process has, or one more or less."""
        return _shard(self.rank, self.size, count)

    def gather(self, rows_b: Tensor, count: int) -> Tensor:
        """All `count` rows, in every process, from the rows of each."""
        if self.size == 1:
            return rows_b
        most = -(-count // self.size)  # the collective needs parts of equal size
        padded = rows_b.new_zeros(most, *rows_b.shape[1:])
        padded[: len(rows_b)] = rows_b
        everything = rows_b.new_empty(self.size * most, *rows_b.shape[1:])
        # torch 2.14 has renamed it, and warns of the old name in every process.
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(everything, padded)
        shares = [_shard(rank, self.size, count) for rank in range(self.size)]
        parts = [part[: s.stop - s.start] for part, s in zip(everything.split(most), shares, strict=True)]
        return torch.cat(parts)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Largest over processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def largest(self, number: float) -> float:
        """The largest number over processes. Waits for all processes, but not for the device."""
        return float(self.max(torch.tensor(number, dtype=torch.float64)))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process. Waits for all processes, but not for the device."""
        return self.largest(float(flag)) > 0.0

    def wait(self) -> None:
        """Wait until all processes have got here."""
        self.largest(0.0)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Run the body in process 0 first and then in the others, which find the files that it made.

        An error in process 0 is one in all of them, which do not begin then.
        """
        if self.size == 1:
            yield
            return
        if not self.is_main:
            _told(None)
            yield
            return
        failure: str | None = "the first process failed, and says why"
        try:
            yield
            failure = None
        except InputError as error:
            failure = str(error)
            raise
        finally:
            with suppress(RuntimeError):  # the others have ended
                _told(failure)


ALONE = World()
_T = TypeVar("_T")


def decided_by_first(decide: Callable[[], _T]) -> _T:
    """What `decide` returns in process 0, in all processes; or the InputError that it raises there, in all of them."""
    if not dist.is_initialized():
        return decide()
    found: Any = None
    if dist.get_rank() > 0:
        return _told(None)
    try:
        found = decide()
    except InputError as error:
        _told(str(error))
        raise
    _told(None, found)
    return found


def _told(failure: str | None, found: Any = None) -> Any:
    """What process 0 has found, in all processes. In the others an InputError if it failed, which it prints itself.

    failure, found: of process 0.
    """
    box = [failure, found]
    dist.broadcast_object_list(box)
    if box[0] is not None and dist.get_rank() > 0:
        error = InputError(box[0])
        error.told_by = "first"
        raise error
    return box[1]


@contextmanager
def alike() -> Iterator[None]:
    """Around what fails alike in all processes of a machine, if it does: one of them prints the error."""
    try:
        yield
    except InputError as error:
        if error.told_by == "each":
            error.told_by = "machine"
        raise


def _shard(rank: int, size: int, count: int) -> slice:
    rows, more = divmod(count, size)
    start = rank * rows + min(rank, more)
    return slice(start, start + rows + (rank < more))


# Launchers whose tasks do not know one another, by the variable that holds their number of tasks. The variable of the
# Slurm step comes first, since SLURM_NTASKS may be that of the whole allocation.
_TASKS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "SLURM_NTASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}


@dataclass(frozen=True)
class Launch:
    """What the environment variables say about this process.

    Attributes:
        rank, size: this process among those of the run.
        local_rank, local_size: this process among those on its machine; local_rank is None if it is not set.
    """

    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    local_size: int = 1


def launched() -> Launch:
    """How this process was started: by torchrun, or alone. An empty variable counts as unset.

    Raises: InputError for variables that contradict each other, and for tasks of srun or mpirun, each of which would
        run alone, all in the same folder.
    """
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if size == 0:
        raise InputError("WORLD_SIZE=0: want the number of processes; unset it for one process")
    if rank is None and (size or 1) > 1:
        raise InputError(
            f"WORLD_SIZE={size}, but RANK is not set, as it is in processes of torchrun. Start them with "
            f"`torchrun --nproc-per-node {size} -m varfast...`, or unset WORLD_SIZE for one process"
        )
    if rank is not None and rank >= (size or 1):
        raise InputError(
            f"RANK={rank}, but WORLD_SIZE{' is not set' if size is None else f'={size}'}: want RANK < WORLD_SIZE. "
            "Start the processes with torchrun, which sets both, or unset RANK for one process"
        )
    if rank is None:
        _refuse_lone_tasks()
        return Launch()
    return Launch(rank, size or 1, _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE") or 1)


def _number(name: str) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"{name}={text}: want a number, as torchrun sets it; unset it for one process")
    return int(text)


def _refuse_lone_tasks() -> None:
    name = next((name for name in _TASKS if os.environ.get(name, "").isdigit()), None)
    if name is not None and int(os.environ[name]) > 1:
        raise InputError(
            f"{name}={os.environ[name]}: {_TASKS[name]} starts tasks that do not know one another. Start one task a "
            f"machine and in it `torchrun --nproc-per-node GPUS -m varfast...`; for one process unset {name}"
        )


def local_device(name: str) -> str:
    """run.device for this process: with several processes, "auto" and "cuda" mean the GPU of its local rank.

    Raises: InputError if one GPU is named for several processes, or if LOCAL_RANK is not set.
    """
    process = launched()
    if process.size == 1 or name == "cpu" or not torch.cuda.is_available():
        return name
    if name not in ("auto", "cuda"):
        raise InputError(f"run.device={name} names one GPU for all processes of torchrun; use auto or cuda")
    if process.local_rank is None:
        raise InputError("LOCAL_RANK is not set, so this process has no GPU of its own; start it with torchrun")
    return f"cuda:{process.local_rank}"


def processes_here() -> int:
    """Processes of the run on this machine."""
    return launched().local_size


@contextmanager
def joined(device: torch.device, timeout_s: float) -> Iterator[World]:
    """Join the processes that torchrun started; without torchrun, a world of one process.

    An error in the body closes the connections before it is raised on, so that no other process waits for this one.

    Args:
        device: of this process.
        timeout_s: how long to wait for another process before it counts as lost.
    Raises: InputError if the processes do not find each other.
    """
    if launched().size == 1:
        yield World()
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    store, rank, size = _met(timeout)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    except BaseException:
        if on_gpu:  # destroy_process_group would wait for collectives that the others never join
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
        raise
    # gloo's thread may release its last tensor after the interpreter has shut down, and abort the process (3 of 12 runs
    # of 4 processes with FSDP). So give it time.
    time.sleep(0.2)
    dist.destroy_process_group()


def _met(timeout: timedelta) -> tuple[Store, int, int]:
    """The store in which processes find one another's addresses, under a prefix of this attempt; rank, size.

    torchrun --max-restarts restarts processes but keeps its store, which still holds the addresses of the dead: torch
    2.15 then connects to them, and fails or waits for ever. So process 0 chooses a random prefix and tells it to each
    process that asks with a random number of its own. Questions of an earlier attempt carry other numbers, and nobody
    reads the answers to those.
    """
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
    except (RuntimeError, ValueError) as error:  # no address, no connection, a port that is taken
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise InputError(
            f"the processes do not meet at MASTER_ADDR={os.environ.get('MASTER_ADDR', '')} "
            f"MASTER_PORT={os.environ.get('MASTER_PORT', '')}: {reason}. Start them with torchrun, which sets both"
        ) from error
    chosen = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", chosen)
        name = store.get(f"answer/{chosen}").decode()
        store.set(f"{name}/{rank}", "knows")
        return PrefixStore(name, store), rank, size
    waiting_for, deadline_s = set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while waiting_for:
        for other in sorted(waiting_for):
            if store.check([f"{chosen}/{other}"]):
                waiting_for.remove(other)
            elif store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", chosen)
        if time.monotonic() > deadline_s:
            raise InputError(
                f"processes {sorted(waiting_for)} did not come within run.timeout_s={timeout.total_seconds():g}"
            )
        time.sleep(0.01)
    return PrefixStore(chosen, store), rank, size


# ---------------------------------------------------------------------------------------------------------------------
# How weights are spread


def replicate(model: nn.Module) -> DistributedDataParallel:
    """The model in a wrapper that averages gradients over processes during the backward pass."""
    with warnings.catch_warnings():
        # torch 2.15 renamed broadcast_buffers, and 2.11 does not know the new name.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*broadcast_buffers")
        # Buffers are constants. Gradients are views of the communication buckets: without that, d30 needs 8 GB more.
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard_weights(
    model: nn.Module, parts: Iterable[nn.Module], world: World, device: torch.device, dtype: torch.dtype
) -> None:
    """Shard weights, gradients and so the optimizer's state over processes, in place (FSDP).

    Args:
        model: its weights outside `parts` are gathered in float32 for a whole step.
        parts: modules whose weights are gathered in `dtype` when they are called, and freed afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    compute = None if dtype == torch.float32 else dtype
    for part in parts:
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(part, mesh=mesh, mp_policy=policy)
    # The 16-bit head returns its logits as a view, and nothing writes to them before the backward pass.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """Whether a value is a tensor that is sharded over processes.

    Until somebody imports DTensor, no tensor can be one. It is not imported here, since that takes 0.6 s on two cores.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its sharding. All processes must call it for a sharded tensor."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The shard of a tensor that this process holds, without a gradient. Writing to it writes to the tensor."""
    return (tensor.to_local() if is_sharded(tensor) else tensor).detach()


def gathered(state: Any, world: World) -> Any:
    """A state_dict with whole tensors in process 0. Sharded ones are on the CPU there, and None in other processes.

    All processes must call it.
    """
    if isinstance(state, dict):
        return {name: gathered(value, world) for name, value in state.items()}
    if isinstance(state, list):
        return [gathered(value, world) for value in state]
    if is_sharded(state):
        tensor = whole(state.detach())
        return tensor.cpu() if world.is_main else None
    return state
