"""The command that predicts a step from its config."""

import socket
from pathlib import Path

import pytest

from varfast import InputError, roofline
from varfast.perf.devices import DEVICES
from varfast.perf.limits import STAGES
from varfast.perf.tables import report

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["d16_brightness", "d30", "digits"])
def test_command_needs_no_network_and_no_weights(name, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    assert roofline.main([str(ROOT / "configs" / f"{name}.yaml"), "device=A100", "run.steps=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "A100" in lines[0]
    assert "not measured" in lines[0]
    assert [line.split()[0] for line in lines[5:11]] == list(STAGES)
    assert any(line.startswith("run.steps=7: at least") for line in lines)
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


def test_report_shows_the_average_of_the_weights(make_work):
    averaged = make_work("d30", update={"ema_decay": 0.999})
    assert f"\naverage{'7.49':>23}\n" in report(averaged, DEVICES["H200"].ceilings("bfloat16"), "x")


def test_command_names_the_devices_it_knows():
    with pytest.raises(InputError, match="device=H300: known are H200, H100, A100"):
        roofline.main([str(ROOT / "configs" / "digits.yaml"), "device=H300"])
    with pytest.raises(InputError, match="usage: python -m varfast.roofline"):
        roofline.main(["device=H200"])
