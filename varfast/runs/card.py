"""The card of a model that a run has made: base, reward, settings, evaluation, pictures, how it is loaded."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varfast.cards.markdown import Result, front_matter, markdown_table
from varfast.cards.model import LICENCE, card, imagenet_section, label_section, load_section
from varfast.config import Config
from varfast.data.config import HUB_DATASETS
from varfast.data.labels import imagenet, read_labels
from varfast.files import open_regular, read_json, read_leaves, write_atomically
from varfast.policies.config import LoRAConfig
from varfast.policies.families import family_of
from varfast.printable import printable
from varfast.runs.environment import environment
from varfast.runs.folder import RunFolder
from varfast.settings.private import public_settings, public_text, without_homes
from varfast.settings.reading import dump_yaml
from varfast.types import InputError
from varfast.weights.hub import repository_of

_PNG, _MOST_PICTURE_BYTES = b"\x89PNG\r\n\x1a\n", 2**26


@dataclass(frozen=True)
class Place:
    """Where the model is that a card belongs to.

    Attributes:
        name: of the model.
        trained, frozen: names of the files, or for the frozen part its address.
        load: arguments of varfast.load_policy.
        dtypes: numbers of the trained weights by file.
        pictures: samples beside the card by "before" and "after".
    """

    name: str
    trained: str
    frozen: str
    load: str
    dtypes: Mapping[str, str]
    pictures: Mapping[str, str]


def run_card(place: Place, folder: RunFolder, config: Config, step: int | None) -> str:
    """Markdown with the hub's metadata in front. No path of this machine is in it.

    step: steps done; None if all.
    """
    summary = read_leaves(folder.path / "summary.json")
    last = summary.get("step")
    done = _steps_done(config, summary, step)
    complete = done >= config.run.steps or last == done
    kind, sizes, with_public_code = family_of(config.policy).model_card(config.policy, place.trained, place.frozen)
    reward = _public(config)["reward"]
    text = card(
        _metadata(place, folder, config, summary if complete else {}),
        place.name,
        f"{kind}, fine-tuned with {config.loss.name.upper()}.",
        _rows(place, sizes, config, summary, done) | {"model": identity(folder, config, step)},
        [
            *_samples(place),
            f"## Reward\n\n```yaml\n{dump_yaml(reward)}```",
            f"## Evaluation\n\n{_evaluation(folder, summary, complete)}",
            load_section(place.load, config.policy),
            with_public_code,
            *_labels(folder, config.policy.num_classes),
            LICENCE,
            f"## All settings\n\nOf paths the last part is shown.\n\n```yaml\n{dump_yaml(_public(config))}```",
        ],
    )
    here = str(folder.path.resolve())
    return without_homes(text.replace(f"{here}/", "").replace(here, folder.path.resolve().name))


def identity(folder: RunFolder, config: Config, step: int | None) -> str:
    """Which model a card is of, in words that it has: the same for all files that hold the model."""
    done = _steps_done(config, read_leaves(folder.path / "summary.json"), step)
    digest = hashlib.sha256(dump_yaml(_public(config)).encode()).hexdigest()[:12]
    return f"settings of sha256 {digest}, after step {done}"


def other_formats(text: str, files: Path, name: str) -> dict[str, str]:
    """What an earlier card of the same model says of its other files that are still beside it: dtypes by name."""
    found = dict(re.findall(r"^\| numbers in ([\w .+-]+\.(?:pth|safetensors)) \| (\w+)[^|]*\|$", text, re.MULTILINE))
    return {other: dtype for other, dtype in found.items() if other != name and (files / other).is_file()}


def save_pictures(folder: RunFolder, to: Path, step: int | None) -> dict[str, str]:
    """Copy the first grid of samples and the last one of the exported weights. Returns names by before and after.

    A picture that is no PNG, or a link, is left out: the weights can be handed on without it.
    """
    grids = sorted(path for path in (folder.path / "grids").glob("step_*.png") if path.stem[5:].isdecimal())
    if step is not None:
        grids = [path for path in grids if int(path.stem[5:]) <= step]
    found = {}
    for when, path in (("before", grids[0]), ("after", grids[-1])) if len(grids) > 1 else ():
        try:
            with open_regular(path, follow=False) as file:
                content = file.read(_MOST_PICTURE_BYTES)
        except OSError:
            continue
        if content.startswith(_PNG) and len(content) < _MOST_PICTURE_BYTES:
            name = f"samples_{when}.png"
            write_atomically(to / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
            found[when] = name
    return found


def _public(config: Config) -> dict[str, Any]:
    return public_settings(Config, config.model_dump(mode="json", exclude_none=True))


def _steps_done(config: Config, summary: Mapping[str, Any], step: int | None) -> int:
    last = summary.get("step")
    return step if step is not None else last if isinstance(last, int) else config.run.steps


def _rows(place: Place, sizes: str, config: Config, summary: dict[str, Any], done: int) -> dict[str, str]:
    sampling, decay, here = config.rollout, config.update.ema_decay, environment()
    averaged = "" if decay is None else f", averaged over optimizer steps, decay {decay}"
    whole = place.trained == place.frozen
    return {
        "sizes": sizes,
        "base model": _base(config),
        **({} if whole else {"VQ-VAE, in a file of its own": place.frozen}),
        **({"trained": _adapter(config.policy.lora)} if config.policy.lora else {}),
        "steps": f"{_steps(done, config.run.steps)}{_ended(summary, done)}, {sampling.images} images each "
        f"({sampling.labels_per_step} labels x {sampling.group_size} samples)",
        f"{config.loss.summary[0]}, learning rate": f"{config.loss.summary[1]}, {config.update.lr}",
        "temperature of the samples": f"{sampling.temperature}, "
        f"{f'guidance {sampling.cfg:g} as a part of the policy' if sampling.cfg else 'no guidance'} and no filters",
        **{f"numbers in {name}": f"{dtype}{averaged}" for name, dtype in place.dtypes.items()},
        "written by": f"varfast {here['varfast']}, commit {here['commit'] or 'unknown'}",
    }


def _steps(done: int, wanted: int) -> str:
    return f"{done} of {wanted}" if done <= wanted else f"{done}, more than the {wanted} that run.steps says now"


def _base(config: Config) -> str:
    address = config.policy.checkpoint
    if address == "pretrain":
        return f"pre-trained on {public_text(config.pretrain.dataset, is_path=True)} by varfast"
    if address == "random":
        return "random weights"
    return public_text(address, is_path=True)


def _adapter(lora: LoRAConfig) -> str:
    return f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}; merged into the weights"


def _ended(summary: dict[str, Any], done: int) -> str:
    """By which budget, if one has ended the run at that step."""
    by = str(summary.get("ended_by", ""))
    return f", ended by {printable(by)}" if by.startswith("run.budget") and summary.get("step") == done else ""


def _samples(place: Place) -> list[str]:
    if not place.pictures:
        return []
    images = [f"![samples {when} training]({name})" for when, name in place.pictures.items()]
    return ["## Samples\n\nOf the same labels or prompts and random numbers.\n\n"
            + markdown_table(list(place.pictures), [images])]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def _metadata(place: Place, folder: RunFolder, config: Config, summary: dict[str, Any]) -> str:
    """summary: of a complete run."""
    prompts = config.prompts.source if config.prompts is not None else ""
    datasets = [prompts.removeprefix(HUB_DATASETS)] if prompts.startswith(HUB_DATASETS) else []
    after = {key.removeprefix("after."): value for key, value in summary.items() if key.startswith("after.")}
    results = [
        Result(name, name, value, "fresh samples after training") for name, value in after.items() if _is_number(value)
    ]
    return front_matter(
        config.policy,
        place.name,
        [config.loss.name, "fine-tuned"],
        repository_of(config.policy.checkpoint),
        datasets,
        [*results, *_measured_results(folder.path / "evaluation" / "evaluation.json")],
    )


def _measured_results(path: Path) -> list[Result]:
    """Of an evaluation.json, the numbers of the checkpoint; none if it is missing or damaged: the text says so."""
    try:
        rows = read_json(path)["rows"] if os.path.lexists(path) else []
        found = []
        for row in rows:
            name, of, value, cfg = row["name"], row["labels"], row["checkpoint"]["value"], row.get("cfg")
            guided = f", guidance {cfg:g}" if _is_number(cfg) and cfg else ""
            if _is_number(value) and isinstance(name, str) and isinstance(of, str):
                of = f"samples of {'all labels or prompts' if of == 'all' else printable(of)}{guided}"
                found.append(Result(printable(name), printable(name), value, of, "evaluation"))
        return found
    except (InputError, KeyError, TypeError, AttributeError):
        return []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _evaluation(folder: RunFolder, summary: dict[str, Any], complete: bool) -> str:
    parts = []
    names = dict.fromkeys(key.partition(".")[2] for key in summary if key.startswith(("before.", "after.")))
    if complete and names:
        rows = [[name, *(summary.get(f"{when}.{name}") for when in ("before", "after"))] for name in names]
        parts.append("Fresh samples, the same labels and random numbers before and after:")
        parts.append(markdown_table(["", "before", "after"], rows))
    measured = folder.path / "evaluation" / "evaluation.json"
    if os.path.lexists(measured):
        parts.append(_measured(measured))
    return "\n\n".join(parts) or "None: the run was not complete, or had no evaluation."


def _measured(path: Path) -> str:
    """The table of an evaluation.json; if that is damaged, a note, since the weights can be exported all the same."""
    try:
        rows = read_json(path)["rows"]
        sides = [side for side in ("reference", "checkpoint", "difference") if any(row[side] for row in rows)]
        cells = [
            [f"{row['name']}, {row['labels']}", *((row[side] or {}).get("value") for side in sides)] for row in rows
        ]
    except (InputError, KeyError, TypeError, AttributeError) as error:
        return f"`evaluation/{path.name}` is left out, as it is damaged: {printable(error)}"
    return "By `varfast.evaluate`, with the labels it is of:\n\n" + markdown_table(["", *sides], cells)


def _labels(folder: RunFolder, num_classes: int) -> list[str]:
    """A section about the labels: of the folder that the base was pre-trained on, or of ImageNet."""
    found = read_labels(folder.path)
    if found:
        rows = [[row.label, row.folder, row.name if row.name != row.folder else None, row.images] for row in found]
        return [label_section(rows, ["label", "folder", "name", "images"])]
    random = folder.load_config().policy.checkpoint in ("random", "pretrain")
    return [imagenet_section()] if not random and num_classes == len(imagenet()) else []
