"""What a step costs: its stages against their limits, the memory of the device, and a trace of one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from varfast.config import Config
from varfast.files import WriteError, save_text
from varfast.roofline import measure_here, speed_of_light_s, stage_counts


class StageLimits:
    """Measured times of a step's stages beside the least that they could take: ms, share of the limit, MFU, images/s.

    The limit of a stage is the time that its FLOPs or its bytes need (`varfast.roofline`), whichever is longer, at the
    rates that a short benchmark measured on this device when the run began.
    """

    def __init__(self, config: Config, device: torch.device, images: int) -> None:
        """Measure the device.

        Args:
            config: this process's part of a step, with the micro-batches and checkpointing that are in use.
            images: of a step, over all processes.
        """
        self._images = images
        counts = stage_counts(config)
        ceilings = measure_here(device, getattr(torch, config.run.dtype))
        self._limit_ms = {name: speed_of_light_s(count, ceilings) * 1e3 for name, count in counts.items()}
        # MFU counts model FLOPs only: recomputation for checkpointing does not count as work.
        self._step_at_peak_s = sum(count.flop for count in stage_counts(config, "none").values()) / ceilings.flop_per_s

    def metrics(self, stages_ms: dict[str, float], step_s: float) -> dict[str, float]:
        """Speed of a step, under the names that metrics.jsonl uses."""
        shares = {f"{n}_share": self._limit_ms[n] / ms for n, ms in stages_ms.items() if self._limit_ms.get(n)}
        return {
            **{f"{name}_ms": ms for name, ms in stages_ms.items()},
            **shares,
            "step_s": step_s,
            "mfu": self._step_at_peak_s / step_s,
            "images_per_s": self._images / step_s,
        }


def memory_metrics(device: torch.device) -> dict[str, float]:
    """GPU memory since the last call, under the names that metrics.jsonl uses; empty on a CPU.

    memory_allocated_bytes and memory_reserved_bytes are peaks. memory_unused_bytes is what is reserved but not
    allocated now: an upper bound on what fragmentation costs. All three are constant in a healthy run. (The largest
    free block would say more, but needs a snapshot of every block.)
    """
    if device.type != "cuda":
        return {}
    statistics = torch.cuda.memory_stats(device)
    torch.cuda.reset_peak_memory_stats(device)
    reserved, allocated = (f"{name}_bytes.all" for name in ("reserved", "allocated"))
    return {
        "memory_allocated_bytes": float(statistics[f"{allocated}.peak"]),
        "memory_reserved_bytes": float(statistics[f"{reserved}.peak"]),
        "memory_unused_bytes": float(statistics[f"{reserved}.current"] - statistics[f"{allocated}.current"]),
    }


@contextmanager
def profiled(folder: Path, device: torch.device) -> Iterator[None]:
    """Profile the body: write trace.json (for chrome://tracing or ui.perfetto.dev) and its use of memory.

    On a GPU, memory.pickle holds the allocator's history for pytorch.org/memory_viz. On a CPU, memory.txt lists memory
    by operator. A profile that cannot be written is reported, and the run goes on.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    with torch.profiler.profile(activities=activities, profile_memory=not on_gpu) as profiler:
        yield
    try:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        if on_gpu:
            torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
        else:
            by_operator = profiler.key_averages().table(sort_by="self_cpu_memory_usage", row_limit=50)
            save_text(folder / "memory.txt", by_operator)
        print(f"profile of one step: {folder}")
    except (OSError, WriteError) as error:
        print(f"the profile could not be written: {error}. The run goes on")
    finally:
        if on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
