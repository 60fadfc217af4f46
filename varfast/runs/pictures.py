"""Pictures for people: grids of samples with titles, the best and worst of a step, and files in several formats.

Axes: N, B image; H, W pixels.
"""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from varfast.data.prompts import PromptSet, drawn
from varfast.evaluation.config import PICTURE_FORMATS
from varfast.files import write_atomically
from varfast.policies.checks import check_images
from varfast.types import InputError, Rewards

# Small images are enlarged by repetition, so that a grid of digits can be looked at.
_SMALLEST_CELL_PX = 48
GAP_PX = 4
_TITLE_PX = 14
_TITLE_LETTERS = 28
# Height of a line of a title, and the most lines: a prompt of 168 letters is shown whole where the images are tall.
_LINE_PX = 17
_TITLE_LINES = 6
HEADING_PX = 24
# Best and worst images of a step that are kept: at 256 pixels a side, two rows of 8 are a PNG of 2 MB.
_EXTREMES = 8


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) images in [0, 1], as `policy.decode` gives them -> B pictures of Pillow, rounded to 8 bits.

    Raises: InputError for another shape, whole numbers, or numbers outside [0, 1].
    """
    _check(images)
    pixels = images.detach().float().mul(255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


def picture(images: Tensor, columns: int = 8, titles: Sequence[str] = ()) -> Image.Image:
    """(B, 3, H, W) images in [0, 1] as one picture of Pillow, which a notebook shows: row by row, small ones enlarged.

    Args:
        titles: one for each row, written beside it.
    Raises: InputError as to_pil.
    """
    _check(images)
    return Image.fromarray(image_grid(images, min(columns, len(images)), titles))


def _check(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise InputError(f"images are {tuple(images.shape)}, want (B, 3, H, W); of one image: images[None]")
    check_images(images)


def image_grid(images: Tensor, columns: int, titles: Sequence[str] = ()) -> np.ndarray:
    """Images (N, 3, H, W) in [0, 1], laid out row by row with white gaps -> picture (height, width, 3) uint8.

    Args:
        titles: one for each row, drawn in a white column left of the images; of several lines (prompt_title), as many
            as the row is high.
    """
    enlarge = max(1, math.ceil(_SMALLEST_CELL_PX / images.shape[-1]))
    images = images.detach().float().cpu().repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    images = F.pad(images, (0, GAP_PX, 0, GAP_PX), value=1.0)
    num, _, height, width = images.shape
    rows = math.ceil(num / columns)
    cells = torch.ones(rows * columns, 3, height, width)
    cells[:num] = images
    picture = cells.view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2).reshape(rows * height, -1, 3)
    pixels: np.ndarray = picture[:-GAP_PX, :-GAP_PX].mul(255.0).round().clamp(0, 255).to(torch.uint8).numpy()
    return np.concatenate([_row_titles(titles, len(pixels), height), pixels], axis=1) if titles else pixels


def prompt_title(prompt: str) -> str:
    """A prompt as a title: lines of at most 28 letters, of which image_grid shows as many as a row has space for."""
    return "\n".join(textwrap.wrap(_ascii(" ".join(prompt.split())), _TITLE_LETTERS)) or " "


def with_domain(prompt: str, domain: str) -> str:
    """A prompt, after its domain where that is one that is not trained on: "(held out) a red cube"."""
    return f"({domain.replace('_', ' ')}) {prompt}" if domain in ("held_out", "out_of_domain") else prompt


def shown_prompts(prompts: PromptSet, rows: int, seed: int) -> tuple[list[int], list[str]]:
    """Ids of the prompts of a grid, which the seed chooses from each domain, as evenly as goes, and their texts, with
    the domain where it is not that of training.

    Args:
        rows: at most so many; those that are left over by others go to the prompts that are trained on.
    """
    others = [domain for domain in prompts.domains if domain != "train"][: max(0, rows - 1)]
    each = rows // (len(others) + 1)
    found = {domain: drawn(prompts.ids(domain), each, seed) for domain in others}
    trained = drawn(prompts.ids("train"), rows - sum(map(len, found.values())), seed)
    texts = [prompts.prompts[row].text for row in trained]
    for domain, ids in found.items():
        texts += [with_domain(prompts.prompts[row].text, domain) for row in ids]
    return [*trained, *(row for ids in found.values() for row in ids)], texts


def _row_titles(titles: Sequence[str], height_px: int, row_px: int) -> np.ndarray:
    """A white column, as wide as the longest title, with each title vertically centred in its row."""
    font = ImageFont.load_default(_TITLE_PX)
    shown = [_lines(title, (row_px - GAP_PX) // _LINE_PX) for title in titles]
    width_px = max(math.ceil(font.getlength(line)) for lines in shown for line in lines) + 2 * GAP_PX
    column = Image.new("RGB", (width_px, height_px), "white")
    draw = ImageDraw.Draw(column)
    for row, lines in enumerate(shown):
        middle_px = row * row_px + (row_px - GAP_PX) // 2
        for place, line in enumerate(lines):
            offset_px = round((place - (len(lines) - 1) / 2) * _LINE_PX)
            draw.text((width_px - 2 * GAP_PX, middle_px + offset_px), line, fill="black", font=font, anchor="rm")
    return np.asarray(column)


def headings(texts: Sequence[tuple[int, int, str]], width_px: int) -> np.ndarray:
    """A white row of HEADING_PX above grids: (left, width, text) each, cut off where the width ends."""
    font = ImageFont.load_default(_TITLE_PX)
    row = Image.new("RGB", (width_px, HEADING_PX), "white")
    for left_px, space_px, text in texts:
        shown = _ascii(text)
        while shown and font.getlength(shown) > space_px:
            shown = shown[:-1]
        ImageDraw.Draw(row).text((left_px, HEADING_PX // 2), shown, fill="black", font=font, anchor="lm")
    return np.asarray(row)


def _lines(title: str, space: int) -> list[str]:
    """The lines of a title that are drawn. space: how many fit; what is left out is marked by "..", as a long line's
    end is."""
    most = max(1, min(space, _TITLE_LINES))
    lines = [_ascii(line) for line in title.split("\n")]
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][: _TITLE_LETTERS - 2] + ".."]
    return [line if len(line) <= _TITLE_LETTERS else line[: _TITLE_LETTERS - 2] + ".." for line in lines]


def _ascii(title: str) -> str:
    """A title in ASCII, which is all that Pillow's own font can draw: accents are dropped, other letters become "?"."""
    letters = (c for c in unicodedata.normalize("NFKD", title) if not unicodedata.combining(c))
    return "".join(letters).encode("ascii", "replace").decode()


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write an (H, W, 3) uint8 picture in the format of its suffix, one of PICTURE_FORMATS.

    Raises: InputError if it cannot be written.
    """
    kind = PICTURE_FORMATS[path.suffix.lower()]
    settings_of: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    settings = settings_of.get(kind, {})
    write_atomically(path, lambda file: Image.fromarray(picture).save(file, format=kind, **settings))


def extremes(labels_B: Tensor, rewards: Rewards) -> tuple[Tensor, dict[str, Any]]:
    """At most 8 of the best and 8 of the worst images of a step, of as many labels as possible where rewards tie.

    Returns: (2, n) indices of images, the best first and then the worst first; content of samples/step_N.json, which
        RunLog.samples describes.
    """
    count = min(_EXTREMES, len(labels_B))
    best_B = _ranked(rewards.total_B, labels_B)
    worst_B = _ranked(-rewards.total_B.flip(0), labels_B.flip(0))
    chosen = {"best": best_B[:count], "worst": len(labels_B) - 1 - worst_B[:count]}
    notes: dict[str, Any] = {
        name: [
            {
                "label": int(labels_B[i]),
                "reward": float(rewards.total_B[i]),
                "rewards": {component: float(score_B[i]) for component, score_B in rewards.components.items()},
            }
            for i in rows_n.tolist()
        ]
        for name, rows_n in chosen.items()
    }
    total_B = rewards.total_B
    notes["ties"] = {name: int((total_B == total_B[rows_n[0]]).sum()) for name, rows_n in chosen.items()}
    notes["images"] = len(labels_B)
    return torch.stack(list(chosen.values())), notes


def _ranked(rewards_B: Tensor, labels_B: Tensor) -> Tensor:
    """(B,) indices by descending reward; among equal ones, the first image of each label, then the second of each."""
    turns: Counter[tuple[float, int]] = Counter()
    keys = []
    for row, (reward, label) in enumerate(zip(rewards_B.tolist(), labels_B.tolist(), strict=True)):
        keys.append((-reward, turns[reward, label], row))
        turns[reward, label] += 1
    return torch.tensor([row for *_, row in sorted(keys)])
