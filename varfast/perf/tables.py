"""The tables that `python -m varfast.roofline` prints."""

from __future__ import annotations

from dataclasses import asdict

from varfast.perf.cost import Count
from varfast.perf.devices import Ceilings
from varfast.perf.limits import speed_of_light_s, stage_counts
from varfast.perf.memory import USABLE, MemoryPlan, memory
from varfast.perf.plan import plan_memory
from varfast.perf.scaling import scale_data_parallel, scale_fully_sharded
from varfast.perf.spent import Budget, whole_step
from varfast.perf.work import Work
from varfast.tables import three_digits


def report(work: Work, ceilings: Ceilings, title: str) -> str:
    """Limits, memory and scaling of a step, planned for a device's memory.

    title: names the device and where its ceilings come from.
    """
    plan = plan_memory(work, ceilings.memory_bytes)
    tables = (
        [title, *_summary(work, plan, ceilings)],
        _stage_table(work, plan, ceilings),
        _memory_table(work, plan, ceilings),
        _sampling_table(work, ceilings),
        _scaling_table(work, plan, ceilings),
        ["Predictions from counts, not measurements."],
    )
    return "\n\n".join("\n".join(table) for table in tables)


def _summary(work: Work, plan: MemoryPlan, ceilings: Ceilings) -> list[str]:
    """Whether the run fits, how long a step takes and how long the run."""
    counts, held = stage_counts(work, plan).values(), memory(work, plan)
    total_s = sum(speed_of_light_s(count, ceilings) for count in counts)
    apart_s = sum(c.flop / ceilings.flop_per_s + c.io_bytes / ceilings.byte_per_s for c in counts)
    if ceilings.memory_bytes is None:
        fits = f"holds {held.peak / 2**30:.1f} GiB at its peak; the memory of this device is not known"
    else:
        fits = (
            f"{'fits' if held.fits(ceilings.memory_bytes) else 'does not fit'} into "
            f"{ceilings.memory_bytes / 2**30:.1f} GiB: {held.peak / 2**30:.1f} at the peak"
        )
    images, steps = work.images, work.config.run.steps
    return [
        fits,
        f"a step of {images} images: at least {total_s:.3g} s, {apart_s:.3g} s where computing and moving do not "
        f"overlap ({images / total_s:.4g} and {images / apart_s:.4g} images/s)",
        f"run.steps={steps}: at least {_duration(steps * total_s)}, {_duration(steps * apart_s)} not overlapped, "
        "without evaluation and checkpoints",
        *_budget_lines(work, total_s),
    ]


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds / 60:.3g} min" if seconds >= 60 else f"{seconds:.3g} s"


def _stage_table(work: Work, plan: MemoryPlan, ceilings: Ceilings) -> list[str]:
    counts, images = stage_counts(work, plan), work.images
    total_s = sum(speed_of_light_s(count, ceilings) for count in counts.values())
    names = ("GFLOP/image", "TFLOP/step", "GB/step", "compute ms", "bytes ms", "limit ms", "share")
    lines = [
        f"{ceilings.flop_per_s / 1e12:.4g} TFLOP/s in {work.cost.dtype}, {ceilings.byte_per_s / 1e12:.4g} TB/s",
        f"one step of {images} images, {work.optimizer_steps} optimizer steps of {work.minibatch}",
        f"{'stage':10}" + "".join(f"{name:>13}" for name in names),
    ]
    for name, count in counts.items():
        limit_s = speed_of_light_s(count, ceilings)
        numbers = (count.flop / images / 1e9, count.flop / 1e12, count.io_bytes / 1e9)
        times = (count.flop / ceilings.flop_per_s, count.io_bytes / ceilings.byte_per_s, limit_s)
        cells = "".join(f"{three_digits(x):>13}" for x in (*numbers, *(s * 1e3 for s in times)))
        lines.append(f"{name:10}{cells}{limit_s / total_s:13.1%}")
    return lines


def _budget_lines(work: Work, least_step_s: float) -> list[str]:
    """How many steps the run's budgets buy. least_step_s: what a step takes at least."""
    lines, hours = Budget.of(work.config.run, whole_step(work)).bought(), work.config.run.budget_hours
    if hours is not None:
        lines.append(f"run.budget_hours={hours:.15g} buys at most {hours * 3600 // least_step_s:.0f} steps")
    return lines


def _sampling_table(work: Work, ceilings: Ceilings) -> list[str]:
    """What the rollout would take with other numbers of images at a time."""
    cost = work.cost
    weights, image = Count(0.0, cost.weights.read_bytes * cost.rollout_passes), cost.rollout * work.rows
    names = ("limit ms", "tokens/s", "images/s", "weights", "bound by")
    lines = [
        f"rollout of other numbers of images at a time: {weights.io_bytes / 1e9:.3g} GB of weights in "
        f"{cost.rollout_passes} passes, {image.io_bytes / 1e9:.3g} GB and {image.flop / 1e9:.4g} GFLOP an image",
        f"{'images':10}" + "".join(f"{name:>13}" for name in names),
    ]
    for images in (1, 16, 64, 256):
        count = weights + image * images
        limit_s = speed_of_light_s(count, ceilings)
        numbers = (limit_s * 1e3, images * cost.num_tokens / limit_s, images / limit_s)
        moves = count.io_bytes / ceilings.byte_per_s >= limit_s
        read = f"{weights.io_bytes / count.io_bytes:.0%}"  # of the bytes
        cells = [*map(three_digits, numbers), read, "bytes" if moves else "FLOPs"]
        lines.append(f"{images:<10}" + "".join(f"{cell:>13}" for cell in cells))
    most = 1.0 / speed_of_light_s(image, ceilings)
    computes = weights.io_bytes / ceilings.byte_per_s * ceilings.flop_per_s / image.flop
    lines.append(
        f"at most {three_digits(most * cost.num_tokens)} tokens/s, {three_digits(most)} images/s. Computing takes as "
        f"long as reading the weights at {computes:.0f} images; an image's own bytes do at "
        f"{weights.io_bytes / image.io_bytes:.0f}"
    )
    if ceilings.memory_bytes is not None:
        held = work.rows * (cost.kv_cache_bytes + cost.rollout_activation_bytes) + cost.input_bytes
        free = USABLE * (ceilings.memory_bytes - cost.weights.frozen_bytes - cost.tokenizer_bytes)
        lines.append(f"sampling alone, {max(0, free) / held:.0f} images fill the memory ({held / 1e6:.3g} MB each)")
    return lines


def _memory_table(work: Work, plan: MemoryPlan, ceilings: Ceilings) -> list[str]:
    held, rollout, update = memory(work, plan), plan.rollout, plan.update
    lines = [
        f"memory, GiB: rollout.micro_batch={rollout.micro_batch}, "
        f"rollout.cuda_graph={str(rollout.cuda_graph).lower()}, "
        f"update.micro_batch={update.micro_batch}, update.checkpointing={update.checkpointing}"
    ]
    parts = asdict(held.states) | {name: size for name, size in asdict(held).items() if name != "states"}
    parts |= {"all states": held.states.total, "peak": held.peak}
    lines += [f"{name.replace('_', ' '):20}{three_digits(size / 2**30):>10}" for name, size in parts.items()]
    if ceilings.memory_bytes is None:
        return lines
    return [
        *lines,
        f"of {ceilings.memory_bytes / 2**30:.1f} GiB, a tenth of what the states leave is kept for fragmentation and "
        "workspaces",
    ]


def _scaling_table(work: Work, plan: MemoryPlan, ceilings: Ceilings) -> list[str]:
    lines = [
        "many GPUs, predicted: each does the step above; a node has 8, with NVLink of 450 GB/s a GPU and direction,",
        "and 50 GB/s a GPU (a 400 Gb/s port each) between nodes, both fully used; no latency, no stragglers. GB and ms",
        "of communication are an optimizer step's. Overlapped: data parallel hides in the backward pass of the last",
        "micro-batch, FSDP in reference and update; its rollout gathers the weights once, before it starts, and holds",
        "them. 100 % is the speed of light of one GPU times their number.",
        f"{'':27}{'GPUs':>6}{'GB/GPU':>10}{'ms':>10}{'efficiency':>12}{'overlapped':>12}{'states GiB':>12}",
    ]
    for gpus in (8, 64, 512):
        ways = {
            "data parallel, float32 sums": scale_data_parallel(work, plan, ceilings, gpus, 4),
            "data parallel, bf16 sums": scale_data_parallel(work, plan, ceilings, gpus, 2),
        }
        if not work.cost.weights.adapter:  # an adapter is not sharded
            ways["FSDP"] = scale_fully_sharded(work, plan, ceilings, gpus)
        for name, way in ways.items():
            sizes = (way.bytes_per_gpu / 1e9, way.communication_s * 1e3, way.states_bytes / 2**30)
            gigabytes, ms, states = map(three_digits, sizes)
            efficiency = f"{way.efficiency:12.1%}{way.efficiency_overlapped:12.1%}"
            lines.append(f"{name:27}{way.gpus:6}{gigabytes:>10}{ms:>10}{efficiency}{states:>12}")
    return lines
