"""Captions of scenes, "two red threes on dark paper", and which of their combinations are new. There are two worlds of
them: handwritten digits in the four corners of a sheet, and coloured shapes.

A scene has several figures of the same kind. A caption asks for some of its attributes, and says nothing of the others.
The scenes are drawn in varfast/data/scenes.py and varfast/data/shapes.py.

Of figure, ink and layout (a place, or a number of figures) every two come together in the scenes that a base model is
pre-trained on, but a fifth of all threes do not. A caption that leaves no other scene is *new*: the base knows all its
words, and has seen any two of them together, but not all. These captions are out of domain.

No PyTorch: a config is checked before it is imported.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from varfast.data.prompts import Prompt

if TYPE_CHECKING:
    import numpy as np

# Of the cells 0 ... 3 of the sheet, row by row.
CORNERS = ("top left", "top right", "bottom left", "bottom right")
COUNTS = {1: "a", 2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Scene:
    """All attributes of a scene, but for the corners of two or more figures, which are any.

    Attributes:
        figure: what is drawn: a digit, or the name of a shape.
        place: of a single figure; None for several.
    """

    figure: Any
    ink: str
    paper: str
    place: str | None
    count: int


@dataclass(frozen=True)
class Caption:
    """A text, and what it asks for.

    Attributes:
        tag: which attributes it is about, beside figure and count: the name of the figure ("digit", "shape"), "colour",
            "position" or "count".
        asked: what it names, by name: the figure, by its name, and attributes of Scene.
        is_new: whether every scene that it describes is.
    """

    text: str
    tag: str
    asked: Mapping[str, Any]
    is_new: bool


@dataclass(frozen=True)
class World:
    """The scenes of one kind of figure, and their captions. Two are defined below.

    Attributes:
        name: in a config.
        figure: what a figure is called: "digit" or "shape", the key of prompts' metadata.
        words: of each figure, one and several of it.
        shades: red, green and blue of each ink and paper, in [0, 1].
        colours: ink and paper that come together.
        places: of a single figure, and where each is: "at the top left".
        most: figures of a scene.
        counts_name_paper: whether captions about the number name the paper.
    """

    name: str
    figure: str
    words: Mapping[Any, tuple[str, str]]
    shades: Mapping[str, tuple[float, float, float]]
    colours: tuple[tuple[str, str], ...]
    places: Mapping[str, str]
    most: int
    counts_name_paper: bool

    @functools.cached_property
    def inks(self) -> tuple[str, ...]:
        """Names."""
        return tuple(dict(self.colours))

    @functools.cached_property
    def papers(self) -> tuple[str, ...]:
        """Names."""
        return tuple(dict.fromkeys(paper for _, paper in self.colours))

    @functools.cached_property
    def known(self) -> dict[str, tuple[Any, ...]]:
        """What a caption may ask for: the values of each attribute."""
        return {
            self.figure: tuple(self.words),
            "ink": tuple(self.shades),
            "paper": tuple(self.shades),
            "count": tuple(range(1, self.most + 1)),
            "place": tuple(self.places),
        }

    @functools.cached_property
    def captions(self) -> tuple[Caption, ...]:
        """All captions, in a fixed order."""
        return tuple(self._captions())

    @functools.cached_property
    def labels(self) -> dict[str, dict[str, Any]]:
        """What the labels of a model without texts ask for, by name: "red star"; in the order of the labels."""
        pairs = itertools.product(self.words.items(), self.inks)
        return {f"{ink} {one}": {self.figure: figure, "ink": ink} for (figure, (one, _)), ink in pairs}

    @functools.cached_property
    def asked(self) -> dict[str, Mapping[str, Any]]:
        """What captions and labels ask for, by text."""
        return {caption.text: caption.asked for caption in self.captions} | self.labels

    def prompts(self) -> list[Prompt]:
        """All captions as prompts, of which the new ones are out of domain; `metadata` is what they ask for."""
        return [
            Prompt(caption.text, caption.tag, dict(caption.asked), "out_of_domain" if caption.is_new else "train")
            for caption in self.captions
        ]

    def scenes(self, caption: Caption) -> list[Scene]:
        """Those that a caption describes and that pre-training shows; for a new caption, all that it describes."""
        return [scene for scene in self.described(caption.asked) if self.is_new(scene) == caption.is_new]

    @functools.cached_property
    def shown(self) -> tuple[Caption, ...]:
        """The captions of pre-training: those that are not new."""
        return tuple(caption for caption in self.captions if not caption.is_new)

    def scenes_shown(self, per_caption: int, rng: np.random.RandomState) -> Iterator[Scene]:
        """A scene of each of the captions `shown`, in their order, so many times over.

        One at a time, so that whoever draws it takes its random numbers before the next one is chosen.
        """
        scenes = [self.scenes(caption) for caption in self.shown]
        for _ in range(per_caption):
            for described in scenes:
                yield described[rng.randint(len(described))]

    def described(self, asked: Mapping[str, Any]) -> list[Scene]:
        """All scenes that have the attributes."""
        fields = {"figure" if name == self.figure else name: value for name, value in asked.items()}
        return [scene for scene in self._scenes if all(getattr(scene, name) == fields[name] for name in fields)]

    def is_new(self, scene: Scene) -> bool:
        """Whether pre-training never shows its figure, ink and layout together."""
        places = list(self.places)
        layout = scene.count if scene.place is None else self.most + places.index(scene.place)
        return (list(self.words).index(scene.figure) + self.inks.index(scene.ink) + layout) % 5 == 0

    @functools.cached_property
    def _scenes(self) -> tuple[Scene, ...]:
        layouts: list[tuple[str | None, int]] = [*((place, 1) for place in self.places)]
        layouts += [(None, count) for count in range(2, self.most + 1)]
        return tuple(
            Scene(figure, ink, paper, place, count)
            for figure, (ink, paper), (place, count) in itertools.product(self.words, self.colours, layouts)
        )

    def _captions(self) -> Iterator[Caption]:
        words = self.words.items()
        for figure, (one, _) in words:
            yield self._caption(f"{'an' if one == 'eight' else 'a'} {one}", self.figure, figure, count=1)
        for (figure, (one, _)), (ink, paper) in itertools.product(words, self.colours):
            text = f"{_article(ink)} {ink} {one} on {paper} paper"
            yield self._caption(text, "colour", figure, ink=ink, paper=paper, count=1)
        for (figure, (one, _)), ink, (place, where) in itertools.product(words, self.inks, self.places.items()):
            yield self._caption(
                f"{_article(ink)} {ink} {one} {where}", "position", figure, ink=ink, place=place, count=1
            )
        on: list[tuple[str, str]] = list(self.colours) if self.counts_name_paper else [(ink, "") for ink in self.inks]
        for (figure, (_, several)), (ink, paper), count in itertools.product(words, on, range(2, self.most + 1)):
            named = {"paper": paper} if paper else {}
            text = f"{COUNTS[count]} {ink} {several}" + f" on {paper} paper" * bool(paper)
            yield self._caption(text, "count", figure, ink=ink, **named, count=count)

    def _caption(self, text: str, tag: str, figure: Any, **asked: Any) -> Caption:
        asked = {self.figure: figure} | asked
        return Caption(text, tag, asked, all(self.is_new(scene) for scene in self.described(asked)))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = World(
    "digits",
    "digit",
    {digit: (word, f"{word}{'es' if word == 'six' else 's'}") for digit, word in enumerate(_DIGITS)},
    {"dark": (0.08, 0.08, 0.08), "light": (0.92, 0.92, 0.92), "red": (0.85, 0.10, 0.10), "blue": (0.15, 0.25, 0.90)},
    # Ink and paper that can be told apart.
    (("dark", "light"), ("light", "dark"), ("red", "light"), ("red", "dark"), ("blue", "light"), ("blue", "dark")),
    {corner: f"at the {corner}" for corner in CORNERS},
    most=3,
    counts_name_paper=True,
)

_INKS = {
    "red": (0.90, 0.22, 0.24),
    "orange": (0.97, 0.54, 0.12),
    "yellow": (0.98, 0.82, 0.16),
    "green": (0.24, 0.70, 0.36),
    "blue": (0.20, 0.45, 0.90),
    "purple": (0.58, 0.30, 0.80),
}
# No colour of their own, so that figures can be told from paper and shadow by that alone: see rewards/scene_readers.py.
_PAPERS = {
    "white": (0.95, 0.94, 0.91),
    "pink": (0.96, 0.83, 0.85),
    "mint": (0.80, 0.93, 0.86),
    "night": (0.17, 0.19, 0.27),
}
SHAPES = World(
    "shapes",
    "shape",
    {name: (name, f"{name}{'es' if name == 'cross' else 's'}")
     for name in ("circle", "square", "triangle", "star", "heart", "cross")},
    _INKS | _PAPERS,
    tuple(itertools.product(_INKS, _PAPERS)),
    {corner: f"at the {corner}" for corner in CORNERS} | {"middle": "in the middle"},
    most=4,
    counts_name_paper=False,
)  # fmt: skip
WORLDS = {world.name: world for world in (DIGITS, SHAPES)}
