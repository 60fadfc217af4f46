"""Captions and scenes of digits, and captioned folders."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from varfast import InputError
from varfast.data.captioned import captions_fingerprint, load_captioned
from varfast.data.captions import DIGITS, Scene
from varfast.data.config import PromptsConfig
from varfast.data.datasets import load_images
from varfast.data.prompts import read_prompts
from varfast.data.scenes import captioned_scenes, draw_scene

SEEN = [caption for caption in DIGITS.captions if not caption.is_new]
NEW = [caption for caption in DIGITS.captions if caption.is_new]


def test_captions_say_what_they_ask_for():
    """Each number, colour and corner that a text names is asked for, and nothing else."""
    texts = {caption.text: caption for caption in DIGITS.captions}
    assert len(texts) == len(DIGITS.captions) == 350
    for text, asked in (
        ("an eight", {"digit": 8, "count": 1}),
        ("a dark seven on light paper", {"digit": 7, "ink": "dark", "paper": "light", "count": 1}),
        ("three blue sixes on dark paper", {"digit": 6, "ink": "blue", "paper": "dark", "count": 3}),
        ("a red two at the bottom left", {"digit": 2, "ink": "red", "place": "bottom left", "count": 1}),
    ):
        assert dict(texts[text].asked) == asked
    for text, caption in texts.items():
        asked = caption.asked
        assert DIGITS.words[asked["digit"]][0] in text
        assert all(str(asked[name]) in text for name in ("ink", "paper", "place") if name in asked)
        assert ("paper" in text, " at the " in text) == ("paper" in asked, "place" in asked)


def test_new_captions_are_of_words_that_the_base_has_seen_but_not_together():
    seen_words = {word for caption in SEEN for word in caption.text.split()}
    assert {word for caption in NEW for word in caption.text.split()} <= seen_words
    assert Counter(caption.tag for caption in NEW).keys() == {"position", "count"}
    shown = {(s.figure, s.ink, s.paper, s.place, s.count) for caption in SEEN for s in DIGITS.scenes(caption)}
    for caption in NEW:
        wanted = [caption.asked.get(name) for name in ("digit", "ink", "paper", "place", "count")]
        for scene in shown:
            assert any(a is not None and a != b for a, b in zip(wanted, scene, strict=True)), caption.text


def test_of_digit_ink_and_layout_every_two_are_seen_together():
    scenes = [scene for caption in SEEN for scene in DIGITS.scenes(caption)]
    seen = {(scene.figure, scene.ink, scene.place or scene.count) for scene in scenes}
    assert len(seen) == 0.8 * 10 * 4 * 6
    assert [len({row[:2] for row in seen}), len({row[1:] for row in seen}), len({row[::2] for row in seen})] == [
        10 * 4, 4 * 6, 10 * 6
    ]  # fmt: skip


def test_digits_prompts_are_in_domain_or_out_of_it():
    prompts = read_prompts(PromptsConfig(source="digits", held_out=40, tags=["colour", "count"]), seed=0)
    count = Counter(prompt.domain for prompt in prompts.prompts)
    of_tags = sum(caption.tag in ("colour", "count") for caption in SEEN)
    assert count == {"train": of_tags - 40, "held_out": 40, "out_of_domain": len(NEW)}
    row = next(prompt for prompt in DIGITS.prompts() if prompt.text == "two red threes on dark paper")
    assert (row.tag, dict(row.metadata)) == ("count", {"digit": 3, "ink": "red", "paper": "dark", "count": 2})


@pytest.mark.parametrize("size", [12, 24])
def test_draw_scene_has_ink_in_its_corners_alone(size):
    scene = Scene(7, "red", "dark", "bottom left", 1)
    image = draw_scene(scene, size, np.random.RandomState(0))
    half = size // 2
    paper = torch.tensor(DIGITS.shades["dark"]).view(3, 1, 1)
    same = (image == paper).all(dim=0)
    assert same[:half].all()
    assert same[half:, half:].all()
    assert not same[half:, :half].all()
    far = (image - paper).norm(dim=0).flatten().argmax()
    torch.testing.assert_close(image.flatten(1)[:, far], torch.tensor(DIGITS.shades["red"]))


def test_draw_scene_draws_as_many_figures_as_it_says():
    rng = np.random.RandomState(1)
    for count in (2, 3):
        corners = Counter()
        for _ in range(40):
            dark = draw_scene(Scene(0, "dark", "light", None, count), 12, rng).mean(dim=0) < 0.5
            filled = [bool(dark[r : r + 6, c : c + 6].any()) for r in (0, 6) for c in (0, 6)]
            assert sum(filled) == count
            corners.update(np.flatnonzero(filled).tolist())
        assert set(corners) == {0, 1, 2, 3}


def test_draw_scene_refuses_other_sides():
    with pytest.raises(InputError, match="an image side of 16 is no multiple"):
        draw_scene(Scene(0, "dark", "light", None, 2), 16, np.random.RandomState(0))


def test_captioned_scenes_are_a_function_of_the_seed():
    images, rows_N, texts = captioned_scenes(2, 12, 0)
    again, other = captioned_scenes(2, 12, 0)[0], captioned_scenes(2, 12, 1)[0]
    assert texts == [caption.text for caption in SEEN]
    assert rows_N.bincount().tolist() == [2] * len(SEEN)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "more").mkdir()
    rows = [("a.png", "a red square"), ("more/b.png", "a blue square"), ("c.png", " a red square ")]
    for name, _ in rows:
        Image.new("RGB", (20, 16), "red").save(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": name, "text": text, "other": 1}) + "\n" for name, text in rows)
    )
    return tmp_path


def test_a_captioned_folder_gives_images_with_rows_of_captions(folder):
    images = load_captioned(str(folder), 8, seed=0)
    assert images.texts == ["a red square", "a blue square"]
    assert [int(images[i][1]) for i in range(len(images))] == [0, 1, 0]
    assert images[0][0].shape == (3, 8, 8)


def test_the_fingerprint_of_a_captioned_folder_follows_texts_and_files(folder):
    prints = [captions_fingerprint(str(folder))]
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("blue", "green"))
    prints.append(captions_fingerprint(str(folder)))
    Image.new("RGB", (30, 16)).save(folder / "c.png")
    prints.append(captions_fingerprint(str(folder)))
    assert len(set(prints)) == 3
    assert captions_fingerprint("captioned_digits") == "captioned_digits"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ('{"file_name": "a.png"}', "want file_name and text"),
        ('{"file_name": "a.png", "text": " "}', "the text has 0 letters"),
        ('{"file_name": "../a.png", "text": "x"}', "leads out of the folder"),
        ('{"file_name": "a.txt", "text": "x"}', "is no image"),
        ('{"file_name": "gone.png", "text": "x"}', "gone.png cannot be read: .*No such file"),
        ("", "is empty; want a line an image"),
    ],
)
def test_a_wrong_line_is_named(folder, line, message):
    (folder / "metadata.jsonl").write_text(line)
    with pytest.raises(InputError, match=message):
        load_captioned(str(folder), 8, seed=0)


def test_what_a_data_set_is_for_is_said(tmp_path):
    with pytest.raises(InputError, match=r"no metadata.jsonl in it; a model that is conditioned on text"):
        load_captioned(str(tmp_path), 8, seed=0)
    with pytest.raises(InputError, match="captions are for a model that is conditioned on text"):
        load_images("captioned_digits", 12, 10)


def test_a_file_that_is_no_image_is_named_before_training(folder):
    (folder / "c.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"one of its files cannot be used\n .*c.png is broken"):
        load_captioned(str(folder), 8, seed=0)
