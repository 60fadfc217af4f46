"""Where an implementation runs in a test: reference on the CPU, Triton interpreted on the CPU, Triton on a GPU."""

import os
from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True)
class Path:
    impl: str
    device: str


@pytest.fixture(
    params=[
        Path("reference", "cpu"),
        Path("triton", "cpu"),
        pytest.param(Path("triton", "cuda"), marks=pytest.mark.gpu),
    ],
    ids=["reference", "interpreted", "cuda"],
)
def path(request):
    if request.param == Path("triton", "cpu") and os.environ.get("TRITON_INTERPRET") != "1":
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
