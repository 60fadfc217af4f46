"""Scenes of handwritten digits, as varfast/data/captions.py describes them: pictures for pre-training, and their truth.

Axes: N scene; images are (N, 3, H, W) float32 in [0, 1].
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varfast.data.captions import CORNERS, DIGITS, Scene
from varfast.data.datasets import load_strokes
from varfast.types import InputError

# Sides of a figure and of the smallest scene, two by two of them. More pixels are by repetition.
FIGURE_PX, SCENE_PX = 6, 12
# Of each digit, so many ways to write it: a small model learns them in minutes.
_HANDS = 6


def draw_scene(scene: Scene, image_size: int, rng: np.random.RandomState) -> Tensor:
    """(3, image_size, image_size) in [0, 1]: the figures, each in another hand, in corners drawn by `rng`.

    Raises: InputError if the side is no multiple of 12.
    """
    if image_size % SCENE_PX:
        raise InputError(f"scenes of digits are {SCENE_PX} pixels wide; an image side of {image_size} is no multiple")
    if scene.place is None:
        cells = rng.choice(len(CORNERS), scene.count, replace=False).tolist()
    else:
        cells = [CORNERS.index(scene.place)]
    strokes_HW = torch.zeros(SCENE_PX, SCENE_PX)
    hands = _hands()[scene.figure]
    for cell in cells:
        top, left = FIGURE_PX * (cell // 2), FIGURE_PX * (cell % 2)
        strokes_HW[top : top + FIGURE_PX, left : left + FIGURE_PX] = hands[rng.randint(len(hands))]
    paper, ink = (torch.tensor(DIGITS.shades[name]).view(3, 1, 1) for name in (scene.paper, scene.ink))
    repeat = image_size // SCENE_PX
    return (paper + (ink - paper) * strokes_HW).repeat_interleave(repeat, dim=1).repeat_interleave(repeat, dim=2)


def captioned_scenes(per_caption: int, image_size: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Scenes with captions, for pre-training: so many of each caption that is not new.

    Returns: images (N, 3, image_size, image_size), (N,) int64 rows of the captions, and the captions' texts.
    Raises: InputError as draw_scene.
    """
    rng, texts = np.random.RandomState(seed), [caption.text for caption in DIGITS.shown]
    images = [draw_scene(scene, image_size, rng) for scene in DIGITS.scenes_shown(per_caption, rng)]
    return torch.stack(images), torch.arange(len(texts)).repeat(per_caption), texts


@functools.cache
def _hands() -> dict[int, Tensor]:
    """Strokes in [0, 1], (M, 6, 6) by digit: those that are most like the mean of their digit."""
    strokes_NHW, labels_N = small_strokes()
    found = {}
    for digit in range(10):
        own_MHW = strokes_NHW[labels_N == digit]
        distance_M = (own_MHW - own_MHW.mean(dim=0)).square().sum(dim=(1, 2))
        found[digit] = own_MHW[distance_M.argsort(stable=True)[:_HANDS]]
    return found


@functools.cache
def small_strokes() -> tuple[Tensor, Tensor]:
    """All digits of scikit-learn as figures: (N, 6, 6) float32, 0 to 1, and (N,) int64 labels.

    Their outer columns, which are nearly empty, are cut off, so that the figure is a square of 6 pixels.
    """
    strokes_NHW, labels_N = load_strokes()
    middle_N1HW = strokes_NHW[:, None, :, 1:7]
    small_NHW = F.interpolate(middle_N1HW, (FIGURE_PX, FIGURE_PX), mode="bilinear", antialias=True).squeeze(1)
    return small_NHW / small_NHW.amax(dim=(1, 2), keepdim=True), labels_N
