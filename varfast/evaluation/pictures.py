"""The images of an evaluation, as files: one by one, in an archive, and side by side."""

from __future__ import annotations

import errno
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from varfast.evaluation.folder import EvaluationFolder
from varfast.evaluation.plan import Images, Plan
from varfast.files import write_atomically
from varfast.runs.pictures import GAP_PX, headings, image_grid, save_picture
from varfast.types import InputError

_GAP_PX = 6 * GAP_PX  # between two models


def save_pngs(folder: Path, levels: np.ndarray, plan: Plan, chunk: list[int]) -> None:
    """A PNG for each image (N, H, W, 3) of a chunk, LABEL_SAMPLE.png. Raises: InputError if the disk does not let it.

    Not atomic: the chunk's own file is written afterwards, and until then all its images count as missing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.is_symlink():
            raise OSError(errno.ELOOP, "it is a link")
        for picture, index in zip(levels, chunk, strict=True):
            path = folder / f"{plan.label(index):04d}_{plan.sample(index):04d}.png"
            path.unlink(missing_ok=True)  # a link would be followed, and its target overwritten
            with path.open("xb") as file:
                Image.fromarray(picture).save(file, format="PNG")
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}; free space there and go on") from error


def save_npz(folder: EvaluationFolder, name: str, plan: Plan) -> None:
    """images_<name>.npz: arr_0 and labels, as ADM's evaluator reads a batch of samples: uint8 (N, H, W, 3), not packed.

    Written chunk by chunk, since all images at once may not fit in memory.
    """

    def write(file: Any) -> None:
        with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                for number in range(len(plan.chunks)):
                    levels = folder.levels(name, number, plan, whole=True)
                    if number == 0:
                        shape = (len(plan.labels), *levels.shape[1:])
                        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(levels.tobytes())
            with archive.open("labels.npy", "w") as member:
                np.lib.format.write_array(member, np.array(plan.labels))

    write_atomically(folder.path / f"images_{name}.npz", write)


def save_pictures(
    folder: EvaluationFolder, sets: Sequence[Images], plan: Plan, titles: Sequence[str]
) -> dict[str, Any]:
    """pictures.png: a row for each label; images of the models, and of several guidances, side by side, from the same
    seeds, each model under its name.

    Args:
        titles: of the rows, plan.picture_labels.
    Returns: what the picture shows, for evaluation.json.
    """
    grids: list[np.ndarray] = []
    above: list[tuple[int, int, str]] = []
    left_px = 0
    for each in sets:
        images = _shown_images(folder, each.name, plan)
        cells = [images[plan.index(label, s)] for label in plan.picture_labels for s in plan.picture_samples]
        pixels = torch.from_numpy(np.stack(cells)).permute(0, 3, 1, 2).float() / 255.0
        bare_px = image_grid(pixels, len(plan.picture_samples)).shape[1]
        grid = image_grid(pixels, len(plan.picture_samples), titles if not grids else ())
        grids += [grid, np.full((len(grid), _GAP_PX, 3), 255, np.uint8)]
        left_px += grid.shape[1]
        above.append((left_px - bare_px, bare_px, each.name.replace("_cfg_", ", cfg ")))
        left_px += _GAP_PX
    page = np.concatenate(grids[:-1], axis=1)
    page = np.concatenate([headings(above, page.shape[1]), page])
    save_picture(folder.path / "pictures.png", page)
    return {
        "file": "pictures.png",
        "rows": plan.picture_labels,
        "columns": [{"of": each.name, "sample": sample} for each in sets for sample in plan.picture_samples],
    }


def _shown_images(folder: EvaluationFolder, name: str, plan: Plan) -> dict[int, np.ndarray]:
    """The images (H, W, 3) that the picture shows, by index."""
    images: dict[int, np.ndarray] = {}
    for number, chunk in enumerate(plan.chunks):
        shown = [index for index in chunk if plan.shown(index)]
        if shown:
            levels = folder.levels(name, number, plan)
            kept = chunk if len(levels) == len(chunk) else shown
            images |= {index: levels[row] for row, index in enumerate(kept) if plan.shown(index)}
    return images
