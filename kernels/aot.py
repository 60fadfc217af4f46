"""Compile every Triton kernel, at every shipped configuration, for sm_90, with no GPU; report what it needs.

    python -m varfast.kernels.aot

Gates (see `problems`): no spills, no stack, 128-bit loads, and HGMMA, Hopper's matrix instruction, in matrix kernels.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODULES = ("sampling", "logprob", "attention", "qkv", "adaln", "gelu", "group_norm")
_MAX_REGISTERS = 255


@dataclass(frozen=True)
class AheadOfTime:
    """A kernel at one configuration.

    Attributes:
        name: for the report.
        kernel: the @triton.jit function.
        signature: type of each argument: "*fp32", "i32", "constexpr", ...
        constants: values of the constexpr arguments.
        matrix: the kernel is made of matrix products and must use HGMMA.
        wide_loads: it streams large arrays and must load 128 bits at a time.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    matrix: bool = False
    wide_loads: bool = True
    attributes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs. Registers a thread; shared memory, spills and stack in bytes."""

    registers: int
    shared_bytes: int
    spilled_bytes: int
    hgmma: int
    wide_loads: int


def compile_for_hopper(item: AheadOfTime) -> Resources:
    """Compile for sm_90; pointers and sizes are taken to be divisible by 16, as they are at run time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = item.kernel.arg_names  # the order of the signature is its own
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if item.signature[name].startswith("*") or item.attributes.get(name) == 16
    }
    constants = {(names.index(name),): value for name, value in item.constants.items()}
    source = ASTSource(
        fn=item.kernel, signature={name: item.signature[name] for name in names}, constexprs=constants, attrs=divisible
    )
    options = {"num_warps": item.num_warps, "num_stages": item.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return _resources(compiled)


def _resources(compiled: Any) -> Resources:
    from triton import knobs

    nvidia: Any = knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [nvidia.cuobjdump.path, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
        )
        sass = subprocess.run(
            [nvidia.nvdisasm.path, "-c", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage.stdout)}
    local = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return Resources(
        registers=found["REG"],
        shared_bytes=int(compiled.metadata.shared),
        spilled_bytes=found["STACK"] + found["LOCAL"] + local,
        hgmma=len(re.findall(r"\bHGMMA\b", sass)),
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*128", sass)) + len(re.findall(r"\bUTMALDG", sass)),
    )


def problems(item: AheadOfTime, used: Resources) -> list[str]:
    """The gates that a kernel does not pass."""
    found = []
    if used.spilled_bytes:
        found.append(f"spills ({used.spilled_bytes})")
    if used.registers > _MAX_REGISTERS:
        found.append(f"{used.registers} registers")
    if item.matrix and not used.hgmma:
        found.append("no HGMMA")
    if item.wide_loads and not used.wide_loads:
        found.append("no 128-bit loads")
    return found


def all_kernels() -> list[AheadOfTime]:
    """Every kernel at every shipped configuration, from each op's file."""
    items: list[AheadOfTime] = []
    for module in MODULES:
        items += importlib.import_module(f"varfast.kernels.{module}").ahead_of_time()
    return items


def main() -> int:
    """Print a line a kernel; 1 if one of them does not pass."""
    failed = 0
    print(f"{'kernel':44} {'regs':>4} {'shared':>7} {'spill':>5} {'HGMMA':>5} {'128-bit':>7}")
    for item in all_kernels():
        used = compile_for_hopper(item)
        wrong = problems(item, used)
        failed += bool(wrong)
        print(
            f"{item.name:44} {used.registers:4} {used.shared_bytes:7} {used.spilled_bytes:5} {used.hgmma:5} "
            f"{used.wide_loads:7}  {', '.join(wrong) or 'ok'}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    sys.exit(main())
