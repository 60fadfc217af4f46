"""An evaluation from its arguments to evaluation.json."""

from __future__ import annotations

import json

import numpy as np
import torch

from varfast.distributed import Launch
from varfast.evaluation.arguments import BASE, Task, chunk_settings, resolved, samplings
from varfast.evaluation.asked import save_asked
from varfast.evaluation.benchmarks import Export
from varfast.evaluation.config import EvaluateConfig
from varfast.evaluation.features import RealImages, check_real_images, load_real_images
from varfast.evaluation.folder import EvaluationFolder
from varfast.evaluation.judge import Judge, column_names
from varfast.evaluation.metrics import NEIGHBOUR_IMAGES, NEIGHBOURS
from varfast.evaluation.pictures import save_npz, save_pictures
from varfast.evaluation.plan import Plan, sets_of
from varfast.evaluation.results import add_results, kept_rows
from varfast.evaluation.sampling import Evaluation, weights_hash
from varfast.evaluation.subjects import Subjects, check_kind, subjects_of
from varfast.evaluation.table import INTERVALS, INTERVALS_OF_PROMPTS, Row, tabulate
from varfast.files import save_text
from varfast.policies.device import pick_device
from varfast.policies.protocol import Policy
from varfast.runs.environment import environment
from varfast.runs.folder import RunFolder
from varfast.runs.load import load_base, load_policy
from varfast.types import InputError, Sampling


def evaluate(config: EvaluateConfig, process: Launch = Launch()) -> list[Row]:  # noqa: B008 - frozen
    """Sample, measure, and write evaluation.json, pictures.png and what `save` asks for into the out folder.

    Args:
        process: this process among those that share the chunks; process 0 waits for the others and makes the table.
    Returns: the table; empty for another process than 0.
    Raises: InputError for whatever cannot be used; what was sampled so far stays in the folder.
    """
    is_main = process.rank == 0
    if config.results is not None:
        return add_results(config) if is_main else []
    task = resolved(config, print if is_main else _silent)
    device = _device(config.device, process)
    if is_main:  # before models are loaded
        for address in dict.fromkeys(config.fid_references.values()):
            check_real_images(address)
    sides = {"reference": task.reference} if task.reference is not None else {}
    sides["checkpoint"] = config.checkpoint
    evaluation: Evaluation | None = None
    subjects: Subjects | None = None
    how: list[Sampling] = []
    real: dict[str, RealImages | None] = {}
    first_sizes: dict[str, int] = {}
    for side, address in sides.items():
        policy = _load(side, address, task, device)
        check_kind(config, policy)
        subjects = subjects or subjects_of(config, policy)
        subjects.give_to(policy)
        sizes = {"labels": policy.num_classes, "pixels a side": policy.image_size}
        if evaluation is None:
            first_sizes, how = sizes, samplings(config, policy)
            evaluation, real = _prepare(task, how, policy, subjects, device, process)
        elif sizes != first_sizes:
            raise InputError(
                f"the models cannot be compared: {first_sizes} in the reference, {sizes} in the checkpoint"
            )
        weights = weights_hash(policy)
        # With the most guidance first: a model that has none is refused at once.
        for images in sorted(sets_of([side], how), key=lambda images: -images.how.cfg):
            evaluation.sample(images, policy, weights)
        del policy  # before the next one is loaded
    assert evaluation is not None
    if not is_main:
        return []
    evaluation.folder.wait([images.name for images in sets_of(list(sides), how)], evaluation.plan)
    return finish(task, how, evaluation, list(sides), real)


def _device(name: str, process: Launch) -> torch.device:
    """Each process's own GPU, unless the arguments name one."""
    own = name == "auto" and torch.cuda.is_available()
    return pick_device(f"cuda:{process.local_rank or 0}" if own else name)


def _load(side: str, address: str, task: Task, device: torch.device) -> Policy:
    """side: "reference" or "checkpoint"; address: what that argument says."""
    dtype = task.config.dtype
    if address != BASE or side == "checkpoint":
        return load_policy(address, task.vqvae, device, dtype, family=task.family, argument=side)
    folder = RunFolder(task.config.checkpoint)
    return load_base(folder.load_config(), folder, device, dtype)


def _prepare(
    task: Task, how: list[Sampling], policy: Policy, subjects: Subjects, device: torch.device, process: Launch
) -> tuple[Evaluation, dict[str, RealImages | None]]:
    """Everything but the models; what cannot be used is refused before the folder is made.

    Returns: the evaluation, and the real images by the name of the features, in process 0.
    """
    config = task.config
    image_size = config.image_size or policy.image_size
    plan = Plan(subjects.ids, subjects.samples, subjects.count)
    export = None
    if config.export is not None and subjects.asked is not None:
        export = Export(task.out, config.export, subjects.asked, subjects.samples)
    judge = Judge(task, subjects, device)
    real: dict[str, RealImages | None] = dict.fromkeys(judge.networks)
    if process.rank == 0:
        for name, address in config.fid_references.items():
            real[name] = load_real_images(address, judge.networks[name], image_size)
            _refuse_too_few(plan, real[name])
    folder = EvaluationFolder(task.out, column_names(task), image_size)
    folder.prepare(chunk_settings(task, how, subjects), process.rank)
    if subjects.asked is not None and process.rank == 0:
        save_asked(folder.path, subjects.asked)
    return Evaluation(config, subjects, plan, judge, folder, process, export), real


def _refuse_too_few(plan: Plan, real: RealImages | None) -> None:
    assert real is not None
    images = len(plan.labels)
    if real.features_MD is None and images < 2:
        raise InputError("FID of one image: raise samples_per_label or samples_per_prompt, or name more of them")
    if real.features_MD is not None and min(images, len(real.features_MD)) <= NEIGHBOURS + 1:
        raise InputError(
            f"{images} samples against {len(real.features_MD)} real images: precision and recall look at {NEIGHBOURS} "
            f"neighbours and need {NEIGHBOURS + 2} images of each; raise samples_per_label, or give more real images"
        )


def finish(
    task: Task, how: list[Sampling], evaluation: Evaluation, sides: list[str], real: dict[str, RealImages | None]
) -> list[Row]:
    """From complete chunks to the table, which is returned, and the files of the out folder."""
    folder, plan, subjects = evaluation.folder, evaluation.plan, evaluation.subjects
    config, labels, of_prompts, tables = task.config, plan.labels, subjects.asked is not None, []
    for sampling in how:  # one guidance after another: 50 000 images have 0.4 GB of Inception's features
        numbers = {images.side: folder.gather(images.name, plan) for images in sets_of(sides, how)
                   if images.how == sampling}  # fmt: skip
        tables.append(
            tabulate(numbers.get("reference"), numbers["checkpoint"], np.array(labels), subjects.groups, real,
                     sampling.cfg, of_prompts)
        )  # fmt: skip
    rows = [row for same in zip(*tables, strict=True) for row in same]
    sets = sets_of(sides, how)
    pictures = save_pictures(folder, sets, plan, [subjects.title(number) for number in plan.picture_labels])
    if config.save == "npz":
        for images in sets:
            save_npz(folder, images.name, plan)
    exported = {images.name: evaluation.export.finish(images.name) for images in sets} if evaluation.export else {}
    rows += kept_rows(folder.path) if exported else []
    settings = chunk_settings(task, how, subjects)
    counts = {name: found.count for name, found in real.items() if found is not None}
    result = {
        "checkpoint": config.checkpoint,
        "reference": task.reference,
        "settings": settings,
        "fid_reference": config.fid_reference,
        "images": len(labels),
        "labels": len(set(labels)),
        "real_images": counts if len(counts) > 1 else next(iter(counts.values()), None),
        "intervals": INTERVALS_OF_PROMPTS if of_prompts else INTERVALS,
        "features": settings["features"],
        "feature_widths": {name: len(found.statistics.mu_D) for name, found in real.items() if found is not None},
        "neighbours": {"nearest": NEIGHBOURS, "images_at_most": NEIGHBOUR_IMAGES},
        "rows": [row.as_json() for row in rows],
        "pictures": pictures,
        "environment": environment(),
    }
    if subjects.asked is not None:
        result["prompts"] = len(subjects.asked)
        pictures["titles"] = [subjects.asked[number].text for number in plan.picture_labels]
    if exported:
        result["exported"] = exported
    save_text(folder.path / "evaluation.json", json.dumps(result, indent=2) + "\n")
    return rows


def _silent(text: str) -> None:
    """For all processes but the first, in place of print."""
