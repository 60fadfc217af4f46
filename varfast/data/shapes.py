"""Scenes of coloured shapes, "three red stars on mint paper": pictures for pre-training, drawn by this file in seconds.

Each figure is a polygon with rounded corners, given by its signed distance: a pixel is covered by how far it lies
inside of the edge, so that edges are smooth at any size. A scene has soft paper, a shadow below each figure, and light
from the top left. Which scenes there are, and what their captions say, is in varfast/data/captions.py.

Axes: N scene, F figure of any scene, H and W pixels, E edge of a polygon; images are (N, 3, H, W) float32 in [0, 1].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varfast.data.captions import CORNERS, SHAPES, Scene
from varfast.types import InputError

_NAMES = tuple(SHAPES.words)
# Below, a star in a corner is a few pixels.
SMALLEST_PX = 24
# Figures that are drawn at a time: 256 of 32 x 32 pixels take some MB.
_CHUNK = 256
# The table of distances: so many points a side, over so many radii from the middle.
_FIELD_PX, _FIELD_RADII = 129, 2.0
# Radius of rounded corners, over the radius of the figure.
_ROUND = 0.1
# Images of a label in pre-training.
SCENES_A_LABEL = 300


@dataclass(frozen=True)
class _Figures:
    """Where figures are, in sides of the image.

    Attributes:
        scene_F, slot_F: of which scene, and which of its figures, from 0.
        shape_F: row of _NAMES.
        centre_F2: x and y.
        radius_F: of the circle around it.
        turn_F: in radians.
    """

    scene_F: Tensor
    slot_F: Tensor
    shape_F: Tensor
    centre_F2: Tensor
    radius_F: Tensor
    turn_F: Tensor
    ink_F3: Tensor

    def rows(self, chosen: Tensor) -> _Figures:
        return _Figures(*(value[chosen] for value in vars(self).values()))


def draw_shapes(scenes: Sequence[Scene], image_size: int, rng: np.random.RandomState) -> Tensor:
    """(N, 3, image_size, image_size): sizes, turns, exact places and light are drawn by `rng`.

    Raises: InputError if the side is below 24.
    """
    if image_size < SMALLEST_PX:
        raise InputError(f"scenes of shapes need {SMALLEST_PX} pixels a side; the image side is {image_size}")
    images, figures = _papers(scenes, image_size, rng), _placed(scenes, rng)
    for paint in (_add_shadow, _add_figure):
        for slot in range(int(figures.slot_F.max()) + 1):
            for part in (figures.slot_F == slot).nonzero().flatten().split(_CHUNK):
                paint(images, figures.rows(part))
    return images.clamp_(0.0, 1.0)


def labelled_shapes(image_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scenes for pre-training a model with labels. A label is a shape in a colour; number, place and paper are any.

    Returns: (N, 3, image_size, image_size), (N,) int64 labels, which SHAPES.labels names.
    Raises: InputError as draw_shapes.
    """
    rng = np.random.RandomState(seed)
    scenes: list[list[Scene]] = [SHAPES.described(asked) for asked in SHAPES.labels.values()]
    labels_N = np.tile(np.arange(len(scenes)), SCENES_A_LABEL)
    chosen = [_any_count(scenes[label], rng) for label in labels_N]
    return draw_shapes(chosen, image_size, rng), torch.from_numpy(labels_N)


def captioned_shapes(per_caption: int, image_size: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Scenes with captions, for pre-training: so many of each caption that is not new.

    Returns: images (N, 3, image_size, image_size), (N,) int64 rows of the captions, and the captions' texts.
    Raises: InputError as draw_shapes.
    """
    rng, texts = np.random.RandomState(seed), [caption.text for caption in SHAPES.shown]
    images = draw_shapes(list(SHAPES.scenes_shown(per_caption, rng)), image_size, rng)
    return images, torch.arange(len(texts)).repeat(per_caption), texts


def _any_count(scenes: Sequence[Scene], rng: np.random.RandomState) -> Scene:
    """One of the scenes, each number of figures as often."""
    count = rng.choice(sorted({scene.count for scene in scenes}))
    found = [scene for scene in scenes if scene.count == count]
    return found[rng.randint(len(found))]


# ---------------------------------------------------------------------------------------------------------------------
# Where things are


def _placed(scenes: Sequence[Scene], rng: np.random.RandomState) -> _Figures:
    """A figure in the middle may be large, others have a quarter of the sheet each."""
    rows: list[tuple[float, ...]] = []
    for number, scene in enumerate(scenes):
        middle = scene.place == "middle"
        if scene.place is None:
            cells = rng.choice(4, scene.count, replace=False).tolist()
        else:
            cells = [CORNERS.index(scene.place)] if not middle else [0]
        size = rng.uniform(0.85, 1.0)  # the figures of a scene are of about the same size
        for slot, cell in enumerate(cells):
            if middle:
                radius, (x, y) = rng.uniform(0.26, 0.36), rng.uniform(0.47, 0.53, 2)
            else:
                radius, away = 0.185 * size * rng.uniform(0.93, 1.0), rng.uniform(-0.025, 0.025, 2)
                x, y = 0.255 + 0.48 * (cell % 2) + away[0], 0.25 + 0.48 * (cell // 2) + away[1]
            turn = rng.uniform(-0.2, 0.2)
            shade = np.array(SHAPES.shades[scene.ink]) + rng.uniform(-0.03, 0.03, 3)
            rows.append((number, slot, _NAMES.index(scene.figure), x, y, radius, turn, *shade))
    table = torch.tensor(rows, dtype=torch.float32)
    scene_F, slot_F, shape_F = table[:, :3].long().unbind(1)
    return _Figures(scene_F, slot_F, shape_F, table[:, 3:5], table[:, 5], table[:, 6], table[:, 7:])


def _papers(scenes: Sequence[Scene], size: int, rng: np.random.RandomState) -> Tensor:
    """Paper, a little lighter towards one side."""
    shades_N3 = torch.tensor([SHAPES.shades[scene.paper] for scene in scenes])
    strength_N, angle_N = (torch.from_numpy(rng.uniform(*bounds, len(scenes)).astype(np.float32))
                           for bounds in ((0.03, 0.09), (0.0, 2 * math.pi)))  # fmt: skip
    x_HW, y_HW = _grid(size)
    along_NHW = (x_HW - 0.5) * angle_N.cos().view(-1, 1, 1) + (y_HW - 0.5) * angle_N.sin().view(-1, 1, 1)
    return shades_N3[:, :, None, None] + (along_NHW * strength_N.view(-1, 1, 1)).unsqueeze(1)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """x and y of pixels' centres, (H, W), in sides of the image."""
    centres = (torch.arange(size) + 0.5) / size
    return centres.expand(size, size), centres.unsqueeze(1).expand(size, size)


# ---------------------------------------------------------------------------------------------------------------------
# How they look


def _add_shadow(images: Tensor, figures: _Figures) -> None:
    """Darken the paper below and right of at most one figure of each scene."""
    away_FHW = _distances(figures, images.shape[-1], shift=(0.02, 0.05))
    images[figures.scene_F] *= 1.0 - 0.28 * torch.sigmoid(-away_FHW / 0.028).unsqueeze(1)


def _add_figure(images: Tensor, figures: _Figures) -> None:
    """Paint at most one figure of each scene."""
    size = images.shape[-1]
    away_FHW = _distances(figures, size)
    x_FHW, y_FHW = _own_axes(figures, size)
    light_FHW = 1.04 - 0.13 * (x_FHW + y_FHW)  # from the top left
    light_FHW = light_FHW - 0.16 * (1.0 + away_FHW / 0.05).clamp(0.0, 1.0)  # darker along the edge
    shine_FHW = 0.30 * torch.exp(-((x_FHW + 0.32).square() + (y_FHW + 0.36).square()) / 0.12)
    painted_F3HW = figures.ink_F3[:, :, None, None] * light_FHW.unsqueeze(1)
    painted_F3HW = painted_F3HW + (1.0 - painted_F3HW) * shine_FHW.unsqueeze(1)
    cover_F1HW = (0.5 - away_FHW * size).clamp(0.0, 1.0).unsqueeze(1)
    there = images[figures.scene_F]
    images[figures.scene_F] = there + (painted_F3HW.clamp(0.0, 1.0) - there) * cover_F1HW


def _own_axes(figures: _Figures, size: int, shift: tuple[float, float] = (0.0, 0.0)) -> tuple[Tensor, Tensor]:
    """(F, H, W) x and y of pixels around each figure's centre, in its radii, not turned."""
    x_HW, y_HW = _grid(size)
    x_F, y_F = (figures.centre_F2 + torch.tensor(shift)).unbind(1)
    radius_F = figures.radius_F.view(-1, 1, 1)
    return (x_HW - x_F.view(-1, 1, 1)) / radius_F, (y_HW - y_F.view(-1, 1, 1)) / radius_F


def _distances(figures: _Figures, size: int, shift: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """(F, H, W) signed distance of pixels to the edge, negative inside, in sides of the image."""
    x, y = _own_axes(figures, size, shift)
    cos, sin = figures.turn_F.cos().view(-1, 1, 1), figures.turn_F.sin().view(-1, 1, 1)
    where = torch.stack([x * cos + y * sin, y * cos - x * sin], dim=3) / _FIELD_RADII
    fields_F1SS = _fields()[figures.shape_F]
    away = F.grid_sample(fields_F1SS, where, padding_mode="border", align_corners=True).squeeze(1)
    return away * figures.radius_F.view(-1, 1, 1)


@functools.cache
def _fields() -> Tensor:
    """(K, 1, S, S) signed distance to the edge of each shape, in radii: computed once, looked up for each figure."""
    axis = torch.linspace(-_FIELD_RADII, _FIELD_RADII, _FIELD_PX)
    x, y = axis.expand(_FIELD_PX, _FIELD_PX), axis.unsqueeze(1).expand(_FIELD_PX, _FIELD_PX)
    return torch.stack([_polygon_distance(x, y, _corners()[name]) - _ROUND for name in _NAMES]).unsqueeze(1)


def _polygon_distance(x: Tensor, y: Tensor, corners_E2: Tensor) -> Tensor:
    """Signed distance of points to a polygon, negative inside, of x's shape."""
    nearest = torch.full_like(x, torch.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners_E2.tolist(), corners_E2.roll(-1, 0).tolist(), strict=True):
        along_x, along_y = bx - ax, by - ay
        share = ((x - ax) * along_x + (y - ay) * along_y) / (along_x**2 + along_y**2)
        share = share.clamp(0.0, 1.0)
        nearest = torch.minimum(nearest, (x - ax - share * along_x).square() + (y - ay - share * along_y).square())
        if ay != by:  # crossed by a ray to the right
            inside ^= ((y < ay) != (y < by)) & (x < ax + (y - ay) * along_x / along_y)
    return torch.where(inside, -1.0, 1.0) * nearest.sqrt()


@functools.cache
def _corners() -> dict[str, Tensor]:
    """(E, 2) of each shape, before its corners are rounded, which adds _ROUND on all sides; y points down."""

    def ring(*radii: float, turn: float = -math.pi / 2, count: int) -> Tensor:
        return torch.tensor(
            [
                (r * math.cos(turn + 2 * math.pi * i / count), r * math.sin(turn + 2 * math.pi * i / count))
                for i, r in zip(range(count), radii * count, strict=False)
            ]
        )

    t = torch.arange(32) / 32 * 2 * math.pi
    heart = torch.stack([16 * t.sin() ** 3, -(13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos())], 1)
    w, r = 0.24, 0.86
    cross = [(-w, -r), (w, -r), (w, -w), (r, -w), (r, w), (w, w), (w, r), (-w, r), (-w, w), (-r, w), (-r, -w), (-w, -w)]
    return {
        "circle": ring(0.82, count=32),
        "square": torch.tensor([(-0.72, -0.72), (0.72, -0.72), (0.72, 0.72), (-0.72, 0.72)]),
        "triangle": torch.tensor([(0.0, -0.85), (0.87, 0.7), (-0.87, 0.7)]),
        "star": ring(1.0, 0.4, count=10),
        "heart": heart / 18.5 + torch.tensor([0.0, -0.08]),
        "cross": torch.tensor(cross),
    }
