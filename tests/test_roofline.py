"""The command that predicts a step from its config."""

import socket
from pathlib import Path

import pytest

from varfast import InputError, roofline
from varfast.perf.devices import DEVICES
from varfast.perf.limits import STAGES
from varfast.perf.tables import report

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["d16_brightness", "d30", "digits", "vqgan_loofid"])
def test_command_needs_no_network_and_no_weights(name, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    assert roofline.main([str(ROOT / "configs" / f"{name}.yaml"), "device=A100", "run.steps=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "A100" in lines[0]
    assert "not measured" in lines[0]
    assert [line.split()[0] for line in lines[8:14]] == list(STAGES)
    assert lines[1].startswith("fits into ")
    assert lines[2].startswith("a step of ")
    assert lines[3].startswith("run.steps=7: at least ")
    assert lines[-1] == "Predictions from counts, not measurements."


def test_command_prints_the_numbers_it_counted(capsys):
    sizes = ["rollout.micro_batch=64", "update.micro_batch=16"]
    roofline.main([str(ROOT / "configs" / "d16_brightness.yaml"), *sizes])
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("decode")).split()
    assert row[1:3] == ["393.8", "201.6"]
    assert "rollout.micro_batch=64, rollout.cuda_graph=true, update.micro_batch=16, update.checkpointing=none" in text
    assert "fits into 139.0 GiB" in text
    roofline.main([str(ROOT / "configs" / "d30.yaml"), "device=RTX4090"])
    assert "does not fit into 22.4 GiB" in capsys.readouterr().out


def test_report_says_what_batch_fills_a_gpu(make_work):
    """LlamaGen-L on an H100."""
    work = make_work(policy={"family": "llamagen", "preset": "L", "checkpoint": "random"})
    h100 = DEVICES["H100"].ceilings("bfloat16")
    lines = report(work, h100, "x").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("rollout of other numbers"))
    assert "166 GB of weights in 256 passes, 3.46 GB and 169.7 GFLOP an image" in lines[first]
    images, ms, tokens, _, weights, bound = lines[first + 4].split()
    assert (images, weights, bound) == ("64", "43%", "bytes")
    moved = 256 * work.cost.weights.read_bytes + 64 * work.cost.rollout.io_bytes
    assert float(ms) == pytest.approx(moved / 3.02e12 * 1e3, rel=1e-3)
    assert float(tokens) == pytest.approx(64 * 256 / (float(ms) * 1e-3), rel=1e-2)
    # 0.65 GB at 3.02 TB/s take as long as 256 images' FLOPs at 790 TFLOP/s.
    assert "as reading the weights at 257 images; an image's own bytes do at 48" in lines[first + 6]
    # 0.9 of what 0.72 GB of weights and 0.29 GB of the tokenizer leave.
    assert lines[first + 7] == "sampling alone, 2815 images fill the memory (25.3 MB each)"


def test_report_shows_the_average_of_the_weights(make_work):
    averaged = make_work("d30", update={"ema_decay": 0.999})
    assert f"\naverage{'7.49':>23}\n" in report(averaged, DEVICES["H200"].ceilings("bfloat16"), "x")


def test_command_names_the_devices_it_knows():
    with pytest.raises(InputError, match="device=H300: known are H200, H100, A100"):
        roofline.main([str(ROOT / "configs" / "digits.yaml"), "device=H300"])
    with pytest.raises(InputError, match="usage: python -m varfast.roofline"):
        roofline.main(["device=H200"])
