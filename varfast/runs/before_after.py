"""The table that training prints at its end: fresh samples before and after it, scored and classified.

Prompts of each domain are sampled, and labels that are held out, if eval.held_out_labels asks for them: rows such as
"reward (held out)" stand below those of what is trained on.

before_after.json in the run folder keeps the values of every image, so that the difference gets an interval over pairs
of images, and so that a resumed run knows which settings its "before" was measured with.

Axes: B, N image.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from varfast.config import Config
from varfast.data.datasets import DigitsClassifier
from varfast.data.prompts import DOMAINS, Domain, PromptSet, drawn
from varfast.distributed import ALONE, World, decided_by_first
from varfast.evaluation.metrics import Numbers, difference_interval
from varfast.files import leaves, read_json, save_text
from varfast.policies.checks import check_finite
from varfast.policies.protocol import Policy
from varfast.printable import printable
from varfast.progress import Progress
from varfast.randomness import EVAL_STEP, Key
from varfast.rewards import WeightedSum
from varfast.runs.failures import failure_of_all
from varfast.runs.folder import differences
from varfast.tables import text_table
from varfast.types import InputError, Prompts, Sampling

FILE = "before_after.json"
_CHUNK_IMAGES = 256


class BeforeAfter:
    """Values of the same labels and random numbers before training, after some of its steps, and after it.

    All processes of a run sample and score a part of the images. The first one keeps the values in the run folder.

    Args:
        folder: of the run.
        config: of the run.
        labels: that the run trains on; the first eval.max_labels are sampled, eval.samples_per_label images each.
            eval.held_out_labels of the others, which run.seed chooses, too.
        prompts: of a run on texts: of each domain, eval.max_labels that run.seed chooses are sampled.
        world: this process among those of the run.
    Attributes:
        values: "before" and "after", each if it has been measured: (N,) float64 by name, which is reward,
            reward/<component>, entropy or accuracy (0 or 1); of prompts and labels that are not trained on with their
            domain, as "reward (held out)". Those of the file are in the first process alone.
        seconds: that the last measurement took; 0 before the first one.
    Raises: InputError for a classifier of labels, or labels held out, where there are prompts or no such labels.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        labels: list[int],
        prompts: PromptSet | None = None,
        world: World = ALONE,
    ) -> None:
        self._path, self._config, self._world = folder / FILE, config, world
        chosen = _labels_of(config, labels) if prompts is None else _prompts_of(config, prompts)
        each = config.eval.samples_per_label
        self._labels = [label for ids in chosen.values() for label in ids for _ in range(each)]
        # How many images have values under names with this suffix, one suffix after another.
        self._counts = {suffix: each * len(ids) for suffix, ids in chosen.items()}
        # Everything that the values depend on and that may change when a run is resumed.
        self._settings = config.eval.model_dump(mode="json", exclude={"every", "held_out_labels"}) | {
            "temperature": config.rollout.temperature,
            "seed": config.run.seed,
            "reward": {name: reward.model_dump(mode="json") for name, reward in config.reward.items()},
        }
        # A run of a version without one of these goes on with its "before".
        if config.rollout.cfg:
            self._settings["cfg"] = config.rollout.cfg
        if config.eval.held_out_labels:
            self._settings["held_out_labels"] = config.eval.held_out_labels
        self.values: dict[str, Numbers] = {}
        self._step: int | None = None
        self._measured_step: int | None = None  # the same, if this process has measured it
        self.seconds = 0.0
        self._classifier: DigitsClassifier | None = None
        if world.is_main:
            self._read()

    def before(self, base: Policy, reward: WeightedSum, micro_batch: int | None) -> Numbers:
        """The values of the base: from the run folder if they have the same settings, else measured now.

        micro_batch: images of a process at a time.
        """
        if self._labels and not decided_by_first(lambda: "before" in self.values):
            found = self._measure("before", base, reward, micro_batch)
            assert found is not None
            self.values = {"before": found}
            self._save()
        return self.values.get("before", {})

    def after(
        self,
        policy: Policy,
        reward: WeightedSum,
        step: int,
        micro_batch: int | None,
        trained: bool = True,
        stops: Callable[[], bool] | None = None,
    ) -> Numbers | None:
        """The values of the policy after `step` steps.

        Args:
            trained: whether a step was done since the run started; if not, values of the same step are read back.
            stops: asked before each chunk of images, in each process: whether to give up.
        Returns: None if it was given up.
        """
        there = self._measured_step == step or (not trained and decided_by_first(lambda: self._step == step))
        if self._labels and not there:
            found = self._measure("after", policy, reward, micro_batch, stops)
            if found is None:
                return None
            self.values["after"], self._step, self._measured_step = found, step, step
            self._save()
        return self.values.get("after", {})

    def _measure(
        self,
        name: str,
        policy: Policy,
        reward: WeightedSum,
        micro_batch: int | None,
        stops: Callable[[], bool] | None = None,
    ) -> Numbers | None:
        """The values of all images, in all processes; None if a process was told to stop."""
        count, world = len(self._labels), self._world
        # Fewer images than processes: each samples all of them, as none may be without.
        shard = world.shard(count) if count >= world.size else slice(0, count)
        # Of all processes the largest: the plan of one that has fewer images of a step may name fewer.
        chunk = int(world.largest(micro_batch or _CHUNK_IMAGES))
        most = math.ceil(count / world.size) if count >= world.size else count  # images of a process
        chunks = math.ceil(most / chunk)
        parts: dict[str, list[torch.Tensor]] = {}
        begin_s = time.perf_counter()
        quiet, in_steps = chunks == 1 or not world.is_main, stops is not None
        name = "evaluation" if in_steps else f"table of {name}"
        with Progress(name, chunks, unit="chunk", quiet=quiet, patient=in_steps) as progress:
            for first in range(shard.start, shard.start + chunks * chunk, chunk):
                if stops is not None and world.any(stops()):
                    return None
                failure: BaseException | None = None
                try:
                    found = self._measured(first, min(first + chunk, shard.stop), policy, reward)
                except BaseException as error:  # noqa: BLE001 - raised again once all processes know
                    failure = error
                failure = failure_of_all(failure, world, f"the {name}")
                if failure is not None:
                    raise failure
                for key, values_b in found.items():
                    parts.setdefault(key, []).append(values_b)
                progress.update()
        values = {key: torch.cat(values) for key, values in parts.items()}
        if count >= world.size:
            values = {key: world.gather(values_n, count) for key, values_n in values.items()}
        self.seconds = time.perf_counter() - begin_s
        return self._by_domain({key: values_N.numpy() for key, values_N in values.items()})

    def _measured(self, first: int, end: int, policy: Policy, reward: WeightedSum) -> dict[str, torch.Tensor]:
        """The values of images `first` to `end`, on the CPU; empty where there are none."""
        if first >= end:
            return {}
        config = self._config
        how = Sampling(config.rollout.temperature, config.rollout.cfg)
        labels_b = torch.tensor(self._labels[first:end])
        # As a step samples, by the CUDA graphs that a step has captured where the number of images is the same.
        rollout, images = policy.sample_images(Prompts(labels_b), how, Key(config.run.seed, EVAL_STEP, first))
        check_finite(rollout, images)
        rewards = reward(images, rollout.labels_B, first_sample=first)
        found = {"reward": rewards.total_B}
        found |= {f"reward/{component}": score_B for component, score_B in rewards.components.items()}
        found["entropy"] = rollout.entropy_BL.mean(dim=1)
        if config.eval.classifier == "digits":
            self._classifier = self._classifier or DigitsClassifier()
            found["accuracy"] = self._classifier.ranks(images, rollout.labels_B) < 1
        return {key: values_b.double().cpu() for key, values_b in found.items()}

    def _by_domain(self, numbers: Numbers) -> Numbers:
        """The values of all images, by name and domain."""
        found: Numbers = {}
        first = 0
        for suffix, count in self._counts.items():
            found |= {f"{name}{suffix}": values_N[first : first + count] for name, values_N in numbers.items()}
            first += count
        return found

    def _save(self) -> None:
        if not self._world.is_main:
            return
        content: dict[str, Any] = {"settings": self._settings, "labels": self._labels, "step": self._step}
        for when, numbers in self.values.items():
            content[when] = {name: values_N.tolist() for name, values_N in numbers.items()}
        save_text(self._path, json.dumps(content) + "\n")

    def _read(self) -> None:
        """Take the values in the folder if their settings are the same; a damaged file counts as none."""
        try:
            content = read_json(self._path)
            there = content["settings"]
            if "reward" not in there and not any(key.startswith("reward") for key in self._config.run.allow_change):
                there = there | {"reward": self._settings["reward"]}  # a version that did not keep it
            if there != self._settings or content["labels"] != self._labels:
                self._say_what_changed(there)
                return
            values = {when: as_numbers(content[when]) for when in ("before", "after") if when in content}
        except (InputError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return
        if all(len(values_N) == self._count(name) for found in values.values() for name, values_N in found.items()):
            self.values = values
            self._step = content["step"] if "after" in values else None

    def _say_what_changed(self, there: dict[str, Any]) -> None:
        lines = differences(leaves(there), leaves(self._settings), printable)
        print("\n".join(["the table of before and after is measured again, as it was of", *lines.values()]))
        if self._config.eval.every:
            print("eval/... in metrics.jsonl are of these settings from here on, and at step 0")

    def _count(self, name: str) -> int:
        """Images with a value of this name."""
        others = (count for suffix, count in self._counts.items() if suffix and name.endswith(suffix))
        return next(others, self._counts.get("", 0))


def _labels_of(config: Config, labels: list[int]) -> dict[str, list[int]]:
    """Labels by the suffix of their values' names. labels: that the run trains on."""
    most, chosen = config.eval.held_out_labels, {"": labels[: config.eval.max_labels]}
    if most:
        others = sorted(set(range(config.policy.num_classes)) - set(labels))
        if not others:
            raise InputError(
                f"eval.held_out_labels={most}: the run draws from all {len(labels)} labels; leave some out by "
                "rollout.labels or rollout.label_share, or use eval.held_out_labels=0"
            )
        chosen[_suffix("held_out")] = drawn(others, most, config.run.seed)
    return chosen


def _prompts_of(config: Config, prompts: PromptSet) -> dict[str, list[int]]:
    """Rows of prompts by the suffix of their values' names."""
    if config.eval.classifier is not None:
        raise InputError(
            f"eval.classifier={config.eval.classifier} tells labels apart, and the run is on prompts; use null, and "
            "rewards that read the prompt"
        )
    if config.eval.held_out_labels:
        raise InputError(
            f"eval.held_out_labels={config.eval.held_out_labels}: the run is on prompts; hold some out by "
            "prompts.held_out"
        )
    return {_suffix(d): drawn(prompts.ids(d), config.eval.max_labels, config.run.seed) for d in prompts.domains}


def _suffix(domain: str) -> str:
    """Of the names of a domain's values."""
    return "" if domain == "train" else f" ({domain.replace('_', ' ')})"


def domain_of(name: str) -> tuple[str, Domain]:
    """What is measured, and of which domain, from a name of the table: "reward (held out)" is reward of held_out."""
    for domain in DOMAINS:
        if domain != "train" and name.endswith(_suffix(domain)):
            return name.removesuffix(_suffix(domain)), domain
    return name, "train"


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
