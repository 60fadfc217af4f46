"""Measure a model, and what fine-tuning changed: scores, accuracy, FID and its kin, pictures side by side.

    python -m varfast.evaluate checkpoint=runs/digits fid_reference=digits
    python -m varfast.evaluate checkpoint=runs/aesthetic classifier=resnet50 fid_reference=imagenet/val save=png
    torchrun --nproc-per-node 8 -m varfast.evaluate checkpoint=...

Every image is a function of (seed, label, number of the sample): the same whatever else is sampled, and with the same
random numbers for both models. Images are measured in chunks, each a file of the out folder; processes share them out,
and what is there is not sampled again.

Axes: B image of a chunk, N image, D feature, K class; H, W pixels.
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a typo are answered before the imports below, which take 6 s
    from varfast.command import run_command

    run_command("evaluate")

import errno
import hashlib
import json
import math
import re
import shlex
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varfast.data.datasets import DigitsClassifier
from varfast.data.labels import caption, label_names, label_numbers, label_pool, run_names
from varfast.distributed import launched
from varfast.evaluation.config import EvaluateConfig
from varfast.evaluation.features import Network, RealImages, check_reference, load_network, load_real_images, to_levels
from varfast.evaluation.metrics import (
    NEIGHBOUR_IMAGES,
    NEIGHBOURS,
    Estimate,
    difference_interval,
    diversity,
    fid,
    inception_score,
    mean_interval,
    neighbours,
    statistics,
)
from varfast.files import open_regular, parse_json, read_bytes, save_text, write_atomically
from varfast.policies.var.policy import Policy, check_finite, pick_device
from varfast.policies.var.weights import resolve
from varfast.printable import printable
from varfast.progress import Progress
from varfast.randomness import EVAL_STEP
from varfast.rewards import RewardConfig, WeightedSum
from varfast.rewards.classifier import ClassifierConfig, Confidence
from varfast.runs.base import Base
from varfast.runs.environment import environment
from varfast.runs.folder import RunFolder
from varfast.runs.pictures import GAP_PX, image_grid, save_picture
from varfast.sample import load
from varfast.settings.loading import parse_arguments
from varfast.train import load_base
from varfast.types import InputError

Numbers = dict[str, np.ndarray]

BASE = "base"
_CHUNK_IMAGES = 128
_PICTURE_LABELS, _PICTURE_SAMPLES = 8, 4
# Arguments that the chunks do not depend on.
_FREE_TO_CHANGE = ("out", "micro_batch", "device", "fid_reference", "inception_weights")
# What zipfile, zlib and the checks of a chunk raise for a file that is no such archive.
_ARCHIVE_ERRORS = (
    OSError, ValueError, EOFError, RuntimeError, ArithmeticError, LookupError, struct.error, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip
# Where weights are; which they are is noted in every chunk. A run folder that was moved goes on with its evaluation.
_PLACES = ("checkpoint", "reference", "vqvae")
# A process that has written nothing for so long is taken for dead.
_PATIENCE_S = 1800.0
_INTERVALS = (
    "95 %: normal over images, Wilson's for shares; of a difference, the same over images paired by label and seed, "
    "Bonett and Price's for shares; of diversity, over labels; none for FID, inception score and what compares "
    "neighbours"
)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: of the number.
        labels: "all", or those that the run was trained on ("seen"), or the others ("unseen").
        reference, checkpoint: of the two models; None without a reference.
        difference: checkpoint - reference.
    """

    name: str
    labels: str
    reference: Estimate | None
    checkpoint: Estimate
    difference: Estimate | None


# ---------------------------------------------------------------------------------------------------------------------
# What is measured of each image


class Judge:
    """Scores, ranks of the label and features of images.

    Raises: InputError for weights that cannot be had and libraries that are missing.
    """

    def __init__(self, config: EvaluateConfig, num_classes: int, device: torch.device) -> None:
        self._scores = WeightedSum(config.scores, device, num_classes, "scores") if config.scores else None
        self._ranks = _classifier(config.classifier, num_classes, device) if config.classifier else None
        self.network: Network | None = None
        if config.feature_network:
            self.network = load_network(config.feature_network, config.inception_weights, device)

    def __call__(self, images: Tensor, labels_B: Tensor) -> Numbers:
        """(B, 3, H, W) in [0, 1] -> arrays of B rows by name: score/<name>, top1, top5, features, logits."""
        numbers: Numbers = {}
        if self._scores is not None:
            components = self._scores(images, labels_B).components
            numbers |= {f"score/{name}": score_B.cpu().numpy() for name, score_B in components.items()}
        if self._ranks is not None:
            ranks_B = self._ranks(images, labels_B).cpu().numpy()
            numbers |= {"top1": ranks_B < 1, "top5": ranks_B < 5}
        if self.network is not None:
            numbers["features"], numbers["logits"] = self.network(to_levels(images))
        return numbers


def _columns(config: EvaluateConfig) -> list[str]:
    """Names of the numbers that a Judge gives of each image."""
    columns = [f"score/{name}" for name in config.scores]
    columns += ["top1", "top5"] if config.classifier else []
    return columns + (["features", "logits"] if config.feature_network else [])


def _classifier(config: ClassifierConfig, num_classes: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    if config.model == "digits":
        if num_classes != 10:
            raise InputError(f"classifier=digits tells 10 classes apart, the policy has {num_classes} labels")
        return DigitsClassifier().ranks
    return Confidence(
        config.model, config.weights, config.file, device, config.batch_size, num_classes, "classifier"
    ).ranks


# ---------------------------------------------------------------------------------------------------------------------
# Sampling in chunks


class Plan:
    """Which images are sampled, in which chunks.

    Image number s of label l has the index s * num_classes + l: a function of the two alone, and consecutive for all
    labels, so that they fill batches.

    Attributes:
        num_classes: labels that the model has.
        chunks: indices of each chunk.
        picture_labels, picture_samples: of the images that are shown.
    """

    def __init__(self, labels: list[int], samples_per_label: int, num_classes: int) -> None:
        self.num_classes = num_classes
        indices = [self.index(label, sample) for sample in range(samples_per_label) for label in labels]
        self.chunks = [indices[i : i + _CHUNK_IMAGES] for i in range(0, len(indices), _CHUNK_IMAGES)]
        shown = min(_PICTURE_LABELS, len(labels))
        self.picture_labels = [labels[i * len(labels) // shown] for i in range(shown)]
        self.picture_samples = list(range(min(_PICTURE_SAMPLES, samples_per_label)))

    def index(self, label: int, sample: int) -> int:
        return sample * self.num_classes + label

    def label(self, index: int) -> int:
        return index % self.num_classes

    def sample(self, index: int) -> int:
        return index // self.num_classes

    def shown(self, index: int) -> bool:
        return self.label(index) in self.picture_labels and self.sample(index) in self.picture_samples

    def runs(self, chunk: list[int], most: int) -> Iterator[list[int]]:
        """Consecutive indices, at most so many at a time."""
        breaks = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(chunk)) if b != a + 1), len(chunk)]
        for first, end in pairwise(breaks):
            for start in range(first, end, most):
                yield chunk[start : min(start + most, end)]


def sample_chunk(policy: Policy, plan: Plan, chunk: list[int], config: EvaluateConfig) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [0, 1] and labels (B,) of a chunk."""
    parts = []
    for run in plan.runs(chunk, config.micro_batch):
        rollout, images = policy.sample_images(
            [plan.label(index) for index in run],
            config.temperature,
            seed=config.seed,
            cfg=config.cfg,
            top_k=config.top_k,
            top_p=config.top_p,
            step=EVAL_STEP,
            first_sample=run[0],
        )
        check_finite(rollout, images)
        parts.append(images)
    return torch.cat(parts), torch.tensor([plan.label(index) for index in chunk], device=policy.device)


class EvaluationFolder:
    """The files of an evaluation. What is read back from it is looked at with care: somebody may have handed it on.

    Attributes:
        path: the folder.
        columns: names of what a chunk holds of each image, as Judge names them.
        image_size: of the images, pixels a side.
    """

    def __init__(self, path: str | Path, columns: Iterable[str] = (), image_size: int = 0) -> None:
        self.path = Path(path).expanduser()
        self.columns = list(columns)
        self.image_size = image_size

    def prepare(self, settings: dict[str, Any], rank: int) -> None:
        """Note the settings, a file a process. Raises: InputError if others are noted there, or something else is."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = sorted(p.name for p in self.path.iterdir())
        except OSError as error:
            raise InputError(f"out={self.path} cannot be used: {error.strerror}; choose another folder") from error
        noted = [name for name in names if name.startswith("settings_")]
        if names and not noted:
            raise InputError(f"out={self.path} holds other files and no evaluation; choose another folder")
        for name in names:
            if (self.path / name).is_symlink():
                raise InputError(f"out={self.path}: {printable(name)} is a link, through which other files would be "
                                 "written; delete it, or choose another folder")  # fmt: skip
        for name in noted:
            if name.endswith(".json"):
                _refuse_other_settings(self.path, _read_settings(self.path / name), settings)
        save_text(self.path / f"settings_{rank}.json", json.dumps(settings, indent=2) + "\n")

    def chunk(self, side: str, number: int) -> Path:
        return self.path / "chunks" / f"{side}_{number:05d}.npz"

    def weights(self, side: str, number: int) -> str:
        """The hash of the weights that a chunk is of. Raises: InputError if it cannot be read."""
        return str(self._read(side, number, ["weights"])["weights"])

    def levels(self, side: str, number: int, plan: Plan, whole: bool = False) -> np.ndarray:
        """The images of a chunk that are kept: all, or those of the picture. Raises: InputError as weights."""
        chunk = plan.chunks[number]
        levels = self._read(side, number, ["levels"])["levels"]
        counts = (len(chunk),) if whole else (len(chunk), sum(plan.shown(index) for index in chunk))
        if levels.dtype != np.uint8 or levels.shape[1:] != (self.image_size, self.image_size, 3):
            self._refuse(side, number, f"its images are {levels.dtype} {levels.shape}")
        if len(levels) not in counts:
            self._refuse(side, number, f"it holds {len(levels)} images")
        return levels

    def gather(self, side: str, plan: Plan) -> Numbers:
        """The arrays of all chunks but the images, in the order of the plan. Raises: InputError as weights."""
        parts: list[Numbers] = []
        for number, chunk in enumerate(plan.chunks):
            part = self._read(side, number, self.columns)
            for name, array in part.items():
                wanted = (len(chunk), *(parts[0][name].shape[1:] if parts else array.shape[1:]))
                axes, kind = (
                    (2, "f") if name in ("features", "logits") else (1, "b" if name in ("top1", "top5") else "f")
                )
                if array.ndim != axes or array.shape != wanted or array.dtype.kind != kind:
                    self._refuse(side, number, f"{printable(name)} is {array.dtype} {array.shape}")
                if kind == "f" and not np.isfinite(array).all():
                    self._refuse(side, number, f"{printable(name)} holds numbers that are not finite")
            parts.append(part)
        return {name: np.concatenate([part[name] for part in parts]) for name in self.columns}

    def _read(self, side: str, number: int, names: list[str]) -> Numbers:
        path = self.chunk(side, number)
        try:
            with open_regular(path, follow=False) as file, zipfile.ZipFile(file) as archive:
                return {name: _read_array(archive, name) for name in names}
        except _ARCHIVE_ERRORS as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else printable(error)
            self._refuse(side, number, reason or type(error).__name__)

    def _refuse(self, side: str, number: int, reason: str) -> NoReturn:
        raise InputError(f"{self.chunk(side, number)} cannot be read ({reason}); delete it and run the command again")


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array as numpy.savez wrote it. By hand: NumPy evaluates the header, and makes room for what it promises."""
    members = [member for member in archive.infolist() if member.filename == f"{name}.npy"]
    if len(members) != 1:
        raise ValueError(f"it holds {name} {len(members)} times")
    if members[0].compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which no chunk is")
    with archive.open(members[0]) as member:
        content = member.read()
    header = re.match(rb"\x93NUMPY\x01\x00..\{'descr': '([<|][biufU]\d{1,3})', 'fortran_order': False, 'shape': "
                      rb"\(([\d, ]{0,80})\), \} *\n", content[:1000], re.S)  # fmt: skip
    if header is None:
        raise ValueError(f"{name} is no array of numbers")
    dtype = np.dtype(header[1].decode())
    shape = tuple(int(side) for side in header[2].split(b",") if side.strip())
    if math.prod(shape) * dtype.itemsize != len(content) - header.end():
        raise ValueError(f"{name} is {len(content) - header.end()} bytes for {dtype} {shape}")
    return np.frombuffer(content, dtype, offset=header.end()).reshape(shape)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = parse_json(read_bytes(path))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else printable(error)
        raise InputError(f"{path} cannot be read ({reason}); delete it and run the command again") from error
    return settings


def _refuse_other_settings(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    names = [*there, *(name for name in here if name not in there)]
    differences = [
        f"  {printable(name)}: {printable(there.get(name))} there, {printable(here.get(name))} here"
        for name in names
        if there.get(name) != here.get(name) and not (name in _PLACES and there.get(name) and here.get(name))
    ]
    if differences:
        raise InputError(
            "\n".join([f"out={folder} holds an evaluation with other settings:", *differences[:40]])
            + "\n  choose another folder, or take these back"
        )


def sample_side(
    side: str,
    policy: Policy,
    judge: Judge,
    plan: Plan,
    config: EvaluateConfig,
    folder: EvaluationFolder,
    rank: int,
    world: int,
) -> None:
    """Sample and measure this process's share of the chunks that are not there yet.

    Raises: InputError if chunks of other weights are there.
    """
    weights = _weights_hash(policy)
    todo = []
    for number in range(rank, len(plan.chunks), world):
        if not folder.chunk(side, number).exists():
            todo.append(number)
        elif folder.weights(side, number) != weights:
            raise InputError(
                f"{folder.chunk(side, number)} holds images of other weights than {side} has now; choose another out "
                "folder, or delete this one"
            )
    progress = Progress(side, len(todo), unit="chunk", quiet=rank != 0)
    for number in todo:
        chunk = plan.chunks[number]
        images, labels_B = sample_chunk(policy, plan, chunk, config)
        numbers = judge(images, labels_B)
        levels = to_levels(images).permute(0, 2, 3, 1).cpu().numpy()
        if config.save == "png":
            _save_pngs(folder.path / "images" / side, levels, plan, chunk)
        kept = [row for row, index in enumerate(chunk) if config.save == "npz" or plan.shown(index)]
        arrays = {**numbers, "levels": levels[kept], "weights": np.array(weights)}
        arrays = {name: np.ascontiguousarray(array) if array.ndim else array for name, array in arrays.items()}
        write_atomically(folder.chunk(side, number), lambda file, arrays=arrays: np.savez(file, **arrays))  # type: ignore[misc]
        progress.update()
    progress.close()


def _weights_hash(policy: Policy) -> str:
    digest = hashlib.sha256()
    for model in (policy.var, policy.vqvae):
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _save_pngs(folder: Path, levels: np.ndarray, plan: Plan, chunk: list[int]) -> None:
    # Not atomically: until the chunk is written, after them, all of them count as missing.
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


def _save_npz(folder: EvaluationFolder, side: str, plan: Plan) -> None:
    """images_<side>.npz: arr_0 and labels, chunk by chunk, since all images at once may not fit in memory."""
    images = sum(len(chunk) for chunk in plan.chunks)

    def write(file: Any) -> None:
        with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                for number in range(len(plan.chunks)):
                    levels = folder.levels(side, number, plan, whole=True)
                    if number == 0:
                        header = {"descr": "|u1", "fortran_order": False, "shape": (images, *levels.shape[1:])}
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(levels.tobytes())
            with archive.open("labels.npy", "w") as member:
                np.lib.format.write_array(member, np.array([plan.label(i) for chunk in plan.chunks for i in chunk]))

    write_atomically(folder.path / f"images_{side}.npz", write)


def _wait(folder: EvaluationFolder, sides: list[str], plan: Plan) -> None:
    """Until the other processes' chunks are there. Raises: InputError if none has come for half an hour."""
    all_chunks = [folder.chunk(side, number) for side in sides for number in range(len(plan.chunks))]
    missing, since = len(all_chunks) + 1, time.monotonic()
    while left := [path for path in all_chunks if not path.exists()]:
        if len(left) < missing:
            print(f"waiting for {len(left)} chunks of other processes")
            missing, since = len(left), time.monotonic()
        if time.monotonic() - since > _PATIENCE_S:
            raise InputError(
                f"{len(left)} chunks of other processes are missing, {left[0].name} first, and none has come for "
                f"{_PATIENCE_S:.0f} s. Run the same command again: what is there is kept"
            )
        time.sleep(0.5)


# ---------------------------------------------------------------------------------------------------------------------
# From numbers to the table


def tabulate(
    reference: Numbers | None, checkpoint: Numbers, labels_N: np.ndarray, seen: set[int] | None, real: RealImages | None
) -> list[Row]:
    """The table of two models' numbers, or of one's.

    Args:
        reference, checkpoint: arrays of N rows by name, as Judge names them, image by image the same label and seed.
        labels_N: of the images.
        seen: labels that the run was trained on, where it was not all: their rows are given apart.
        real: what features are compared with.
    """
    groups = {"all": np.ones(len(labels_N), dtype=bool)}
    if seen is not None:
        is_seen_N = np.isin(labels_N, sorted(seen))
        groups |= {name: rows_N for name, rows_N in (("seen", is_seen_N), ("unseen", ~is_seen_N)) if rows_N.any()}
    rows = []
    for name in [n for n in checkpoint if n.startswith("score/") or n in ("top1", "top5")]:
        for group, rows_N in groups.items():
            values = [None if side is None else side[name][rows_N] for side in (reference, checkpoint)]
            rows.append(_paired_row(name, group, *values))
    if "features" in checkpoint:
        spread = [None if side is None else diversity(side["features"], labels_N) for side in (reference, checkpoint)]
        if spread[1] is not None and len(spread[1]):
            rows.append(_paired_row("diversity", "all", *spread))
        before = _of_the_set(reference, real) if reference is not None else None
        for name, value in _of_the_set(checkpoint, real).items():
            old = None if before is None else Estimate(before[name])
            rows.append(Row(name, "all", old, Estimate(value), old and Estimate(value - old.value)))
    return rows


def _paired_row(name: str, group: str, before: np.ndarray | None, after: np.ndarray | None) -> Row:
    assert after is not None
    if before is None:
        return Row(name, group, None, mean_interval(after), None)
    return Row(name, group, mean_interval(before), mean_interval(after), difference_interval(before, after))


def _of_the_set(numbers: Numbers, real: RealImages | None) -> dict[str, float]:
    found = {"inception_score": inception_score(numbers["logits"])}
    if real is not None:
        found["fid"] = fid(real.statistics, statistics(numbers["features"]))
        if real.features_MD is not None:
            found |= neighbours(real.features_MD, numbers["features"])
    return found


def table(rows: list[Row]) -> str:
    """Text: name, reference, checkpoint, difference, with intervals."""
    names = [printable(row.name if row.labels == "all" else f"{row.name}, {row.labels} labels") for row in rows]
    columns = [("", names), ("checkpoint", [_shown(row.checkpoint) for row in rows])]
    if any(row.reference for row in rows):
        columns.insert(1, ("reference", [_shown(row.reference) for row in rows]))
        columns.append(("difference", [_shown(row.difference, "+") for row in rows]))
    widths = [max(map(len, [heading, *cells])) for heading, cells in columns]
    lines = [[heading for heading, _ in columns], *zip(*(cells for _, cells in columns), strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _shown(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return ""
    text = f"{estimate.value:{sign}.4g}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{estimate.low:{sign}.4g}, {estimate.high:{sign}.4g}]"


def _about(result: dict[str, Any]) -> str:
    """What the table is of, in a few lines, from the content of evaluation.json."""
    lines = [f"{result['images']} images a model, of {result['labels']} labels."]
    if result["features"]:
        lines.append(
            f"Features: {result['features']}. FID falls as samples grow in number: compare equal numbers alone."
        )
    if result["real_images"]:
        lines.append(f"{result['real_images']} real images; {NEIGHBOURS} nearest neighbours.")
    return "\n".join([*lines, f"Intervals: {result['intervals']}."])


def _save_pictures(folder: EvaluationFolder, sides: list[str], plan: Plan, names: list[str] | None) -> dict[str, Any]:
    """pictures.png: a row a label; the reference's images, a gap, and the checkpoint's of the same seeds."""
    titles = [caption(label, names) for label in plan.picture_labels]
    images: dict[tuple[str, int], np.ndarray] = {}
    for side in sides:
        for number, chunk in enumerate(plan.chunks):
            if not any(plan.shown(index) for index in chunk):
                continue
            levels = folder.levels(side, number, plan)
            kept = chunk if len(levels) == len(chunk) else [index for index in chunk if plan.shown(index)]
            images |= {(side, index): levels[row] for row, index in enumerate(kept) if plan.shown(index)}
    columns = [(side, sample) for side in sides for sample in plan.picture_samples]
    grids: list[np.ndarray] = []
    for side in sides:
        cells = [images[side, plan.index(label, s)] for label in plan.picture_labels for s in plan.picture_samples]
        pixels = torch.from_numpy(np.stack(cells)).permute(0, 3, 1, 2).float() / 255.0
        grids.append(image_grid(pixels, len(plan.picture_samples), titles if not grids else ()))
        grids.append(np.full((len(grids[-1]), 6 * GAP_PX, 3), 255, np.uint8))
    save_picture(folder.path / "pictures.png", np.concatenate(grids[:-1], axis=1))
    return {
        "file": "pictures.png",
        "rows": plan.picture_labels,
        "columns": [{"of": side, "sample": sample} for side, sample in columns],
    }


# ---------------------------------------------------------------------------------------------------------------------
# The command


def resolved(config: EvaluateConfig, say: Callable[[str], object] = print) -> EvaluateConfig:
    """What the arguments leave open: the out folder, and from the run folder its base, its rewards, its classifier.

    Of its rewards, those that only compute on the images: what runs code, asks a server, or reads files by name counts
    when the arguments name it (docs/security.md).

    Args:
        say: told which rewards were left out.
    Raises: InputError if there is no such checkpoint.
    """
    checkpoint = Path(config.checkpoint).expanduser()
    if config.out is None:
        out = checkpoint / "evaluation" if checkpoint.is_dir() else Path("evaluation")
        config = config.model_copy(update={"out": str(out)})
    if not checkpoint.is_dir():
        if config.reference == BASE:
            raise InputError(
                f"reference={BASE}: checkpoint={config.checkpoint} is not a run folder; name the base's weights"
            )
        resolve(config.checkpoint)
    else:
        folder = RunFolder(config.checkpoint)
        run, given = folder.load_config(), config.model_fields_set
        found: dict[str, Any] = {} if "reference" in given else {"reference": BASE}
        if "scores" not in given:
            found["scores"] = {name: reward for name, reward in run.reward.items() if not reward.reaches_outside()}
            if len(found["scores"]) < len(run.reward):
                say(_left_out(folder, run.reward))
        if "classifier" not in given and run.eval.classifier is not None:
            found["classifier"] = ClassifierConfig(model=run.eval.classifier)
        if config.vqvae is None and run.policy.checkpoint != "random":
            found["vqvae"] = str(Base(folder).find("vqvae"))
        config = config.model_copy(update=found)
    if config.reference not in (None, BASE) and not Path(config.reference).expanduser().is_dir():
        resolve(config.reference)
    return config


def _left_out(folder: RunFolder, rewards: dict[str, RewardConfig]) -> str:
    """One line: what is not measured, why, and the argument that brings it back, ready for a shell."""
    outside = {name: reward.reaches_outside() for name, reward in rewards.items()}
    names = ", ".join(f"{printable(name, 80)} ({printable(why)})" for name, why in outside.items() if why)
    content = {name: reward.model_dump(mode="json", exclude_defaults=True) for name, reward in rewards.items()}
    argument = f"scores={json.dumps(content, ensure_ascii=False)}"
    fits = argument.isprintable() and len(argument) <= 1000
    override = shlex.quote(argument) if fits else "scores=..., with what you trust of the section reward there"
    return (
        f"left out of the scores, as {printable(folder.config)} names it and not the command line: {names}. If you "
        f"trust it, add {override}"
    )


def evaluate(config: EvaluateConfig, rank: int = 0, world: int = 1) -> list[Row]:
    """Sample, measure, and write evaluation.json, pictures.png and what `save` asks for into the out folder.

    Args:
        rank, world: this process among how many; each samples its share, process 0 waits for the others and makes the
            table.
    Returns: the table; empty for another process than 0.
    Raises: InputError for whatever cannot be used; what was sampled so far stays in the folder.
    """
    config = resolved(config, print if rank == 0 else _silent)
    device = pick_device(config.device)
    assert config.out is not None
    folder = EvaluationFolder(config.out)
    sides = {"reference": config.reference} if config.reference is not None else {}
    sides["checkpoint"] = config.checkpoint
    if config.fid_reference is not None and rank == 0:
        check_reference(config.fid_reference)  # before models are loaded
    judge: Judge | None = None
    plan: Plan | None = None
    real: RealImages | None = None
    first_sizes: dict[str, int] = {}
    for side, address in sides.items():
        policy = _load(side, address, config, device)
        sizes = {"labels": policy.num_classes, "pixels a side": policy.vqvae.config.image_size}
        if judge is None or plan is None:
            first_sizes = sizes
            folder.columns, folder.image_size = _columns(config), policy.vqvae.config.image_size
            plan = Plan(_labels(config, policy.num_classes), config.samples_per_label, policy.num_classes)
            judge = Judge(config, policy.num_classes, device)
            if config.fid_reference is not None and judge.network is not None and rank == 0:
                real = load_real_images(config.fid_reference, judge.network, sizes["pixels a side"])
                _check_enough(plan, real)
            folder.prepare(_settings(config), rank)
        elif sizes != first_sizes:
            raise InputError(
                f"the models cannot be compared: {first_sizes} in the reference, {sizes} in the checkpoint"
            )
        sample_side(side, policy, judge, plan, config, folder, rank, world)
        del policy  # before the next one is loaded
    assert plan is not None
    if rank != 0:
        return []
    _wait(folder, list(sides), plan)
    return _finish(config, folder, list(sides), plan, real)


def _finish(
    config: EvaluateConfig, folder: EvaluationFolder, sides: list[str], plan: Plan, real: RealImages | None
) -> list[Row]:
    numbers = {side: folder.gather(side, plan) for side in sides}
    labels_N = np.array([plan.label(index) for chunk in plan.chunks for index in chunk])
    rows = tabulate(numbers.get("reference"), numbers["checkpoint"], labels_N, _seen_labels(config), real)
    pictures = _save_pictures(folder, sides, plan, label_names(config.checkpoint, plan.num_classes))
    if config.save == "npz":
        for side in sides:
            _save_npz(folder, side, plan)
    result = {
        "checkpoint": config.checkpoint,
        "reference": config.reference,
        "settings": _settings(config),
        "fid_reference": config.fid_reference,
        "images": len(labels_N),
        "labels": len(set(labels_N.tolist())),
        "real_images": real.count if real else None,
        "intervals": _INTERVALS,
        "features": config.feature_network,
        "neighbours": {"nearest": NEIGHBOURS, "images_at_most": NEIGHBOUR_IMAGES},
        "rows": [asdict(row) for row in rows],
        "pictures": pictures,
        "environment": environment(),
    }
    save_text(folder.path / "evaluation.json", json.dumps(result, indent=2) + "\n")
    return rows


def _seen_labels(config: EvaluateConfig) -> set[int] | None:
    """Labels that the run was trained on; None where it was all, or nobody knows."""
    if not Path(config.checkpoint).expanduser().is_dir():
        return None
    run = RunFolder(config.checkpoint).load_config()
    names = run_names(run.policy, run.pretrain, Path(config.checkpoint).expanduser(), made=True)
    pool = label_pool(run.rollout, run.policy.sizes.num_classes, run.run.seed, names)
    return set(pool) if len(pool) < run.policy.sizes.num_classes else None


def _labels(config: EvaluateConfig, num_classes: int) -> list[int]:
    if config.labels == "all":
        return list(range(num_classes))
    return sorted(set(label_numbers("labels", config.labels, num_classes, label_names(config.checkpoint, num_classes))))


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """What the chunks depend on, beside the weights."""
    settings = config.model_dump(mode="json", exclude=set(_FREE_TO_CHANGE))
    return settings | {"features": config.feature_network}


def _check_enough(plan: Plan, real: RealImages) -> None:
    images = sum(len(chunk) for chunk in plan.chunks)
    if real.features_MD is None and images < 2:
        raise InputError("FID of one image: raise samples_per_label, or name more labels")
    if real.features_MD is not None and min(images, len(real.features_MD)) <= NEIGHBOURS + 1:
        raise InputError(
            f"{images} samples against {len(real.features_MD)} real images: precision and recall look at {NEIGHBOURS} "
            f"neighbours and need {NEIGHBOURS + 2} images of each; raise samples_per_label, or give more real images"
        )


def _load(side: str, address: str, config: EvaluateConfig, device: torch.device) -> Policy:
    if address != BASE or side == "checkpoint":
        return load(address, config.vqvae, device, config.dtype, side)
    folder = RunFolder(config.checkpoint)
    run = folder.load_config()
    run = run.model_copy(update={"run": run.run.model_copy(update={"device": str(device), "dtype": config.dtype})})
    return load_base(run, folder)


def _silent(text: str) -> None:
    """For all processes but the first."""


def main(arguments: list[str]) -> int:
    """python -m varfast.evaluate checkpoint=... [reference=...] [key=value ...]"""
    process = launched()
    config = resolved(parse_arguments(arguments, EvaluateConfig), print if process.rank == 0 else _silent)
    if config.device == "auto" and torch.cuda.is_available():
        config = config.model_copy(update={"device": f"cuda:{process.local_rank or 0}"})
    rows = evaluate(config, process.rank, process.size)
    if process.rank == 0:
        assert config.out is not None
        result = json.loads((Path(config.out).expanduser() / "evaluation.json").read_text(encoding="utf-8"))
        print(f"\n{table(rows)}\n\n{_about(result)}\n{config.out}: evaluation.json, pictures.png")
    return 0
