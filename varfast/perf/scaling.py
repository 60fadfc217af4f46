"""What communication between many GPUs costs a step, predicted from the links of a DGX-like node."""

from __future__ import annotations

from dataclasses import dataclass

from varfast.perf.cost import FLOAT32_BYTES
from varfast.perf.devices import Ceilings
from varfast.perf.limits import micro_batches, speed_of_light_s, stage_counts
from varfast.perf.memory import MemoryPlan, held_states
from varfast.perf.work import Work

_GPUS_A_NODE = 8
_NVLINK_BYTE_PER_S = 450e9  # a GPU and direction: NVLink of H100 and H200
_NETWORK_BYTE_PER_S = 50e9  # a GPU: a 400 Gb/s port each


def all_gather_s(size_bytes: float, gpus: int) -> float:
    """Seconds until each of `gpus` has all of `size_bytes`, of which each held an equal part; a reduce-scatter takes as
    long, an all-reduce twice.

    Across nodes each GPU fetches its eighth over its own port, then the eight of a node exchange over NVLink.
    """
    local = min(gpus, _GPUS_A_NODE)
    nodes = gpus / local
    between_s = size_bytes / local * (1 - 1 / nodes) / _NETWORK_BYTE_PER_S
    within_s = size_bytes * (1 - 1 / local) / _NVLINK_BYTE_PER_S
    return between_s + within_s


@dataclass(frozen=True)
class Scaling:
    """One way to spread a run over GPUs, each with the config's images a step and minibatch.

    Attributes:
        gpus: how many.
        bytes_per_gpu: that a GPU receives in one optimizer step.
        communication_s: of one optimizer step.
        efficiency, efficiency_overlapped: time of a step alone over its time here, without and with communication
            hidden behind computing.
        states_bytes: of `Memory.states`, a GPU.
    """

    gpus: int
    bytes_per_gpu: float
    communication_s: float
    efficiency: float
    efficiency_overlapped: float
    states_bytes: float


def scale_data_parallel(
    work: Work, plan: MemoryPlan, ceilings: Ceilings, gpus: int, gradient_item_bytes: int
) -> Scaling:
    """Each GPU holds everything; gradients are averaged by an all-reduce in every optimizer step.

    Only the backward pass of the last micro-batch can hide it.

    Args:
        gradient_item_bytes: in which a number of the gradient travels.
    """
    limits_s = {name: speed_of_light_s(count, ceilings) for name, count in stage_counts(work, plan).items()}
    step_s, optimizer_steps = sum(limits_s.values()), work.optimizer_steps
    size = gradient_item_bytes * work.cost.weights.trained
    each_s = 2 * all_gather_s(size, gpus)
    backward_s = 2 / 3 * limits_s["update"] / optimizer_steps / micro_batches(work, plan)
    exposed_s = max(0.0, each_s - backward_s)
    return Scaling(
        gpus=gpus,
        bytes_per_gpu=2 * size * (1 - 1 / gpus),
        communication_s=each_s,
        efficiency=step_s / (step_s + optimizer_steps * each_s),
        efficiency_overlapped=step_s / (step_s + optimizer_steps * exposed_s),
        states_bytes=held_states(work).total,
    )


def scale_fully_sharded(work: Work, plan: MemoryPlan, ceilings: Ceilings, gpus: int) -> Scaling:
    """Weights, gradients, moments and reference in equal parts (FSDP).

    The blocks' matrices travel in run.dtype, gradients in float32. Every micro-batch gathers the weights for its
    forward and again for its backward pass, those of the reference once, and scatters its gradients. The rollout
    gathers them once and keeps them to its end.
    """
    limits_s = {name: speed_of_light_s(count, ceilings) for name, count in stage_counts(work, plan).items()}
    step_s, optimizer_steps = sum(limits_s.values()), work.optimizer_steps
    held, weights = held_states(work), work.cost.weights.frozen_bytes
    whole = held.tokenizer + held.reward  # on every GPU
    gathers = 3 if work.reads_reference else 2
    size = micro_batches(work, plan) * (gathers * weights + FLOAT32_BYTES * work.cost.weights.trained)
    each_s, rollout_s = all_gather_s(size, gpus), all_gather_s(weights, gpus)
    hiding_s = (limits_s["reference"] + limits_s["update"]) / optimizer_steps
    exposed_s = max(0.0, each_s - hiding_s)
    return Scaling(
        gpus=gpus,
        bytes_per_gpu=size * (1 - 1 / gpus),
        communication_s=each_s,
        efficiency=step_s / (step_s + optimizer_steps * each_s + rollout_s),
        efficiency_overlapped=step_s / (step_s + optimizer_steps * exposed_s + rollout_s),
        states_bytes=(held.total - whole) / gpus + whole,
    )
