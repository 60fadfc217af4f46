"""Every Triton kernel, at every shipped configuration, compiled for Hopper and Blackwell with no GPU."""

import os
import subprocess
import sys
from dataclasses import replace

from varfast.kernels.aot import SM_100, AheadOfTime, Resources, problems


def test_every_kernel_compiles_within_its_gates_and_at_its_smallest():
    # In a process of its own: here the kernels may be interpreted, and then they cannot be compiled.
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "varfast.kernels.aot"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()[1:]
    assert len(lines) > 30
    assert all(line.endswith(" ok") for line in lines)
    for op in (
        "sample_tokens fp32",
        "selective_log_softmax backward bf16",
        "adaln residual+norm",
        "split_heads",
        "attention",
        "group_norm_silu",
        "conv3x3",
        "group_norm_silu join bf16 C=160, all 1",  # of one pixel: an H100 was the first to compile it
        "attention forward bf16 64x64, sm_100",
    ):
        assert any(op in line for line in lines), op


def test_problems_names_each_gate():
    item = AheadOfTime("x", None, {}, {}, matrix=True)
    good = Resources(registers=128, shared_bytes=0, spilled_bytes=0, matrix=4, wide_loads=2)
    assert problems(item, good) == []
    bad = Resources(registers=128, shared_bytes=0, spilled_bytes=8, matrix=0, wide_loads=0)
    assert problems(item, bad) == ["spills (8)", "no HGMMA", "no 128-bit loads"]
    assert problems(replace(item, target=SM_100), bad)[1] == "no UTCMMA"
    assert problems(replace(item, gated=False), bad) == []
