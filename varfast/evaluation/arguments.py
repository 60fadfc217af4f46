"""What the arguments of an evaluation leave open, taken from the run folder that they name."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from varfast.data.labels import label_names, label_numbers, label_pool, run_names
from varfast.evaluation.config import EvaluateConfig
from varfast.printable import printable
from varfast.rewards import RewardConfig
from varfast.rewards.classifier import ClassifierConfig
from varfast.runs.base import Base
from varfast.runs.folder import RunFolder
from varfast.types import InputError
from varfast.weights.files import resolve

# The value of the argument `reference` that stands for the model that the run started from.
BASE = "base"
# Arguments that the chunks do not depend on.
_FREE_TO_CHANGE = ("out", "micro_batch", "device", "fid_reference", "inception_weights")


def resolved(config: EvaluateConfig, say: Callable[[str], object] = print) -> EvaluateConfig:
    """The arguments with what they leave open: the out folder, and from a run folder its base, rewards and classifier.

    Of the run's rewards, only those that compute on the images and nothing else are taken. One that runs code, asks a
    server, or reads files by name must be named by the arguments (docs/security.md).

    Args:
        say: called with a line that names the rewards that were skipped.
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
                say(_skipped(folder, run.reward))
        if "classifier" not in given and run.eval.classifier is not None:
            found["classifier"] = ClassifierConfig(model=run.eval.classifier)
        if config.vqvae is None and run.policy.checkpoint != "random":
            found["vqvae"] = str(Base(folder).find(run.policy.parts[1]))
        config = config.model_copy(update=found)
    if config.reference not in (None, BASE) and not Path(config.reference).expanduser().is_dir():
        resolve(config.reference)
    return config


def _skipped(folder: RunFolder, rewards: dict[str, RewardConfig]) -> str:
    """One line: which rewards are not measured, why, and the argument that brings them back, ready for a shell."""
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


def chunk_settings(config: EvaluateConfig) -> dict[str, Any]:
    """What the chunks depend on, beside the weights."""
    settings = config.model_dump(mode="json", exclude=set(_FREE_TO_CHANGE))
    return settings | {"features": config.feature_network}


def sampled_labels(config: EvaluateConfig, num_classes: int) -> list[int]:
    """The labels that the arguments name, ascending. Raises: InputError for one that the model does not have."""
    if config.labels == "all":
        return list(range(num_classes))
    return sorted(set(label_numbers("labels", config.labels, num_classes, label_names(config.checkpoint, num_classes))))


def seen_labels(config: EvaluateConfig) -> set[int] | None:
    """Labels that the run was trained on; None where that was all of them, or no run folder says it."""
    folder = RunFolder(config.checkpoint)
    if not folder.path.is_dir():
        return None
    run = folder.load_config()
    num_classes = run.policy.num_classes
    names = run_names(run.policy, run.pretrain.dataset, folder.path, made=True)
    pool = label_pool(run.rollout, num_classes, run.run.seed, names)
    return set(pool) if len(pool) < num_classes else None
