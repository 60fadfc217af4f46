"""squeezenet1_1 (5 MB) with random weights: the real ones are not in the tests."""

import hashlib
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

from varfast import InputError
from varfast.data.datasets import DigitsClassifier, digits
from varfast.rewards import WeightedSum
from varfast.rewards.classifier import ClassifierReward, Confidence

LABELS = torch.tensor([0, 7, 999, 1, 2, 3])
MODEL = {"model": "squeezenet1_1", "weights": "IMAGENET1K_V1"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(torchvision.models.squeezenet1_1().state_dict(), path)
    return str(path)


def classifier(**settings):
    return ClassifierReward(type="classifier", **(MODEL | settings))


def test_confidence_equals_torchvision_on_pictures(weights, images):
    scored = WeightedSum({"c": classifier(file=weights, batch_size=4)}, num_classes=1000)(images, LABELS)
    network = torchvision.models.squeezenet1_1()
    network.load_state_dict(torch.load(weights, weights_only=True))
    transform = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.transforms()
    pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        table = network.eval()(torch.stack([transform(Image.fromarray(p)) for p in pixels])).softmax(dim=1)
    torch.testing.assert_close(scored.total_B, table[torch.arange(6), LABELS], rtol=1e-4, atol=0)
    assert table[torch.arange(6), LABELS].std() > 1e-6


def test_ranks_count_the_classes_that_are_likelier(weights, images):
    confidence = Confidence("squeezenet1_1", "IMAGENET1K_V1", weights, torch.device("cpu"), 64, 1000, "classifier")
    network = confidence._network
    best = network(confidence._preprocess(images)).argsort(dim=1, descending=True)
    assert confidence.ranks(images, best[:, 0]).tolist() == [0] * 6
    assert confidence.ranks(images, best[:, 4]).tolist() == [4] * 6
    confidence._network = lambda pixels: torch.full((len(pixels), 1000), torch.nan)
    assert confidence.ranks(images, LABELS).tolist() == [1000] * 6  # a broken classifier obeys no label


def test_weights_come_from_the_cache_of_torchvision(weights, images, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(InputError) as caught:
        WeightedSum({"c": classifier()})
    for text in ("reward.c: ", "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth", str(tmp_path),
                 "set reward.c.file"):  # fmt: skip
        assert text in str(caught.value)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "squeezenet1_1-b8a52dc0.pth").write_bytes(Path(weights).read_bytes())
    by_file = WeightedSum({"c": classifier(file=weights)})(images, LABELS).total_B
    assert torch.equal(WeightedSum({"c": classifier()})(images, LABELS).total_B, by_file)


def test_a_file_of_the_public_name_must_have_its_hash(weights, tmp_path):
    copy = tmp_path / "squeezenet1_1-b8a52dc0.pth"
    content = Path(weights).read_bytes()
    copy.write_bytes(content)
    message = f"has SHA-256 {hashlib.sha256(content).hexdigest()}, the public file has b8a52dc0"
    with pytest.raises(InputError, match=message):
        WeightedSum({"c": classifier(file=str(copy))})


@pytest.mark.parametrize(
    ("settings", "num_classes", "message"),
    [
        ({"model": "resnet5"}, 1000, r"reward.c.model=resnet5: want digits, or .*; did you mean resnet\d+"),
        ({"weights": "IMAGENET1K_V2"}, 1000, "torchvision has IMAGENET1K_V1, DEFAULT for squeezenet1_1"),
        ({}, 10, "squeezenet1_1 IMAGENET1K_V1 tells 1000 classes apart, the policy has 10 labels"),
        ({"model": "digits"}, 1000, "digits tells 10 classes apart, the policy has 1000 labels"),
        ({"file": "nowhere.pth"}, 1000, "reward.c.file: checkpoint nowhere.pth does not exist"),
        (
            {"model": "shufflenet_v2_x0_5", "file": "WEIGHTS"},
            1000,
            "does not hold the weights of torchvision's shufflenet_v2_x0_5",
        ),
        ({"model": "googlenet", "file": "WEIGHTS"}, 1000, "leave file out"),
    ],
)
def test_classifier_says_what_is_wrong(weights, settings, num_classes, message):
    settings = {k: weights if v == "WEIGHTS" else v for k, v in settings.items()}
    with pytest.raises(InputError, match=message):
        WeightedSum({"c": classifier(**settings)}, num_classes=num_classes)


def test_digits_confidence_is_high_for_the_digit_and_low_for_others():
    images, labels = digits(8)
    images, labels = images[:200], labels[:200]
    reward = WeightedSum({"d": classifier(model="digits")}, num_classes=10)
    table = torch.stack([reward(images, torch.full_like(labels, digit)).total_B for digit in range(10)], dim=1)
    torch.testing.assert_close(table.sum(dim=1), torch.ones(200))
    right = reward(images, labels).total_B
    assert torch.equal(right, table[torch.arange(200), labels])
    assert right.mean() > 0.85
    assert (table.argmax(dim=1) == labels).float().mean() > 0.97
    assert DigitsClassifier().accuracy(images, labels) > 0.97
