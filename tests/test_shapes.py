"""Scenes of shapes: what is drawn, checked with numpy and scipy alone, and whether the reward reads the same."""

import colorsys
import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from varfast import InputError
from varfast.config import load_config
from varfast.data import shapes
from varfast.data.captions import CORNERS, SHAPES, Scene
from varfast.data.datasets import load_images
from varfast.data.labels import read_labels
from varfast.data.prompts import PromptSet
from varfast.data.shapes import captioned_shapes, draw_shapes, labelled_shapes
from varfast.pretraining.cache import pretrained
from varfast.rewards import WeightedSum
from varfast.rewards.composition import CompositionReward, judge
from varfast.rewards.scene_readers import ShapesReader
from varfast.train import train

CHECKS = ("shape", "colour", "count", "position")
CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def drawn():
    """One scene a caption, and its image."""
    rng = np.random.RandomState(5)
    scenes = [(found := SHAPES.scenes(caption))[rng.randint(len(found))] for caption in SHAPES.captions]
    return scenes, draw_shapes(scenes, 32, rng)


@pytest.fixture(scope="module")
def reading(drawn):
    return ShapesReader().read(drawn[1])


def asked(scene):
    """All that a scene is."""
    found = {name: value for name, value in dataclasses.asdict(scene).items() if value is not None}
    return found | {"shape": found.pop("figure")}


def coloured(image):
    """(H, W) bool of pixels that have a colour, and the number of each connected patch of them."""
    rgb = image.permute(1, 2, 0).numpy()
    inside = rgb.max(axis=2) - rgb.min(axis=2) > 0.33
    return rgb, inside, ndimage.label(inside, structure=np.ones((3, 3)))


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def test_scenes_have_the_number_ink_and_place_that_they_say(drawn):
    hues = {ink: colorsys.rgb_to_hsv(*SHAPES.shades[ink])[0] for ink in SHAPES.inks}
    for scene, image in zip(*drawn, strict=True):
        rgb, inside, (patches, count) = coloured(image)
        assert count == scene.count, scene
        hue = colorsys.rgb_to_hsv(*rgb[inside].mean(axis=0))[0]
        assert min(hues, key=lambda ink: min(abs(hue - hues[ink]), 1 - abs(hue - hues[ink]))) == scene.ink
        if scene.place is not None:
            y, x = (centre / 31 for centre in ndimage.center_of_mass(patches > 0))
            middle = max(abs(x - 0.5), abs(y - 0.5)) < 0.1
            assert (scene.place == "middle") == middle
            assert middle or CORNERS[2 * (y > 0.5) + (x > 0.5)] == scene.place
        pale = rgb[ndimage.binary_dilation(inside, iterations=4) == 0].mean(axis=0)
        near = {paper: np.abs(pale - SHAPES.shades[paper]).sum() for paper in SHAPES.papers}
        assert min(near, key=near.__getitem__) == scene.paper


def test_shapes_cover_the_area_of_their_kind():
    """Pixels of a large figure, over those of the smallest disc around its centre that holds it, by geometry."""
    geometry = {"circle": (0.9, 1.05), "square": (0.58, 0.78), "triangle": (0.38, 0.6), "star": (0.3, 0.52),
                "heart": (0.5, 0.85), "cross": (0.48, 0.72)}  # fmt: skip
    for name, (low, high) in geometry.items():
        image = draw_shapes([Scene(name, "red", "white", "middle", 1)], 96, np.random.RandomState(1))[0]
        _, inside, _ = coloured(image)
        y, x = np.nonzero(inside)
        radius = np.hypot(x - x.mean(), y - y.mean()).max() + 0.5
        assert low < inside.sum() / (np.pi * radius**2) < high, name


def test_edges_are_smooth_and_paper_is_soft():
    """Beside full and empty pixels there are some in between, and paper is no single colour."""
    image = draw_shapes([Scene("circle", "blue", "white", "middle", 1)], 48, np.random.RandomState(0))[0]
    colour = (image.amax(dim=0) - image.amin(dim=0)).numpy()
    assert ((colour > 0.1) & (colour < 0.4)).sum() > 20
    assert image[:, :4].flatten(1).std(dim=1).min() > 0.002


def test_draw_shapes_is_a_function_of_scenes_and_seed(drawn):
    scenes = drawn[0][:20]
    first, again, other = (draw_shapes(scenes, 24, np.random.RandomState(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.0 <= float(first.min()) < float(first.max()) <= 1.0
    with pytest.raises(InputError, match="need 24 pixels a side; the image side is 16"):
        draw_shapes(scenes, 16, np.random.RandomState(0))


def test_labels_have_as_many_scenes_of_each_number(monkeypatch):
    monkeypatch.setattr(shapes, "SCENES_A_LABEL", 8)
    images, labels_N = labelled_shapes(24, 0)
    assert labels_N.bincount().tolist() == [8] * 36
    counts = Counter(coloured(image)[2][1] for image in images)
    assert counts.keys() == {1, 2, 3, 4}
    assert min(counts.values()) > 0.15 * len(images)
    red_star = list(SHAPES.labels).index("red star")
    names, seen = list(SHAPES.words), ShapesReader().read(images[labels_N == red_star])
    assert (seen.probability_BKD[seen.figures_BK].argmax(dim=1) == names.index("star")).float().mean() > 0.9


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def test_captions_say_what_they_ask_for():
    texts = {caption.text: caption for caption in SHAPES.captions}
    assert len(texts) == len(SHAPES.captions)
    for text, wanted in (
        ("a star", {"shape": "star", "count": 1}),
        ("an orange heart on night paper", {"shape": "heart", "ink": "orange", "paper": "night", "count": 1}),
        ("four blue crosses", {"shape": "cross", "ink": "blue", "count": 4}),
        ("a red circle in the middle", {"shape": "circle", "ink": "red", "place": "middle", "count": 1}),
    ):
        assert dict(texts[text].asked) == wanted
    new = [caption for caption in SHAPES.captions if caption.is_new]
    assert {caption.tag for caption in new} == {"position", "count"}
    assert 0.1 < len(new) / len(texts) < 0.2


def test_captioned_shapes_leave_out_new_combinations():
    _, rows_N, texts = captioned_shapes(1, 24, 0)
    assert texts == [caption.text for caption in SHAPES.captions if not caption.is_new]
    assert rows_N.tolist() == list(range(len(texts)))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_the_reader_sees_what_was_drawn(drawn, reading):
    wanted = [asked(scene) for scene in drawn[0]]
    for check in CHECKS:
        assert judge(SHAPES, reading, wanted, (check,), "exact").mean() >= 0.99, check
        assert judge(SHAPES, reading, wanted, (check,), "graded").mean() >= 0.85, check


@pytest.mark.parametrize("check", CHECKS)
def test_each_check_sees_its_own_attribute_and_no_other(drawn, reading, check):
    truth = [asked(scene) for scene in drawn[0]]
    names = list(SHAPES.words)
    change = {
        "shape": lambda scene: {"shape": names[names.index(scene["shape"]) - 1]},
        "colour": lambda scene: {"ink": SHAPES.inks[SHAPES.inks.index(scene["ink"]) - 1]},
        "count": lambda scene: {"count": scene["count"] % 4 + 1},
        "position": lambda scene: {"place": list(SHAPES.places)[list(SHAPES.places).index(scene["place"]) - 1]}
        if "place" in scene else {},
    }[check]  # fmt: skip
    wrong = [scene | change(scene) for scene in truth]
    changed = torch.tensor([a != b for a, b in zip(truth, wrong, strict=True)])
    for other in CHECKS:
        before, after = (judge(SHAPES, reading, wanted, (other,), "exact") for wanted in (truth, wrong))
        if other == check:
            assert after[changed].mean() <= 0.01
        else:
            assert torch.equal(before, after)


def test_mush_is_right_of_nothing():
    """Blots of colour are seen as figures, most of them of no shape, and no picture of them is what a caption asks."""
    noise = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = ShapesReader().read(torch.nn.functional.interpolate(noise, size=32, mode="bicubic").clamp(0, 1))
    assert seen.figures_BK.any(dim=1).all()
    assert (seen.probability_BKD[seen.figures_BK].amax(dim=1) > 0).float().mean() < 0.3
    wanted = [dict(caption.asked) for caption in SHAPES.captions[100:140]]
    assert judge(SHAPES, seen, wanted, CHECKS, "exact").max() == 0.0


def test_labels_are_asked_for_by_their_names_and_the_config(drawn):
    """A model with labels: "red star" names shape and ink, and the config asks for three of them."""
    picked = [scene for scene in drawn[0] if scene.figure == "star" and scene.ink == "red"]
    images = draw_shapes(picked, 32, np.random.RandomState(0))
    names = list(SHAPES.labels)
    reward = WeightedSum(
        {"three": CompositionReward(type="composition", scenes="shapes", asked={"count": 3}),
         "kind": CompositionReward(type="composition", scenes="shapes", checks=["shape", "colour"])},
        num_classes=36, names=names,
    )  # fmt: skip
    found = reward(images, torch.full((len(picked),), names.index("red star"))).components
    assert found["three"].tolist() == [float(scene.count == 3) for scene in picked]
    assert found["kind"].min() == 1.0
    other = reward(images, torch.full((len(picked),), names.index("blue star"))).components
    assert other["kind"].max() == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"asked": {"count": 7}}, "asked has count=7; known: 1, 2, 3, 4"),
        ({"asked": {"digit": 7}}, "asked has digit; known: shape, ink, paper, count, place"),
        ({"checks": ["digit"]}, "checks has digit; scenes=shapes has shape, colour, count, position"),
    ],
)
def test_what_a_scene_does_not_have_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CompositionReward(type="composition", scenes="shapes", **settings)


def test_a_prompt_of_something_else_is_refused():
    reward = WeightedSum({"x": CompositionReward(type="composition", scenes="shapes")}, prompts=PromptSet.of(["a cat"]))
    with pytest.raises(InputError, match=r"'a cat' has no metadata of a scene .*prompts.source=shapes.*\"shape\""):
        reward(torch.zeros(1, 3, 32, 32), torch.tensor([0]))


# ---------------------------------------------------------------------------------------------------------------------
# The configs, end to end at a reduced size

SMALL = [
    "run.device=cpu", "run.dtype=float32", "run.steps=1", "log.tensorboard=false", "pretrain.batch_size=4",
    "pretrain.vqvae_steps=2", "pretrain.var_steps=2", "rollout.labels_per_step=2", "rollout.group_size=2",
    "update.minibatch=2", "eval.samples_per_label=1", "eval.max_labels=2", "log.grid_labels=2", "log.grid_samples=2",
]  # fmt: skip


@pytest.mark.slow
def test_the_config_of_labels_runs_and_knows_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SCENES_A_LABEL", 1)
    own = ["policy.var.depth=1", "policy.var.patch_nums=[1,2,8]", f"run.dir={tmp_path}/run"]
    config = load_config(CONFIGS / "shapes.yaml", [*SMALL, *own, f"pretrain.cache_dir={tmp_path}"])
    assert train(config) == 0
    assert [row.name for row in read_labels(tmp_path / "run")] == list(SHAPES.labels)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"reward/three", "reward/readable"} <= line.keys()
    assert pretrained(config, torch.device("cpu"))[0].exists()


@pytest.mark.slow
def test_the_config_of_captions_runs(tmp_path, monkeypatch):
    from varfast.data import captioned

    monkeypatch.setitem(captioned._SCENES_A_CAPTION, "captioned_shapes", 1)
    own = ["policy.transformer.depth=1", f"run.dir={tmp_path}/run", f"pretrain.cache_dir={tmp_path}"]
    own.append("eval.samples_per_label=0")
    assert train(load_config(CONFIGS / "shapes_text.yaml", [*SMALL, *own])) == 0
    prompts = (tmp_path / "run" / "prompts.jsonl").read_text()
    assert '"shape": "star"' in prompts


def test_another_number_of_labels_is_refused():
    with pytest.raises(InputError, match=r"pretrain.dataset=shapes has 36 labels, policy.var.num_classes=10"):
        load_images("shapes", 32, 10)
