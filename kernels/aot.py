"""Compile every Triton kernel, at every shipped configuration, for sm_90 and sm_100, with no GPU; report what it needs.

    python -m varfast.kernels.aot

Gates (see `problems`): no spills, no stack, 128-bit loads, and in matrix kernels the matrix instruction: HGMMA on
Hopper, UTCMMA on Blackwell.

A launch specialises the integers that it is given: 1 becomes a Python int, on which `.to()` fails, and multiples of 16
are known as such. Each kernel is compiled as it is launched at full size, and also with every integer 1 and with none
that 16 divides (`specialised`): these must compile, no more.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

MODULES = ("sampling", "logprob", "attention", "qkv", "adaln", "group_norm", "conv", "matmul")
_MAX_REGISTERS = 255
SM_90, SM_100 = 90, 100


@dataclass(frozen=True)
class AheadOfTime:
    """A kernel at one configuration.

    Attributes:
        name: for the report.
        kernel: the @triton.jit function.
        signature: type of each argument: "*fp32", "i32", "constexpr", ...
        constants: values of the constexpr arguments.
        matrix: the kernel is made of matrix products and must use the matrix instruction of the target.
        wide_loads: it streams large arrays and must load 128 bits at a time.
        attributes: integers that 16 divides at run time, with the number 16.
        target: compute capability, 90 or 100.
        gated: it must pass the gates; else it must only compile.
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
    target: int = SM_90
    gated: bool = True


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs. Registers a thread; shared memory, spills and stack in bytes; instructions."""

    registers: int
    shared_bytes: int
    spilled_bytes: int
    matrix: int
    wide_loads: int


def specialised(item: AheadOfTime) -> Iterator[AheadOfTime]:
    """A kernel with the integers of its smallest launch, all 1, and with integers that 16 does not divide."""
    kept = {
        item.kernel.params[i].name for i in range(len(item.kernel.params)) if item.kernel.params[i].do_not_specialize
    }
    ones = [name for name, kind in item.signature.items() if kind in ("i32", "i64") and name not in kept]
    signature = {**item.signature, **dict.fromkeys(ones, "constexpr")}
    constants = {**item.constants, **dict.fromkeys(ones, 1)}
    smallest = replace(item, signature=signature, constants=constants)
    yield replace(smallest, name=f"{item.name}, all 1", attributes={}, gated=False)
    yield replace(item, name=f"{item.name}, odd", attributes={}, gated=False)


def compile_kernel(item: AheadOfTime) -> Resources:
    """Compile; pointers are taken to be divisible by 16, as they are at run time."""
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
    compiled = triton.compile(source, target=GPUTarget("cuda", item.target, 32), options=options)
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
        matrix=len(re.findall(r"\b(?:HGMMA|UTC\w*MMA)\b", sass)),
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*128", sass)) + len(re.findall(r"\bUTMALDG", sass)),
    )


def problems(item: AheadOfTime, used: Resources) -> list[str]:
    """The gates that a kernel does not pass."""
    if not item.gated:
        return []
    found = []
    if used.spilled_bytes:
        found.append(f"spills ({used.spilled_bytes})")
    if used.registers > _MAX_REGISTERS:
        found.append(f"{used.registers} registers")
    if item.matrix and not used.matrix:
        found.append(f"no {'HGMMA' if item.target == SM_90 else 'UTCMMA'}")
    if item.wide_loads and not used.wide_loads:
        found.append("no 128-bit loads")
    return found


def all_kernels() -> list[AheadOfTime]:
    """Every kernel at every shipped configuration, from each op's file."""
    items: list[AheadOfTime] = []
    for module in MODULES:
        items += importlib.import_module(f"varfast.kernels.{module}").ahead_of_time()
    return items


def everything() -> list[AheadOfTime]:
    """For sm_90 every kernel at every configuration, and once a kernel and set of flags what small launches make of it;
    for sm_100 once a kernel and set of flags, in bfloat16, and every matrix kernel."""
    items, small, for_100 = [], set(), set()
    found = all_kernels()
    own_setting = {item.kernel for item in found if item.target == SM_100}
    for item in found:
        items.append(item)
        flags = tuple((name, value) for name, value in item.constants.items() if isinstance(value, bool))
        if (item.kernel, flags) not in small:
            small.add((item.kernel, flags))
            items += specialised(item)
        if (
            item.kernel not in own_setting
            and " bf16" in item.name
            and (item.matrix or (item.kernel, flags) not in for_100)
        ):
            for_100.add((item.kernel, flags))
            items.append(replace(item, name=f"{item.name}, sm_100", target=SM_100))
    return items


def _compiled(index: int) -> tuple[Resources | None, list[str]]:
    """What item `index` needs, and what is wrong with it. By index: kernels do not travel between processes."""
    item = everything()[index]
    try:
        used = compile_kernel(item)
    except Exception as error:  # noqa: BLE001 - a kernel may fail to compile in any way, and all are to be seen
        lines = str(error).strip().splitlines() or [""]
        return None, [f"does not compile: {type(error).__name__}: {lines[-1][:200]}"]
    return used, problems(item, used)


def main() -> int:
    """Print a line a kernel; 1 if one of them does not pass."""
    failed, items = 0, everything()
    print(f"{'kernel':60} {'regs':>4} {'shared':>7} {'spill':>5} {'MMA':>5} {'128-bit':>7}")
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn")) as pool:
        for item, (used, wrong) in zip(items, pool.map(_compiled, range(len(items)), chunksize=4), strict=True):
            failed += bool(wrong)
            numbers = " " * 32 if used is None else (
                f"{used.registers:4} {used.shared_bytes:7} {used.spilled_bytes:5} {used.matrix:5} {used.wide_loads:7}"
            )  # fmt: skip
            print(f"{item.name:60} {numbers}  {', '.join(wrong) or 'ok'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    sys.exit(main())
