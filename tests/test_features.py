import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from varfast import InputError
from varfast.data.datasets import digits
from varfast.evaluation import metrics
from varfast.evaluation.features import load_real_images
from varfast.evaluation.metrics import statistics
from varfast.features.inception import Inception
from varfast.features.networks import DigitsPixels, load_network, to_levels


@pytest.fixture(scope="module")
def network():
    return DigitsPixels()


@pytest.fixture
def levels():
    return to_levels(digits(8)[0][:100])


def save_images(folder, levels, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(levels.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(picture).save(folder / f"{i:04d}.{suffix}")
    return str(folder)


def save_npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_to_levels_is_what_a_png_keeps():
    images = torch.tensor([-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.2]).view(1, 1, 1, 6)
    assert to_levels(images).flatten().tolist() == [0, 0, 0, 1, 255, 255]


def test_digits_pixels_are_grey_means_and_the_classifiers_probabilities(network):
    levels = to_levels(digits(16)[0][:20])
    features, logits = network(levels)
    want = levels.double().mean(dim=1).view(20, 8, 2, 8, 2).mean(dim=(2, 4)).flatten(1) / 255
    np.testing.assert_allclose(features, want.numpy(), rtol=1e-12)
    assert features.dtype == np.float64
    np.testing.assert_allclose(np.exp(logits).sum(axis=1), 1, rtol=1e-9)
    assert (logits.argmax(axis=1) == digits(16)[1][:20].numpy()).mean() > 0.9


def test_real_images_are_the_same_from_a_folder_an_archive_and_the_data(network, levels, tmp_path):
    from_data = load_real_images("digits", network, 8)
    want = network(to_levels(digits(8)[0]))[0]
    np.testing.assert_allclose(from_data.features_MD, want)
    np.testing.assert_allclose(from_data.statistics.sigma_DD, np.cov(want, rowvar=False), atol=1e-15)
    save_images(tmp_path / "images" / "a", levels[:60])
    save_images(tmp_path / "images" / "b", levels[60:])
    (tmp_path / "images" / "notes.txt").write_text("no image")
    pixels = levels.permute(0, 2, 3, 1).numpy()
    archive = save_npz(tmp_path / "images.npz", arr_0=pixels)
    for found in (load_real_images(str(tmp_path / "images"), network, 8), load_real_images(archive, network, 8)):
        assert found.count == 100
        np.testing.assert_array_equal(found.features_MD, network(levels)[0])
        np.testing.assert_array_equal(found.statistics.mu_D, statistics(network(levels)[0]).mu_D)


def test_features_for_neighbours_are_thinned_and_statistics_are_not(network, levels, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "NEIGHBOUR_IMAGES", 30)
    found = load_real_images(save_npz(tmp_path / "a.npz", arr_0=levels.permute(0, 2, 3, 1).numpy()), network, 8)
    assert (len(found.features_MD), found.count) == (30, 100)
    np.testing.assert_array_equal(found.statistics.mu_D, statistics(network(levels)[0]).mu_D)


def test_images_of_a_folder_are_fitted_and_made_rgb(network, tmp_path):
    wide = np.zeros((16, 40), dtype=np.uint8)
    wide[:, 4:36] = 200  # what is not, is cropped off
    Image.fromarray(wide).save(tmp_path / "grey.png")
    half = np.full((8, 8, 4), 145, dtype=np.uint8)
    half[..., 3] = 128  # of 255, over white
    Image.fromarray(half).save(tmp_path / "rgba.webp", lossless=True)
    found = load_real_images(str(tmp_path), network, 8).features_MD
    np.testing.assert_allclose(found, 200 / 255)


def test_statistics_alone_are_enough_for_fid_and_are_preferred(network, levels, tmp_path):
    mu, sigma = np.arange(64, dtype=np.float32), np.eye(64, dtype=np.float32)
    found = load_real_images(save_npz(tmp_path / "a.npz", mu=mu, sigma=sigma), network, 8)
    assert (found.features_MD, found.count) == (None, None)
    assert found.statistics.mu_D.dtype == np.float64
    pixels = levels.permute(0, 2, 3, 1).numpy()
    both = load_real_images(save_npz(tmp_path / "b.npz", mu=mu, sigma=sigma, arr_0=pixels), network, 8)
    np.testing.assert_array_equal(both.statistics.mu_D, mu)
    np.testing.assert_array_equal(both.features_MD, network(levels)[0])


def test_a_broken_image_is_named(network, levels, tmp_path):
    folder = save_images(tmp_path / "images", levels[:3])
    whole = (tmp_path / "images" / "0001.png").read_bytes()
    for content in (whole[: len(whole) // 2], b"no image", b""):
        (tmp_path / "images" / "0001.png").write_bytes(content)
        with pytest.raises(InputError, match=r"0001.png is broken or no image \(.*\); delete it or replace it"):
            load_real_images(folder, network, 8)


def bomb(path):
    """300 MB of images in 300 kB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (1_600_000, 8, 8, 3)}
        )
        for _ in range(300):
            file.write(bytes(1_024_000))
    return str(path)


def test_real_images_that_cannot_be_used_are_refused(network, levels, tmp_path):
    pixels = levels.permute(0, 2, 3, 1).numpy()
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "plain.npy", pixels)
    (tmp_path / "noise.npz").write_bytes(b"noise")
    whole = Path(save_npz(tmp_path / "whole.npz", arr_0=pixels)).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1  # the archive has a check sum
    (tmp_path / "damaged.npz").write_bytes(damaged)
    cases = {
        str(tmp_path / "nowhere"): "nowhere does not exist; give a folder of images, an .npz or digits",
        "/dev/zero": "is a device, want a file",
        "~nosuchuser/x": "there is no such user",
        "x" * 5000: "cannot be read: File name too long",
        str(tmp_path / "empty"): "no images in it",
        save_images(tmp_path / "one", levels[:1]): "one image in it",
        str(tmp_path / "plain.npy"): "is a single NumPy array",
        str(tmp_path / "noise.npz"): "is a text file, which begins 'noise'",
        str(tmp_path / "cut.npz"): "truncated or damaged",
        str(tmp_path / "damaged.npz"): "truncated or damaged",
        save_npz(tmp_path / "other.npz", x=pixels): "holds x; want arr_0, or mu and sigma",
        save_npz(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048)): r"mu \(2048,\) .* these are 64 wide",
        save_npz(tmp_path / "float.npz", arr_0=pixels / 255): r"arr_0 is float64 \(100, 8, 8, 3\), want uint8",
        save_npz(tmp_path / "size.npz", arr_0=pixels[:, :4]): r"\(100, 4, 8, 3\), want uint8 \(images, 8, 8, 3\)",
        save_npz(tmp_path / "single.npz", arr_0=pixels[:1]): "1 images in it",
        save_npz(tmp_path / "nan.npz", mu=np.full(64, np.nan), sigma=np.eye(64)): "mu holds 64 numbers that are not",
        save_npz(tmp_path / "complex.npz", mu=np.zeros(64), sigma=1j * np.eye(64)): "sigma is complex128, want real",
        save_npz(tmp_path / "code.npz", mu=np.zeros(64), sigma=np.array([Path()])): "sigma holds Python objects, which",
        bomb(tmp_path / "bomb.npz"): "declares uint8 .* bytes, in .* bytes of the file: damaged, or a zip bomb",
    }
    for address, message in cases.items():
        with pytest.raises(InputError, match=message):
            load_real_images(address, network, 8)


def test_both_readers_of_folders_see_the_same_picture(network, tmp_path):
    """Of 16 bits, turned by the camera, transparent, in hidden folders."""
    exif = Image.Exif()
    exif[0x0112] = 3
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    (tmp_path / "set" / "a" / ".ipynb_checkpoints").mkdir(parents=True)
    Image.fromarray(ramp).save(tmp_path / "set" / "a" / "0.png", exif=exif)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(tmp_path / "set" / "a" / "1.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "set" / "a" / ".ipynb_checkpoints" / "2.png")
    found = load_real_images(str(tmp_path / "set"), network, 8)
    assert found.count == 2
    np.testing.assert_allclose(found.features_MD[0].reshape(8, 8), ramp[::-1, ::-1] / 65535, atol=0.5 / 255)
    np.testing.assert_allclose(found.features_MD[1], 1)


def test_statistics_that_would_fill_the_memory_or_are_not_finite_are_refused(network, tmp_path):
    header = (
        b"\x93NUMPY\x01\0v\0" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (400000000,), }".ljust(117) + b"\n"
    )
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("mu.npy", header)  # 3.2 GB, said by the header alone
        archive.writestr("sigma.npy", header)
    with pytest.raises(InputError, match=r"mu declares float64 \(400000000,\), 3200000000 bytes, .* or a zip bomb"):
        load_real_images(str(tmp_path / "bomb.npz"), network, 8)
    path = save_npz(tmp_path / "nan.npz", mu=np.full(64, np.nan), sigma=np.eye(64))
    with pytest.raises(InputError, match="nan.npz: mu holds 64 numbers that are not finite"):
        load_real_images(path, network, 8)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """torch-fidelity's network with random weights: the real ones are not in the tests."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    return str(path)


def test_inception_is_torch_fidelitys_with_the_given_weights(inception_weights, levels):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    features, logits = load_network("inception", inception_weights, torch.device("cpu"))(levels[:2])
    network = FeatureExtractorInceptionV3(
        "x", ["logits_unbiased", "2048"], feature_extractor_weights_path=inception_weights
    )
    want_logits, want = network(levels[:2])
    np.testing.assert_array_equal(features, want.numpy())
    np.testing.assert_array_equal(logits, want_logits.numpy())
    assert features.shape == (2, Inception.width)


def test_inception_weights_that_cannot_be_used_are_refused(inception_weights, levels, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    device = torch.device("cpu")
    with pytest.raises(InputError, match=r"cannot be fetched, (?s:.*)set inception_weights to its path"):
        Inception(None, device, "inception_weights")
    with pytest.raises(InputError, match="inception_weights: checkpoint nowhere.pth does not exist"):
        Inception("nowhere.pth", device, "inception_weights")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="does not hold torch-fidelity's Inception-v3"):
        Inception(str(tmp_path / "other.pth"), device, "inception_weights")
    torch.save(Path, tmp_path / "code.pth")
    with pytest.raises(InputError, match="could run code, so it was not loaded"):
        Inception(str(tmp_path / "code.pth"), device, "inception_weights")
    public = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    public.write_bytes(b"damaged")
    with pytest.raises(InputError, match="the public file has 6726825d"):
        Inception(str(public), device, "inception_weights")
