import os

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from varfast import InputError
from varfast.data.datasets import DigitsClassifier, digits, fingerprint, load_images


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


def test_images_are_resized_and_cropped_as_by_torchvision(folder):
    from torchvision import transforms

    Image.fromarray(np.arange(40 * 9 * 3, dtype=np.uint8).reshape(9, 40, 3)).save(folder / "cat" / "wide.png")
    steps = [
        transforms.Resize(18, interpolation=transforms.InterpolationMode.LANCZOS),
        transforms.RandomCrop(16),
        transforms.ToTensor(),
    ]
    images = load_images(str(folder), 16)
    paths = [*(f"bird/{i}.png" for i in range(3)), *(f"cat/{n}.png" for n in (0, 1, 2, "wide"))]
    for index, path in enumerate(paths):
        torch.manual_seed(index)
        found = images[index][0]
        torch.manual_seed(index)
        assert torch.equal(found, transforms.Compose(steps)(Image.open(folder / path))), path


def test_a_line_of_pixels_takes_no_gigabytes(folder):
    Image.new("RGB", (1, 60_000), "red").save(folder / "cat" / "line.png")
    images = load_images(str(folder), 64)
    assert images[6][0].shape == (3, 64, 64)


def classes(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / name / "0.png")
    return str(folder)


def test_class_folders_are_read_in_natural_order_and_hidden_ones_passed_over(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "0.JPG")
    hidden = (".ipynb_checkpoints", "__MACOSX", "@eaDir")
    folder = classes(tmp_path / "set", *map(str, range(12)), "Cat", "cat", "n02099601", *hidden)
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    Image.new("RGB", (8, 8)).save(tmp_path / "set" / "loose.png")
    (tmp_path / "set" / "cat" / "phone.HEIC").write_bytes(b"x")
    images = load_images(folder, 8)
    assert images.classes == [*map(str, range(12)), "Cat", "cat", "linked", "n02099601"]
    assert images.class_to_idx["2"] == 2
    assert images.counts == [1] * 16
    assert [int(label) for _, label in images] == list(range(16))
    notes = "\n".join(images.notes)
    for said in ("Cat and cat look alike and are two labels", *(f"{name} is passed over" for name in hidden),
                 "1 images beside the class folders belong to no class", "not read: 1 .heic"):  # fmt: skip
        assert said in notes


@pytest.mark.parametrize(("dataset", "count", "size"), [("digits", 10, 8), ("shapes", 36, 32)])
@pytest.mark.parametrize("wanted", [9, 1000])
def test_a_built_in_data_set_refuses_another_number_of_labels(dataset, count, size, wanted):
    said = f"dataset={dataset} has {count} labels, policy.var.num_classes={wanted}; set policy.var.num_classes={count}"
    with pytest.raises(InputError, match=said):
        load_images(dataset, size, wanted)
    assert {int(label) for _, label in load_images(dataset, size, count)} == set(range(count))


def test_as_many_class_folders_as_labels_are_wanted_before_any_file_is_read(tmp_path):
    folder = classes(tmp_path, "train", "val")
    (tmp_path / "val" / "0.png").write_bytes(b"broken")
    for labels, said in ((1, "the last ones would have no label"), (5, "labels 2 to 4 would have no image")):
        with pytest.raises(InputError) as error:
            load_images(folder, 8, labels)
        assert f"has 2 class folders (train, val), policy.var.num_classes={labels}: {said}" in str(error.value)
        assert "set policy.var.num_classes=2, or name one of them, as pretrain.dataset=" in str(error.value)
    with pytest.raises(
        InputError, match=r"val/0.png is broken or no image \(.*\)\n  Each of them: delete it or replace it"
    ):
        load_images(folder, 8, 2)


def test_fingerprint_follows_the_files_and_the_order_of_the_labels(folder):
    before = fingerprint(str(folder))
    assert fingerprint(str(folder)) == before
    (folder / "notes.txt").write_bytes(b"x")
    assert fingerprint(str(folder)) == before  # what is not read does not count
    (folder / "cat" / "new.png").write_bytes(b"x")
    assert (after := fingerprint(str(folder))) != before
    (folder / "cat").rename(folder / "ant")
    assert fingerprint(str(folder)) != after
    (folder / "ant").rename(folder / os.fsdecode(b"\xff"))
    fingerprint(str(folder))


def test_image_folder_errors(tmp_path):
    with pytest.raises(InputError, match="no such folder; want 'digits', 'shapes' or a folder"):
        load_images(str(tmp_path / "none"), 16)
    with pytest.raises(InputError, match="no class folders in it"):
        load_images(str(tmp_path), 16)
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(InputError, match=r"1 images lie in it directly; .* put them all into one sub-folder"):
        load_images(str(tmp_path), 16)
    with pytest.raises(InputError, match="0.png: a file; want a folder"):
        load_images(str(tmp_path / "0.png"), 16)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.heic").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no images in empty; every sub-folder is a label.* not read: 1 .heic"):
        load_images(str(tmp_path), 16)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "one.jpg").mkdir()
    with pytest.raises(InputError, match=r"gone is a link to nothing; one.jpg is a folder with the name of an image"):
        load_images(str(tmp_path), 16)
