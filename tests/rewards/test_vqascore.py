import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from varfast import InputError
from varfast.rewards import WeightedSum
from varfast.rewards.vqascore import VQAScoreReward
from varfast.settings.loading import parse_arguments

IMAGES = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).view(5, 1, 1, 1).expand(5, 3, 4, 6)


class Model:
    """What t2v_metrics' models do, with the red of an image as its score, and the length of the text added."""

    def __init__(self):
        self.asked = []

    def forward(self, images, texts):
        self.asked.append((images, texts))
        torch.set_grad_enabled(True)  # a library that changes the process
        pixels = [np.asarray(Image.open(path)) for path in images]
        assert all(picture.shape == (4, 6, 3) for picture in pixels)
        return torch.tensor([p[..., 0].mean() / 255 + len(t) for p, t in zip(pixels, texts, strict=True)])


class Scorer:
    def __init__(self, model, device):
        self.name, self.device, self.model = model, device, Model()


@pytest.fixture
def package(monkeypatch):
    """A stand-in for t2v_metrics; `made` holds the scorers."""
    made = []

    def score(**arguments):
        made.append(Scorer(**arguments))
        return made[-1]

    module = SimpleNamespace(VQAScore=score, list_all_models=lambda: ["clip-flant5-xl", "other"], made=made)
    monkeypatch.setitem(sys.modules, "t2v_metrics", module)
    return module


def reward(**keys):
    names = ["a", "bb", "ccc"]
    return WeightedSum({"vqa": VQAScoreReward(type="vqascore", **keys)}, num_classes=3, names=names)


def test_vqascore_asks_for_each_image_with_its_prompt(package):
    found = reward(batch_size=2, text="a {prompt}")(IMAGES, torch.tensor([0, 1, 2, 1, 0])).components["vqa"]
    (scorer,) = package.made
    assert (scorer.name, scorer.device) == ("clip-flant5-xl", "cpu")
    assert [texts for _, texts in scorer.model.asked] == [["a a", "a bb"], ["a ccc", "a bb"], ["a a"]]
    want = torch.tensor([3.0, 4.25, 5.5, 4.75, 4.0])
    torch.testing.assert_close(found, want, rtol=0, atol=0.5 / 255)
    assert not any(Path(path).exists() for paths, _ in scorer.model.asked for path in paths)


def test_vqascore_leaves_the_process_as_it_was(package):
    with torch.no_grad():
        reward()(IMAGES, torch.zeros(5, dtype=torch.long))
        assert not torch.is_grad_enabled()


def test_vqascore_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "t2v_metrics", None)  # as if it were not installed
    with pytest.raises(InputError, match="reward.vqa: VQAScore is computed by t2v-metrics.*pip install t2v-metrics"):
        reward()


def test_vqascore_of_an_unknown_model_names_the_known_ones(package):
    with pytest.raises(InputError, match="reward.vqa.model=clip-t9: .*it has clip-flant5-xl, other"):
        reward(model="clip-t9")
    assert package.made == []


def test_vqascore_is_a_section_of_a_config(package):
    from varfast.evaluation.config import EvaluateConfig

    config = parse_arguments(["checkpoint=a", "scores.vqa.type=vqascore", "scores.vqa.model=other"], EvaluateConfig)
    assert config.scores["vqa"] == VQAScoreReward(type="vqascore", model="other")
    assert "other" in config.scores["vqa"].reaches_outside()
    with pytest.raises(InputError, match="scores.vqa.*has no {prompt}"):
        parse_arguments(["checkpoint=a", "scores.vqa.type=vqascore", "scores.vqa.text=a cat"], EvaluateConfig)
