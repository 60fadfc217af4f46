import json
import math
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import varfast.pretraining.cache
import varfast.pretraining.var
from varfast import InputError, load_policy
from varfast.data.datasets import digits, load_images
from varfast.data.labels import read_labels
from varfast.export import file_card
from varfast.models import VQVAE
from varfast.pretrain import main
from varfast.pretraining.cache import base_paths, pretrained
from varfast.pretraining.common import batches
from varfast.pretraining.training import PretrainReport, pretrain
from varfast.randomness import deterministic
from varfast.runs.config import ExportConfig
from varfast.runs.folder import RunFolder
from varfast.runs.manifest import dump_config
from varfast.runs.signals import Stopped
from varfast.train import train

SMALL = {
    "policy__checkpoint": "pretrain",
    "policy__var": {"depth": 1, "patch_nums": [1, 2, 4], "vocab_size": 32, "code_width": 8, "num_classes": 10},
    "policy__vqvae": {"base_channels": 32, "channel_multipliers": [1, 2], "num_res_blocks": 1},
    "pretrain__vqvae_steps": 40,
    "pretrain__var_steps": 40,
    "pretrain__batch_size": 32,
    "pretrain__vqvae_lr": 2e-3,
    "pretrain__var_lr": 2e-3,
}
CPU = torch.device("cpu")


@pytest.fixture
def config(make_config):
    return make_config(**SMALL)


def test_a_deterministic_run_may_pretrain_by_operations_without_a_fixed_order(config, monkeypatch):
    """As the upsamplings' gradients on a GPU are; on a CPU put_ stands for them."""

    def unordered(*args):
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
        raise ZeroDivisionError

    monkeypatch.setattr("varfast.pretraining.training.load_images", unordered)
    with deterministic(True), pytest.warns(UserWarning, match="put_"), pytest.raises(ZeroDivisionError):
        pretrained(config, CPU)


def test_pretrain_learns_and_repeats_itself(make_config):
    config = make_config(**SMALL | {"pretrain__vqvae_steps": 120})
    var, vqvae, report = pretrain(config, CPU)
    pixels = digits()[0] * 2 - 1
    assert report.reconstruction_mse < 0.5 * float(pixels.var())
    assert report.token_loss < 0.9 * math.log(32)
    assert 0.5 < report.codebook_usage <= 1
    again, vqvae_again, _ = pretrain(config, CPU)
    for model, twin in ((var, again), (vqvae, vqvae_again)):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_fixed_images_are_encoded_once_and_others_at_every_step(config, monkeypatch):
    """With the same tokens either way, and so the same transformer."""
    encoded, encode = [], VQVAE.encode
    monkeypatch.setattr(VQVAE, "encode", lambda self, images: encoded.append(len(images)) or encode(self, images))
    once, _, _ = pretrain(config, CPU)
    assert sum(encoded) == 1797
    encoded.clear()
    images = digits()
    monkeypatch.setattr("varfast.pretraining.training.load_images", lambda *_: torch.utils.data.StackDataset(*images))
    again, _, _ = pretrain(config, CPU)
    assert sum(encoded) == 40 * 32
    for a, b in zip(once.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_pretrained_is_cached_by_what_made_it(config, make_config, capsys):
    paths = pretrained(config, CPU)
    assert "base model:" in capsys.readouterr().out
    stamps = [path.stat().st_mtime_ns for path in paths]
    assert pretrained(config, CPU) == paths
    assert [path.stat().st_mtime_ns for path in paths] == stamps
    assert "base model:" not in capsys.readouterr().out
    policy = load_policy(*map(str, paths))
    assert policy.sample([0, 9], seed=0).tokens_BL.shape == (2, 21)
    assert json.loads(paths[0].with_name("report.json").read_text())["seconds"] > 0
    for change in ({"run__seed": 1}, {"pretrain__var_steps": 41}, {"pretrain__class_dropout": 0.2}):
        assert base_paths(make_config(**SMALL | change), CPU) != paths
    for free in ({"run__dir": "elsewhere"}, {"grpo__kl_beta": 0.0}, {"pretrain__num_workers": 1}):
        assert base_paths(make_config(**SMALL | free), CPU) == paths


@pytest.fixture
def instant(monkeypatch, make_models):
    """Pre-training that takes no time; a list that grows by one for each base."""
    made = []

    def stand_in(config, device):
        made.append(1)
        return *make_models(), PretrainReport(0.1, 1.0, 0.5, 2.0, 1.0)

    monkeypatch.setattr(varfast.pretraining.cache, "pretrain", stand_in)
    return made


def test_a_cached_base_that_is_damaged_is_made_again(config, instant, capsys):
    paths = pretrained(config, CPU)
    whole = [path.read_bytes() for path in paths]
    flipped = bytearray(whole[0])
    flipped[len(flipped) // 2] ^= 1
    report = paths[0].with_name("report.json")
    damages = {
        "var.pth has another SHA-256": lambda: paths[0].write_bytes(flipped),
        "vqvae.pth has 100 of": lambda: paths[1].write_bytes(whole[1][:100]),
        "var.pth has 0 of": lambda: paths[0].write_bytes(b""),
        "vqvae.pth cannot be read: No such file": lambda: paths[1].unlink(),
        "report.json does not say": lambda: report.write_text('{"seconds": 1.0}'),
        "report.json does not say what": lambda: report.unlink(),
    }
    for number, (said, damage) in enumerate(damages.items()):
        damage()
        capsys.readouterr()
        assert pretrained(config, CPU) == paths
        assert f"{said}" in capsys.readouterr().out
        assert len(instant) == number + 2
        assert [path.read_bytes() for path in paths] == whole
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["report.json", "var.pth", "vqvae.pth"]


@pytest.mark.parametrize("cache", ["file/cache", "folder", "/proc/nothing"])
def test_a_cache_that_cannot_be_written_is_said_before_anything_is_trained(make_config, tmp_path, instant, cache):
    (tmp_path / "file").write_text("")
    config = make_config(**SMALL, pretrain__cache_dir=str(tmp_path / cache))
    key = base_paths(config, CPU)[0].parent.name
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / key).write_text("")  # a file where the base's folder should be
    with pytest.raises(InputError, match="the base model in .* cannot be used: .*; choose another pretrain.cache_dir"):
        pretrained(config, CPU)
    assert not instant


def test_of_two_that_want_one_base_the_second_waits_for_it(config, instant, capsys):
    """Two threads; flock tells two descriptors of a process apart as it does two processes."""
    began, go_on, pretrain_now = threading.Event(), threading.Event(), varfast.pretraining.cache.pretrain

    def slow(*given):
        began.set()
        assert go_on.wait(30)
        return pretrain_now(*given)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as threads:
        patch.setattr(varfast.pretraining.cache, "pretrain", slow)
        first = threads.submit(pretrained, config, CPU)
        assert began.wait(30)
        second = threads.submit(pretrained, config, CPU)
        deadline = time.monotonic() + 30
        while "waiting: the base model in" not in (out := capsys.readouterr().out):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert f"is in use by pid {os.getpid()} on host" in out
        go_on.set()
        assert first.result() == second.result()
    assert len(instant) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_pre_training_and_leaves_no_lock_and_no_half_file(config, tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(varfast.pretraining.var, "train_tokenizer", lambda *given: os.kill(os.getpid(), number))
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    with pytest.raises(Stopped, match=f"stopped by {number.name}") as caught:
        main([str(path), "run.device=cpu"])
    assert caught.value.code == 128 + number
    assert "pre-training keeps nothing" in caught.value.__notes__[0]
    assert list(base_paths(config, CPU)[0].parent.iterdir()) == []


def test_pretrain_with_shared_adaln_and_drop_path(make_config):
    policy = SMALL["policy__var"] | {"depth": 2, "shared_adaln": True}
    config = make_config(**SMALL | {"policy__var": policy, "pretrain__drop_path": 0.5, "pretrain__vqvae_steps": 5})
    _, _, report = pretrain(config, CPU)
    assert report.token_loss < 3.47


def test_pretrain_on_a_folder_of_images(tmp_path, make_config):
    rng = np.random.RandomState(0)
    for name in ("a", "b", "c"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(4):
            pixels = rng.randint(0, 255, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    settings = SMALL | {
        "pretrain__dataset": str(tmp_path / "images"),
        "pretrain__batch_size": 6,
        "pretrain__vqvae_steps": 3,
        "pretrain__var_steps": 3,
    }
    for labels in (2, 10):
        settings["policy__var"] = SMALL["policy__var"] | {"num_classes": labels}
        with pytest.raises(
            InputError, match=rf"has 3 class folders \(a, b, c\), policy.var.num_classes={labels}: .*=3"
        ):
            pretrain(make_config(**settings), CPU)
    settings["policy__var"] = SMALL["policy__var"] | {"num_classes": 3}
    var, _, _ = pretrain(make_config(**settings), CPU)
    assert var.config.num_classes == 3
    settings["pretrain__batch_size"] = 13
    with pytest.raises(InputError, match="has 12 images, fewer than pretrain.batch_size=13"):
        pretrain(make_config(**settings), CPU)


@pytest.fixture
def own_images(tmp_path):
    """Settings of a base for a folder of three classes."""
    for label, name in enumerate(("2", "10", "dog")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (12, 12), (80 * label, 60 * index, 128)).save(tmp_path / "set" / name / f"{index}.png")
    return SMALL | {
        "policy__var": SMALL["policy__var"] | {"num_classes": 3},
        "pretrain__dataset": str(tmp_path / "set"),
        "pretrain__batch_size": 6,
        "pretrain__vqvae_steps": 3,
        "pretrain__var_steps": 3,
        "pretrain__num_workers": 1,
    }


def test_a_base_of_own_images_says_what_it_is_and_what_to_do(own_images, make_config, capsys):
    config = make_config(**own_images)
    var_path, _ = pretrained(config, CPU)
    said = capsys.readouterr().out
    assert (
        "12 images\nlabel  folder  images\n    0  2            4\n    1  10           4\n    2  dog          4\n"
        in said
    )
    assert "of the pixels' variance is lost by the VQ-VAE" in said
    assert "raise pretrain.vqvae_steps=3, as to 12" in said
    assert "guessing costs 3.47" in said
    assert "raise pretrain.var_steps=3, as to 12" in said
    for name, size in (("reconstructions.png", 2 * 52 - 4), ("samples.png", 3 * 52 - 4)):
        with Image.open(var_path.with_name(name)) as picture:
            assert picture.height == size
    assert [row.folder for row in read_labels(var_path.parent)] == ["2", "10", "dog"]
    report = json.loads(var_path.with_name("report.json").read_text())
    assert 0 < report["codebook_usage"] <= 1  # of fewer steps than it is measured over, too
    pixels = np.stack([np.full((8, 8, 3), (80 * a, 60 * b, 128)) for a in range(3) for b in range(4)]) / 127.5 - 1
    assert report["pixel_variance"] == pytest.approx(pixels.var(axis=(0, 1, 2)).mean(), rel=0.5)


def test_a_run_keeps_the_labels_of_its_base_and_takes_their_names(own_images, make_config):
    config = make_config(**own_images, rollout__labels=["dog", 0], run__steps=1, eval__samples_per_label=0)
    assert train(config) == 0
    folder = RunFolder(config.run.dir)
    assert [row.images for row in read_labels(folder.path)] == [4, 4, 4]
    card = file_card(Path("m.pth"), ExportConfig(checkpoint="x", out="m.pth"), folder, config, 1, {})
    assert "| 1 | 10 |  | 4 |" in card
    Path(own_images["pretrain__dataset"]).rename(folder.path.parent / "moved")
    longer = make_config(**own_images, rollout__labels=["dog", 0], run__steps=2, eval__samples_per_label=0)
    assert train(longer) == 0  # the run needs its images no more


def test_a_wrong_name_is_said_before_a_base_is_made(own_images, make_config, tmp_path):
    with pytest.raises(InputError, match="rollout.labels holds 'dgo', which no label is called; did you mean 'dog'?"):
        train(make_config(**own_images, rollout__labels=["dgo"]))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_while_training_is_named_without_a_traceback(own_images, make_config, workers):
    config = make_config(**own_images | {"pretrain__num_workers": workers})
    images = load_images(config.pretrain.dataset, 8)
    for path in Path(config.pretrain.dataset).rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"png is broken or no image \(.*\); delete it or replace it") as error:
        next(batches(images, config, 1, CPU))
    assert "Traceback" not in str(error.value)
    assert "\n" not in str(error.value)


def test_main_needs_a_config():
    with pytest.raises(InputError, match="usage: python -m varfast.pretrain"):
        main([])


@pytest.mark.parametrize(("which", "what"), [("vqvae", "tokenizer"), ("var", "transformer")])
def test_a_base_model_that_diverges_does_not_come_into_the_cache(config, monkeypatch, which, what):
    train_it = getattr(varfast.pretraining.var, f"train_{what}")

    def diverged(*args):
        model, *measured = train_it(*args)
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
        return model, *measured

    monkeypatch.setattr(varfast.pretraining.var, f"train_{what}", diverged)
    config = config.model_copy(
        update={"pretrain": config.pretrain.model_copy(update={"vqvae_steps": 2, "var_steps": 2})}
    )
    with pytest.raises(InputError, match=f"of the .* diverged: 1 of .*lower pretrain.{which}_lr .now 0.002"):
        pretrained(config, CPU)
    assert not any(path.exists() for path in base_paths(config, CPU))
