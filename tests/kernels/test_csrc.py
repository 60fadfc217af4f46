"""The extension is built where it can be, its kernels fit, and what is missing is said."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from varfast.kernels import choices

ROOT = Path(__file__).parent.parent.parent

_spec = importlib.util.spec_from_file_location("varfast_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup)

CXX, NVCC = setup.find_cxx(os.environ), setup.find_nvcc(os.environ)
needs_cxx = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
HOW = "run `pip install -v -e .` again: it says why the extension was not built"


def availability(device, op="grpo_token_loss"):
    return next(c for c in choices(torch.device(device)) if c.op == op)


@needs_cxx
def test_extension_is_built_where_there_is_a_compiler():
    assert "cpp" in availability("cpu").available, f"{availability('cpu').why}; {HOW}"
    picked = {choice.op for choice in choices(torch.device("cpu")) if choice.impl == "cpp"}
    split, adaln = {"split_heads", "split_heads_to_cache"}, {"layer_norm_modulate", "gated_residual_norm"}
    attention = {"block_causal_attention", "cached_attention"}
    next_token = {"rms_norm", "residual_rms_norm", "swiglu", "split_heads_rotary", "split_heads_rotary_to_cache"}
    next_token |= {"decode_attention"}
    losses = {"grpo_token_loss", "dpo_loss"}
    assert picked == {"group_norm_silu", "gelu_bias"} | losses | split | adaln | attention | next_token


@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_extension_is_built_with_cuda_where_there_is_nvcc():
    release = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    major = re.search(r"release (\d+)", release)[1]
    if major != torch.version.cuda.split(".")[0]:
        pytest.skip(f"nvcc {major}, torch of CUDA {torch.version.cuda}")
    assert availability("cuda").impl == "cuda", f"{availability('cuda').why}; {HOW}"


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "kernels", "registers_at_most"),
    [
        # Forward and backward, of float32 with and without 128-bit loads and of float64; the image's ratio of both.
        # 64 registers: four blocks of 256 threads an SM.
        ("grpo_loss_cuda.cu", 8, 64),
        ("dpo_loss_cuda.cu", 4, 96),  # pairs and means, of both dtypes
    ],
)
def test_cuda_kernels_do_not_spill_on_any_architecture(tmp_path, source, kernels, registers_at_most):
    command = setup.nvcc_command(NVCC, {})
    compiled = subprocess.run(
        [*command, "-Xptxas", "-v", "-c", str(ROOT / "csrc" / source), "-o", str(tmp_path / "cuda.o")],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", compiled)]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled)
    num_architectures = sum(flag.startswith("arch=") and "code=sm_" in flag for flag in command)
    assert len(registers) == len(frames) == kernels * num_architectures > 0
    assert set(frames) == {("0", "0", "0")}, compiled
    assert max(registers) <= registers_at_most, compiled


PROGRAM = """
#include <cstdio>
#include <limits>
#include "grpo_math.h"
using namespace varfast;
template <typename T>
void print(T logp, T old, T ref, T advantage, bool has_reference, bool sequence = false, bool unbiased = false) {
  const GrpoSettings<T> settings{T(0.8), T(1.2), T(0.5), has_reference, sequence, unbiased};
  const GrpoToken<T> token = grpo_token(logp, old, ref, advantage, T(1.1), settings);
  GrpoSums<double> sums;
  GrpoSums<T> one;
  one.add(token);
  sums.add(one);
  sums.add(one);
  T loss, stats[5];
  sums.write(0.5, &loss, stats);
  std::printf("[%.17g, %.17g, %.17g, %.17g, %.17g, %.17g, %d],\\n", double(token.loss), double(token.kl),
              double(token.clipped), double(token.ratio), double(token.gap), double(token.grad),
              loss == token.loss && stats[0] == token.kl && stats[4] == token.gap);
}
int main() {
  std::printf("[");
  print<double>(0.3, 0.1, 0.25, 2.0, true);   // above, rewarded: cut off
  print<double>(0.3, 0.1, 0.8, -2.0, true);   // above, punished: not
  print<double>(0.05, 0.0, 0.0, 1.5, false);  // within
  // Above, and rounding makes both products 4 units of the smallest number: half the gradient.
  const double unit = std::numeric_limits<double>::denorm_min();
  print<double>(0.26, 0.0, 0.0, 3 * unit, false);
  print<float>(0.3f, 0.1f, 0.25f, 2.0f, true);
  print<double>(0.3, 0.1, 0.8, 2.0, true, true, false);  // the image's ratio is within: not cut off
  print<double>(0.3, 0.1, 0.8, 2.0, true, false, true);
  std::printf("0]");
}
"""


@needs_cxx
def test_grpo_math_compiles_without_torch_and_is_right(tmp_path):
    (tmp_path / "main.cpp").write_text(PROGRAM)
    binary = tmp_path / "main"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([CXX, *flags, str(tmp_path / "main.cpp"), "-o", str(binary)], check=True)
    rows = json.loads(subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout)[:-1]
    assert all(row[-1] == 1 for row in rows)
    up = math.exp(0.2)

    def kl(q):
        return math.exp(q) - q - 1

    expected = [
        [0.5 * kl(-0.05) - 2.4, kl(-0.05), 1, up, up - 1, -0.5 * math.expm1(-0.05)],
        [0.5 * kl(0.5) + 2 * up, kl(0.5), 0, up, up - 1, -0.5 * math.expm1(0.5) + 2 * up],
        [-1.5 * math.exp(0.05), 0, 0, math.exp(0.05), math.expm1(0.05), -1.5 * math.exp(0.05)],
    ]
    for row, wanted in zip(rows[:3], expected, strict=True):
        assert row[:-1] == pytest.approx(wanted, rel=1e-12, abs=1e-15)
    assert rows[3][0] == -4 * 5e-324
    assert rows[3][5] == -2 * 5e-324
    assert rows[4][:-1] == pytest.approx(expected[0], rel=1e-5)
    sequence = [0.5 * kl(0.5) - 2.2, kl(0.5), 0, 1.1, up - 1, -0.5 * math.expm1(0.5) - 2.2]
    unbiased = [0.5 * up * kl(0.5) - 2.4, kl(0.5), 1, up, up - 1, -0.5 * up * 0.5]
    for row, wanted in zip(rows[5:], (sequence, unbiased), strict=True):
        assert row[:-1] == pytest.approx(wanted, rel=1e-12)


def test_gencode_flags_follow_the_list_and_the_toolkit():
    known = {"sm_80", "sm_90", "sm_100"}

    def codes(arch_list, supported=known):
        return [flag.partition("code=")[2] for flag in setup.gencode_flags(arch_list, supported)[1::2]]

    assert codes(None) == ["sm_80", "sm_90", "sm_100", "compute_100"]
    assert codes("") == codes(None)
    assert codes(None, {"sm_80", "sm_90"}) == ["sm_80", "sm_90", "compute_90"]  # a toolkit of before 12.8
    assert codes("9.0") == ["sm_90"]
    assert codes("8.6 9.0a;12.0+PTX") == ["sm_86", "sm_90a", "sm_120", "compute_120"]
    with pytest.raises(ValueError, match="has 'Hopper'; want entries like"):
        codes("Hopper")


def test_find_nvcc_takes_a_wrapper_and_prefers_cuda_home(tmp_path):
    for folder in ("home/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / folder / "nvcc").chmod(0o755)
    on_path = {"PATH": str(tmp_path / "path")}
    assert setup.find_nvcc(on_path) == str(tmp_path / "path/nvcc")
    assert setup.find_nvcc({**on_path, "CUDA_HOME": str(tmp_path / "home")}) == str(tmp_path / "home/bin/nvcc")
    assert setup.find_nvcc({**on_path, "CUDA_HOME": str(tmp_path / "nowhere")}) is None


def build(folder, **environment):
    for name in ("setup.py", "pyproject.toml", "csrc", "kernels", "varfast", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "kernels/_C.so").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, "CUDA_HOME": "/nowhere", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # As an install lays it out, and before any other varfast.
    (folder / "installed").mkdir()
    shutil.copytree(folder / "varfast", folder / "installed/varfast")
    shutil.copytree(folder / "kernels", folder / "installed/varfast/kernels")
    code = (
        "import torch, varfast; from varfast.kernels import extension as e; print(e.__file__); "
        "print(e.cannot_run_cuda(torch.device('cuda'))); print(e.cannot_run_cpp(torch.device('cpu')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=folder / "installed", capture_output=True, text=True, check=True
    )
    file, no_cuda, no_cpp = found.stdout.splitlines()
    assert Path(file).is_relative_to(folder)
    return done.stdout, no_cuda, no_cpp


@needs_cxx
def test_without_nvcc_the_cpu_part_is_built_and_says_so(tmp_path):
    output, no_cuda, no_cpp = build(tmp_path)
    assert "varfast: nvcc not found: building the CPU part only" in output
    assert "built without CUDA; `pip install" in no_cuda
    assert no_cpp == "None"


@needs_cxx
def test_when_nvcc_fails_the_cpu_part_is_built_and_says_so(tmp_path):
    (tmp_path / "cuda/bin").mkdir(parents=True)
    (tmp_path / "cuda/bin/nvcc").write_text(
        '#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo sm_90 || { echo too new a g++ >&2; exit 1; }\n'
    )
    (tmp_path / "cuda/bin/nvcc").chmod(0o755)
    output, no_cuda, no_cpp = build(tmp_path, CUDA_HOME=str(tmp_path / "cuda"))
    if torch.version.cuda is not None:
        assert "varfast: nvcc failed: building the CPU part only." in output
        assert "too new a g++" in output
    assert "built without CUDA" in no_cuda
    assert no_cpp == "None"


def test_without_a_compiler_varfast_works_and_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    output, no_cuda, no_cpp = build(tmp_path, PATH=str(tmp_path / "empty"), CXX="")
    assert "varfast: no C++ compiler: extension not built" in output
    assert no_cuda == no_cpp
    assert no_cpp.startswith("the extension is not built; `pip install -v -e .` builds it")
