"""What the benchmarks share: the digits model with random weights, and images/s beside every time."""

from pathlib import Path

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
