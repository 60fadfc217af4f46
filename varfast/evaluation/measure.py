"""An evaluation from its arguments to evaluation.json."""

from __future__ import annotations

import json

import numpy as np
import torch

from varfast.data.labels import label_names
from varfast.distributed import Launch
from varfast.evaluation.arguments import BASE, chunk_settings, resolved, sampled_labels, seen_labels
from varfast.evaluation.config import EvaluateConfig
from varfast.evaluation.features import RealImages, check_real_images, load_real_images
from varfast.evaluation.folder import EvaluationFolder
from varfast.evaluation.judge import Judge, column_names
from varfast.evaluation.metrics import NEIGHBOUR_IMAGES, NEIGHBOURS
from varfast.evaluation.pictures import save_npz, save_pictures
from varfast.evaluation.plan import Plan
from varfast.evaluation.sampling import Evaluation
from varfast.evaluation.table import INTERVALS, Row, tabulate
from varfast.files import save_text
from varfast.policies.device import pick_device
from varfast.policies.protocol import Policy
from varfast.runs.environment import environment
from varfast.runs.folder import RunFolder
from varfast.runs.load import load_base, load_policy
from varfast.types import InputError


def evaluate(config: EvaluateConfig, process: Launch = Launch()) -> list[Row]:  # noqa: B008 - frozen
    """Sample, measure, and write evaluation.json, pictures.png and what `save` asks for into the out folder.

    Args:
        process: this process among those that share the chunks; process 0 waits for the others and makes the table.
    Returns: the table; empty for another process than 0.
    Raises: InputError for whatever cannot be used; what was sampled so far stays in the folder.
    """
    is_main = process.rank == 0
    config = resolved(config, print if is_main else silent)
    device = pick_device(config.device)
    if config.fid_reference is not None and is_main:
        check_real_images(config.fid_reference)  # before models are loaded
    sides = {"reference": config.reference} if config.reference is not None else {}
    sides["checkpoint"] = config.checkpoint
    evaluation: Evaluation | None = None
    real: RealImages | None = None
    first_sizes: dict[str, int] = {}
    for side, address in sides.items():
        policy = _load(side, address, config, device)
        sizes = {"labels": policy.num_classes, "pixels a side": policy.image_size}
        if evaluation is None:
            first_sizes = sizes
            evaluation, real = _prepare(config, policy.num_classes, policy.image_size, device, process)
        elif sizes != first_sizes:
            raise InputError(
                f"the models cannot be compared: {first_sizes} in the reference, {sizes} in the checkpoint"
            )
        evaluation.sample(side, policy)
        del policy  # before the next one is loaded
    assert evaluation is not None
    if not is_main:
        return []
    evaluation.folder.wait(sides, evaluation.plan)
    return finish(config, evaluation.folder, list(sides), evaluation.plan, real)


def _load(side: str, address: str, config: EvaluateConfig, device: torch.device) -> Policy:
    """side: "reference" or "checkpoint"; address: what that argument says."""
    if address != BASE or side == "checkpoint":
        return load_policy(address, config.vqvae, device, config.dtype, family=config.family, argument=side)
    folder = RunFolder(config.checkpoint)
    return load_base(folder.load_config(), folder, device, config.dtype)


def _prepare(
    config: EvaluateConfig, num_classes: int, image_size: int, device: torch.device, process: Launch
) -> tuple[Evaluation, RealImages | None]:
    """Everything but the models; what cannot be used is refused before the folder is made. Real images in process 0."""
    assert config.out is not None
    plan = Plan(sampled_labels(config, num_classes), config.samples_per_label, num_classes)
    judge = Judge(config, num_classes, device)
    real: RealImages | None = None
    if config.fid_reference is not None and judge.network is not None and process.rank == 0:
        real = load_real_images(config.fid_reference, judge.network, image_size)
        _refuse_too_few(plan, real)
    folder = EvaluationFolder(config.out, column_names(config), image_size)
    folder.prepare(chunk_settings(config), process.rank)
    return Evaluation(config, plan, judge, folder, process), real


def _refuse_too_few(plan: Plan, real: RealImages) -> None:
    images = len(plan.labels)
    if real.features_MD is None and images < 2:
        raise InputError("FID of one image: raise samples_per_label, or name more labels")
    if real.features_MD is not None and min(images, len(real.features_MD)) <= NEIGHBOURS + 1:
        raise InputError(
            f"{images} samples against {len(real.features_MD)} real images: precision and recall look at {NEIGHBOURS} "
            f"neighbours and need {NEIGHBOURS + 2} images of each; raise samples_per_label, or give more real images"
        )


def finish(
    config: EvaluateConfig, folder: EvaluationFolder, sides: list[str], plan: Plan, real: RealImages | None
) -> list[Row]:
    """From complete chunks to the table, which is returned, and the files of the out folder."""
    numbers = {side: folder.gather(side, plan) for side in sides}
    labels = plan.labels
    rows = tabulate(numbers.get("reference"), numbers["checkpoint"], np.array(labels), seen_labels(config), real)
    pictures = save_pictures(folder, sides, plan, label_names(config.checkpoint, plan.num_classes))
    if config.save == "npz":
        for side in sides:
            save_npz(folder, side, plan)
    result = {
        "checkpoint": config.checkpoint,
        "reference": config.reference,
        "settings": chunk_settings(config),
        "fid_reference": config.fid_reference,
        "images": len(labels),
        "labels": len(set(labels)),
        "real_images": real.count if real else None,
        "intervals": INTERVALS,
        "features": config.feature_network,
        "neighbours": {"nearest": NEIGHBOURS, "images_at_most": NEIGHBOUR_IMAGES},
        "rows": [row.as_json() for row in rows],
        "pictures": pictures,
        "environment": environment(),
    }
    save_text(folder.path / "evaluation.json", json.dumps(result, indent=2) + "\n")
    return rows


def silent(text: str) -> None:
    """For all processes but the first, in place of print."""
