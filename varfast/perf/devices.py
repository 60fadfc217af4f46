"""What devices do at best, from data sheets or measured, and how much memory they have."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from varfast.config import Config
from varfast.types import InputError


@dataclass(frozen=True)
class Ceilings:
    """What a device does at best: FLOP/s of a large product, bytes/s of a copy (read plus write); memory if known."""

    flop_per_s: float
    byte_per_s: float
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Device:
    """Ceilings of a GPU by dtype.

    Attributes:
        bfloat16, float32: FLOP/s of dense products, without sparsity; float32 without TF32.
        byte_per_s, memory_bytes: of its memory.
        source: where these come from.
    """

    bfloat16: float
    float32: float
    byte_per_s: float
    memory_bytes: int
    source: str

    def ceilings(self, dtype: str) -> Ceilings:
        return Ceilings(self.float32 if dtype == "float32" else self.bfloat16, self.byte_per_s, self.memory_bytes)


_DATASHEET = "datasheet, not measured: expect less (the H200's product reaches 80 % of its datasheet, its copy 90 %)"
DEVICES = {
    "H200": Device(
        790e12, 67e12, 4.3e12, 139 * 2**30,
        "measured with an 8192^3 bf16 product and a device copy on an H200; float32 from the datasheet",
    ),
    "H100": Device(
        790e12, 67e12, 3.02e12, int(80e9),
        "measured with an 8192^3 bf16 product and a device copy on an H100 SXM 80 GB (its datasheet: 989 TFLOP/s, "
        "3.35 TB/s); float32 from the datasheet",
    ),
    "A100": Device(312e12, 19.5e12, 2.039e12, int(80e9), f"A100 SXM 80 GB, {_DATASHEET}"),
    "A100-40GB": Device(312e12, 19.5e12, 1.555e12, int(40e9), f"A100 SXM 40 GB, {_DATASHEET}"),
    "L40S": Device(362e12, 91.6e12, 0.864e12, int(48e9), _DATASHEET),
    "RTX4090": Device(165e12, 82.6e12, 1.008e12, int(24e9), f"GeForce RTX 4090, {_DATASHEET}"),
    "RTX4080": Device(97.5e12, 48.7e12, 0.717e12, int(16e9), f"GeForce RTX 4080, {_DATASHEET}"),
}  # fmt: skip


def measure_here(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Ceilings of this machine, now: a square product in `dtype` and a copy, medians of 5.

    Sides of 8192 and 2 GiB on a GPU, of 1024 and 64 MiB on a CPU, where both take a fraction of a second.
    """
    on_gpu = device.type == "cuda"
    side, size = (8192, 2**31) if on_gpu else (1024, 2**26)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_s = _median_s(lambda: torch.mm(a, b), device)
    copy_s = _median_s(lambda: target.copy_(source), device)
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else _cpu_memory()[0]
    return Ceilings(2 * side**3 / product_s, 2 * size / copy_s, total)


def _median_s(call: Callable[[], object], device: torch.device) -> float:
    repeats = 10 if device.type == "cuda" else 1  # so that a launch and a synchronisation do not count
    times = []
    for _ in range(1 + 5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - begin) / repeats)
    return statistics.median(times[1:])  # the first warms up


def compute_dtype(name: str, device: torch.device) -> str:
    """What a config's run.dtype means on a device: "float32" or "bfloat16"."""
    if name != "auto":
        return name
    if device.type == "cuda":  # every GPU since 2020
        return "bfloat16"
    # Other CPUs compute in bfloat16 too, many times slower than in float32.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def with_dtype(config: Config, device: torch.device) -> Config:
    """The config with run.dtype auto replaced by what it means on a device."""
    run = config.run.model_copy(update={"dtype": compute_dtype(config.run.dtype, device)})
    return config.model_copy(update={"run": run})


def available_bytes(device: torch.device) -> int:
    """Memory of a device that is free now, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _cpu_memory()[1]


def usual_bytes(device: torch.device) -> int:
    """Memory of a device that a run may count on whatever else is there now: the same at every start."""
    return int(0.9 * whole_bytes(device)) if device.type == "cuda" else whole_bytes(device) // 2


def whole_bytes(device: torch.device) -> int:
    """Memory of a device, in bytes."""
    return int(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else _cpu_memory()[0]


def _cpu_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of memory that this process may use in all, and that are free of it: the machine's, or its container's.

    A container, a job of Slurm or a systemd scope has a limit of its own (cgroup v1 or v2), which psutil does not know;
    whoever goes beyond it is killed.
    """
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for limit, used in _cgroup_memory(root):
        if limit < machine.total:
            total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _cgroup_memory(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes, cache of files aside, of each control group with a limit that this process is in.

    Source: Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst of Linux.
    """
    mounts = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return  # not Linux, or no /proc
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:  # v2
            mount, names = mounts, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount, names = mounts / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Limits of the groups above count too. In a container the path may be the host's, of which there is the end
        # alone: the mount itself.
        folder = mount / path.lstrip("/")
        for group in (folder, *folder.parents):
            found = _limit_and_use(group, *names)
            if found is not None:
                yield found
            if group == mount:
                break


def _limit_and_use(group: Path, limit_name: str, use_name: str, cache_name: str) -> tuple[int, int] | None:
    try:
        limit, used = int((group / limit_name).read_text()), int((group / use_name).read_text())
        entries = dict(line.split(maxsplit=1) for line in (group / "memory.stat").read_text().splitlines())
        return limit, max(0, used - int(entries.get(cache_name, 0)))  # the kernel gives up cache before it kills
    except (OSError, ValueError):  # no such group, or no limit: "max"
        return None


def here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def find_ceilings(name: str, dtype: str) -> tuple[Ceilings, str]:
    """Ceilings of a device by name, and where they come from. Raises: InputError for a name that is not known."""
    if name == "here":
        device = here()
        what = f"CPU, torch threads: {torch.get_num_threads()}"
        if device.type == "cuda":
            what = torch.cuda.get_device_name(device)
        return measure_here(device, getattr(torch, dtype)), f"{what}; measured now with a product and a copy"
    if name not in DEVICES:
        raise InputError(f"device={name}: known are {', '.join(DEVICES)}, and 'here' for this machine, measured")
    return DEVICES[name].ceilings(dtype), DEVICES[name].source
