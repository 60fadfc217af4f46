import functools
from pathlib import Path

import harness
import pytest
import torch

from varfast.config import load_config
from varfast.train import random_policy

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"


@pytest.fixture(scope="session")
def digits_policy():
    """(config, policy) of configs/digits.yaml on the CPU, with random weights: times do not depend on their values."""
    config = load_config(CONFIG, ["policy.checkpoint=random"])
    return config, random_policy(config, torch.device("cpu"))


@pytest.fixture
def report_images():
    """Note the throughput, from the median, beside the time."""

    def report(benchmark, images: int) -> None:
        benchmark.extra_info["threads"] = torch.get_num_threads()
        if benchmark.stats is not None:  # None with --benchmark-disable
            benchmark.extra_info["images_per_s"] = round(images / benchmark.stats.stats.median, 1)

    return report


_ROWS: list[harness.Row] = []


@pytest.fixture(scope="session")
def ceilings():
    return _measured_ceilings()


@pytest.fixture(scope="session")
def rows():
    """Rows of this session; printed at its end, and recorded if they are of a GPU."""
    return _ROWS


@functools.cache
def _measured_ceilings():
    return harness.measure_ceilings()


def pytest_terminal_summary(terminalreporter):
    if not _ROWS:
        return
    best = _measured_ceilings()
    terminalreporter.section("against peers and ceilings")
    terminalreporter.write_line(
        f"ceilings: {best.flop_per_s / 1e12:.3g} TFLOP/s, {best.byte_per_s / 1e9:.4g} GB/s, on {harness.DEVICE}"
    )
    for row in _ROWS:
        terminalreporter.write_line(row.line())
    if harness.CUDA:
        terminalreporter.write_line(f"record: {harness.write_record(_ROWS, best)}")
