"""Captions of scenes of handwritten digits, "two red threes on dark paper", and which of their combinations are new.

A scene has one to three figures of the same digit in the four corners of a sheet of paper. A caption asks for some of
its attributes, and says nothing of the others. The scenes are drawn in varfast/data/scenes.py.

Of digit, ink and layout (a corner, or a number of figures) every two come together in the scenes that a base model is
pre-trained on, but a fifth of all threes do not. A caption that leaves no other scene is *new*: the base knows all its
words, and has seen any two of them together, but not all. These captions are out of domain.

No PyTorch: a config is checked before it is imported.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from varfast.data.prompts import Prompt

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Ink and paper that can be told apart.
COLOURS = (("dark", "light"), ("light", "dark"), ("red", "light"), ("red", "dark"), ("blue", "light"), ("blue", "dark"))
INKS = tuple(dict(COLOURS))
# Red, green, blue of ink and paper.
SHADES = {
    "dark": (0.08, 0.08, 0.08),
    "light": (0.92, 0.92, 0.92),
    "red": (0.85, 0.10, 0.10),
    "blue": (0.15, 0.25, 0.90),
}
# Of the cells 0 ... 3 of the sheet, row by row.
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNTS = {1: "a", 2: "two", 3: "three"}


@dataclass(frozen=True)
class Scene:
    """All attributes of a scene, but for the corners of two or three figures, which are any.

    Attributes:
        place: corner of a single figure; None for several.
    """

    digit: int
    ink: str
    paper: str
    place: str | None
    count: int

    @property
    def is_new(self) -> bool:
        """Whether pre-training never shows its digit, ink and layout together."""
        layout = self.count if self.place is None else 3 + PLACES.index(self.place)
        return (self.digit + INKS.index(self.ink) + layout) % 5 == 0


@dataclass(frozen=True)
class Caption:
    """A text, and what it asks for.

    Attributes:
        tag: which attributes it is about, beside digit and count: "digit" (none), "colour", "position" or "count".
        asked: the attributes of Scene that it names, by name.
        is_new: whether every scene that it describes is.
    """

    text: str
    tag: str
    asked: Mapping[str, Any]
    is_new: bool

    def scenes(self) -> list[Scene]:
        """The scenes that it describes and that pre-training shows; for a new caption, all that it describes."""
        found = _described(self.asked)
        return [scene for scene in found if scene.is_new == self.is_new]


def digits_prompts() -> list[Prompt]:
    """All captions as prompts, of which the new ones are out of domain; `metadata` is what they ask for."""
    return [
        Prompt(caption.text, caption.tag, dict(caption.asked), "out_of_domain" if caption.is_new else "train")
        for caption in all_captions()
    ]


@functools.cache
def all_captions() -> tuple[Caption, ...]:
    """All captions, in a fixed order."""
    return tuple(_captions())


def _captions() -> Iterator[Caption]:
    for digit, word in enumerate(DIGITS):
        article = "an" if word == "eight" else "a"
        yield _caption(f"{article} {word}", "digit", digit=digit, count=1)
    for (digit, word), (ink, paper) in itertools.product(enumerate(DIGITS), COLOURS):
        yield _caption(f"a {ink} {word} on {paper} paper", "colour", digit=digit, ink=ink, paper=paper, count=1)
    for (digit, word), ink, place in itertools.product(enumerate(DIGITS), INKS, PLACES):
        yield _caption(f"a {ink} {word} at the {place}", "position", digit=digit, ink=ink, place=place, count=1)
    for (digit, word), (ink, paper), count in itertools.product(enumerate(DIGITS), COLOURS, (2, 3)):
        text = f"{COUNTS[count]} {ink} {word}{'es' if word == 'six' else 's'} on {paper} paper"
        yield _caption(text, "count", digit=digit, ink=ink, paper=paper, count=count)


def _caption(text: str, tag: str, **asked: Any) -> Caption:
    return Caption(text, tag, asked, all(scene.is_new for scene in _described(asked)))


def _described(asked: Mapping[str, Any]) -> list[Scene]:
    """All scenes that have the attributes."""
    return [scene for scene in _scenes() if all(getattr(scene, name) == value for name, value in asked.items())]


@functools.cache
def _scenes() -> tuple[Scene, ...]:
    layouts: list[tuple[str | None, int]] = [*((place, 1) for place in PLACES), (None, 2), (None, 3)]
    return tuple(
        Scene(digit, ink, paper, place, count)
        for digit, (ink, paper), (place, count) in itertools.product(range(10), COLOURS, layouts)
    )
