import errno
import io
import json
import os
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import varfast.progress
from varfast import InputError
from varfast.perf.profile import profiled
from varfast.progress import Progress, duration, pace
from varfast.progress import clock as clock_after
from varfast.runs.log import RunLog
from varfast.runs.pictures import image_grid, prompt_title, save_picture
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


def inked_lines(picture, images_px):
    """How many lines of text stand in the column left of the images: runs of rows with ink."""
    inked = (picture[:, :-images_px] < 128).any(axis=(1, 2))
    return int(inked[0]) + int((inked[1:] & ~inked[:-1]).sum())


def test_prompt_title_is_wrapped_and_cut_to_the_row():
    text = "A CUBE AND\tNINE SPHERES IN THE RAIN BESIDE FOUR LARGE TREES ON THE MOON AT NIGHT WITHOUT ANY LIGHT"
    title = prompt_title(text)
    assert [len(line) <= 28 for line in title.split("\n")] == [True] * 4
    assert title.replace("\n", " ") == text.replace("\t", " ")
    tall = image_grid(torch.rand(1, 3, 128, 128), 1, [title])
    assert inked_lines(tall, 128) == 4
    low = image_grid(torch.rand(1, 3, 48, 48), 1, [title])
    assert inked_lines(low, 48) == 2
    assert low.shape[1] < 48 + 350
    short = image_grid(torch.rand(1, 3, 48, 48), 1, [prompt_title("A CUBE")])
    np.testing.assert_array_equal(short[:, :-48], image_grid(torch.rand(1, 3, 48, 48), 1, ["A CUBE"])[:, :-48])
    assert prompt_title("") == " "


@pytest.mark.parametrize("kind", ["png", "jpg", "JPEG", "webp"])
def test_save_picture_follows_the_suffix(tmp_path, kind):
    picture = np.tile(np.array([200, 30, 60], np.uint8), (8, 8, 1))
    save_picture(tmp_path / f"x.{kind}", picture)
    with Image.open(tmp_path / f"x.{kind}") as found:
        assert found.format == {"jpg": "JPEG"}.get(kind, kind.upper())
        assert np.abs(np.asarray(found).astype(int) - picture).max() <= (0 if kind in ("png", "webp") else 3)


def test_save_picture_round_trip(tmp_path):
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    save_picture(tmp_path / "deep" / "x.png", picture)
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


def test_amend_adds_to_the_line_of_a_step_and_makes_that_of_the_base(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, 0, 3, tensorboard=True) as log:
        log.step(1, METRICS)
        log.step(2, METRICS)
        assert log.metrics_of(0) == {}
        log.amend(0, {"eval/reward": 0.1})
        log.amend(1, {"eval/reward": 0.2})
        assert log.metrics_of(1) == {"step": 1, **METRICS, "eval/reward": 0.2}
    with RunLog(tmp_path, 2, 3, tensorboard=False) as log:  # going on keeps them
        log.step(3, METRICS)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("eval/reward"), line.get("kl")) for line in lines] == [
        (0, 0.1, None), (1, 0.2, 0.1), (2, None, 0.1), (3, None, 0.1)
    ]  # fmt: skip
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("eval/reward")] == [(0, 0.1), (1, 0.2)]


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


class Terminal(io.StringIO):
    def __init__(self, is_one):
        super().__init__()
        self._is_one, self.flushed = is_one, 0

    def isatty(self):
        return self._is_one

    def flush(self):
        self.flushed += 1


@pytest.fixture
def stream_to(monkeypatch):
    """Standard output and standard error, terminals or not, and a clock that the test turns."""

    def make(out=False, error=False):
        monkeypatch.delenv("TQDM_DISABLE", raising=False)
        streams = Terminal(out), Terminal(error)
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        clock = SimpleNamespace(now_s=100.0)
        shown = {"monotonic": lambda: clock.now_s, "time": lambda: clock.now_s}
        shown |= {"localtime": lambda s=None: time.gmtime(clock.now_s if s is None else s), "strftime": time.strftime}
        monkeypatch.setattr(varfast.progress, "time", SimpleNamespace(**shown))
        return *streams, clock

    return make


@pytest.mark.parametrize("error_is_terminal", [False, True], ids=["nohup", "tee"])
def test_progress_off_a_terminal_is_a_line_every_so_many_steps(stream_to, error_is_terminal):
    out, error, clock = stream_to(False, error_is_terminal)
    progress = Progress("grpo", 25, every=10)
    flushed = []
    for step in range(1, 26):
        clock.now_s += 60.0 if step == 1 else 1.5
        progress.update(f"reward={step / 100}")
        flushed.append(out.flushed)
    progress.close()
    assert out.getvalue().splitlines() == [
        "grpo: step 1 of 25, reward=0.01, 60 s a step, 24 min 0 s left (00:26)",
        "grpo: step 10 of 25, reward=0.1, 1.5 s a step, 22 s left",
        "grpo: step 20 of 25, reward=0.2, 1.5 s a step, 8 s left",
        "grpo: step 25 of 25, reward=0.25, 1.5 s a step, 0 s left",
    ]
    assert "\r" not in out.getvalue()
    assert error.getvalue() == ""
    assert flushed[0] > 0  # at once, not when the buffer is full
    assert flushed[9] > flushed[8]


def test_progress_of_slow_steps_is_a_line_every_half_minute(stream_to):
    out, _, clock = stream_to()
    progress = Progress("grpo", 1000, done=500, every=100)
    for _ in range(7):
        clock.now_s += 11.0
        progress.update()
    steps = [line.split(",")[0] for line in out.getvalue().splitlines()]
    assert steps == ["grpo: step 501 of 1000", "grpo: step 504 of 1000", "grpo: step 507 of 1000"]


@pytest.mark.parametrize("terminal", [False, True])
def test_patient_progress_is_a_line_after_half_a_minute(stream_to, terminal):
    out, error, clock = stream_to(terminal, terminal)
    progress = Progress("evaluation", 10, unit="chunk", patient=True)
    for _ in range(10):
        clock.now_s += 7.0
        progress.update()
    assert out.getvalue().splitlines() == [
        "evaluation: chunk 5 of 10, 7 s a chunk, 35 s left (00:02)",
        "evaluation: chunk 10 of 10, 7 s a chunk, 0 s left",
    ]
    assert error.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0424, "42.4 ms"), (0.9, "900 ms"), (1.0, "1 s"), (1532.0, "1.53e+03 s")]
)
def test_pace(seconds, text):
    assert pace(seconds) == text


def test_the_end_is_given_by_the_clock_and_of_another_day_with_its_name(stream_to):
    _, _, clock = stream_to()
    clock.now_s = 23 * 3600.0  # of Thursday, 1 January 1970
    assert clock_after(59 * 60) == "23:59"
    assert clock_after(3600) == "Fri 00:00"


def test_progress_shows_the_pace_and_the_end_that_the_caller_knows(stream_to):
    out, _, clock = stream_to()
    progress = Progress("grpo", 4)
    clock.now_s += 900.0
    progress.update("", step_s=2.0, left_s=3600.0)
    assert out.getvalue() == "grpo: step 1 of 4, 2 s a step, 1 h 0 min left (01:16)\n"


def test_the_line_of_a_step_has_what_matters_in_a_hundred_letters(stream_to, tmp_path, make_config):
    """The change is since the first step, of a run that goes on too."""
    out, _, _ = stream_to()
    first = METRICS | {"reward_mean": 0.25, "groups_without_signal": 1}
    with RunLog(tmp_path, 0, 9000, False, make_config()) as log:
        log.step(1, first)
    with RunLog(tmp_path, 1, 9000, False, make_config()) as log:
        log.step(2, first | {"reward_mean": 0.5}, step_s=1.234, left_s=1e4)
    line = out.getvalue().splitlines()[1]
    assert line == (
        "grpo: step 2 of 9000, reward 0.500 (+0.250) kl 0.100 no signal 1/2, 1.23 s a step, 2 h 46 min left (02:48)"
    )
    assert len(line) < 110


def test_the_line_of_dpo_has_its_margin(stream_to, tmp_path):
    out, _, _ = stream_to()
    with RunLog(tmp_path, 0, 2, tensorboard=False) as log:
        log.step(1, {"implicit_margin": 0.25, "pair_accuracy": 0.75})
    assert "step 1 of 2, margin 0.250 pair accuracy 0.750, " in out.getvalue()


def test_progress_on_a_terminal_is_a_bar(stream_to):
    out, error, _ = stream_to(True, True)
    with Progress("grpo", 2) as progress:
        progress.update("reward=0.5")
        progress.say("a line")
        progress.update()
    assert "2/2" in error.getvalue()
    assert "reward=0.5" in error.getvalue()
    assert "\r" in error.getvalue()
    assert out.getvalue().splitlines() == ["a line"]


@pytest.mark.parametrize("terminal", [False, True])
def test_tqdm_disable_turns_lines_and_bar_off(stream_to, monkeypatch, terminal):
    out, error, _ = stream_to(terminal, terminal)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with Progress("grpo", 2) as progress:
        progress.update()
        progress.say("a line")
    assert (out.getvalue(), error.getvalue()) == ("a line\n", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3601, "1 h 0 min"), (2e5, "55 h 33 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_steps_without_a_kl_have_none_in_their_line(stream_to, tmp_path):
    out, _, _ = stream_to()
    with RunLog(tmp_path, 0, 2, tensorboard=False) as log:
        log.step(1, {"reward_mean": 0.5, "images_per_s": 3.0})
        log.step(2, METRICS)
    lines = out.getvalue().splitlines()
    assert "step 1 of 2, reward 0.500, " in lines[0]
    assert "step 2 of 2, reward 0.500 (+0.000) kl 0.100, " in lines[1]
    assert ["kl" in json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [False, True]
