"""What many GPUs lose to communication."""

import pytest

from varfast.perf.devices import Ceilings
from varfast.perf.limits import speed_of_light_s, stage_counts
from varfast.perf.memory import held_states
from varfast.perf.plan import plan_memory
from varfast.perf.scaling import all_gather_s, scale_data_parallel, scale_fully_sharded

H200 = Ceilings(790e12, 4.3e12, 139 * 2**30)


def data_parallel(work, gpus, gradient_item_bytes):
    return scale_data_parallel(work, plan_memory(work, None), H200, gpus, gradient_item_bytes)


def fully_sharded(work):
    return scale_fully_sharded(work, plan_memory(work, None), H200, 8)


def test_all_gather_takes_each_gpu_s_part_over_its_own_port():
    assert all_gather_s(450e9, 1) == 0.0
    assert all_gather_s(450e9, 8) == pytest.approx(7 / 8)
    # 4 nodes: an eighth of 400 GB, of which 3 in 4 are elsewhere, at 50 GB/s; then 7 in 8 of all at 450.
    assert all_gather_s(400e9, 32) == pytest.approx(0.75 + 350 / 450)


def test_scale_data_parallel_hides_behind_one_backward_pass(make_work):
    work = make_work("d30", update={"micro_batch": 32})
    counts = stage_counts(work, plan_memory(work, None))
    step_s = sum(speed_of_light_s(c, H200) for c in counts.values())
    way = data_parallel(work, 64, 4)
    assert way.bytes_per_gpu == pytest.approx(2 * 63 / 64 * 4 * 2_010_020_356)
    # 8.04 GB: 17.6 ms across 8 nodes and 15.6 ms within one, twice.
    assert way.communication_s * 1e3 == pytest.approx(2 * (17.6 + 15.6), rel=0.005)
    assert way.efficiency == pytest.approx(step_s / (step_s + 16 * way.communication_s))
    assert way.efficiency_overlapped == 1.0  # 153 ms of backward pass
    small = data_parallel(make_work("d30", update={"micro_batch": 4}), 64, 4)
    assert way.efficiency < small.efficiency_overlapped < 1.0  # 19 ms of it
    assert data_parallel(work, 1, 4).efficiency == 1.0
    assert data_parallel(work, 64, 2).communication_s == way.communication_s / 2


def test_scale_fully_sharded_gathers_in_every_micro_batch(make_work):
    work = make_work("d30", update={"micro_batch": 16})
    matrices = 30 * 18 * 1920**2 + 1920 * 4096
    weights, gradient = 2 * matrices + 4 * (2_010_020_356 - matrices), 4 * 2_010_020_356
    way = fully_sharded(work)
    assert way.bytes_per_gpu == pytest.approx(7 / 8 * 2 * (3 * weights + gradient))
    assert way.communication_s == pytest.approx(way.bytes_per_gpu / 450e9)
    assert way.efficiency < way.efficiency_overlapped < 1.0
    held = held_states(work)
    assert way.states_bytes == pytest.approx((held.total - held.tokenizer) / 8 + held.tokenizer)
    free = fully_sharded(make_work("d30", update={"micro_batch": 16}, grpo={"kl_beta": 0.0}))
    assert free.bytes_per_gpu == pytest.approx(7 / 8 * 2 * (2 * weights + gradient))
