"""Packages, their folders, and the extension: csrc/ -> varfast/kernels/_C.so. Everything else is in pyproject.toml.

`pip install -e .` builds it. Without nvcc the CPU part is built, without a C++ compiler nothing: a plain line says so
(pip shows it with -v), `python -m varfast.env` says it again, and every op still has its PyTorch implementation.

    CXX                   C++ compiler; default: c++ or g++ on the PATH
    CUDA_HOME             toolkit; default: nvcc on the PATH, then /usr/local/cuda
    TORCH_CUDA_ARCH_LIST  GPUs, such as "9.0" or "8.0;9.0+PTX"; default: 8.0, 9.0, 10.0 and PTX for later ones
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
EXTENSION = "varfast.kernels._C"
# The oldest torch whose stable ABI the extension may use (2.11, as in pyproject.toml): built with any later torch's
# headers, it loads on this one and on all that follow.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"
# Those that name the CUDA kernels where there are any, and those that do not.
HOST_SOURCES = ("ops.cpp", "grpo_loss.cpp", "dpo_loss.cpp")
CUDA_SOURCES = ("grpo_loss_cuda.cu", "dpo_loss_cuda.cu")
CPU_SOURCES = (
    "grpo_loss_cpu.cpp",
    "split_heads_cpu.cpp",
    "adaln_cpu.cpp",
    "group_norm_cpu.cpp",
    "gelu_cpu.cpp",
    "column_sums_cpu.cpp",
    "attention_cpu.cpp",
    "rms_norm_cpu.cpp",
    "rotary_cpu.cpp",
)


def find_cxx(environment: Mapping[str, str]) -> str | None:
    """Path of the C++ compiler."""
    return _first_found([environment.get("CXX") or "c++", "g++"], environment)


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    """Path of nvcc. It may be a wrapper: it finds its own toolkit, so nothing here needs the toolkit's root."""
    home = environment.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return _first_found(places, environment)


def _first_found(commands: list[str], environment: Mapping[str, str]) -> str | None:
    found = (shutil.which(command, path=environment.get("PATH")) for command in commands)
    return next(filter(None, found), None)


def gencode_flags(arch_list: str | None, supported: set[str]) -> list[str]:
    """nvcc's flags for a TORCH_CUDA_ARCH_LIST; None: the default, as far as nvcc supports it.

    Raises: ValueError for an entry that is not like 9.0, 9.0a or 9.0+PTX.
    """
    entries = re.split(r"[;\s]+", (arch_list or DEFAULT_ARCHITECTURES).strip())
    parsed = []
    for entry in entries:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not found:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST has {entry!r}; want entries like 9.0, 9.0a or 9.0+PTX")
        parsed.append(("".join(found.groups()[:3]), bool(found[4])))
    if not arch_list:
        # An older toolkit: the GPUs that it knows, and PTX of the last for those that it does not.
        known = [number for number, _ in parsed if f"sm_{number}" in supported]
        parsed = [(number, number == known[-1]) for number in known]
    flags = []
    for number, ptx in parsed:
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"] if ptx else []
    return flags


def nvcc_command(nvcc: str, environment: Mapping[str, str]) -> list[str]:
    """How the CUDA kernels are compiled, without files."""
    codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    flags = gencode_flags(environment.get("TORCH_CUDA_ARCH_LIST"), set(codes.split()))
    host = ["-ccbin", environment["CXX"]] if environment.get("CXX") else []
    return [nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0", *host, *flags]


class BuildExtension(build_ext):
    """Compiles with g++ and nvcc directly.

    torch.utils.cpp_extension takes the toolkit's root from where nvcc lies, which is wrong where that is a wrapper.
    The headers of torch's stable ABI cost 1 s a file (measured on one core).
    """

    def get_ext_filename(self, fullname: str) -> str:
        """Not a Python module and tied to no Python version: torch.ops.load_library opens it."""
        return fullname.replace(".", os.sep) + ".so"

    def run(self) -> None:
        """Where the result goes into the checkout, an earlier one must not pass for it."""
        if self.inplace:
            (ROOT / "kernels" / "_C.so").unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Build what can be built; say plainly what cannot and why."""
        cxx = find_cxx(os.environ)
        if cxx is None:
            return self.say("no C++ compiler: extension not built. Install g++ and install again")
        if importlib.util.find_spec("torch") is None:
            return self.say("torch is not installed where this is built: extension not built. Install torch first")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        try:
            self.compile(cxx, target)
        except subprocess.CalledProcessError as error:
            self.say(f"extension not built: {' '.join(error.cmd)}\n{error.stderr}")

    def compile(self, cxx: str, target: Path) -> None:
        """Compile the files of csrc/, side by side, and link them."""
        import torch

        folder = Path(torch.__file__).parent
        cuda = None
        nvcc = find_nvcc(os.environ)
        if nvcc is None:
            self.say("nvcc not found: building the CPU part only")
        elif not (folder / "lib" / "libtorch_cuda.so").exists():
            self.say(f"torch {torch.__version__} is a build without CUDA: building the CPU part only")
        else:
            try:
                cuda = nvcc_command(nvcc, os.environ)
            except subprocess.CalledProcessError as error:
                self.say(f"{nvcc} does not run: building the CPU part only. {error.stderr}")
        # No traps: else g++ leaves loops with a minimum, or a division, as they are instead of vectorising them.
        flags = ["-O3", "-fno-trapping-math", "-std=c++20", "-fPIC", "-fvisibility=hidden", TORCH_TARGET]
        flags += ["-isystem", str(folder / "include")]
        with_cuda = [*flags, "-DUSE_CUDA", "-DVARFAST_CUDA"]
        with ThreadPoolExecutor() as pool:
            cpu_objects = [pool.submit(self.run_compiler, [cxx, *flags], source) for source in CPU_SOURCES]
            host = [cxx, *(with_cuda if cuda else flags)]
            host_objects = [pool.submit(self.run_compiler, host, source) for source in HOST_SOURCES]
            cuda_objects = [pool.submit(self.run_compiler, cuda, source) for source in CUDA_SOURCES if cuda]
        link, libraries = [cxx, "-shared"], [f"-L{folder / 'lib'}", "-ltorch_cpu"]
        objects = [pending.result() for pending in (*host_objects, *cpu_objects)]
        if cuda:
            try:
                objects += [pending.result() for pending in cuda_objects]
            except subprocess.CalledProcessError as error:
                self.say(f"nvcc failed: building the CPU part only. {' '.join(error.cmd)}\n{error.stderr}")
                for source in HOST_SOURCES:  # over the objects of the same names
                    self.run_compiler([cxx, *flags], source)
            else:
                # The static CUDA runtime: the minor version of torch's own need not be the toolkit's.
                link = [cuda[0], "-shared", "-cudart", "static"]
                libraries.append("-ltorch_cuda")
        subprocess.run([*link, *objects, *libraries, "-o", str(target)], capture_output=True, text=True, check=True)
        self.say(f"built {EXTENSION} with torch {torch.__version__}, {'CPU' if link[0] == cxx else 'CPU and CUDA'}")

    def run_compiler(self, command: list[str], source: str) -> str:
        """Path of the object file."""
        result = str(Path(self.build_temp) / f"{source}.o")
        command = [*command, "-c", str(ROOT / "csrc" / source), "-o", result]
        subprocess.run(command, capture_output=True, text=True, check=True)
        return result

    @staticmethod
    def say(line: str) -> None:
        """One plain line among the installer's."""
        print(f"varfast: {line}", flush=True)


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["varfast", "varfast.*"]), "varfast.kernels"],
        package_dir={"varfast.kernels": "kernels"},
        package_data={"varfast": ["py.typed"], "varfast.data": ["imagenet.txt"]},
        # optional: an install goes on without what could not be built. The source list is for its sake only.
        ext_modules=[Extension(EXTENSION, ["csrc/ops.cpp"], optional=True, py_limited_api=True)],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
