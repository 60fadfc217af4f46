"""One record a session, written row by row; a session that died goes on where it was: the benchmark that it died in is
tried once more, without its peers, and left out if it dies again.

VARFAST_BENCH_TEST_S   seconds after which a benchmark that hangs ends its process
"""

import gc
import os
import signal
import sys

import harness
import pytest
import torch

DEVICE_LOST = 33  # exit code: the CUDA context is gone; started again, the session goes on with the next benchmark
DIED, DIED_TWICE = "ended its process", "ended its process twice"
_RECORD = harness.Record(harness.record_path())


@pytest.fixture(scope="session")
def record():
    """Of this session; printed at its end, and written if it is of a GPU."""
    return _RECORD


def pytest_collection_modifyitems(config, items):
    """Leave out what an earlier process of this record did, or two died of."""
    done = {name for name, state in _RECORD.content["tests"].items() if state != DIED}
    left_out = [item for item in items if item.nodeid in done]
    if left_out:
        items[:] = [item for item in items if item.nodeid not in done]
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    limit = int(os.environ.get("VARFAST_BENCH_TEST_S", "0"))
    if limit:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even where it waits for the device
        signal.alarm(limit)
    _RECORD.alone = _RECORD.content["tests"].get(item.nodeid) == DIED
    begun = DIED_TWICE if _RECORD.alone else DIED  # unless it gets to say otherwise
    if _RECORD.path is not None:
        _RECORD.note("tests", item.nodeid, begun)
    result = yield
    signal.alarm(0)
    if _RECORD.path is not None and _RECORD.content["tests"][item.nodeid] == begun:
        _RECORD.note("tests", item.nodeid, "passed without peers" if _RECORD.alone else "passed")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and _RECORD.path is not None:
        _RECORD.note("tests", item.nodeid, f"failed: {report.longreprtext.strip().splitlines()[-1][:300]}")
    if report.when == "teardown" and harness.CUDA:
        sys.last_value = sys.last_traceback = None  # they hold the tensors of a test that failed
        gc.collect()
        try:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the device is lost: {error}", returncode=DEVICE_LOST)
    return report


def pytest_terminal_summary(terminalreporter):
    rows = [harness.Row(**row) for row in _RECORD.content["rows"]]
    if not rows:
        return
    best = _RECORD.ceilings
    terminalreporter.section("against peers and ceilings")
    terminalreporter.write_line(
        f"ceilings: {best.flop_per_s / 1e12:.3g} TFLOP/s, {best.byte_per_s / 1e9:.4g} GB/s, on {harness.DEVICE}"
    )
    for row in rows:
        terminalreporter.write_line(row.line())
    if _RECORD.path is not None:
        terminalreporter.write_line(f"record: {_RECORD.path}")
