"""What to change where a device's memory did not suffice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from varfast.perf.allocator import ALLOCATOR_VARIABLES
from varfast.perf.devices import whole_bytes
from varfast.perf.memory import MemoryPlan, held_states, memory
from varfast.perf.plan import ENOUGH_ROWS, largest_divisor
from varfast.perf.work import Work
from varfast.tables import three_digits
from varfast.types import InputError

Part = Literal["rollout", "reward", "update"]


def check_states(work: Work, device: torch.device) -> None:
    """Raises: InputError if what a run holds all the time is more than the device's memory, before it is allocated."""
    needed, whole = held_states(work).total, whole_bytes(device)
    if needed > whole:
        raise InputError(
            f"weights, gradients, moments and reference take {needed / 2**30:.1f} GiB, and {device} has "
            f"{whole / 2**30:.1f} GiB; choose a smaller policy, an adapter (policy.lora={{}}), or another device"
        )


@contextmanager
def memory_advice(part: Part, work: Work, plan: MemoryPlan) -> Iterator[None]:
    """Around a part of the step: where memory runs out, say which setting to change. Raises: InputError then."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        reserved, allocated = reserved_and_allocated()
        held = memory(work, plan)
        of_graphs = max(held.captured, held.captured_update) + held.captured_decode  # reserved, and not free
        advice = scattered_memory(reserved - of_graphs, allocated) or lower_memory(work, plan, part)
        raise InputError(f"out of memory in the {part}: {reason}\n  {advice}") from error


def lower_memory(work: Work, plan: MemoryPlan, part: Part) -> str:
    """What to change where memory ran out: the next smaller setting, with the one in use."""
    held = memory(work, plan)
    if part != "reward" and plan.update.cuda_graph:
        return _without_graph("update", held.captured_update, "during the rollout too")
    advice: str | None
    if part == "reward":
        advice = _smaller_rewards(work)
    elif part == "rollout":
        advice = _halved("rollout.micro_batch", plan.rollout.micro_batch, work.images)
    elif of_graphs := held.captured + held.captured_decode:
        return _without_graph("rollout", of_graphs, "meanwhile")
    else:
        advice = _smaller_update(work, plan)
    return advice or _other_settings(work)


def _without_graph(section: str, held_bytes: int, when: str) -> str:
    held = f"its graph holds {three_digits(held_bytes / 2**30)} GiB {when}"
    return f"use {section}.cuda_graph=false, now true ({held})"


def _smaller_rewards(work: Work) -> str:
    rewards = work.config.reward.items()
    sizes = {f"reward.{name}.batch_size": r.batch_size for name, r in rewards if hasattr(r, "batch_size")}
    return "; ".join(f"use {key}={size // 2}, now {size}" for key, size in sizes.items() if size > 1)


def _smaller_update(work: Work, plan: MemoryPlan) -> str | None:
    now, checkpointing = plan.update.micro_batch, plan.update.checkpointing
    if now * work.rows < 2 * ENOUGH_ROWS and checkpointing != "full":
        more = "attention" if checkpointing == "none" else "full"
        return f"use update.checkpointing={more}, now {checkpointing} with update.micro_batch={now}"
    return _halved("update.micro_batch", now, work.minibatch, work.unit)


def _halved(key: str, now: int, total: int, unit: int = 1) -> str | None:
    half = unit * largest_divisor(total // unit, now / 2 / unit)
    return f"use {key}={half}, now {now}" if half < now else None


def _other_settings(work: Work) -> str:
    config, weights = work.config, work.cost.weights
    sharded = config.run.parallel == "fsdp"
    others = ["run.dtype=bfloat16"]
    if config.update.optimizer != "adamw8bit" and not sharded:
        now, then = (three_digits(weights.moment_bytes(o) / 2**30) for o in (config.update.optimizer, "adamw8bit"))
        others.append(f"update.optimizer=adamw8bit (moments of {then} instead of {now} GiB)")
    if config.rollout.cfg:
        others.append("rollout.cfg=0 (no unconditional half)")
    if config.dpo is None:
        others.append("grpo.kl_beta=0 (no reference is held)")
    if not weights.adapter and not sharded:
        others.append("policy.lora.rank=16 (an adapter is trained in place of all weights)")
    return (
        f"nothing smaller can be set there: try {', '.join(others)}, a smaller model or a device with more memory; see "
        "what else runs on this one"
    )


def reserved_and_allocated() -> tuple[int, int]:
    """Bytes that CUDA's allocator holds, and those of them in use; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.memory_reserved(), torch.cuda.memory_allocated()


def scattered_memory(reserved_bytes: int, allocated_bytes: int) -> str | None:
    """What to do where memory ran out with a tenth of it, and 1 GiB, reserved but in pieces too small to be used."""
    unused = reserved_bytes - allocated_bytes
    if unused < max(2**30, reserved_bytes / 10):
        return None
    size = f"{three_digits(unused / 2**30)} GiB are reserved and free, in pieces too small: memory is fragmented"
    set_by = [name for name in ALLOCATOR_VARIABLES if "expandable_segments:True" in os.environ.get(name, "")]
    if set_by:
        return f"{size}, although {set_by[0]} has expandable_segments:True; use a smaller rollout.micro_batch"
    return f"{size}; set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
