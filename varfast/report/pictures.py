"""The pictures of a run folder, checked, as data: URIs for the attribute src."""

from __future__ import annotations

import base64
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from varfast.report.reading import PICTURE_BYTES, Samples, Unreadable, read_bytes, read_json, validated
from varfast.runs.pictures import GAP_PX

# A run of 40 000 steps has 400 grids of 8 MB. At most so many are shown, as JPEG and at most so wide.
_GRIDS = 24
_WIDEST_PX = 1024
_AS_IT_IS_BYTES = 200_000
# A grid of 8 x 8 images with 256 pixels a side has 4.3 million pixels.
_MOST_PIXELS = 50_000_000
# What Pillow raises for damaged PNGs.
_PICTURE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    MemoryError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True)
class Grid:
    """A sample grid.

    Attributes:
        step: after which it was sampled.
        uri: the picture, as the value of src.
        width, height: in pixels.
    """

    step: int
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Extremes:
    """Best and worst samples of a step.

    Attributes:
        step: whose.
        samples: their labels and rewards, from samples/step_N.json.
        uris: for "best" and "worst", a data: URI for each image.
    """

    step: int
    samples: Samples
    uris: dict[str, list[str]]


def read_picture(folder: Path, name: str) -> tuple[Image.Image, bytes]:
    """A PNG of a run folder, decoded, and its bytes. Raises: FileNotFoundError; Unreadable."""
    content = read_bytes(folder, name, PICTURE_BYTES)
    with _decoding():
        # Only PNG: some of Pillow's other formats run programs (EPS), and the rare ones are less tested.
        picture = Image.open(io.BytesIO(content), formats=("PNG",))
        width, height = picture.size
        if width * height > _MOST_PIXELS:
            raise Unreadable(f"{width} x {height} pixels, more than {_MOST_PIXELS / 1e6:.0f} million")
        picture.load()
    return picture, content


@contextmanager
def _decoding() -> Iterator[None]:
    """Around the decoding of a picture: turn whatever Pillow raises into Unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except _PICTURE_ERRORS as error:
        raise Unreadable(f"no picture ({type(error).__name__})") from error


def picture_uri(folder: Path, name: str) -> tuple[str, tuple[int, int]]:
    """A PNG of a run folder as a data: URI, and its width and height. Raises: as read_picture."""
    picture, content = read_picture(folder, name)
    with _decoding():
        return data_uri(picture, content), picture.size


def data_uri(picture: Image.Image, content: bytes | None = None) -> str:
    """A picture as a data: URI: the PNG `content` itself if it is small, else a JPEG at most 1024 pixels wide."""
    kind = "png"
    if content is None and picture.width <= 128:
        content = _encoded(picture, "PNG")
    if content is None or len(content) > _AS_IT_IS_BYTES:
        picture = picture.convert("RGB")
        picture.thumbnail((_WIDEST_PX, 100_000))
        kind, content = "jpeg", _encoded(picture, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _encoded(picture: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def _steps(folder: Path, suffix: str, leave_out: Callable[[str, object], None]) -> list[tuple[int, str]]:
    """Steps and names of the files step_<number><suffix> in a folder, ascending."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        leave_out(folder.name, error.strerror)
        return []
    found = []
    for name in names:
        number = name.removeprefix("step_").removesuffix(suffix)
        if name == f"step_{number}{suffix}" and number.isascii() and number.isdecimal() and len(number) <= 12:
            found.append((int(number), name))
    return sorted(found)


def read_grids(folder: Path, leave_out: Callable[[str, object], None]) -> tuple[list[Grid], int]:
    """At most 24 of the sample grids, including the first and the last, and how many there are in all."""
    found = _steps(folder / "grids", ".png", leave_out)
    grids = []
    for index in sorted({round(i * (len(found) - 1) / (_GRIDS - 1)) for i in range(_GRIDS)}) if found else []:
        step, name = found[index]
        try:
            uri, size = picture_uri(folder, f"grids/{name}")
            grids.append(Grid(step, uri, *size))
        except (Unreadable, FileNotFoundError) as error:
            leave_out(f"grids/{name}", error)
    return grids, len(found)


def read_extremes(folder: Path, leave_out: Callable[[str, object], None]) -> Extremes | None:
    """Best and worst samples of the last step for which both files can be used."""
    for step, name in reversed(_steps(folder / "samples", ".json", leave_out)[-100:]):
        try:
            found = validated(Samples, read_json(folder, f"samples/{name}"))
            picture, _ = read_picture(folder, f"samples/{name.removesuffix('.json')}.png")
            with _decoding():
                return Extremes(step, found, _cut(found, picture))
        except (Unreadable, FileNotFoundError) as error:  # one file is missing if the run was killed between the two
            leave_out(f"samples/{name}", error)
    return None


def _cut(found: Samples, picture: Image.Image) -> dict[str, list[str]]:
    columns = max(len(found.best), len(found.worst))
    width, height = (picture.width + GAP_PX) // columns, (picture.height + GAP_PX) // 2
    if width <= GAP_PX or height <= GAP_PX:
        raise Unreadable(f"a picture of {picture.width} x {picture.height} pixels for 2 rows of {columns} samples")
    uris: dict[str, list[str]] = {}
    for row, (title, samples) in enumerate((("best", found.best), ("worst", found.worst))):
        for column in range(len(samples)):
            left, top = column * width, row * height
            cell = picture.crop((left, top, left + width - GAP_PX, top + height - GAP_PX))
            uris.setdefault(title, []).append(data_uri(cell))
    return uris
