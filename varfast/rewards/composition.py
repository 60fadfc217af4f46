"""Whether a picture of digits shows what its prompt asks for: digit, colour, count and position, read from the pixels.

The scenes of varfast/data/captions.py have figures in the four corners of a sheet. A picture is read corner by corner:
paper is the colour that most pixels have, a corner holds a figure where enough pixels differ from it, the ink is that
of the pixels that differ most, and a classifier of handwritten digits tells what is written there. Nothing is fetched.

Which attributes count for an image is said by the metadata of its prompt: `digit` (0 to 9), `ink` and `paper` (names of
colours), `count`, `place` ("top left" and so on). What a prompt does not name is not judged.

Axes: B image, K corner, F number that is read of a corner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from varfast.data.captions import COUNTS, PLACES, SHADES
from varfast.printable import printable
from varfast.rewards.building import Building, PerImage, Reward, RewardSection, Scored
from varfast.types import InputError

if TYPE_CHECKING:
    from torch import Tensor

Check = Literal["digit", "colour", "count", "position"]
# What each check reads of a prompt's metadata, and the values that it knows.
ASKED: dict[str, tuple[object, ...]] = {
    "digit": tuple(range(10)),
    "ink": tuple(SHADES),
    "paper": tuple(SHADES),
    "count": tuple(COUNTS),
    "place": PLACES,
}
# Distance in RGB, each in [0, 1], from which on a colour is seen on the paper; the palest pair of ours has 0.8.
_SEEN = 0.35
# Pixels nearer than this have the same colour.
_SAME = 0.25
# Pixels of a figure's 36 whose mean is its ink, and how many must be at least half ink.
_INK_PIXELS, _LEAST_PIXELS = 4, 6


class CompositionReward(RewardSection):
    """Whether digit, colours, count and position are those of the prompt; for prompts.source=digits."""

    type: Literal["composition"] = Field(description="the kind of reward")
    checks: tuple[Check, ...] = Field(
        ("digit", "colour", "count", "position"),
        min_length=1,
        strict=False,
        description="what is judged, of what a prompt names; colour: ink and paper",
    )
    mode: Literal["exact", "share", "graded"] = Field(
        "exact",
        description="1 if all checks are right; the share of them that is; the mean of how near each is, in [0, 1]",
    )

    def build(self, building: Building) -> Reward:
        reader = building.share("scenes of digits", 1024, SceneReader)
        return PerImage(building, Composition(reader, self.checks, self.mode, building.key))

    def reaches_outside(self) -> str | None:
        return None


@dataclass(frozen=True)
class Reading:
    """What is seen in each corner of a picture.

    Attributes:
        paper_B3: its colour.
        figures_BK: bool, whether the corner holds a figure.
        ink_BK3: colour of the pixels that differ most from the paper.
        mass_BK: how much ink there is, in pixels.
        probability_BKD: of each digit, by the classifier; 0 where there is no figure.
    """

    paper_B3: Tensor
    figures_BK: Tensor
    ink_BK3: Tensor
    mass_BK: Tensor
    probability_BKD: Tensor

    def packed(self) -> Tensor:
        """(B, K, F) float32."""
        import torch

        paper_BK3 = self.paper_B3.unsqueeze(1).expand_as(self.ink_BK3)
        columns = [self.figures_BK.unsqueeze(2), self.mass_BK.unsqueeze(2), paper_BK3, self.ink_BK3]
        return torch.cat([*(column.float() for column in columns), self.probability_BKD], dim=2)

    @classmethod
    def unpacked(cls, read_BKF: Tensor) -> Reading:
        figures, mass, paper, ink, probability = read_BKF.split([1, 1, 3, 3, 10], dim=2)
        return cls(paper[:, 0], figures.squeeze(2) > 0, ink, mass.squeeze(2), probability)


class SceneReader:
    """Reads pictures once for all rewards that judge them.

    Raises: InputError if scikit-learn is missing.
    """

    def __init__(self) -> None:
        from varfast.data.datasets import DigitsClassifier
        from varfast.data.scenes import small_strokes

        self.batch_size = 1024
        self._classifier = DigitsClassifier(small_strokes())

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, K, F), `Reading.packed`, on their device."""
        import torch

        return torch.cat([self.read(part).packed() for part in images.split(self.batch_size)]).to(images.device)

    def texts_are_read(self) -> None:
        pass

    def read(self, images: Tensor) -> Reading:
        """(B, 3, H, W) in [0, 1] -> what is seen, on the CPU."""
        import torch

        from varfast.data.scenes import FIGURE_PX, SCENE_PX

        images = torch.nn.functional.interpolate(images.float().cpu(), (SCENE_PX, SCENE_PX), mode="area")
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
        mass_BK = strokes_BKP.sum(dim=2) * figures_BK
        return Reading(paper_B3, figures_BK, ink_BK3, mass_BK, probability_BKD)


def _commonest(pixels_BP3: Tensor) -> Tensor:
    """(B, 3), the mean of the pixels round the one that most others are near to."""
    import torch

    near_BPP = (torch.cdist(pixels_BP3, pixels_BP3) < _SAME).float()
    densest_B = near_BPP.sum(dim=2).argmax(dim=1)
    weight_BP1 = near_BPP[torch.arange(len(densest_B)), densest_B].unsqueeze(2)
    return (pixels_BP3 * weight_BP1).sum(dim=1) / weight_BP1.sum(dim=1)


class Composition:
    """The reward. Arguments: see CompositionReward; key: where it stands in the config, for errors."""

    def __init__(self, reader: SceneReader, checks: Sequence[Check], mode: str, key: str) -> None:
        self._reader, self._checks, self._mode, self._key = reader, tuple(checks), mode, key

    def __call__(self, scored: Scored) -> Tensor:
        """(B,) in [0, 1]; 1 where the prompt asks for nothing that is checked.

        Raises: InputError for a prompt that names none of the attributes, or one with a value that is not known.
        """
        read_BKF = scored.embeddings(self._reader)
        asked = asked_of(scored.batch.prompts, scored.batch.metadata, self._key)
        return judge(Reading.unpacked(read_BKF.cpu()), asked, self._checks, self._mode).to(read_BKF.device)


def asked_of(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    """The attributes that prompts name, from their metadata.

    Raises: InputError for a prompt that names none, or one with a value that is not known.
    """
    found = []
    for row in range(len(prompts)):
        named = metadata[row] if metadata else {}
        asked = {name: named[name] for name in ASKED if name in named}
        what = f"{key}: the prompt {printable(prompts[row])!r}"
        if not asked:
            raise InputError(
                f"{what} has no metadata of a scene ({', '.join(ASKED)}); use prompts.source=digits, or a JSONL whose "
                'rows have such keys, as {"prompt": "a red seven", "digit": 7, "ink": "red", "count": 1}'
            )
        for name, value in asked.items():
            if value not in ASKED[name] or isinstance(value, bool):
                known = ", ".join(map(str, ASKED[name]))
                raise InputError(f"{what} has {name}={printable(repr(value))}; known: {known}")
        found.append(asked)
    return found


def judge(reading: Reading, asked: Sequence[Mapping[str, Any]], checks: Sequence[Check], mode: str) -> Tensor:
    """(B,) float32 in [0, 1], how well what is seen is what is asked; mode: see CompositionReward."""
    import torch

    scores = []
    for row, wanted in enumerate(asked):
        parts = [_CHECKS[check](reading, row, wanted, mode == "graded") for check in checks]
        judged = [part for part in parts if part is not None]
        if mode == "exact":
            scores.append(float(all(part == 1.0 for part in judged)))
        else:
            scores.append(sum(judged) / len(judged) if judged else 1.0)
    return torch.tensor(scores, dtype=torch.float32)


def _digit(reading: Reading, row: int, wanted: Mapping[str, Any], graded: bool) -> float | None:
    """All figures are the digit; graded: the mean of their probabilities of it."""
    if "digit" not in wanted:
        return None
    probability_nD = reading.probability_BKD[row][reading.figures_BK[row]]
    if not len(probability_nD):
        return 0.0
    if graded:
        return float(probability_nD[:, wanted["digit"]].mean())
    return float(bool((probability_nD.argmax(dim=1) == wanted["digit"]).all()))


def _colour(reading: Reading, row: int, wanted: Mapping[str, Any], graded: bool) -> float | None:
    """Ink of all figures, and paper; graded: 1 minus the distance in RGB, where that is below 1."""
    inks = list(reading.ink_BK3[row][reading.figures_BK[row]])
    seen = {"ink": inks, "paper": [reading.paper_B3[row]]}
    parts = []
    for name in ("ink", "paper"):
        if name in wanted:
            rated = [_near(colour_3, wanted[name]) if graded else float(_name(colour_3) == wanted[name])
                     for colour_3 in seen[name]]  # fmt: skip
            parts.append((sum(rated) / len(rated) if graded else min(rated)) if rated else 0.0)
    if not parts:
        return None
    return sum(parts) / len(parts) if graded else min(parts)


def _count(reading: Reading, row: int, wanted: Mapping[str, Any], graded: bool) -> float | None:
    """The number of figures; graded: 1 / (1 + how many too many or too few)."""
    if "count" not in wanted:
        return None
    wrong = abs(int(reading.figures_BK[row].sum()) - wanted["count"])
    return 1.0 / (1 + wrong) if graded else float(wrong == 0)


def _position(reading: Reading, row: int, wanted: Mapping[str, Any], graded: bool) -> float | None:
    """A figure in the corner and none elsewhere; graded: the share of the ink that lies in the corner."""
    if "place" not in wanted:
        return None
    corner, mass_K = PLACES.index(wanted["place"]), reading.mass_BK[row]
    if graded:
        return float(mass_K[corner] / mass_K.sum().clamp_min(1e-6))
    figures_K = reading.figures_BK[row]
    return float(bool(figures_K[corner]) and int(figures_K.sum()) == 1)


_CHECKS: dict[str, Callable[[Reading, int, Mapping[str, Any], bool], float | None]] = {
    "digit": _digit,
    "colour": _colour,
    "count": _count,
    "position": _position,
}


def _distance(colour_3: Tensor, name: str) -> float:
    return float((colour_3 - colour_3.new_tensor(SHADES[name])).norm())


def _near(colour_3: Tensor, name: str) -> float:
    return max(0.0, 1.0 - _distance(colour_3, name))


def _name(colour_3: Tensor) -> str:
    """The named colour that is nearest."""
    return min(SHADES, key=lambda name: _distance(colour_3, name))
