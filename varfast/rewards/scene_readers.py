"""What a picture of digits or of shapes shows, read from its pixels: kind, colour, number and place of its figures.

Axes: B image, K figure (for digits: corner), P pixel, S shade, D kind of figure, F number that is read of a figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from varfast.data.captions import DIGITS, SHAPES, Scene, World

if TYPE_CHECKING:
    from torch import Tensor

# Of digits. Distance in RGB, each in [0, 1], from which on a colour is seen on the paper; the palest pair has 0.8.
_SEEN = 0.35
# Pixels nearer than this have the same colour.
_SAME = 0.25
# Pixels of a figure's 36 whose mean is its ink, and how many must be at least half ink.
_INK_PIXELS, _LEAST_PIXELS = 4, 6

# Of shapes. Pictures are read at this side, which is that of configs/shapes.yaml.
_SIDE_PX = 32
# Largest minus smallest of red, green and blue: papers and shadows have at most 0.15, inks at least 0.4.
_PALE, _BRIGHT = 0.2, 0.46
# A spot of fewer pixels is no figure, and a figure of fewer has no shape; the smallest ones that are drawn have 32. Of
# more figures, the largest are read.
_SPOT_PX, _SHAPE_PX, _MOST_FIGURES = 6, 20, 6
# Figures are compared in cut-outs of so many pixels, whose half side is so many radii of a disc of the figure's area.
_CUT_PX, _CUT_RADII = 14, 1.6
# Cosine to the most similar drawn figure below which a figure has no shape; of 1000 drawn ones 999 have more.
_LIKE = 0.9
# A centre at most so far from the middle, in sides, is in the middle.
_MIDDLE = 0.12


@dataclass(frozen=True)
class Reading:
    """What is seen of up to K figures of each picture.

    Attributes:
        figures_BK: bool, whether there is such a figure.
        mass_BK: its area in pixels; 0 where there is none.
        place_BK: row of the world's places.
        paper_BS, ink_BKS: how near the colour is to each shade, at most 1; the largest one names it.
        probability_BKD: of each kind of figure; 0 of all where none can be told.
    """

    figures_BK: Tensor
    mass_BK: Tensor
    place_BK: Tensor
    paper_BS: Tensor
    ink_BKS: Tensor
    probability_BKD: Tensor

    def packed(self) -> Tensor:
        """(B, K, F) float32."""
        paper_BKS = self.paper_BS.unsqueeze(1).expand_as(self.ink_BKS)
        singles = [value.unsqueeze(2).float() for value in (self.figures_BK, self.mass_BK, self.place_BK)]
        return torch.cat([*singles, paper_BKS, self.ink_BKS, self.probability_BKD], dim=2)

    @classmethod
    def unpacked(cls, read_BKF: Tensor, world: World) -> Reading:
        shades = len(world.shades)
        figures, mass, place, paper, ink, kind = read_BKF.split([1, 1, 1, shades, shades, len(world.words)], dim=2)
        return cls(figures.squeeze(2) > 0, mass.squeeze(2), place.squeeze(2).long(), paper[:, 0], ink, kind)


class SceneReader:
    """Reads pictures once for all rewards that judge them."""

    world: World

    def __init__(self) -> None:
        self.batch_size = 1024

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, K, F), `Reading.packed`, on their device."""
        return torch.cat([self.read(part).packed() for part in images.split(self.batch_size)]).to(images.device)

    def texts_are_read(self) -> None:
        pass

    def read(self, images: Tensor) -> Reading:
        """(B, 3, H, W) in [0, 1] -> what is seen, on the CPU."""
        raise NotImplementedError


class DigitsReader(SceneReader):
    """Digits in the corners of a sheet, corner by corner.

    Paper is the colour that most pixels have, a corner holds a figure where enough pixels differ from it, the ink is
    that of the pixels that differ most, and a classifier of handwritten digits tells what is written there.

    Raises: InputError if scikit-learn is missing.
    """

    world = DIGITS

    def __init__(self) -> None:
        from varfast.data.datasets import DigitsClassifier
        from varfast.data.scenes import small_strokes

        super().__init__()
        self._classifier = DigitsClassifier(small_strokes())

    def read(self, images: Tensor) -> Reading:
        from varfast.data.scenes import FIGURE_PX, SCENE_PX

        images = F.interpolate(images.float().cpu(), (SCENE_PX, SCENE_PX), mode="area")
        paper_B3 = _commonest(images.flatten(2).transpose(1, 2))
        # Corner by corner, row by row: (B, K, pixel, 3).
        tiled = images.unflatten(3, (2, FIGURE_PX)).unflatten(2, (2, FIGURE_PX)).permute(0, 2, 4, 3, 5, 1)
        cells_BKP3 = tiled.flatten(3, 4).flatten(1, 2)
        difference_BKP3 = cells_BKP3 - paper_B3[:, None, None]
        most_BKp = difference_BKP3.norm(dim=3).topk(_INK_PIXELS, dim=2).indices
        ink_BK3 = cells_BKP3.gather(2, most_BKp.unsqueeze(3).expand(-1, -1, -1, 3)).mean(dim=2)
        axis_BK13 = (ink_BK3 - paper_B3[:, None]).unsqueeze(2)
        along_BKP = (difference_BKP3 * axis_BK13).sum(dim=3)
        strokes_BKP = (along_BKP / axis_BK13.square().sum(dim=3).clamp_min(1e-6)).clamp(0.0, 1.0)
        seen_BK = axis_BK13.norm(dim=3).squeeze(2) >= _SEEN
        figures_BK = seen_BK & ((strokes_BKP >= 0.5).sum(dim=2) >= _LEAST_PIXELS)
        probability_BKD = torch.zeros(*figures_BK.shape, 10)
        if figures_BK.any():
            written = 1.0 - strokes_BKP[figures_BK].view(-1, 1, FIGURE_PX, FIGURE_PX)
            probability_BKD[figures_BK] = self._classifier.probabilities(written).float()
        return Reading(
            figures_BK,
            strokes_BKP.sum(dim=2) * figures_BK,
            torch.arange(4).expand_as(figures_BK),
            _near_shades(paper_B3, self.world),
            _near_shades(ink_BK3, self.world),
            probability_BKD,
        )


def _commonest(pixels_BP3: Tensor) -> Tensor:
    """(B, 3), the mean of the pixels round the one that most others are near to."""
    near_BPP = (torch.cdist(pixels_BP3, pixels_BP3) < _SAME).float()
    densest_B = near_BPP.sum(dim=2).argmax(dim=1)
    weight_BP1 = near_BPP[torch.arange(len(densest_B)), densest_B].unsqueeze(2)
    return (pixels_BP3 * weight_BP1).sum(dim=1) / weight_BP1.sum(dim=1)


def _near_shades(colours: Tensor, world: World) -> Tensor:
    """(..., 3) -> (..., S), 1 minus the distance to each shade."""
    shades_S3 = torch.tensor(list(world.shades.values()))
    return 1.0 - (colours.unsqueeze(-2) - shades_S3).norm(dim=-1)


class ShapesReader(SceneReader):
    """Coloured shapes anywhere on pale paper.

    Papers and shadows have next to no colour, so a figure is a connected patch of pixels that have one. Its ink is the
    ink of the nearest hue. Its shape is that of the most similar one of figures drawn in several sizes and turns, in a
    cut-out scaled by its area; a patch that is similar to none has no shape.
    """

    world = SHAPES

    def __init__(self) -> None:
        super().__init__()
        self._drawn_TC, self._shape_T = self._drawn()

    def read(self, images: Tensor) -> Reading:
        images = images.float().cpu()
        if images.shape[-1] != _SIDE_PX:
            images = F.interpolate(images, (_SIDE_PX, _SIDE_PX), mode="bilinear", antialias=True)
        cover_BP, patches_BKP, area_BK = _patches(images)
        figures_BK = area_BK >= _SPOT_PX
        weight_BKP = patches_BKP * cover_BP.unsqueeze(1)
        ink_BK3 = _mean(images.flatten(2), weight_BKP)
        centre_BK2 = _mean(_places(), weight_BKP)
        return Reading(
            figures_BK,
            area_BK * figures_BK,
            _corner_or_middle(centre_BK2),
            self._papers(images, cover_BP),
            self._inks(ink_BK3),
            self._shapes(weight_BKP, centre_BK2) * (area_BK >= _SHAPE_PX).unsqueeze(2),
        )

    def _papers(self, images: Tensor, cover_BP: Tensor) -> Tensor:
        """(B, S); by the median of the pixels without a colour, which half a page of shadows does not move."""
        pale_B3P = images.flatten(2).masked_fill(cover_BP.unsqueeze(1) > 0.0, torch.nan)
        near_BS = _near_shades(pale_B3P.nanmedian(dim=2).values.nan_to_num(), self.world)
        is_paper_S = torch.tensor([name in self.world.papers for name in self.world.shades])
        return near_BS.where(is_paper_S, -1.0)

    def _inks(self, ink_BK3: Tensor) -> Tensor:
        """(B, K, S), cosines of hues."""
        is_ink_S = torch.tensor([name in self.world.inks for name in self.world.shades])
        shades_S3 = torch.tensor(list(self.world.shades.values()))
        return (_hue(ink_BK3) @ _hue(shades_S3).T).where(is_ink_S, -1.0)

    def _shapes(self, weight_BKP: Tensor, centre_BK2: Tensor) -> Tensor:
        """(B, K, D) probabilities."""
        like_BKT = _cut_outs(weight_BKP, centre_BK2) @ self._drawn_TC.T
        kinds = range(len(self.world.words))
        like_BKD = torch.stack([like_BKT[..., self._shape_T == kind].amax(dim=2) for kind in kinds], dim=2)
        probability_BKD = (like_BKD * 60.0).softmax(dim=2)
        return probability_BKD * (like_BKD.amax(dim=2, keepdim=True) >= _LIKE)

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """Cut-outs (T, C) of figures drawn in all sizes and turns, and their shapes (T,)."""
        from varfast.data.shapes import draw_shapes

        rng = np.random.RandomState(0)
        kinds = range(len(self.world.words))
        scenes = [Scene(name, "red", "white", place, 1)
                  for name in self.world.words for place in self.world.places for _ in range(16)]  # fmt: skip
        cover_BP, patches_BKP, _ = _patches(draw_shapes(scenes, _SIDE_PX, rng))
        weight_B1P = (patches_BKP * cover_BP.unsqueeze(1))[:, :1]
        cuts_TC = _cut_outs(weight_B1P, _mean(_places(), weight_B1P)).squeeze(1)
        return cuts_TC, torch.tensor([kind for kind in kinds for _ in range(len(scenes) // len(kinds))])


def _patches(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How much of each pixel has a colour (B, P), the largest connected patches (B, K, P) 0 or 1, and their pixels."""
    batch, pixels = len(images), images.shape[-1] ** 2
    colour_BHW = images.amax(dim=1) - images.amin(dim=1)
    cover_BHW = ((colour_BHW - _PALE) / (_BRIGHT - _PALE)).clamp(0.0, 1.0)
    inside_B1HW = (cover_BHW >= 0.5).unsqueeze(1).float()
    numbers_B1HW = torch.arange(1.0, pixels + 1).view(1, 1, *images.shape[-2:])
    patch_B1HW = numbers_B1HW * inside_B1HW
    # The largest number of a patch spreads to all of its pixels.
    for _ in range(pixels):
        spread_B1HW = F.max_pool2d(patch_B1HW, 3, stride=1, padding=1) * inside_B1HW
        if torch.equal(spread_B1HW, patch_B1HW):
            break
        patch_B1HW = spread_B1HW
    patch_BP = patch_B1HW.view(batch, pixels).long()
    area_BN = torch.zeros(batch, pixels + 1).scatter_add_(1, patch_BP, inside_B1HW.view(batch, pixels))
    area_BK, patch_BK = area_BN.topk(_MOST_FIGURES, dim=1)
    patches_BKP = (patch_BP.unsqueeze(1) == patch_BK.unsqueeze(2)) & (area_BK.unsqueeze(2) > 0)
    return cover_BHW.flatten(1), patches_BKP.float(), area_BK


def _places() -> Tensor:
    """(2, P): x and y of pixels' centres, from 0 to 1."""
    axis = (torch.arange(_SIDE_PX) + 0.5) / _SIDE_PX
    return torch.stack([axis.repeat(_SIDE_PX), axis.repeat_interleave(_SIDE_PX)])


def _mean(values: Tensor, weight_BKP: Tensor) -> Tensor:
    """(B, K, n) of values (B, n, P) or (n, P)."""
    return weight_BKP @ values.transpose(-1, -2) / weight_BKP.sum(dim=2, keepdim=True).clamp_min(1e-6)


def _hue(colours: Tensor) -> Tensor:
    """(..., 3), of length 1: what is left without grey."""
    return F.normalize(colours - colours.mean(dim=-1, keepdim=True), dim=-1)


def _corner_or_middle(centre_BK2: Tensor) -> Tensor:
    """(B, K) rows of the places: four corners, row by row, and the middle."""
    corner_BK = (centre_BK2[..., 0] >= 0.5).long() + 2 * (centre_BK2[..., 1] >= 0.5).long()
    return torch.where((centre_BK2 - 0.5).abs().amax(dim=2) <= _MIDDLE, 4, corner_BK)


def _cut_outs(weight_BKP: Tensor, centre_BK2: Tensor) -> Tensor:
    """(B, K, C) of length 1: the figure alone, moved to the middle and scaled to the same area."""
    batch, figures = weight_BKP.shape[:2]
    half_BK = _CUT_RADII * (weight_BKP.sum(dim=2).clamp_min(1.0) / torch.pi).sqrt() / _SIDE_PX
    axis = torch.linspace(-1.0, 1.0, _CUT_PX)
    offset_CC2 = torch.stack([axis.expand(_CUT_PX, _CUT_PX), axis.unsqueeze(1).expand(_CUT_PX, _CUT_PX)], dim=2)
    where = centre_BK2[:, :, None, None] + offset_CC2 * half_BK[:, :, None, None, None]
    cut = F.grid_sample(
        weight_BKP.view(batch * figures, 1, _SIDE_PX, _SIDE_PX), where.flatten(0, 1) * 2.0 - 1.0, align_corners=False
    )
    return F.normalize(cut.view(batch, figures, -1), dim=2)
