"""What pictures of digits show, against scenes whose attributes are known."""

import dataclasses

import numpy as np
import pytest
import torch

from varfast import InputError
from varfast.data.captions import CORNERS, DIGITS, Scene
from varfast.data.prompts import PromptSet
from varfast.data.scenes import draw_scene
from varfast.rewards import WeightedSum
from varfast.rewards.colour_match import ColourMatchReward, colour_match
from varfast.rewards.composition import CompositionReward, judge
from varfast.rewards.scene_readers import DigitsReader

CHECKS = ("digit", "colour", "count", "position")
TABLE = PromptSet(tuple(DIGITS.prompts()))
ROWS = {prompt.text: row for row, prompt in enumerate(TABLE.prompts)}


@pytest.fixture(scope="module")
def reader():
    return DigitsReader()


@pytest.fixture(scope="module")
def drawn():
    """Images of two scenes a caption, with what their captions ask for and what they are."""
    rng = np.random.RandomState(5)
    pairs = [(caption, (found := DIGITS.scenes(caption))[rng.randint(len(found))]) for caption in DIGITS.captions * 2]
    images = torch.stack([draw_scene(scene, 12, rng) for _, scene in pairs])
    return images, [dict(caption.asked) for caption, _ in pairs], [scene for _, scene in pairs]


@pytest.mark.parametrize(("noise", "least"), [(0.0, 0.995), (0.05, 0.99), (0.1, 0.98)])
def test_scenes_are_what_their_captions_ask_for(reader, drawn, noise, least):
    images, asked, _ = drawn
    noisy = images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    reading = reader.read(noisy.clamp(0, 1))
    assert judge(DIGITS, reading, asked, CHECKS, "exact").mean() >= least
    assert judge(DIGITS, reading, asked, CHECKS, "graded").mean() >= 0.9


def test_pictures_of_more_pixels_are_read_alike(reader, drawn):
    images = drawn[0][:40]
    large = images.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    torch.testing.assert_close(reader.embed_images(large), reader.embed_images(images))


@pytest.mark.parametrize("check", CHECKS)
def test_each_check_sees_its_own_attribute_and_no_other(reader, drawn, check):
    """Every scene is asked for with one attribute changed: the check of that attribute fails, the others do not."""
    images, _, scenes = drawn
    truth, wrong = [], []
    for scene in scenes:
        asked = {k: v for k, v in dataclasses.asdict(scene).items() if v is not None}
        asked["digit"] = asked.pop("figure")
        change = {
            "digit": {"digit": (scene.figure + 1) % 10},
            "colour": {"ink": "blue" if scene.ink == "red" else "red"},
            "count": {"count": scene.count % 3 + 1},
            "position": {"place": CORNERS[CORNERS.index(scene.place) - 1]} if scene.place else {},
        }[check]
        truth.append(asked)
        wrong.append(asked | change)
    reading = reader.read(images)
    for mode in ("exact", "graded"):
        for other in CHECKS:
            before, after = (judge(DIGITS, reading, asked, (other,), mode) for asked in (truth, wrong))
            if other != check:
                assert torch.equal(before, after)
            elif check == "position":
                single = torch.tensor([scene.place is not None for scene in scenes])
                assert (after[single] < 0.01).all()
                assert (before[single] > 0.99).all()
            else:
                assert (before > after).float().mean() > 0.99


def test_paper_is_judged_as_ink_is(reader, drawn):
    images, _, scenes = drawn
    reading = reader.read(images)
    right, wrong = (
        judge(DIGITS, reading, [{"paper": scene.paper if same else SWAPPED[scene.paper]} for scene in scenes],
              ("colour",), "exact") for same in (True, False)
    )  # fmt: skip
    assert (right.min(), wrong.max()) == (1.0, 0.0)


SWAPPED = {"light": "dark", "dark": "light"}


def scored(rewards, images, texts, **more):
    reward = WeightedSum(rewards, prompts=TABLE, **more)
    return reward(images, torch.tensor([ROWS[text] for text in texts])).components


def test_modes_of_a_half_right_picture():
    """A blue 7 where a red one was asked for, at the right place: three of the four checks are right."""
    image = draw_scene(Scene(7, "blue", "light", "top left", 1), 12, np.random.RandomState(0))
    modes = {mode: CompositionReward(type="composition", mode=mode) for mode in ("exact", "share", "graded")}
    found = scored(modes, image.unsqueeze(0), ["a red seven at the top left"])
    assert float(found["exact"]) == 0.0
    assert float(found["share"]) == 0.75
    blue, red = (torch.tensor(DIGITS.shades[name]) for name in ("blue", "red"))
    near = 1 - float((blue - red).norm())
    assert float(found["graded"]) == pytest.approx((1 + max(0, near) + 1 + 1) / 4, abs=0.05)


def test_a_blank_sheet_shows_nothing_and_fools_colour_match():
    sheet = torch.tensor(DIGITS.shades["dark"]).view(1, 3, 1, 1).expand(1, 3, 12, 12)
    scene = draw_scene(Scene(3, "red", "dark", None, 2), 12, np.random.RandomState(0)).unsqueeze(0)
    rewards = {"true": CompositionReward(type="composition"), "cheap": ColourMatchReward(type="colour_match")}
    text = "two red threes on dark paper"
    blank, right = (scored(rewards, images, [text]) for images in (sheet, scene))
    assert (float(blank["true"]), float(right["true"])) == (0.0, 1.0)
    assert float(blank["cheap"]) == pytest.approx(1.0)
    assert float(right["cheap"]) < 0.97


def test_colour_match_is_the_mean_distance_to_the_nearest_colour():
    image = torch.tensor(DIGITS.shades["red"]).view(3, 1, 1).expand(3, 2, 2).clone()
    image[:, 0, 0] = torch.tensor([0.85, 0.10, 0.60])  # half a unit from red
    image[:, 1, 1] = torch.tensor(DIGITS.shades["light"])  # more than one unit from red
    score = colour_match(DIGITS, torch.stack([image, image]), [{"ink": "red"}, {"digit": 3}])
    torch.testing.assert_close(score, torch.tensor([(2 + 0.5 + 0) / 4, 1.0]))


def test_composition_asks_nothing_of_what_a_prompt_does_not_name():
    image = draw_scene(Scene(7, "blue", "light", "top left", 1), 12, np.random.RandomState(0)).unsqueeze(0)
    rewards = {"colour": CompositionReward(type="composition", checks=["colour", "position"])}
    assert float(scored(rewards, image, ["a three"])["colour"]) == 1.0


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, r"reward.right: the prompt 'a cat' has no metadata of a scene \(digit, ink, paper, count, place\)"),
        ({"ink": "green"}, "has ink='green'; known: dark, light, red, blue"),
        ({"digit": True}, "has digit=True; known: 0, 1"),
        ({"place": ["top"]}, r"has place=\['top'\]; known: top left"),
    ],
)
def test_prompts_of_something_else_are_refused(metadata, message):
    table = PromptSet((dataclasses.replace(TABLE.prompts[0], text="a cat", metadata=metadata),))
    reward = WeightedSum({"right": CompositionReward(type="composition")}, prompts=table)
    with pytest.raises(InputError, match=message):
        reward(torch.zeros(1, 3, 12, 12), torch.tensor([0]))


def test_pictures_are_read_once_for_all_rewards(monkeypatch):
    calls = []
    read = DigitsReader.read
    monkeypatch.setattr(DigitsReader, "read", lambda self, images: (calls.append(len(images)), read(self, images))[1])
    rewards = {check: CompositionReward(type="composition", checks=[check]) for check in CHECKS}
    image = draw_scene(Scene(1, "dark", "light", "top left", 1), 12, np.random.RandomState(0)).unsqueeze(0)
    found = scored(rewards, image, ["a dark one at the top left"])
    assert calls == [1]
    assert {name: float(score) for name, score in found.items()} == dict.fromkeys(CHECKS, 1.0)


def test_a_picture_that_is_noise_is_right_of_nothing(reader):
    noise = torch.rand(50, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    asked = [dict(caption.asked) for caption in DIGITS.captions[50:100]]
    assert judge(DIGITS, reader.read(noise), asked, CHECKS, "exact").max() == 0.0
