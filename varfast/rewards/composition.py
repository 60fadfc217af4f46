"""Whether a picture of digits or shapes shows what its prompt asks for: kind, colour, number and place of figures.

The scenes are those of varfast/data/captions.py, and varfast/rewards/scene_readers.py reads the pixels. Nothing is
fetched.

Which attributes count for an image is said by the metadata of its prompt: `digit` (0 to 9) or `shape` ("star"), `ink`
and `paper` (names of colours), `count`, `place` ("top left" and so on). A prompt without them may be one of the
captions, or a label of pretrain.dataset=shapes, "red star". What a prompt does not name is not judged.

Axes: B image, K figure, F number that is read of a figure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from varfast.data.captions import WORLDS, World
from varfast.printable import printable
from varfast.rewards.building import Building, PerImage, Reward, RewardSection, Scored
from varfast.settings.schema import Wanted
from varfast.types import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from varfast.rewards.scene_readers import Reading, SceneReader

Check = Literal["digit", "shape", "colour", "count", "position"]
Scenes = Literal["digits", "shapes"]
_CHECKS_OF: dict[str, tuple[Check, ...]] = {
    "digits": ("digit", "colour", "count", "position"),
    "shapes": ("shape", "colour", "count", "position"),
}


class CompositionReward(RewardSection):
    """Whether figures, colours, count and position are those of the prompt; for prompts.source=digits or shapes."""

    type: Literal["composition"] = Field(description="the kind of reward")
    scenes: Scenes = Field("digits", description="what is in the pictures: digits in corners, or shapes")
    checks: tuple[Check, ...] = Field(
        _CHECKS_OF["digits"],
        min_length=1,
        strict=False,
        description="what is judged, of what a prompt names; colour: ink and paper. scenes=shapes has shape in "
        "place of digit",
    )
    asked: Annotated[dict[str, int | str], Wanted("attributes and values, such as {count: 3}")] = Field(
        default_factory=dict,
        description="what every image is asked for, beside what its prompt or label names: {count: 3}",
    )
    mode: Literal["exact", "share", "graded"] = Field(
        "exact",
        description="1 if all checks are right; the share of them that is; the mean of how near each is, in [0, 1]",
    )

    @model_validator(mode="before")
    @classmethod
    def _checks_of_scenes(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("scenes") == "shapes" and "checks" not in data:
            return data | {"checks": _CHECKS_OF["shapes"]}
        return data

    @model_validator(mode="after")
    def _of_one_world(self) -> CompositionReward:
        world = WORLDS[self.scenes]
        wrong = [check for check in self.checks if check not in _CHECKS_OF[self.scenes]]
        if wrong:
            known = ", ".join(_CHECKS_OF[self.scenes])
            raise ValueError(f"checks has {wrong[0]}; scenes={self.scenes} has {known}")
        for name, value in self.asked.items():
            if problem := _unknown(world, name, value):
                raise ValueError(f"asked has {problem}")
        return self

    def build(self, building: Building) -> Reward:
        return PerImage(
            building, Composition(scene_reader(building, self.scenes), self.checks, self.mode, building.key, self.asked)
        )

    def reaches_outside(self) -> str | None:
        return None


def scene_reader(building: Building, scenes: Scenes) -> SceneReader:
    """What reads pictures, the same for all rewards. Raises: InputError if scikit-learn is missing, for digits."""
    from varfast.rewards.scene_readers import DigitsReader, ShapesReader

    kinds: dict[str, Callable[[], SceneReader]] = {"digits": DigitsReader, "shapes": ShapesReader}
    return building.share(f"scenes of {scenes}", 1024, kinds[scenes])


class Composition:
    """The reward. Arguments: see CompositionReward; key: where it stands in the config, for errors."""

    def __init__(
        self, reader: SceneReader, checks: Sequence[Check], mode: str, key: str, asked: Mapping[str, Any]
    ) -> None:
        self._reader, self._checks, self._mode, self._key, self._asked = reader, tuple(checks), mode, key, dict(asked)

    def __call__(self, scored: Scored) -> Tensor:
        """(B,) in [0, 1]; 1 where the prompt asks for nothing that is checked.

        Raises: InputError for a prompt that names none of the attributes, or one with a value that is not known.
        """
        from varfast.rewards.scene_readers import Reading

        world = self._reader.world
        read_BKF = scored.embeddings(self._reader)
        asked = asked_of(world, scored.batch.prompts, scored.batch.metadata, self._key)
        reading = Reading.unpacked(read_BKF.cpu(), world)
        return judge(world, reading, [each | self._asked for each in asked], self._checks, self._mode).to(
            read_BKF.device
        )


def asked_of(
    world: World, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], key: str
) -> list[dict[str, Any]]:
    """The attributes that prompts name, from their metadata, or because they are captions or labels of the world.

    Raises: InputError for a prompt that names none, or one with a value that is not known.
    """
    found = []
    for row, prompt in enumerate(prompts):
        named = metadata[row] if metadata else {}
        asked = {name: named[name] for name in world.known if name in named} or dict(world.asked.get(prompt, {}))
        what = f"{key}: the prompt {printable(prompt)!r}"
        if not asked:
            one = next(iter(world.words))
            raise InputError(
                f"{what} has no metadata of a scene ({', '.join(world.known)}); use prompts.source={world.name}, or a "
                f'JSONL whose rows have such keys, as {{"prompt": "a red {world.words[one][0]}", "{world.figure}": '
                f'{json.dumps(one)}, "ink": "red", "count": 1}}'
            )
        for name, value in asked.items():
            if problem := _unknown(world, name, value):
                raise InputError(f"{what} has {problem}")
        found.append(asked)
    return found


def _unknown(world: World, name: str, value: object) -> str | None:
    """What is wrong with an attribute; None: nothing."""
    if name not in world.known:
        return f"{printable(name)}; known: {', '.join(world.known)}"
    if value in world.known[name] and not isinstance(value, bool):
        return None
    return f"{name}={printable(repr(value))}; known: {', '.join(map(str, world.known[name]))}"


def judge(
    world: World, reading: Reading, asked: Sequence[Mapping[str, Any]], checks: Sequence[Check], mode: str
) -> Tensor:
    """(B,) float32 in [0, 1], how well what is seen is what is asked; mode: see CompositionReward."""
    import torch

    scores = []
    for row, wanted in enumerate(asked):
        parts = [_CHECKS[check](world, reading, row, wanted, mode == "graded") for check in checks]
        judged = [part for part in parts if part is not None]
        if mode == "exact":
            scores.append(float(all(part == 1.0 for part in judged)))
        else:
            scores.append(sum(judged) / len(judged) if judged else 1.0)
    return torch.tensor(scores, dtype=torch.float32)


def _kind(world: World, reading: Reading, row: int, wanted: Mapping[str, Any], graded: bool) -> float | None:
    """All figures are the digit, or the shape; graded: the mean of their probabilities of it."""
    if world.figure not in wanted:
        return None
    probability_nD = reading.probability_BKD[row][reading.figures_BK[row]]
    if not len(probability_nD):
        return 0.0
    kind = list(world.words).index(wanted[world.figure])
    if graded:
        return float(probability_nD[:, kind].mean())
    told = (probability_nD.argmax(dim=1) == kind) & (probability_nD[:, kind] > 0.0)
    return float(bool(told.all()))


def _colour(world: World, reading: Reading, row: int, wanted: Mapping[str, Any], graded: bool) -> float | None:
    """Ink of all figures, and paper; graded: how near they are, not below 0."""
    seen = {"ink": reading.ink_BKS[row][reading.figures_BK[row]], "paper": reading.paper_BS[row : row + 1]}
    parts = []
    for name in ("ink", "paper"):
        if name in wanted:
            shade, near_nS = list(world.shades).index(wanted[name]), seen[name]
            rated_n = near_nS[:, shade].clamp_min(0.0) if graded else (near_nS.argmax(dim=1) == shade).float()
            rated = rated_n.tolist() or [0.0]
            parts.append(sum(rated) / len(rated) if graded else min(rated))
    if not parts:
        return None
    return sum(parts) / len(parts) if graded else min(parts)


def _count(world: World, reading: Reading, row: int, wanted: Mapping[str, Any], graded: bool) -> float | None:
    """The number of figures; graded: 1 / (1 + how many too many or too few)."""
    if "count" not in wanted:
        return None
    wrong = abs(int(reading.figures_BK[row].sum()) - wanted["count"])
    return 1.0 / (1 + wrong) if graded else float(wrong == 0)


def _position(world: World, reading: Reading, row: int, wanted: Mapping[str, Any], graded: bool) -> float | None:
    """A figure at the place and none elsewhere; graded: the share of the ink that lies there."""
    if "place" not in wanted:
        return None
    there_K, mass_K = reading.place_BK[row] == list(world.places).index(wanted["place"]), reading.mass_BK[row]
    if graded:
        return float(mass_K[there_K].sum() / mass_K.sum().clamp_min(1e-6))
    figures_K = reading.figures_BK[row]
    return float(bool(figures_K[there_K].any()) and int(figures_K.sum()) == 1)


_CHECKS: dict[str, Callable[[World, Reading, int, Mapping[str, Any], bool], float | None]] = {
    "digit": _kind,
    "shape": _kind,
    "colour": _colour,
    "count": _count,
    "position": _position,
}
