import errno
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from varfast import InputError
from varfast.log import RunLog, image_grid, profiled, save_picture, save_png, table
from varfast.types import Rewards

METRICS = {"reward_mean": 0.5, "kl": 0.1, "images_per_s": 3.0}


def test_image_grid_places_and_enlarges():
    images = torch.zeros(3, 3, 8, 8)
    images[1, 0] = 1.0  # red
    images[2] = 0.5
    picture = image_grid(images, columns=2)
    assert picture.shape == (2 * 48 + 4, 2 * 48 + 4, 3)
    assert picture[10, 10].tolist() == [0, 0, 0]
    assert picture[10, 60].tolist() == [255, 0, 0]
    assert picture[60, 10].tolist() == [128, 128, 128]
    assert picture[60, 60].tolist() == [255, 255, 255]
    assert picture[10, 49].tolist() == [255, 255, 255]


def test_image_grid_titles_stand_beside_the_images_and_change_none():
    images = torch.rand(4, 3, 48, 48)
    bare = image_grid(images, 2)
    titled = image_grid(images, 2, ["0 tench", "1 猫"])
    margin = titled[:, : -bare.shape[1]]
    np.testing.assert_array_equal(titled[:, -bare.shape[1] :], bare)
    rows = [margin[:48], margin[52:]]
    assert all((row < 128).any() for row in rows)  # something is written
    assert not np.array_equal(*rows)
    assert (margin[48:52] == 255).all()
    longest = image_grid(images[:1], 1, ["a very long name, which is cut off somewhere " * 9])
    assert longest.shape[1] < 400


@pytest.mark.parametrize("kind", ["png", "jpg", "JPEG", "webp"])
def test_save_picture_follows_the_suffix(tmp_path, kind):
    picture = np.tile(np.array([200, 30, 60], np.uint8), (8, 8, 1))
    save_picture(tmp_path / f"x.{kind}", picture)
    with Image.open(tmp_path / f"x.{kind}") as found:
        assert found.format == {"jpg": "JPEG"}.get(kind, kind.upper())
        assert np.abs(np.asarray(found).astype(int) - picture).max() <= (0 if kind in ("png", "webp") else 3)


def test_save_png_round_trip(tmp_path):
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    save_png(tmp_path / "deep" / "x.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "deep" / "x.png")), picture)


def test_metrics_of_steps_that_are_done_again_are_dropped(tmp_path):
    with RunLog(tmp_path, 0, 5, tensorboard=False) as log:
        for step in (1, 2, 3):
            log.step(step, METRICS)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # killed while writing
    with RunLog(tmp_path, 2, 5, tensorboard=False) as log:
        log.step(3, METRICS | {"kl": 9.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kl"]) for line in lines] == [(1, 0.1), (2, 0.1), (3, 9.0)]


def test_samples_are_the_best_and_the_worst_of_the_step(tmp_path):
    rewards = Rewards(torch.tensor([0.5, 2.0, 0.5, -1.0]), {"a": torch.tensor([1.0, 4.0, 1.0, -2.0])})
    images = torch.tensor([0.0, 0.2, 0.4, 0.6]).view(4, 1, 1, 1).expand(4, 3, 48, 48)
    with RunLog(tmp_path, 0, 1, tensorboard=False) as log:
        log.samples(1, images, torch.tensor([5, 6, 7, 8]), rewards)
    noted = json.loads((tmp_path / "samples" / "step_000001.json").read_text())
    assert [sample["label"] for sample in noted["best"]] == [6, 5, 7, 8]
    assert [sample["label"] for sample in noted["worst"]] == [8, 7, 5, 6]
    assert noted["best"][0] == {"label": 6, "reward": 2.0, "rewards": {"a": 4.0}}
    picture = np.asarray(Image.open(tmp_path / "samples" / "step_000001.png"))
    assert picture.shape == (100, 204, 3)
    assert picture[[0, 0, 0, 0, 99, 99], [0, 60, 120, 203, 0, 203], 0].tolist() == [51, 0, 102, 153, 153, 51]


def test_tensorboard_events_hold_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, 0, 1, tensorboard=True) as log:
        log.step(1, METRICS)
        log.grid(1, torch.zeros(2, 3, 8, 8), 2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(METRICS)
    assert events.Scalars("kl")[0].value == pytest.approx(0.1)
    assert events.Tags()["images"] == ["samples"]
    assert (tmp_path / "grids" / "step_000001.png").exists()


class FakeWandb(SimpleNamespace):
    """What varfast uses of wandb 0.17 and later: init, run.log, run.finish, Image, Error."""

    Error = type("Error", (Exception,), {})

    def __init__(self, refusal=None):
        super().__init__(started=[], logged=[], finished=[], refusal=refusal)

    def init(self, **settings):
        if self.refusal:
            raise self.Error(self.refusal)
        self.started.append(settings)
        log = lambda values, step: self.logged.append((step, values))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda exit_code: self.finished.append(exit_code))

    def Image(self, picture):
        return ("image", picture.size)


@pytest.fixture
def install_wandb(monkeypatch):
    def install(package):
        monkeypatch.setitem(sys.modules, "wandb", package)
        return package

    return install


def test_wandb_gets_metrics_grids_and_config_and_goes_on_with_the_same_run(make_config, install_wandb, tmp_path):
    wandb = install_wandb(FakeWandb())
    config = make_config(log__wandb="digits")
    with RunLog(tmp_path, 0, 2, False, config) as log:
        log.grid(0, torch.zeros(2, 3, 48, 48), 2)
        log.step(1, METRICS)
    log = RunLog(tmp_path, 1, 2, False, config)
    log.step(2, METRICS)
    log.__exit__(KeyError, KeyError(), None)
    first, second = wandb.started
    assert first == second
    assert first["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert (first["project"], first["resume"], first["dir"]) == ("digits", "allow", str(tmp_path))
    assert first["config"] == json.loads(config.model_dump_json())
    assert wandb.logged == [(0, {"samples": ("image", (100, 48))}), (1, METRICS), (2, METRICS)]
    assert wandb.finished == [0, 1]


def test_runs_have_ids_of_their_own(make_config, install_wandb, tmp_path):
    wandb = install_wandb(FakeWandb())
    for name in ("a", "b"):
        RunLog(tmp_path / name, 0, 2, False, make_config(log__wandb="digits")).__exit__(None, None, None)
    assert wandb.started[0]["id"] != wandb.started[1]["id"]


@pytest.mark.parametrize("package", [None, SimpleNamespace()], ids=["not installed", "a folder of that name"])
def test_wandb_that_is_not_installed_is_named_before_models_are_loaded(make_config, install_wandb, package):
    from varfast.train import train

    install_wandb(package)
    config = make_config(log__wandb="digits", policy__checkpoint="nowhere.pth", policy__vqvae_checkpoint="nowhere.pth")
    with pytest.raises(InputError, match=r"log.wandb: the package wandb .* pip install 'varfast\[wandb\]'"):
        train(config)


def test_wandb_that_cannot_start_is_named(make_config, install_wandb, tmp_path):
    install_wandb(FakeWandb("api_key not configured"))
    with pytest.raises(InputError, match=r"log.wandb=digits: api_key not configured(.|\n)*WANDB_MODE=offline"):
        RunLog(tmp_path, 0, 2, False, make_config(log__wandb="digits"))


def test_wandb_is_not_imported_unless_asked(make_config, install_wandb, tmp_path):
    install_wandb(None)
    with RunLog(tmp_path, 0, 1, False, make_config()) as log:
        log.step(1, METRICS)


def test_what_cannot_be_written_is_said_once_and_the_run_goes_on(tmp_path, capsys):
    """A folder and FIFOs in the files' places stand for whatever the disk refuses."""
    for name in ("grids", "samples", "tensorboard", "environment.json"):
        (tmp_path / name).mkdir() if "." in name else (tmp_path / name).write_text("")
    os.mkfifo(tmp_path / "metrics.jsonl")
    image = torch.zeros(2, 3, 4, 4)
    with RunLog(tmp_path, 0, 3, tensorboard=True) as log:
        log.environment({"varfast": "0"})
        for step in (1, 2):
            log.step(step, METRICS)
            log.grid(step, image, 2)
            log.samples(step, image, torch.tensor([0, 1]), Rewards(torch.tensor([0.5, 0.2]), {}))
        (tmp_path / "metrics.jsonl").unlink()
        log.step(3, METRICS)
    said = capsys.readouterr().out.splitlines()
    assert all(line.endswith("The run goes on; this is said once") for line in said), said
    wanted = (
        "a grid of samples",
        "a line of metrics",
        "environment.json",
        "TensorBoard's events",
        "the best and worst",
    )
    assert sorted(line[:12] for line in said if "of earlier" not in line) == sorted(text[:12] for text in wanted)
    # There is space again: nothing of the curves is lost.
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_profile_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    (tmp_path / "profile").write_text("")
    with profiled(tmp_path / "profile", torch.device("cpu")):
        torch.ones(2).sum()
    assert "the profile could not be written: " in capsys.readouterr().out


def test_half_a_line_is_taken_back(tmp_path, monkeypatch):
    with RunLog(tmp_path, 0, 2, tensorboard=False) as log:
        log.step(1, METRICS)
        write = os.write

        def full(descriptor, content):
            if len(content) < 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, content[:20])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            log.step(2, METRICS)
        assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
        assert (tmp_path / "metrics.jsonl").read_text().endswith("\n")
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_damaged_lines_of_earlier_steps_stop_nothing(tmp_path):
    """What a killed run, two runs at once or a fault of the disk leave there; each step stays once."""
    deep = b'{"step": ' + b"[" * 100_000
    lines = [
        b'{"step": 1, "kl": 1}',
        b"\xff\xfe",
        deep,
        b'{"step": ' + b"9" * 5000 + b"}",
        b'{"step": true}',
        b'{"step": 2, "kl": 2}',
        b"[]",
        b'{"step": 1, "kl": 3}',
        b'{"step": 7}',
        b'{"step": 2, "k',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    with RunLog(tmp_path, 3, 4, tensorboard=False):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "kl": 3}\n{"step": 2, "kl": 2}\n'


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()])
def test_a_special_file_in_place_of_earlier_steps_stops_nothing(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with RunLog(tmp_path, 3, 4, tensorboard=False):
        pass


def test_table_lines_up():
    assert table({"reward": 0.1}, {"reward": 0.95, "accuracy": 0.5}).splitlines() == [
        "            before     after",
        "reward       0.100     0.950",
        "accuracy       nan     0.500",
    ]
