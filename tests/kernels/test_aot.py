"""Every Triton kernel, at every shipped configuration, compiled for Hopper and Blackwell with no GPU."""

import os
import subprocess
import sys
from dataclasses import replace

from varfast.kernels.aot import BLACKWELL, AheadOfTime, Resources, problems


def compiled(*command):
    """In a process of its own: here the kernels may be interpreted, and then they cannot be compiled."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)


def test_every_kernel_compiles_within_its_gates():
    done = compiled("-m", "varfast.kernels.aot")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()[1:]
    assert len(lines) > 100
    assert all(line.endswith(" ok") for line in lines)
    for op in (
        "sample_tokens fp32",
        "selective_log_softmax bf16 V=4096: logp backward",
        "adaln residual+norm",
        "split_heads",
        "attention",
        "group_norm_silu",
        "one token, one head",
    ):
        assert any(op in line for line in lines), op
    assert any("attention" in line and " sm_100 " in line for line in lines)


# A kernel with one argument of each kind, and the fault that only shows where a launch makes 1 a constant.
TOY = """
import torch
import triton
import triton.language as tl
from varfast.kernels import aot

@triton.jit
def _toy_kernel(x_ptr, off_ptr, none_ptr, one, sixteen, odd, real, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), one.to(tl.float32) + tl.load(off_ptr) + sixteen + odd + real)

def call(one):
    x = torch.empty(64)
    _toy_kernel[(1,)](x, x[1:], None, one, 32, 33, 1.0, BLOCK=32, num_warps=2)

one, two = aot.recorded("toy", lambda: (call(1), call(2)), fast=False)
assert one.signature == {
    "x_ptr": "*fp32", "off_ptr": "*fp32", "none_ptr": "constexpr", "one": "constexpr", "sixteen": "i32", "odd": "i32",
    "real": "fp32", "BLOCK": "constexpr",
}, one.signature
assert one.constants == {"none_ptr": None, "one": 1, "BLOCK": 32}, one.constants
assert [name for name, by in one.attributes.items() if by == 16] == ["x_ptr", "sixteen"], one.attributes
assert (one.num_warps, one.num_stages) == (2, 3)  # 3 is what Triton takes where a launch says nothing
assert two.signature["one"] == "i32" and "one" not in two.constants
for item in (one, two):
    line, ok = aot.report(item)
    print(ok, line)
"""


def test_recorded_specialises_arguments_as_a_launch_does(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    done = compiled(str(script))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("False toy")
    assert "sm_90   does not compile" in done.stdout
    assert "AttributeError(\"'int' object has no attribute 'to'\")" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("True toy")


def test_problems_names_each_gate():
    item = AheadOfTime("x", None, {}, {}, matrix=True)
    good = Resources(registers=128, shared_bytes=0, spilled_bytes=0, matrix=4, wide_loads=2)
    assert problems(item, good) == []
    bad = Resources(registers=256, shared_bytes=0, spilled_bytes=8, matrix=0, wide_loads=0)
    assert problems(item, bad) == ["spills (8)", "256 registers", "no HGMMA", "no 128-bit loads"]
    assert problems(replace(item, capability=BLACKWELL), bad)[2] == "no UTCHMMA"
    degenerate = replace(item, fast=False, matrix=False, wide_loads=False)
    assert problems(degenerate, replace(bad, registers=128)) == []
