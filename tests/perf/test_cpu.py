import subprocess
import sys

import pytest

from varfast.perf.cpu import keep_freed_memory

# Pages that come anew for ten tensors of 64 MB, one after the other, once the heap has grown.
PROGRAM = """
import resource, torch
from varfast.perf.cpu import keep_freed_memory
if {keep}: assert keep_freed_memory()
for _ in range(10): torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_keep_freed_memory_spares_the_pages_of_the_next_tensor(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert 4 * faults(keep=True) < faults(keep=False)


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")]
)
def test_keep_freed_memory_leaves_an_allocator_that_the_environment_sets(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()
