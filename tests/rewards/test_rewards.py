import json
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import pytest
import torch
from pydantic import Field, TypeAdapter

from varfast import InputError
from varfast.rewards import RewardConfig, WeightedSum, aesthetic
from varfast.rewards.aesthetic import AestheticReward
from varfast.rewards.backbone import Backbone
from varfast.rewards.brightness import Brightness, BrightnessReward, brightness
from varfast.rewards.building import Building, Reward, RewardSection, on_images
from varfast.rewards.clip import ClipReward
from varfast.rewards.function import FunctionReward
from varfast.rewards.preprocess import Preprocessing
from varfast.train import train

HEAD = str(Path(__file__).parent.parent / "data" / "aesthetic" / aesthetic.PUBLIC_HEAD)
LABELS = torch.zeros(6, dtype=torch.int64)


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        """
import torch
def redness(images, labels, power=1):
    return images[:, 0].mean(dim=(1, 2)) ** power
def as_numpy(images, labels):
    return labels.double().cpu().numpy() + 2
def not_finite(images, labels):
    return torch.tensor([1.0, float("nan"), float("inf"), 0.0, 0.0, 0.0])
def too_few(images, labels):
    return torch.zeros(3)
def one_number(images, labels):
    return 1.0
class Target:
    def __init__(self, value): self.value = value
    def __call__(self, images, labels): return -(images.mean(dim=(1, 2, 3)) - self.value).abs()
number = 3
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_rewards", None)


def function(name, weight=1.0, **args):
    return FunctionReward(type="function", function=f"my_rewards:{name}", weight=weight, args=args)


def test_brightness_equals_the_formula_in_float64(images):
    wide = images.double().numpy()
    exact = (0.2989 * wide[:, 0] + 0.5870 * wide[:, 1] + 0.1140 * wide[:, 2]).mean(axis=(1, 2))
    np.testing.assert_allclose(brightness(images), exact, rtol=1e-6)


def test_brightness_thresholds_of_the_paper():
    # The three luma weights sum to 0.9999.
    shades = torch.tensor([0.1, 0.19, 0.21, 0.79, 0.81, 1.0]).view(6, 1, 1, 1).expand(6, 3, 4, 4)
    assert Brightness("bright")(shades, LABELS).tolist() == [0, 0, 0, 0, 1, 1]
    assert Brightness("dark")(shades, LABELS).tolist() == [1, 1, 0, 0, 0, 0]
    assert Brightness("bright", 0.2)(shades, LABELS).tolist() == [0, 0, 1, 1, 1, 1]
    exactly = torch.full((1, 3, 1, 1), 1.0)
    assert Brightness("bright", float(brightness(exactly)))(exactly, LABELS).tolist() == [1]
    assert Brightness("dark", float(brightness(exactly)))(exactly, LABELS).tolist() == [0]
    torch.testing.assert_close(Brightness("raw")(shades, LABELS), 0.9999 * shades[:, 0, 0, 0])


def test_weighted_sum(images, my_rewards):
    reward = WeightedSum(
        {
            "red": function("redness", weight=2.0, power=2),
            "near": function("Target", weight=-1.0, value=0.25),
            "constant": function("as_numpy", weight=0.5),
            "luma": BrightnessReward(type="brightness", mode="raw"),
        }
    )
    scored = reward(images, LABELS)
    red = images[:, 0].mean(dim=(1, 2)) ** 2
    near = -(images.mean(dim=(1, 2, 3)) - 0.25).abs()
    torch.testing.assert_close(scored.total_B, 2 * red - near + 1.0 + brightness(images))
    assert list(scored.components) == ["red", "near", "constant", "luma"]
    torch.testing.assert_close(scored.components["near"], near)
    assert scored.total_B.dtype == torch.float32


def test_rewards_on_one_clip_model_share_its_pass(images, tiny_clip, monkeypatch):
    monkeypatch.setattr(aesthetic, "CLIP_MODEL", "tiny-quickgelu")
    seen = []

    def embed_images(self, batch, embed=Backbone.embed_images):
        seen.append(batch)
        return embed(self, batch)

    monkeypatch.setattr(Backbone, "embed_images", embed_images)
    components = {
        "aes": AestheticReward(type="aesthetic", head=HEAD, pretrained=tiny_clip),
        "art": ClipReward(type="clip", model="tiny-quickgelu", pretrained=tiny_clip, prompt="a painting", weight=2),
        "old": ClipReward(type="clip", model="tiny-quickgelu", pretrained=tiny_clip, prompt="an old picture"),
    }
    together = WeightedSum(components)
    scored = together(images, LABELS)
    assert len(seen) == 1
    alone = {name: WeightedSum({name: config})(images, LABELS).components[name] for name, config in components.items()}
    for name, scores in alone.items():
        torch.testing.assert_close(scored.components[name], scores)
    torch.testing.assert_close(scored.total_B, alone["aes"] + 2 * alone["art"] + alone["old"])
    assert (alone["art"] - alone["old"]).abs().max() > 1e-4
    # Nothing of one batch is left for the next.
    images.mul_(0.5)
    assert not torch.equal(together(images, LABELS).components["aes"], alone["aes"])
    # Another model, or another precision, is another pass.
    seen.clear()
    components["old"] = components["old"].model_copy(update={"model": "tiny"})
    components["art"] = components["art"].model_copy(update={"dtype": "bfloat16"})
    WeightedSum(components)(images, LABELS)
    assert len(seen) == 3


def test_train_gives_rewards_the_labels_of_the_model(make_config, tiny_clip):
    clip = {"type": "clip", "model": "tiny", "pretrained": tiny_clip, "label_prompt": "a {name}"}
    with pytest.raises(InputError, match=r"reward.c.names: got 2 names, the model has 5 labels"):
        train(make_config(reward={"c": clip | {"names": ["ant", "bee"]}}))
    names = ["ant", "bee", "cat", "dog", "eel"]
    config = make_config(reward={"c": clip | {"names": names}}, run__steps=1)
    assert train(config) == 0
    (line,) = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["reward/c"] == pytest.approx(json.loads(line)["reward_mean"])


@pytest.mark.parametrize("sizes", [(64, 4), (4, 64)])
def test_the_smallest_batch_size_counts_on_a_shared_model(images, tiny_clip, monkeypatch, sizes):
    seen = []

    def preprocess(self, batch, preprocess=Preprocessing.__call__):
        seen.append(len(batch))
        return preprocess(self, batch)

    monkeypatch.setattr(Preprocessing, "__call__", preprocess)
    clip = {"type": "clip", "model": "tiny", "pretrained": tiny_clip, "prompt": "a painting"}
    WeightedSum({str(size): ClipReward(**clip, batch_size=size) for size in sizes})(images, LABELS)
    assert seen == [4, 2]


def test_text_towers_are_dropped_once_every_text_is_embedded(images, tiny_clip, monkeypatch):
    dropped = []
    monkeypatch.setattr(Backbone, "texts_are_read", lambda self: dropped.append(self))
    clip = {"type": "clip", "model": "tiny", "pretrained": tiny_clip}
    WeightedSum({prompt: ClipReward(**clip, prompt=prompt) for prompt in ("a painting", "a photo")})
    assert len(dropped) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_finite", r"reward mine returned nan for image 1 \(2 of 6 are not finite\)"),
        ("too_few", r"reward mine returned shape \(3,\) for 6 images; want \(6,\)"),
        ("one_number", r"reward mine returned shape \(\) for 6 images"),
    ],
)
def test_reward_that_returns_nonsense_is_named(images, my_rewards, name, message):
    with pytest.raises(InputError, match=message):
        WeightedSum({"mine": function(name)})(images, LABELS)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:f", "no module no_such_module; run from its folder, or set PYTHONPATH"),
        ("my_rewards:rednes", "did you mean redness"),
        ("my_rewards:number", "has no such function"),
    ],
)
def test_reward_that_cannot_be_imported_is_named(my_rewards, path, message):
    with pytest.raises(InputError, match=message):
        WeightedSum({"mine": FunctionReward(type="function", function=path)})


class RednessReward(RewardSection):
    """A reward as a new file of varfast/rewards would hold it."""

    type: Literal["redness"] = Field(description="the kind of reward")

    def build(self, building: Building) -> Reward:
        return on_images(building, lambda images, labels_B: images[:, 0].mean(dim=(1, 2)) + labels_B)

    def reaches_outside(self) -> str | None:
        return None


def test_a_new_reward_is_a_section_with_two_methods_and_a_line_of_the_union(images):
    union, discriminator = get_args(RewardConfig)
    known = TypeAdapter(dict[str, Annotated[union | RednessReward, discriminator]])
    components = known.validate_python({"red": {"type": "redness", "weight": 2.0}, "luma": {"type": "brightness"}})
    scored = WeightedSum(components)(images, LABELS + 3)
    torch.testing.assert_close(scored.components["red"], images[:, 0].mean(dim=(1, 2)) + 3)
    torch.testing.assert_close(scored.total_B, 2 * scored.components["red"] + scored.components["luma"])
