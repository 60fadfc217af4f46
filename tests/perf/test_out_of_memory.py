"""What is said where a device's memory does not suffice."""

import pytest
import torch

from varfast import InputError
from varfast.perf.memory import memory
from varfast.perf.out_of_memory import check_states, lower_memory, scattered_memory
from varfast.perf.plan import plan_memory


@pytest.mark.parametrize("part", ["rollout", "update"])
def test_lower_memory_names_a_captured_update_first(make_work, part):
    work = make_work("d30", update={"cuda_graph": True})
    plan = plan_memory(work, 79 * 2**30)
    held = memory(work, plan).captured_update / 2**30
    said = lower_memory(work, plan, part)
    assert said == f"use update.cuda_graph=false, now true (its graph holds {held:.1f} GiB during the rollout too)"


def test_scattered_memory_names_fragmentation_and_its_remedy(monkeypatch):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert scattered_memory(78 * 2**30, 77 * 2**30) is None
    assert scattered_memory(2**29, 0) is None
    said = scattered_memory(78 * 2**30, 50 * 2**30)
    assert said == (
        "28.0 GiB are reserved and free, in pieces too small: memory is fragmented; set "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    )
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert "although PYTORCH_ALLOC_CONF has" in scattered_memory(78 * 2**30, 50 * 2**30)


def test_a_model_beyond_the_memory_is_refused_before_it_is_made(make_work, monkeypatch):
    monkeypatch.setattr("varfast.perf.devices._cpu_memory", lambda: (10 * 2**30, 2**30))
    with pytest.raises(InputError, match=r"take [\d.]+ GiB, and cpu has 10.0 GiB; choose a smaller policy"):
        check_states(make_work("d30"), torch.device("cpu"))
    check_states(make_work("d16"), torch.device("cpu"))
