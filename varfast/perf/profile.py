"""The memory of the device after a step, and a trace of one step."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from varfast.files import WriteError, save_text


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
def without_noise(on_gpu: bool) -> Iterator[None]:
    """Drop what Kineto, the library under PyTorch's profiler, writes to standard error in the body of every profile.

    That is "USDT:... profiler_start", and, of a profile without a GPU, that there is none. All other lines are written
    when the body ends.
    """
    sys.stderr.flush()
    try:
        stderr = os.dup(2)
    except OSError:  # closed: nothing is written there
        yield
        return
    with os.fdopen(stderr, "wb") as shown, tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(shown.fileno(), 2)
            kept.seek(0)
            shown.writelines(line for line in kept if not _is_noise(line, on_gpu))


def _is_noise(line: bytes, on_gpu: bool) -> bool:
    return line.startswith(b"USDT:") or (not on_gpu and b"gpuGetDeviceCount failed" in line)


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
    profiler = torch.profiler.profile(activities=activities, profile_memory=not on_gpu)
    with without_noise(on_gpu):
        profiler.start()
    try:
        yield
    finally:
        with without_noise(on_gpu):
            profiler.stop()
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
