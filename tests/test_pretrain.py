import json
import math

import pytest
import torch

from varfast import InputError, load_policy
from varfast.data import digits
from varfast.models import VQVAE
from varfast.pretrain import base_paths, main, pretrain, pretrained
from varfast.randomness import deterministic

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

    monkeypatch.setattr("varfast.pretrain.load_images", unordered)
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
    monkeypatch.setattr("varfast.pretrain.load_images", lambda *_: torch.utils.data.StackDataset(*images))
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


def test_pretrain_with_shared_adaln_and_drop_path(make_config):
    policy = SMALL["policy__var"] | {"depth": 2, "shared_adaln": True}
    config = make_config(**SMALL | {"policy__var": policy, "pretrain__drop_path": 0.5, "pretrain__vqvae_steps": 5})
    _, _, report = pretrain(config, CPU)
    assert report.token_loss < 3.47


def test_pretrain_on_a_folder_of_images(tmp_path, make_config):
    import numpy as np
    from PIL import Image

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


def test_main_needs_a_config():
    with pytest.raises(InputError, match="usage: python -m varfast.pretrain"):
        main([])
