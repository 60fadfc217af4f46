"""What the arguments of an evaluation leave open: taken from the run folder that they name, or from the model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varfast.evaluation.config import EvaluateConfig
from varfast.evaluation.subjects import Subjects
from varfast.policies.config import FamilyName
from varfast.policies.pretrained import saved_section
from varfast.policies.protocol import Policy
from varfast.printable import printable
from varfast.rewards import RewardConfig
from varfast.rewards.classifier import ClassifierConfig
from varfast.runs.base import Base
from varfast.runs.folder import RunFolder
from varfast.runs.named import fault
from varfast.types import InputError, Sampling
from varfast.weights.files import resolve
from varfast.weights.saved import is_run, is_saved
from varfast.weights.shards import names_model, resolve_model

# The value of the argument `reference` that stands for the model that the run started from.
BASE = "base"
# Arguments that the chunks do not depend on.
_FREE_TO_CHANGE = ("out", "micro_batch", "device", "fid_reference", "inception_weights", "results")
# Of prompts, the folder keeps what Subjects.settings says.
_OF_LABELS, _OF_PROMPTS = ("labels", "samples_per_label"), ("prompts", "max_prompts", "samples_per_prompt")
# Arguments of later versions: not among the settings that a folder keeps, unless they are given.
_NEW = ("image_size", "rounding", "networks", "export")


@dataclass(frozen=True)
class Task:
    """An evaluation: its arguments, and what they leave open.

    Attributes:
        config: the arguments. Of what stands below too, this here counts.
        out: folder of results.
        reference: what the checkpoint is compared with: a run folder, weights, BASE or None.
        family, vqvae: of weights that are no run folder: their family, and the address of the frozen part's.
        scores, classifier: what is measured of each image.
    """

    config: EvaluateConfig
    out: Path
    reference: str | None
    family: FamilyName
    vqvae: str | None
    scores: dict[str, RewardConfig]
    classifier: ClassifierConfig | None


def out_folder(config: EvaluateConfig) -> Path:
    """The folder of results."""
    if config.out is not None:
        return Path(config.out).expanduser()
    return Path(config.checkpoint).expanduser() / "evaluation" if is_run(config.checkpoint) else Path("evaluation")


def resolved(config: EvaluateConfig, say: Callable[[str], object] = print) -> Task:
    """The arguments with what they leave open: the out folder, and from a run folder its base, rewards and classifier.

    Of the run's rewards, only those that compute on the images and nothing else are taken. One that runs code, asks a
    server, or reads files by name must be named by the arguments (docs/security.md).

    Args:
        say: called with a line that names the rewards that were skipped.
    Raises: InputError if there is no such checkpoint.
    """
    reference, scores, classifier = config.reference, config.scores, config.classifier
    family: FamilyName = config.family
    vqvae: str | None = config.vqvae
    if not is_run(config.checkpoint):
        if reference == BASE:
            raise InputError(
                f"reference={BASE}: checkpoint={config.checkpoint} is not a run folder; name the base's weights"
            )
        _find(config.checkpoint, "checkpoint")
        if is_saved(config.checkpoint):
            family = saved_section(config.checkpoint).family  # type: ignore[assignment]
    else:
        folder = RunFolder(config.checkpoint)
        run, given = folder.load_config(), config.model_fields_set
        if "reference" not in given:
            reference = BASE
        if "scores" not in given:
            alone = {name: reward for name, reward in run.reward.items() if not reward.of_sets}
            scores = {name: reward for name, reward in alone.items() if not reward.reaches_outside()}
            if len(scores) < len(alone):
                say(_skipped(folder, alone))
        if "classifier" not in given and run.eval.classifier is not None:
            classifier = ClassifierConfig(model=run.eval.classifier)
        family = run.policy.family
        if vqvae is None and run.policy.checkpoint != "random":
            vqvae = str(Base(folder).find(run.policy.parts[1]))
    if reference not in (None, BASE) and not is_run(reference):
        _find(reference, "reference")
    return Task(config, out_folder(config), reference, family, vqvae, scores, classifier)


def _find(address: str, argument: str) -> None:
    """Raises: InputError if there are no such weights."""
    if address.lower() == BASE:
        raise InputError(f"{argument}={address}: write reference={BASE}")
    if not is_saved(address) and not names_model(address) and (wrong := fault(address)):
        raise InputError(f"{argument}={address} {wrong}")
    if is_saved(address):
        saved_section(address)
    else:
        (resolve_model if names_model(address) else resolve)(address)


def samplings(config: EvaluateConfig, policy: Policy) -> list[Sampling]:
    """How images are sampled, one for each guidance. What the arguments leave open is as in the family's own code."""
    own = policy.published_sampling
    temperature, top_k, top_p = (
        getattr(own, name) if (given := getattr(config, name)) is None else given
        for name in ("temperature", "top_k", "top_p")
    )
    return [Sampling(temperature, cfg, top_k, top_p) for cfg in (config.cfg or (own.cfg,))]


def _skipped(folder: RunFolder, rewards: dict[str, RewardConfig]) -> str:
    """One line: which rewards are not measured, why, and the argument that brings them back, ready for a shell."""
    outside = {name: reward.reaches_outside() for name, reward in rewards.items()}
    names = ", ".join(f"{printable(name, 80)} ({printable(why)})" for name, why in outside.items() if why)
    content = {
        name: reward.model_dump(mode="json", exclude_defaults=True)
        | ({"function": "FILE.py:NAME"} if reward.is_missing else {})
        for name, reward in rewards.items()
    }
    argument = f"scores={json.dumps(content, ensure_ascii=False)}"
    fits = argument.isprintable() and len(argument) <= 1000
    override = shlex.quote(argument) if fits else "scores=..., with what you trust of the section reward there"
    return (
        f"left out of the scores, as {printable(folder.config)} names it and not the command line: {names}. If you "
        f"trust it, add {override}"
    )


def chunk_settings(task: Task, how: list[Sampling], subjects: Subjects) -> dict[str, Any]:
    """What the chunks depend on, beside the weights. how: one sampling for each guidance."""
    left_out = {*_FREE_TO_CHANGE, *_OF_PROMPTS} | (set() if subjects.asked is None else set(_OF_LABELS))
    settings = task.config.model_dump(mode="json", exclude=left_out) | subjects.settings()
    settings = {name: value for name, value in settings.items() if name not in _NEW or value}
    if task.family == "var":  # as the versions before wrote it
        del settings["family"]
    else:
        settings["family"] = task.family
    networks = task.config.feature_networks
    return settings | {
        "reference": task.reference,
        "vqvae": task.vqvae,
        "scores": {n: reward.model_dump(mode="json", exclude={"normalise"}) for n, reward in task.scores.items()},
        "classifier": task.classifier and task.classifier.model_dump(mode="json"),
        "temperature": how[0].temperature,
        "cfg": _one_or_list([each.cfg for each in how]),
        "top_k": how[0].top_k,
        "top_p": how[0].top_p,
        "features": _one_or_list(list(networks)) if networks else None,
    }


def _one_or_list(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values
