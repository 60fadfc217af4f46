"""Compile every Triton kernel ahead of time, without a GPU, exactly as its launches would; report its resources.

    python -m varfast.kernels.aot [WORD ...]        only kernels whose name contains every word

Each op's `ahead_of_time()` lists example calls of the op. `recorded` runs them on the CPU, intercepts the launches
instead of executing them, and specialises the arguments of each launch by Triton's own rule: an integer 1 and None
become constants of the kernel, and integers and addresses divisible by 16 are marked as such for the compiler.

Every kernel must pass these gates (see `problems`): no register spills, no stack, 128-bit loads, and in matrix kernels
the tensor-core instruction (HGMMA on sm_90, UTCHMMA on sm_100). Calls with degenerate shapes only have to compile.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from varfast.kernels import selection, settings

HOPPER, BLACKWELL = (9, 0), (10, 0)
_MAX_REGISTERS = 255
_OPTIONS = ("num_warps", "num_stages")
_FLAGS = ("enable_fp_fusion",)


@dataclass(frozen=True)
class AheadOfTime:
    """One kernel in one configuration, to be compiled. `recorded` makes them from example calls.

    Attributes:
        name: its name in the report.
        kernel: the @triton.jit function.
        signature: type of each argument: "*fp32", "i32", "constexpr", ...
        constants: values of the constexpr arguments.
        matrix: the kernel consists of matrix products and must use the tensor-core instruction.
        wide_loads: the kernel streams large arrays and must load 128 bits at a time.
        attributes: by argument, 16 if it is known to be divisible by 16, else 1. Arguments that are not listed are
            treated as divisible if they are pointers, and as not divisible if they are numbers.
        fast: False for a degenerate shape, which must compile but need not pass the gates.
        capability: compute capability of the GPU, (9, 0) or (10, 0).
        options: compiler options other than num_warps and num_stages.
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
    fast: bool = True
    capability: tuple[int, int] = HOPPER
    options: Mapping[str, bool] = field(default_factory=dict)

    @property
    def compiled(self) -> tuple[Any, ...]:
        """Everything that the compiled binary depends on."""
        tables = (self.signature, self.constants, self.attributes, self.options)
        numbers = (self.num_warps, self.num_stages, self.capability)
        return id(self.kernel), *(tuple(sorted((k, repr(v)) for k, v in t.items())) for t in tables), *numbers


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel. Registers are per thread; shared memory, spills and stack are in bytes.

    Attributes:
        matrix: number of tensor-core instructions.
        wide_loads: number of instructions that load 128 bits.
        instructions, barriers: number in the whole program, each counted once however often it is executed.
    """

    registers: int
    shared_bytes: int
    spilled_bytes: int
    matrix: int
    wide_loads: int
    instructions: int = 0
    barriers: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# From calls to kernels


def recorded(
    name: str,
    call: Callable[[], Any],
    *,
    matrix: bool = False,
    narrow: tuple[Any, ...] = (),
    fast: bool = True,
    also_blackwell: bool = False,
) -> list[AheadOfTime]:
    """What `call` would compile on a GPU: one item for each kernel launched, named `name` plus the kernel's own name.

    Nothing is computed: the outputs of kernels stay uninitialised. Launch settings are those of the target GPU.

    Args:
        call: calls ops with impl="triton" on small CPU tensors, whose alignment and strides matter as they would on a
            GPU.
        matrix, fast: as in AheadOfTime.
        narrow: kernels that read too little data to need wide loads.
        also_blackwell: compile for sm_100 as well as for sm_90.
    """
    items = []
    for capability in (HOPPER, BLACKWELL) if also_blackwell else (HOPPER,):
        with selection.launches_recorded(), settings.compiling_for(capability), _launches() as launches:
            call()
        assert launches, f"{name} launched nothing"
        for kernel, arguments, keywords in launches:
            shown = kernel.fn.__name__.strip("_").removesuffix("_kernel").replace("_", " ")
            item = AheadOfTime(
                name if shown in name else f"{name}: {shown}",
                kernel,
                **_specialised(kernel, arguments, keywords, capability),
                matrix=matrix and fast,
                wide_loads=fast and kernel not in narrow,
                fast=fast,
                capability=capability,
            )
            items.append(item)
    return items


@contextmanager
def _launches() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Intercept the launches of Triton kernels; yields the list of them as (kernel, arguments, keywords)."""
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def catch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        assert not callable(grid), "a grid that depends on the settings is not caught"
        assert all(side > 0 for side in grid), grid
        found.append((kernel, arguments, keywords))

    before = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}
    for kind in before:
        kind.run = catch
    try:
        yield found
    finally:
        for kind, run in before.items():
            kind.run = run


def _specialised(
    kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], capability: tuple[int, int]
) -> dict[str, Any]:
    """Signature, constants, attributes and options: the steps of JITFunction.run up to the call of the compiler."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(_target(capability))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, given = bind(*arguments, **keywords)
    unknown = set(given) - {*_OPTIONS, *_FLAGS}
    assert not unknown, f"{kernel.fn.__name__}: what launch options {unknown} change is not compiled here"
    options, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialisation, given)
    names = kernel.arg_names
    divisible = {names[index] for (index,), found in attributes.items() if ["tt.divisibility", 16] in found}
    return {
        "signature": signature,
        "constants": {names[index]: value for (index,), value in constants.items()},
        "attributes": {name: 16 if name in divisible else 1 for name in names},
        "num_warps": options.num_warps,
        "num_stages": options.num_stages,
        "options": {name: value for name, value in given.items() if name in _FLAGS},
    }


def _target(capability: tuple[int, int]) -> Any:
    from triton.backends.compiler import GPUTarget

    major, minor = capability
    return GPUTarget("cuda", 10 * major + minor, 32)


# ---------------------------------------------------------------------------------------------------------------------
# From kernels to machine code


def compile_for(item: AheadOfTime) -> Resources:
    """Compile a kernel for its target GPU and return its resources."""
    return _resources(binary(item))


def binary(item: AheadOfTime) -> Any:
    """The result of Triton's compiler, with every intermediate stage, such as binary(item).asm["ptx"]."""
    import triton
    from triton.compiler import ASTSource

    names = item.kernel.arg_names  # item.signature may be in another order
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if item.attributes.get(name, 16 if item.signature[name].startswith("*") else 1) == 16
    }
    constants = {(names.index(name),): value for name, value in item.constants.items()}
    source = ASTSource(
        fn=item.kernel, signature={name: item.signature[name] for name in names}, constexprs=constants, attrs=divisible
    )
    options = {option: getattr(item, option) for option in _OPTIONS} | dict(item.options)
    return triton.compile(source, target=_target(item.capability), options=options)


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

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    return Resources(
        registers=found["REG"],
        shared_bytes=int(compiled.metadata.shared),
        spilled_bytes=found["STACK"] + found["LOCAL"] + count(r"\b(?:STL|LDL)\b"),
        matrix=count(r"\b(?:HGMMA|UTC\w*MMA)\b"),
        wide_loads=count(r"\b(?:LDG|LDGSTS)\.[\w.]*128") + count(r"\bUTMALDG"),
        instructions=count(r"/\*[0-9a-f]{4,}\*/\s+\S"),
        barriers=count(r"\bBAR\.SYNC"),
    )


def problems(item: AheadOfTime, used: Resources) -> list[str]:
    """The gates that a kernel fails."""
    found = []
    if item.fast and used.spilled_bytes:
        found.append(f"spills ({used.spilled_bytes})")
    if used.registers > _MAX_REGISTERS:
        found.append(f"{used.registers} registers")
    if item.matrix and not used.matrix:
        found.append("no HGMMA" if item.capability == HOPPER else "no UTCHMMA")
    if item.wide_loads and not used.wide_loads:
        found.append("no 128-bit loads")
    return found


def _modules() -> list[Any]:
    """The modules of this package except this one and those whose name begins with _ (_triton, the extension _C)."""
    import varfast.kernels

    names = [found.name for found in pkgutil.iter_modules(varfast.kernels.__path__)]
    return [importlib.import_module(f"varfast.kernels.{name}") for name in names if name[0] != "_" and name != "aot"]


def all_kernels() -> list[AheadOfTime]:
    """Every kernel in every shipped configuration, from each file that defines `ahead_of_time`. Items that compile to
    the same binary are listed once."""
    items: dict[tuple[Any, ...], AheadOfTime] = {}
    for module in _modules():
        calls = getattr(module, "ahead_of_time", None)
        if calls is not None and calls.__module__ == module.__name__:
            for item in calls():
                items.setdefault(item.compiled, item)
    return list(items.values())


def forgotten(items: list[AheadOfTime]) -> list[str]:
    """Kernels of this package, by file and name, that are missing from the items."""
    compiled = {id(item.kernel) for item in items}
    found = ((f"{m.__name__}.{name}", kernel) for m in _modules() for name, kernel in vars(m).items())
    kernels = {name: kernel for name, kernel in found if name.endswith("_kernel") and hasattr(kernel, "arg_names")}
    return sorted(name for name, kernel in kernels.items() if id(kernel) not in compiled)


def report(item: AheadOfTime) -> tuple[str, bool]:
    """One line with a kernel's resources, and whether it passes the gates."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import TritonError

    head = f"{item.name:60} sm_{10 * item.capability[0] + item.capability[1]:<4}"
    try:
        used = compile_for(item)
    except (CompilationError, TritonError) as error:
        return f"{head} does not compile: {error}", False
    wrong = problems(item, used)
    numbers = f"{used.registers:4} {used.shared_bytes:7} {used.spilled_bytes:5} {used.matrix:6} {used.wide_loads:7}"
    return f"{head} {numbers} {used.instructions:6} {used.barriers:4}  {', '.join(wrong) or 'ok'}", not wrong


def main(words: list[str]) -> int:
    """Print one line for each kernel; returns 1 if any of them fails, else 0."""
    everything = all_kernels()
    items = [item for item in everything if all(word in item.name for word in words)]
    print(
        f"{'kernel':60} {'for':7} {'regs':>4} {'shared':>7} {'spill':>5} {'matrix':>6} {'128-bit':>7} instrs barriers"
    )
    missing = forgotten(everything)
    if missing:
        print(f"no example call launches {', '.join(missing)}: add one to ahead_of_time() of its file")
    passed = not missing
    # Forked workers inherit the kernels, which cannot be pickled, and the imports, which take seconds.
    global _ITEMS
    _ITEMS = items
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("fork")) as workers:
        for line, ok in workers.map(_report, range(len(items))):
            passed = passed and ok
            print(line, flush=True)
    return 0 if passed else 1


_ITEMS: list[AheadOfTime] = []


def _report(index: int) -> tuple[str, bool]:
    return report(_ITEMS[index])


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    sys.exit(main(sys.argv[1:]))
