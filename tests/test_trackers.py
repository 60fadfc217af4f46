"""trackio, MLflow and SwanLab follow a run: what they are told, by stand-ins with the calls that varfast makes.

Each was also run for real, offline (docs/measured.md has the versions); Weights & Biases is in tests/test_log.py.
"""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from varfast import InputError
from varfast.runs.log import RunLog
from varfast.runs.trackers import MLflow, SwanLab, Trackio

METRICS = {"reward_mean": 0.5, "reward/luma": 0.25}


class Calls:
    """A package that notes what is called on it."""

    def __init__(self, **special):
        self.calls = []
        self.exceptions = SimpleNamespace(MlflowException=type("MlflowException", (Exception,), {}))
        self.__dict__.update(special)

    def Image(self, picture):
        return ("image", picture.size)

    def __getattr__(self, name):
        def call(*arguments, **settings):
            self.calls.append((name, *arguments, settings) if settings else (name, *arguments))
            return SimpleNamespace(info=SimpleNamespace(run_id="a1"))

        return call

    def of(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def install(monkeypatch):
    def put(service, **special):
        package = Calls(**special)
        monkeypatch.setitem(sys.modules, service.name, package)
        return package

    return put


def follow(config, folder, parts=2):
    for part in range(parts):
        with RunLog(folder, part, parts, False, config) as log:
            log.grid(part, torch.zeros(2, 3, 48, 48), 2)
            log.step(part + 1, METRICS | {"loss": float("nan")})


def test_trackio_gets_metrics_and_grids_and_goes_on_by_its_name(make_config, install, tmp_path):
    package = install(Trackio)
    config = make_config(log__trackio="digits")
    follow(config, tmp_path)
    first, second = (settings for (settings,) in package.of("init"))
    assert first == second
    name = f"{tmp_path.name}-{(tmp_path / 'trackio_id.txt').read_text().strip()}"
    assert (first["project"], first["name"], first["resume"]) == ("digits", name, "allow")
    assert first["config"] == json.loads(config.model_dump_json())
    picture = {"samples": ("image", (100, 48))}
    assert package.of("log") == [
        (picture, {"step": 0}), (METRICS, {"step": 1}), (picture, {"step": 1}), (METRICS, {"step": 2}),
    ]  # fmt: skip
    assert len(package.of("finish")) == 2


def test_mlflow_goes_on_with_the_run_that_it_named(make_config, install, tmp_path):
    package = install(MLflow)
    follow(make_config(log__mlflow="digits"), tmp_path)
    assert package.of("set_experiment") == [("digits",), ("digits",)]
    assert package.of("start_run") == [
        ({"run_id": None, "run_name": tmp_path.name},), ({"run_id": "a1", "run_name": None},),
    ]  # fmt: skip
    ((settings,),) = package.of("log_params")  # once: a setting cannot be changed there
    assert settings["update.lr"] == "0.0001"
    assert all(isinstance(value, str) and len(value) <= 500 for value in settings.values())
    assert package.of("log_metrics") == [(METRICS, {"step": 1}), (METRICS, {"step": 2})]
    assert [call[-1] for call in package.of("log_image")] == [{"key": "samples", "step": s} for s in (0, 1)]
    assert package.of("end_run") == [("FINISHED",), ("FINISHED",)]


def test_swanlab_writes_into_the_run_folder(make_config, install, tmp_path):
    package = install(SwanLab)
    follow(make_config(log__swanlab="digits"), tmp_path, parts=1)
    ((settings,),) = package.of("init")
    assert settings["logdir"] == str(tmp_path / "swanlab")
    assert (settings["project"], settings["experiment_name"]) == ("digits", tmp_path.name)
    assert (settings["id"], settings["resume"]) == ((tmp_path / "swanlab_id.txt").read_text().strip(), "allow")
    assert package.of("log")[1] == (METRICS, {"step": 1})
    assert package.of("finish") == [({"state": "success"},)]


@pytest.mark.parametrize(
    ("service", "ended"), [(MLflow, ("FAILED",)), (SwanLab, ({"state": "crashed"},))], ids=["mlflow", "swanlab"]
)
def test_a_run_that_failed_is_marked_as_failed(make_config, install, tmp_path, service, ended):
    package = install(service)
    log = RunLog(tmp_path, 0, 2, False, make_config(**{f"log__{service.name}": "digits"}))
    log.__exit__(KeyError, KeyError(), None)
    assert package.of("end_run" if service is MLflow else "finish") == [ended]


@pytest.mark.parametrize("service", [Trackio, MLflow, SwanLab], ids=lambda service: service.name)
def test_a_service_that_refuses_is_named_with_what_to_do(make_config, install, tmp_path, service):
    def refuse(*arguments, **settings):
        raise OSError("no route to host")

    install(service, **{"start_run" if service is MLflow else "init": refuse})
    with pytest.raises(InputError, match=rf"log.{service.name}=digits: no route to host\n  .*log.{service.name}=null"):
        RunLog(tmp_path, 0, 2, False, make_config(**{f"log__{service.name}": "digits"}))


def test_several_services_follow_one_run(make_config, install, tmp_path):
    packages = [install(Trackio), install(SwanLab)]
    follow(make_config(log__trackio="a", log__swanlab="b"), tmp_path, parts=1)
    assert all(package.of("log")[-1] == (METRICS, {"step": 1}) for package in packages)
