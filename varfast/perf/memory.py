"""What a step holds in a device's memory under a plan: its micro-batches, checkpointing and CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass, fields

from varfast.perf.cost import FLOAT32_BYTES, Checkpointing
from varfast.perf.work import Work
from varfast.policies.config import DECODE_GRAPH_IMAGES

# The share of free memory that plans may use; the rest is left to the allocator's fragmentation and to workspaces.
USABLE = 0.9


@dataclass(frozen=True)
class RolloutPlan:
    """Attributes:
    micro_batch: images sampled and decoded at a time.
    cuda_graph: whether rollout and decoder are captured on a GPU, and replayed.
    """

    micro_batch: int
    cuda_graph: bool


@dataclass(frozen=True)
class UpdatePlan:
    """Attributes:
    micro_batch: images of a forward and backward pass.
    checkpointing: what the backward pass computes again instead of keeping it.
    cuda_graph: whether the passes are captured on a GPU, and replayed.
    """

    micro_batch: int
    checkpointing: Checkpointing
    cuda_graph: bool


@dataclass(frozen=True)
class MemoryPlan:
    """How a step is split so that it fits into a device's memory. It changes results only by the order of sums."""

    rollout: RolloutPlan
    update: UpdatePlan


@dataclass(frozen=True)
class States:
    """Bytes that one process holds on its device from the start of a run to its end.

    Attributes:
        weights: of the transformer, float32. With an adapter, the frozen matrices of the blocks are in run.dtype and
            the adapter is float32.
        compute_copy: low-precision copies of the matrices of blocks and head, or of the adapter, which rollout and
            update read; 0 in float32. With sharded weights, the whole transformer that samples.
        gradients: of what is trained, float32.
        moments: of the optimizer; see `Weights.moment_bytes`.
        average: of what is trained, float32; 0 without update.ema_decay.
        reference: the base model of the KL term, its matrices in run.dtype; 0 if none is held, and with an adapter,
            because the frozen weights are the reference; one that moves has an adapter of its own. With reference_ema
            of the loss the average too, as `average`.
        tokenizer, reward: weights of the tokenizer and of the rewards' networks, float32.
    """

    weights: int
    compute_copy: int
    gradients: int
    moments: int
    average: int
    reference: int
    tokenizer: int
    reward: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Memory:
    """Bytes that one process holds on its device during a step.

    Attributes:
        states: from the start of the run to its end.
        images: of a step: float32 pixels, and the transformer's input, twice while micro-batches are concatenated.
        kv_cache: of a micro-batch.
        rollout_activations: of a micro-batch, where they are largest.
        decode: activations of a micro-batch, where they are largest.
        update: of a micro-batch: what autograd keeps, the logits, and the block that is computed.
        captured: what the rollout's CUDA graph holds during the update: cache and activations.
        captured_decode: what the decoder's graph holds, in a pool of its own because it runs beside the rollout.
        captured_update: what the update's CUDA graph holds during the rollout; the two share a pool.
    """

    states: States
    images: int
    kv_cache: int
    rollout_activations: int
    decode: int
    update: int
    captured: int
    captured_decode: int
    captured_update: int

    @property
    def rollout(self) -> int:
        """Cache, activations and decode together: a captured graph keeps its buffers between them.

        With a captured update, the pool is always as large as the larger of the two graphs.
        """
        pool_grown = max(0, self.captured_update - self.captured)
        return self.images + self.kv_cache + self.rollout_activations + self.decode + pool_grown

    @property
    def peak(self) -> int:
        shared = min(self.captured, self.captured_update)
        of_update = self.update + self.captured - shared + self.captured_decode
        return self.states.total + max(self.rollout, of_update)

    def fits(self, device_bytes: float) -> bool:
        """Whether a step takes at most 0.9 of the memory that the states leave."""
        return self.peak - self.states.total <= USABLE * (device_bytes - self.states.total)


def held_states(work: Work) -> States:
    """What a process holds from the start of a run to its end."""
    config, weights = work.config, work.cost.weights
    trained = FLOAT32_BYTES * weights.trained
    whole = work.cost.base.weights.frozen_bytes
    reference = whole if work.holds_reference and not weights.adapter else 0
    if weights.adapter and config.loss.reference_moves is not None:  # an adapter of its own
        reference = trained + weights.copy_bytes
    if config.loss.reference_ema is not None:
        reference += trained // work.shards
    return States(
        weights=weights.held_bytes // work.shards,
        compute_copy=weights.copy_bytes if work.shards == 1 else whole,
        gradients=trained // work.shards,
        moments=weights.moment_bytes(config.update.optimizer) // work.shards,
        average=trained // work.shards if config.update.ema_decay is not None else 0,
        reference=reference,
        tokenizer=work.cost.tokenizer_bytes,
        reward=FLOAT32_BYTES * sum(network.parameters for network in work.networks),
    )


def memory(work: Work, plan: MemoryPlan) -> Memory:
    """What a process needs for its part of a step."""
    cost, sampled, rows = work.cost, plan.rollout.micro_batch, plan.rollout.micro_batch * work.rows
    update = plan.update.micro_batch * work.rows * cost.update_activation_bytes(plan.update.checkpointing)
    captures = work.config.run.fast and plan.rollout.cuda_graph
    return Memory(
        states=held_states(work),
        images=work.images * kept_bytes(work),
        kv_cache=rows * cost.kv_cache_bytes,
        rollout_activations=rows * cost.rollout_activation_bytes,
        decode=sampled * cost.decode_activation_bytes,
        update=update,
        captured=captured_rollout_bytes(work, sampled) if captures else 0,
        captured_decode=captured_decode_bytes(work, sampled) if captures else 0,
        captured_update=update if plan.update.cuda_graph else 0,
    )


def kept_bytes(work: Work) -> int:
    """Of one image, held from the rollout to the end of the step."""
    return work.cost.image_bytes + 2 * work.cost.input_bytes


def captured_rollout_bytes(work: Work, sampled: int) -> int:
    """What the CUDA graph of a rollout of `sampled` images holds."""
    of_rows = work.rows * (work.cost.kv_cache_bytes + work.cost.rollout_activation_bytes)
    return sampled * (of_rows + work.cost.input_bytes)


def captured_decode_bytes(work: Work, sampled: int) -> int:
    """What the CUDA graph of the decoder holds, if `sampled` images are sampled at a time."""
    return min(sampled, DECODE_GRAPH_IMAGES) * work.cost.decode_activation_bytes
