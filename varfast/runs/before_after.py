"""The table that training prints at its end: fresh samples before and after it, scored and classified.

Of prompts, those of each domain are sampled: rows such as "reward (held out)" stand below those of what is trained on.

before_after.json in the run folder keeps the values of every image, so that the difference gets an interval over pairs
of images, and so that a resumed run knows which settings its "before" was measured with.

Axes: B, N image.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from varfast.config import Config
from varfast.data.datasets import DigitsClassifier
from varfast.data.prompts import PromptSet, drawn
from varfast.evaluation.metrics import Numbers, difference_interval
from varfast.files import read_json, save_text
from varfast.policies.protocol import Policy
from varfast.progress import Progress
from varfast.randomness import EVAL_STEP
from varfast.rewards import WeightedSum
from varfast.tables import text_table
from varfast.types import InputError

FILE = "before_after.json"
_CHUNK_IMAGES = 256


class BeforeAfter:
    """Values of the same labels and random numbers before training and after it.

    Args:
        folder: of the run.
        config: of the run.
        labels: that the run trains on; the first eval.max_labels are sampled, eval.samples_per_label images each.
        prompts: of a run on texts: of each domain, eval.max_labels that run.seed chooses are sampled.
    Attributes:
        values: "before" and "after", each if it has been measured: (N,) float64 by name, which is reward,
            reward/<component>, entropy or accuracy (0 or 1); of prompts that are not trained on with their domain, as
            "reward (held out)".
    Raises: InputError for a classifier of labels where there are prompts.
    """

    def __init__(self, folder: Path, config: Config, labels: list[int], prompts: PromptSet | None = None) -> None:
        self._path, self._config = folder / FILE, config
        chosen = {"": labels[: config.eval.max_labels]}
        if prompts is not None:
            if config.eval.classifier is not None:
                raise InputError(
                    f"eval.classifier={config.eval.classifier} tells labels apart, and the run is on prompts; use "
                    "null, and rewards that read the prompt"
                )
            chosen = {
                _suffix(d): drawn(prompts.ids(d), config.eval.max_labels, config.run.seed) for d in prompts.domains
            }
        each = config.eval.samples_per_label
        self._labels = [label for ids in chosen.values() for label in ids for _ in range(each)]
        # How many images have values under names with this suffix, one suffix after another.
        self._counts = {suffix: each * len(ids) for suffix, ids in chosen.items()}
        # Everything that the values depend on and that may change when a run is resumed.
        self._settings = config.eval.model_dump(mode="json") | {
            "temperature": config.rollout.temperature,
            "seed": config.run.seed,
        }
        if config.rollout.cfg:  # a run of a version without it goes on with its "before"
            self._settings["cfg"] = config.rollout.cfg
        self.values: dict[str, Numbers] = {}
        self._step: int | None = None
        self._read()

    def before(self, base: Policy, reward: WeightedSum, micro_batch: int | None) -> Numbers:
        """The values of the base: from the run folder if they have the same settings, else measured now."""
        if self._labels and "before" not in self.values:
            self.values = {"before": self._measure("before", base, reward, micro_batch)}
            self._save()
        return self.values.get("before", {})

    def after(
        self, policy: Policy, reward: WeightedSum, step: int, micro_batch: int | None, trained: bool = True
    ) -> Numbers:
        """The values of the policy after `step` steps.

        Args:
            trained: whether a step was done since the run started; if not, values of the same step are read back.
        """
        if self._labels and (trained or self._step != step):
            self.values["after"], self._step = self._measure("after", policy, reward, micro_batch), step
            self._save()
        return self.values.get("after", {})

    def _measure(self, name: str, policy: Policy, reward: WeightedSum, micro_batch: int | None) -> Numbers:
        config, labels_N = self._config, torch.tensor(self._labels)
        classifier = DigitsClassifier() if config.eval.classifier == "digits" else None
        chunk = micro_batch or _CHUNK_IMAGES
        chunks = -(-len(labels_N) // chunk)
        parts: dict[str, list[torch.Tensor]] = {}
        with Progress(f"table of {name}", chunks, unit="chunk", quiet=chunks == 1) as progress:
            for first in range(0, len(labels_N), chunk):
                rollout = policy.sample(
                    labels_N[first : first + chunk],
                    config.rollout.temperature,
                    seed=config.run.seed,
                    cfg=config.rollout.cfg,
                    step=EVAL_STEP,
                    first_sample=first,
                )
                images = policy.decode(rollout.tokens_BL)
                rewards = reward(images, rollout.labels_B)
                found = {"reward": rewards.total_B}
                found |= {f"reward/{component}": score_B for component, score_B in rewards.components.items()}
                found["entropy"] = rollout.entropy_BL.mean(dim=1)
                if classifier is not None:
                    found["accuracy"] = classifier.ranks(images, rollout.labels_B) < 1
                for key, values_B in found.items():
                    parts.setdefault(key, []).append(values_B.double().cpu())
                progress.update()
        return self._by_domain({key: torch.cat(values).numpy() for key, values in parts.items()})

    def _by_domain(self, numbers: Numbers) -> Numbers:
        """The values of all images, by name and domain."""
        found: Numbers = {}
        first = 0
        for suffix, count in self._counts.items():
            found |= {f"{name}{suffix}": values_N[first : first + count] for name, values_N in numbers.items()}
            first += count
        return found

    def _save(self) -> None:
        content: dict[str, Any] = {"settings": self._settings, "labels": self._labels, "step": self._step}
        for when, numbers in self.values.items():
            content[when] = {name: values_N.tolist() for name, values_N in numbers.items()}
        save_text(self._path, json.dumps(content) + "\n")

    def _read(self) -> None:
        """Take the values in the folder if their settings are the same; a damaged file counts as none."""
        try:
            content = read_json(self._path)
            if content["settings"] != self._settings or content["labels"] != self._labels:
                return
            values = {when: as_numbers(content[when]) for when in ("before", "after") if when in content}
        except (InputError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return
        if all(len(values_N) == self._count(name) for found in values.values() for name, values_N in found.items()):
            self.values = values
            self._step = content["step"] if "after" in values else None

    def _count(self, name: str) -> int:
        """Images with a value of this name."""
        others = (count for suffix, count in self._counts.items() if suffix and name.endswith(suffix))
        return next(others, self._counts.get("", 0))


def _suffix(domain: str) -> str:
    """Of the names of a domain's values."""
    return "" if domain == "train" else f" ({domain.replace('_', ' ')})"


def as_numbers(content: dict[str, Any]) -> Numbers:
    """Values by name, from JSON. Raises: ValueError, TypeError, AttributeError or OverflowError for anything else."""
    numbers = {str(name): np.array(values, dtype=np.float64) for name, values in content.items()}
    if not all(values_N.ndim == 1 and np.isfinite(values_N).all() for values_N in numbers.values()):
        raise ValueError("want lists of finite numbers")
    return numbers


def means(numbers: Numbers) -> dict[str, float]:
    """The mean over images, by name."""
    return {name: float(values_N.mean()) for name, values_N in numbers.items()}


def table(values: dict[str, Numbers]) -> str:
    """Text: name, before, after, their difference with its 95 % interval over pairs of images."""
    before, after = values["before"], values["after"]
    rows = [("", "before", "after", "difference [95 % interval]")]
    for name, after_N in after.items():
        change = difference_interval(before[name], after_N)
        bounds = "" if change.low is None else f" [{change.low:+.3f}, {change.high:+.3f}]"
        means = f"{before[name].mean():8.3f}", f"{after_N.mean():8.3f}"
        rows.append((name, *means, f"{change.value:+10.3f}{bounds}"))
    return "\n".join(text_table(rows, "<>><"))
