"""Which labels a run trains on, which ones a step samples, and what they are called.

Names come from labels.json, which pre-training on a folder writes beside the base and which a run copies. Without it, a
model with 1000 labels is assumed to be one of ImageNet, as all public ones are.

Axes: P labels.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from varfast.data.captions import SHAPES
from varfast.data.datasets import LABELLED, FolderImages, class_folders
from varfast.data.shapes import SCENES_A_LABEL
from varfast.files import read_json
from varfast.policies.config import FamilyConfig, RolloutConfig
from varfast.printable import printable
from varfast.randomness import Purpose, keyed_generator
from varfast.settings.section import check_labels
from varfast.tables import text_table
from varfast.types import InputError
from varfast.weights.hub import names_repository
from varfast.weights.saved import is_saved, read_saved

LABELS_FILE = "labels.json"
_SHOWN_ROWS = 40


def label_pool(config: RolloutConfig, num_classes: int, seed: int, names: list[str] | None = None) -> list[int]:
    """The labels of the run, ascending: all or those listed, reduced to the configured fraction by the seed.

    Args:
        names: of all labels, to look up those that the config lists by name; None if they have none.
    Raises: InputError for a name that is not among them.
    """
    if config.labels == "all":
        pool = list(range(num_classes))
    else:
        pool = sorted(set(label_numbers("rollout.labels", config.labels, num_classes, names)))
    if config.label_share < 1.0:
        kept = max(1, round(config.label_share * len(pool)))
        order = torch.randperm(len(pool), generator=keyed_generator(seed, Purpose.LABEL_POOL))
        pool = sorted(pool[i] for i in order[:kept].tolist())
    return pool


def draw_labels(pool: list[int], count: int, seed: int, step: int, replacement: bool = True) -> Tensor:
    """(P,) int64 labels, or ids of prompts, of a step.

    Args:
        replacement: sampled uniformly and independently from the pool. Else the pool is gone through again and again,
            each time in another order: a step goes on where the one before it ended.
    """
    if replacement:
        index_P = torch.randint(len(pool), (count,), generator=keyed_generator(seed, Purpose.LABELS, step))
        return torch.tensor(pool)[index_P]
    first, end = step * count, (step + 1) * count
    orders = [
        torch.randperm(len(pool), generator=keyed_generator(seed, Purpose.LABELS, turn))
        for turn in range(first // len(pool), -(-end // len(pool)))
    ]
    skipped = first % len(pool)
    return torch.tensor(pool)[torch.cat(orders)[skipped : skipped + count]]


# ---------------------------------------------------------------------------------------------------------------------
# What labels are called


@dataclass(frozen=True)
class Label:
    """A label of a data set.

    Attributes:
        label: its number.
        folder: name of its sub-folder.
        name: what people call it: ImageNet's name for a WordNet id (n02099601), else the folder's.
        images: how many there are; None: unknown.
    """

    label: int
    folder: str
    name: str
    images: int | None


@functools.cache
def imagenet() -> dict[str, str]:
    """Names of ImageNet's classes by WordNet id, in the order of the labels.

    Source: ILSVRC 2012, by torchvision's weights (names, each of them once) and timm (ids).
    """
    lines = (Path(__file__).parent / "imagenet.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)


def _named(folders: Sequence[str]) -> list[str]:
    known = imagenet()
    return [known.get(folder, folder) for folder in folders] if set(folders) <= known.keys() else list(folders)


def labels_of(images: FolderImages) -> list[Label]:
    """The labels of a folder of images."""
    rows = zip(images.classes, _named(images.classes), images.counts, strict=True)
    return [Label(label, printable(f), printable(name), count) for label, (f, name, count) in enumerate(rows)]


def drawn_labels() -> list[Label]:
    """The labels of pretrain.dataset=shapes."""
    return [Label(label, name, name, SCENES_A_LABEL) for label, name in enumerate(SHAPES.labels)]


def label_table(labels: Sequence[Label]) -> str:
    """A table of label, folder and number of images; of more than 40 labels, the first 30 and the last 5."""
    shown = list(labels) if len(labels) <= _SHOWN_ROWS else [*labels[: _SHOWN_ROWS - 10], *labels[-5:]]
    cells = [("label", "folder", "images")]
    cells += [
        (
            str(row.label),
            row.folder + f" ({row.name})" * (row.name != row.folder),
            "" if row.images is None else str(row.images),
        )
        for row in shown
    ]
    lines = text_table(cells, "><>")
    if len(shown) < len(labels):
        lines.insert(-5, f"... {len(labels) - len(shown)} more")
    return "\n".join(lines)


def labels_json(labels: Sequence[Label]) -> str:
    """Content of labels.json."""
    return json.dumps({"labels": [asdict(label) for label in labels]}, indent=1) + "\n"


def read_labels(folder: Path) -> list[Label] | None:
    """The labels in a folder's labels.json, or that a saved model names; None if there are none or the file is
    damaged, since only names depend on it.
    """
    path = folder / LABELS_FILE
    if not path.exists():
        return _saved_labels(folder)
    try:
        rows = read_json(path)["labels"]
        found = [
            Label(
                int(row["label"]),
                printable(row["folder"]),
                printable(row["name"]),
                None if row["images"] is None else int(row["images"]),
            )
            for row in rows
        ]
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return None
    return found if found and [row.label for row in found] == list(range(len(found))) else None


def _saved_labels(place: Path | str) -> list[Label] | None:
    try:
        names = read_saved(place).labels if is_saved(place) else None
    except InputError:
        return None
    return None if names is None else [Label(label, name, name, None) for label, name in enumerate(names)]


def label_names(place: str | Path, num_classes: int) -> list[str] | None:
    """Names of a model's labels; None if they are not known.

    Args:
        place: a run folder, which contains labels.json, or the file of the weights, which has labels.json beside it;
            or a saved model, as a folder or a repository.
    """
    path = Path(place).expanduser()
    of_hub = names_repository(place)
    found = _saved_labels(place) if of_hub else read_labels(path if path.is_dir() else path.parent)
    if found is not None and len(found) == num_classes:
        return [row.name for row in found]
    return list(imagenet().values()) if num_classes == len(imagenet()) else None


def run_names(policy: FamilyConfig, dataset: str, folder: Path, made: bool) -> list[str] | None:
    """Names of a run's labels: from its folder, its data set, or the weights that it starts from.

    Args:
        dataset: that the base is pre-trained on, where the config says so.
        made: whether the run's base exists already. One without labels.json is from a version that ordered the folders
            of a data set differently, so their names would be wrong.
    """
    num_classes, checkpoint = policy.num_classes, policy.checkpoint
    if read_labels(folder) is not None:
        return label_names(folder, num_classes)
    if checkpoint != "pretrain":  # a run keeps a copy of the names: do not look at the checkpoint again
        return label_names(folder if made else checkpoint, num_classes)
    if dataset in LABELLED:
        names = [str(digit) for digit in range(10)] if dataset == "digits" else [row.name for row in drawn_labels()]
        return names if num_classes == len(names) else None
    if made:
        return None
    return [printable(name) for name in _named(class_folders(str(Path(dataset).expanduser())))]


def label_numbers(what: str, given: Sequence[int | str], num_classes: int, names: Sequence[str] | None) -> list[int]:
    """Labels given by number or name, as numbers.

    A name may be written in any case, and with _ or - for a space. For ImageNet, a WordNet id is a name too.

    Args:
        what: the setting, for errors.
        names: of all labels; None if they are not known.
    Raises: InputError for a name that no label has, or several have, and for a number out of range.
    """
    numbers = [entry if isinstance(entry, int) else _number(what, entry, names) for entry in given]
    check_labels(what, numbers, num_classes)
    return numbers


def _number(what: str, name: str, names: Sequence[str] | None) -> int:
    if names is None:
        raise InputError(f"{what} holds {name!r}, but the labels of this model have no names; give numbers")
    ways: list[Sequence[str]] = [names, [_folded(known) for known in names]]
    if list(names) == list(imagenet().values()):
        ways.append(list(imagenet()))
    for known, wanted in zip(ways, (name, _folded(name), name.strip()), strict=False):
        found = [label for label, other in enumerate(known) if other == wanted]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(
                f"{what} holds {name!r}, which labels {', '.join(map(str, found))} are called; give a number"
            )
    folded = ways[1]
    near = [names[folded.index(n)] for n in difflib.get_close_matches(_folded(name), folded, n=3, cutoff=0.5)]
    near += [known for known in names if _folded(name) in _folded(known) and known not in near][: 3 - len(near)]
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(map(repr, names[:10]))}"
    number = f"; for label {name} leave the quotes out" if name.isdecimal() else ""
    raise InputError(f"{what} holds {name!r}, which no label is called; {hint}{number}")


def _folded(name: str) -> str:
    """A name without the differences that a user need not care about: case, _ and - for spaces."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def caption(label: int, names: Sequence[str] | None) -> str:
    """A label with its name, as "207 golden retriever"."""
    if names is None or label >= len(names) or names[label] == str(label):
        return f"{label}"
    return f"{label} {names[label]}"
