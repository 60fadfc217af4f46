"""Statistics of real images: by the command, from files of others, and from the cache."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from varfast import InputError
from varfast.data.datasets import digits
from varfast.evaluation.features import load_real_images
from varfast.features.networks import DigitsPixels, to_levels
from varfast.features.reference import reference_statistics
from varfast.features.statistics import Summing
from varfast.statistics import main


@pytest.fixture(scope="module")
def levels():
    return to_levels(digits(8)[0][:100])


@pytest.fixture
def folder(levels, tmp_path):
    (tmp_path / "real" / "a").mkdir(parents=True)
    for i, picture in enumerate(levels.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(picture).save(tmp_path / "real" / ("a" if i % 2 else ".") / f"{i:03d}.png")
    return tmp_path / "real"


@pytest.fixture
def network():
    """Counts its images; another name makes other features of it."""
    found = DigitsPixels()
    found.seen, features = 0, found.features

    def counting(levels):
        found.seen += len(levels)
        return features(levels)

    found.features = counting
    return found


def statistics(address, network, cache, image_size=8, batch_size=64):
    return reference_statistics(str(address), network, image_size, "reward.fid.reference", cache, batch_size)


def assert_equal(found, features):
    np.testing.assert_allclose(found.mu_D, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.sigma_DD, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-15)
    assert found.count in (None, len(features))


def test_sums_keep_their_digits_far_from_0():
    """All features near 1e6, as no sum of squares would survive."""
    rows = np.random.RandomState(0).randn(1000, 5) + 1e6
    summing = Summing()
    for part in torch.from_numpy(rows).split(300):
        summing.add(part)
    found = summing.statistics()
    np.testing.assert_allclose(found.mu_D, rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.sigma_DD, np.cov(rows, rowvar=False), rtol=1e-8, atol=1e-9)


def test_the_command_writes_what_reward_and_evaluation_read(levels, folder, network, tmp_path, capsys):
    out = tmp_path / "digits.npz"
    assert main([f"images={folder}", "features=digits", "image_size=8", f"out={out}", "batch_size=7"]) == 0
    assert "mean and covariance of 64 digits features of 100 images" in capsys.readouterr().out
    features = DigitsPixels().features(levels).numpy()
    assert_equal(statistics(out, network, tmp_path), features)
    np.testing.assert_allclose(load_real_images(str(out), DigitsPixels(), 8).statistics.mu_D, features.mean(0))
    with np.load(out) as arrays:  # as pytorch-fid reads it
        assert arrays["mu"].shape == (64,)
        assert arrays["sigma"].shape == (64, 64)
    with pytest.raises(InputError, match=r"digits.npz exists; choose another out, or overwrite=true"):
        main([f"images={folder}", "features=digits", f"out={out}"])
    few = tmp_path / "few"
    few.mkdir()
    for name in ("000.png", "002.png"):
        os.link(folder / name, few / name)
    main([f"images={few}", "features=digits", f"out={out}", "overwrite=true"])
    assert "too few for covariance=full of the reward loo_fid, which needs more than 64" in capsys.readouterr().out
    main(["images=digits", "features=digits", f"out={out}", "overwrite=true"])
    assert_equal(statistics(out, network, tmp_path), DigitsPixels().features(to_levels(digits(8)[0])).numpy())


def test_statistics_of_others_have_no_name_and_their_width_is_checked(network, tmp_path):
    mu, sigma = np.arange(64.0), np.eye(64)
    np.savez(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    found = statistics(tmp_path / "theirs.npz", network, tmp_path)
    np.testing.assert_array_equal(found.mu_D, mu)
    assert found.count is None
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(InputError, match=r"reference=.*wide.npz: mu \(2048,\) .* of other features; these are 64 wide"):
        statistics(tmp_path / "wide.npz", network, tmp_path)
    np.savez(tmp_path / "nan.npz", mu=mu * np.nan, sigma=sigma)
    with pytest.raises(InputError, match=r"nan.npz: mu holds 64 numbers that are not finite"):
        statistics(tmp_path / "nan.npz", network, tmp_path)
    np.savez(tmp_path / "other.npz", x=mu)
    with pytest.raises(InputError, match=r"other.npz holds x; want images as arr_0, or mu and sigma"):
        statistics(tmp_path / "other.npz", network, tmp_path)


def test_statistics_of_other_features_are_refused(folder, network, tmp_path):
    main([f"images={folder}", "features=digits", f"out={tmp_path}/a.npz"])
    network.name = "inception_torchvision"
    for read in (lambda: statistics(tmp_path / "a.npz", network, tmp_path),
                 lambda: load_real_images(f"{tmp_path}/a.npz", network, 8)):  # fmt: skip
        with pytest.raises(InputError, match=r"holds statistics of the features digits; these are inception_torchv"):
            read()


def test_statistics_of_a_folder_are_kept_until_it_changes(levels, folder, network, tmp_path, capsys):
    cache, features = tmp_path / "cache", DigitsPixels().features(levels).numpy()
    for seen in (100, 100):
        assert_equal(statistics(folder, network, cache), features)
        assert network.seen == seen
    assert statistics(folder, network, cache).count == 100
    statistics(folder, network, cache, image_size=16)
    assert network.seen == 200
    network.name = "others"
    statistics(folder, network, cache)
    assert network.seen == 300
    network.name = "digits"
    (folder / "000.png").unlink()
    assert statistics(folder, network, cache).count == 99
    assert network.seen == 399
    for kept in cache.iterdir():
        kept.write_bytes(kept.read_bytes()[:100])
    assert statistics(folder, network, cache).count == 99
    assert network.seen == 498
    assert "are made again" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_done_without(folder, network, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    assert statistics(folder, network, tmp_path / "cache").count == 100
    assert "statistics of real images are not kept: cannot write" in capsys.readouterr().out


def test_images_in_an_archive(levels, network, tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=levels.permute(0, 2, 3, 1).numpy())
    for _ in range(2):
        assert_equal(statistics(tmp_path / "real.npz", network, tmp_path), DigitsPixels().features(levels).numpy())
    assert network.seen == 100
    with pytest.raises(InputError, match=r"arr_0 is uint8 \(100, 8, 8, 3\), want uint8 \(images, 16, 16, 3\)"):
        statistics(tmp_path / "real.npz", network, tmp_path, image_size=16)


def test_real_images_that_cannot_be_used_are_refused(network, tmp_path):
    (tmp_path / "empty").mkdir()
    for address, message in (
        (tmp_path / "nowhere", r"reward.fid.reference .*nowhere does not exist; give a folder of images"),
        (tmp_path / "empty", "reward.fid.reference=.*empty: no images in it"),
    ):
        with pytest.raises(InputError, match=message):
            statistics(address, network, tmp_path)
    np.savez(tmp_path / "real.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    network.features = lambda levels: torch.full((len(levels), 64), torch.nan)
    with pytest.raises(InputError, match="digits features of these images are not finite"):
        statistics(tmp_path / "real.npz", network, tmp_path)
