import functools

import harness
import pytest

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
