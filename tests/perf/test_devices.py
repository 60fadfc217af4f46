"""Ceilings and memory of devices."""

import psutil
import pytest
import torch

from varfast.perf import devices


def test_ceilings_of_a_device_are_those_of_the_dtype():
    assert devices.DEVICES["H200"].ceilings("bfloat16") == devices.Ceilings(790e12, 4.3e12, 139 * 2**30)
    h100 = devices.DEVICES["H100"]
    assert (h100.bfloat16, h100.byte_per_s) == (790e12, 3.02e12)  # measured on one; below the datasheet's
    assert "989 TFLOP/s, 3.35 TB/s" in h100.source
    assert devices.DEVICES["A100"].ceilings("float32").flop_per_s == 19.5e12


def test_measure_here_measures_product_and_copy():
    here = devices.measure_here(torch.device("cpu"), torch.float32)
    assert 1e8 < here.flop_per_s < 1e14
    assert 1e7 < here.byte_per_s < 1e13
    assert here.memory_bytes is None or here.memory_bytes > 2**28


def test_dtype_auto_means_what_the_device_computes_in(monkeypatch):
    assert devices.compute_dtype("auto", torch.device("cuda")) == "bfloat16"
    for bf16, amx, expected in ((True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=bf16: answer)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda answer=amx: answer)
        assert devices.compute_dtype("auto", torch.device("cpu")) == expected
    assert devices.compute_dtype("float32", torch.device("cuda")) == "float32"


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_container_counts_not_that_of_its_host(tmp_path, version):
    """Trees as Linux shows them: a group with a limit below one with a larger limit, in either version."""
    limit, current, cache, unlimited = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", str(2**63 - 4096)),
        ("memory.max", "memory.current", "inactive_file", "max"),
    )[version - 1]
    mount = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    own = "9:name=systemd:/x\n4:cpu,memory:/job/step\n" if version == 1 else "0::/job/step\n"

    def group(path, bytes_limit, bytes_used, bytes_cache):
        path.mkdir(parents=True, exist_ok=True)
        (path / limit).write_text(f"{bytes_limit}\n")
        (path / current).write_text(f"{bytes_used}\n")
        (path / "memory.stat").write_text(f"anon 5\n{cache} {bytes_cache}\nother 7\n")

    assert list(devices._cgroup_memory(tmp_path)) == []  # no /proc
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(own)
    assert devices._cpu_memory(tmp_path)[0] == psutil.virtual_memory().total  # no such group
    group(mount / "job/step", unlimited, 1, 0)
    assert devices._cpu_memory(tmp_path)[0] == psutil.virtual_memory().total
    group(mount / "job", 64 * 2**20, 24 * 2**20, 8 * 2**20)
    assert devices._cpu_memory(tmp_path) == (64 * 2**20, 48 * 2**20)
    group(mount / "job/step", 32 * 2**20, 40 * 2**20, 2**20)
    assert devices._cpu_memory(tmp_path) == (32 * 2**20, 0)
    (mount / "job/step" / limit).unlink()  # a container sees its own group at the mount
    group(mount, 16 * 2**20, 2**20, 0)
    assert devices._cpu_memory(tmp_path) == (16 * 2**20, 15 * 2**20)
    (mount / limit).write_text("much\n")
    assert devices._cpu_memory(tmp_path) == (64 * 2**20, 48 * 2**20)


def test_a_limit_of_the_container_makes_smaller_micro_batches(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(devices, "_cgroup_memory", lambda root: [(2**30, 2**29)])
    assert devices.available_bytes(cpu) == 2**29
    assert devices.usual_bytes(cpu) == 2**29
    assert devices.measure_here(cpu, torch.float32).memory_bytes == 2**30
