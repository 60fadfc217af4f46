"""Where an implementation runs in a test: reference or C++ on the CPU, Triton interpreted there, Triton on a GPU."""

import os
from dataclasses import dataclass

import pytest
import torch

from varfast.kernels.extension import NO_EXTENSION


@dataclass(frozen=True)
class Path:
    impl: str
    device: str


PATHS = {
    "reference": Path("reference", "cpu"),
    "interpreted": Path("triton", "cpu"),
    "cuda": pytest.param(Path("triton", "cuda"), marks=pytest.mark.gpu),
}


def pytest_generate_tests(metafunc):
    """Every path of a test that takes `path`: C++ on the CPU too in files that say HAS_CPP, and MORE_TRITON kernels."""
    if "path" in metafunc.fixturenames:
        paths = dict(PATHS)
        if getattr(metafunc.module, "HAS_CPP", False):
            paths["cpp"] = Path("cpp", "cpu")
        for impl in getattr(metafunc.module, "MORE_TRITON", ()):
            paths[f"{impl} interpreted"] = Path(impl, "cpu")
            paths[f"{impl} cuda"] = pytest.param(Path(impl, "cuda"), marks=pytest.mark.gpu)
        metafunc.parametrize("path", paths.values(), ids=paths, indirect=True)


@pytest.fixture
def path(request):
    if request.param.impl == "cpp" and NO_EXTENSION:
        pytest.skip(NO_EXTENSION)
    if (
        request.param.impl.startswith("triton")
        and request.param.device == "cpu"
        and os.environ.get("TRITON_INTERPRET") != "1"
    ):
        pytest.skip("needs TRITON_INTERPRET=1; the kernel runs on the GPU here")
    return request.param


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference from float64, NaN never passing."""
    difference = (got.detach().double().cpu() - exact.detach().double().cpu()).abs()
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


@pytest.fixture
def assert_as_exact():
    """The house rule: an error of at most twice that of PyTorch in the same dtype, both against float64."""

    def check(got, plain, exact, floor: float = 1e-7):
        for name in exact:
            assert got[name].shape == exact[name].shape, name
            assert error(got[name], exact[name]) <= 2 * error(plain[name], exact[name]) + floor, name

    return check
