"""What the images of an evaluation are to show: labels of the model, or prompts in a table of their own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from varfast.data.config import PromptsConfig
from varfast.data.labels import caption, label_names, label_numbers, label_pool, run_names
from varfast.data.prompts import PROMPTS_FILE, Prompt, PromptSet, drawn, read_prompts, saved_prompts
from varfast.evaluation.asked import Asked, groups_of
from varfast.evaluation.config import EvaluateConfig, SampleConfig, is_prompt_file
from varfast.policies.protocol import Policy
from varfast.policies.text import reads_texts
from varfast.runs.folder import RunFolder
from varfast.runs.pictures import prompt_title, with_domain
from varfast.types import InputError

# Of each domain of a run, which may have 100 000 prompts, unless max_prompts says how many.
_OF_A_DOMAIN = 500


@dataclass(frozen=True)
class Subjects:
    """Labels or prompts.

    Attributes:
        ids: that are sampled, ascending.
        count: of all labels of the model, or of the prompts.
        samples: images each.
        names: of all labels, if they have any.
        asked: the prompts, row i with id i; None for labels.
        groups: ids that the table has rows of its own for, by group.
    """

    ids: list[int]
    count: int
    samples: int
    names: list[str] | None
    asked: list[Asked] | None
    groups: dict[str, set[int]]

    @property
    def prompts(self) -> PromptSet | None:
        """The prompts, as rewards read them."""
        if self.asked is None:
            return None
        return PromptSet(tuple(Prompt(prompt.text, prompt.tag, prompt.metadata) for prompt in self.asked))

    def title(self, number: int) -> str:
        """Of a row of a picture."""
        if self.asked is None:
            return caption(number, self.names)
        return prompt_title(with_domain(self.asked[number].text, self.asked[number].domain))

    def give_to(self, policy: Policy) -> None:
        """Let a policy that reads texts make its table of these prompts."""
        if self.asked is not None:
            policy.set_prompts([prompt.text for prompt in self.asked])

    def settings(self) -> dict[str, Any]:
        """What a folder of results keeps of the prompts, by which others are told apart; {} for labels."""
        if self.asked is None:
            return {}
        rows = json.dumps([asdict(prompt) for prompt in self.asked]).encode()
        return {
            "prompts": f"{len(self.asked)}, sha256 {hashlib.sha256(rows).hexdigest()[:16]}",
            "samples_per_prompt": self.samples,
        }


def subjects_of(config: EvaluateConfig, policy: Policy) -> Subjects:
    """What the arguments name, of this model.

    Raises: InputError for labels that the model does not have, for prompts that cannot be read, and for labels of a
        model of texts or prompts of one of labels.
    """
    check_kind(config, policy)
    if reads_texts(policy):
        asked = asked_of(config, config.max_prompts)
        return Subjects(
            list(range(len(asked))), len(asked), config.samples_per_prompt, None, asked, groups_of(asked)
        )  # fmt: skip
    labels = sampled_labels(config, policy.num_classes)
    seen = seen_labels(config)
    groups = {} if seen is None else {"seen": seen, "unseen": set(range(policy.num_classes)) - seen}
    names = label_names(config.checkpoint, policy.num_classes)
    return Subjects(labels, policy.num_classes, config.samples_per_label, names, None, groups)


def check_kind(config: EvaluateConfig | SampleConfig, policy: Policy) -> None:
    """Raises: InputError for arguments of labels to a model of texts, and of prompts to one of labels."""
    of_labels, of_prompts = ("labels", "samples_per_label"), ("prompts", "samples_per_prompt", "max_prompts", "export")
    wrong, instead = (of_labels, of_prompts) if reads_texts(policy) else (of_prompts, of_labels)
    for key in wrong:
        if key in config.model_fields_set and getattr(config, key) is not None:  # sample has no max_prompts and export
            conditioned = "texts" if reads_texts(policy) else "labels"
            raise InputError(
                f"{key}: {config.checkpoint} is a model that is conditioned on {conditioned}; leave it out, and use "
                f"{' and '.join(instead[:2])}"
            )


def asked_of(config: EvaluateConfig | SampleConfig, most: int | None = None) -> list[Asked]:
    """The prompts that the arguments name, or those of the run, with their domains in the run.

    Args:
        most: of each domain, drawn by seed; None: all that the arguments name, 500 of each domain of the run.
    Raises: InputError if there are none, or they cannot be read.
    """
    run = Path(config.checkpoint).expanduser()
    of_run = saved_prompts(run).prompts if (run / PROMPTS_FILE).is_file() else ()
    if config.prompts is not None:
        known = {prompt.text: prompt.domain for prompt in of_run}
        found = _named(config.prompts)
        rows = [Asked(0, p.text, p.tag, known.get(p.text, "") if known else p.domain, dict(p.metadata)) for p in found]
    elif of_run:
        most = most or _OF_A_DOMAIN
        rows = [Asked(0, p.text, p.tag, p.domain, dict(p.metadata)) for p in of_run]
    else:
        raise InputError(
            f"prompts is missing: {config.checkpoint} is a model of texts, and no run folder with {PROMPTS_FILE}; give "
            "texts, as prompts=[a red cube, two dogs], or a .txt or .jsonl"
        )
    if most is not None:
        domains = dict.fromkeys(row.domain for row in rows)
        kept = {i for d in domains for i in drawn([i for i, r in enumerate(rows) if r.domain == d], most, config.seed)}
        rows = [row for i, row in enumerate(rows) if i in kept]
    return [Asked(i, row.text, row.tag, row.domain, row.metadata) for i, row in enumerate(rows)]


def _named(given: tuple[str, ...]) -> list[Prompt]:
    """Texts, or the prompts of files. Those of a text file get its name as their tag, as T2I-CompBench's have none."""
    if not is_prompt_file(given[0]):
        return list(PromptSet.of(given).prompts)
    found: list[Prompt] = []
    for source in given:
        tag = Path(source).stem if source.lower().endswith(".txt") else ""
        read = read_prompts(PromptsConfig(source=source), seed=0).prompts
        found += [Prompt(p.text, p.tag or tag, p.metadata, p.domain) for p in read]
    return found


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
