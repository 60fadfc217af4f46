"""Which images an evaluation samples, in which chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from varfast.types import Sampling

_CHUNK_IMAGES = 128
_PICTURE_LABELS, _PICTURE_SAMPLES = 8, 4


@dataclass(frozen=True)
class Images:
    """One set of images of an evaluation: of a model, sampled with one guidance.

    Attributes:
        side: of the model: "reference" or "checkpoint".
        how: they are sampled.
        name: of their files.
    """

    side: str
    how: Sampling
    name: str


def sets_of(sides: list[str], how: list[Sampling]) -> list[Images]:
    """Every model with every guidance; the models with the same guidance stand side by side."""
    several = len(how) > 1
    return [Images(s, h, f"{s}_cfg_{h.cfg:g}" if several else s) for h in how for s in sides]


class Plan:
    """The images of an evaluation, by index.

    Sample number s of label l, or of the prompt with id l, has the index s * num_classes + l: a function of the two
    alone, and consecutive over the labels, so that a batch holds a range of indices.

    Attributes:
        num_classes: labels that the model has, or prompts that are sampled.
        chunks: indices of each chunk, which is a file of the out folder.
        picture_labels, picture_samples: of the images that pictures.png shows.
    """

    def __init__(self, labels: list[int], samples_per_label: int, num_classes: int) -> None:
        self.num_classes = num_classes
        indices = [self.index(label, sample) for sample in range(samples_per_label) for label in labels]
        self.chunks = [indices[i : i + _CHUNK_IMAGES] for i in range(0, len(indices), _CHUNK_IMAGES)]
        shown = min(_PICTURE_LABELS, len(labels))
        self.picture_labels = [labels[i * len(labels) // shown] for i in range(shown)]
        self.picture_samples = list(range(min(_PICTURE_SAMPLES, samples_per_label)))

    @property
    def labels(self) -> list[int]:
        """The label of each image, chunk by chunk."""
        return [self.label(index) for chunk in self.chunks for index in chunk]

    def index(self, label: int, sample: int) -> int:
        return sample * self.num_classes + label

    def label(self, index: int) -> int:
        return index % self.num_classes

    def sample(self, index: int) -> int:
        return index // self.num_classes

    def shown(self, index: int) -> bool:
        """Whether pictures.png shows this image."""
        return self.label(index) in self.picture_labels and self.sample(index) in self.picture_samples

    def ranges(self, chunk: list[int], most: int) -> Iterator[list[int]]:
        """The chunk in ranges of consecutive indices, each of at most `most`."""
        breaks = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(chunk)) if b != a + 1), len(chunk)]
        for first, end in pairwise(breaks):
            for start in range(first, end, most):
                yield chunk[start : min(start + most, end)]
