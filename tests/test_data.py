import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from varfast import InputError
from varfast.data import DigitsClassifier, digits, fingerprint, load_images


def test_digits_are_the_real_ones_in_ink_on_paper():
    images, labels = digits()
    real = load_digits()
    assert images.shape == (1797, 3, 8, 8)
    assert labels.tolist() == real.target.tolist()
    assert images.min() >= 0
    assert images.max() <= 1
    for index in (0, 500, 1796):  # a straight line from ink to paper
        shade = images[index, 0].flatten().numpy()
        assert np.corrcoef(shade, real.images[index].ravel())[0, 1] == pytest.approx(-1, abs=1e-5)
    assert torch.equal(images, digits()[0])
    assert 0.05 < float((images.mean(dim=(1, 2, 3)) >= 0.8).float().mean()) < 0.2


def test_digits_at_a_multiple_of_their_size():
    small, large = digits(8)[0], digits(24)[0]
    assert torch.equal(large[:, :, ::3, ::3], small)
    assert torch.equal(large[:, :, 2::3, 1::3], small)
    with pytest.raises(InputError, match="no multiple of 8"):
        digits(20)


def test_classifier_ranks_labels_and_agrees_with_its_accuracy():
    images, labels = digits(8)
    images = torch.cat([images[:300], torch.rand(300, 3, 8, 8, generator=torch.Generator().manual_seed(0))])
    labels = torch.cat([labels[:300], torch.arange(300) % 10])
    classifier = DigitsClassifier()
    ranks = torch.stack([classifier.ranks(images, torch.full_like(labels, digit)) for digit in range(10)], dim=1)
    assert torch.equal(ranks.gather(1, labels.unsqueeze(1)).squeeze(1), classifier.ranks(images, labels))
    assert ((ranks == 0).sum(dim=1) == 1).all()  # read as one digit
    assert ranks.min() == 0
    assert ranks.max() == 9
    assert float((classifier.ranks(images, labels) == 0).float().mean()) == pytest.approx(
        classifier.accuracy(images, labels)
    )
    likely = classifier.probabilities(images[:300]).argsort(dim=1, descending=True)
    second = ranks[:300].gather(1, likely[:, 1:2])
    assert (second <= 2).float().mean() > 0.8  # margins and calibrated probabilities agree on the runner-up


def test_classifier_reads_digits_of_any_shade_and_not_noise():
    images, labels = digits(16)
    classifier = DigitsClassifier()
    assert classifier.accuracy(images, labels) > 0.99
    assert classifier.accuracy(0.9 + 0.1 * images, labels) > 0.99
    assert classifier.accuracy(images, (labels + 1) % 10) < 0.01
    assert classifier.accuracy(torch.rand(1000, 3, 8, 8), labels[:1000]) < 0.3


@pytest.fixture
def folder(tmp_path):
    rng = np.random.RandomState(0)
    for name, base in (("bird", 0), ("cat", 128)):
        (tmp_path / name).mkdir()
        for index in range(3):
            pixels = rng.randint(base, base + 100, (20 + index, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    return tmp_path


def test_image_folder(folder):
    images = load_images(str(folder), 16)
    assert len(images) == 6
    image, label = images[5]
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.float32
    assert int(label) == 1
    assert 0.4 < float(image.mean()) < 0.95
    assert int(images[0][1]) == 0


def test_fingerprint_follows_the_files(folder):
    before = fingerprint(str(folder))
    assert fingerprint(str(folder)) == before
    (folder / "cat" / "new.png").write_bytes(b"x")
    assert fingerprint(str(folder)) != before


def test_image_folder_errors(tmp_path):
    with pytest.raises(InputError, match="no such folder; want 'digits' or a folder"):
        load_images(str(tmp_path / "none"), 16)
    with pytest.raises(InputError, match="no class folders in it"):
        load_images(str(tmp_path), 16)
