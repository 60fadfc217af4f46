"""The prompts of an evaluation, which its folder keeps: what was asked for, under which number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from varfast.files import parse_json, read_text, save_text
from varfast.printable import printable
from varfast.types import InputError

FILE = "prompts.jsonl"
# Rows of the table and of the report: with more tags than this, results by tag are left out.
_MOST_TAGS = 60


@dataclass(frozen=True)
class Asked:
    """A prompt that images were sampled for.

    Attributes:
        id: its row among the prompts of the evaluation, of which the random numbers of its images are a function too.
        text: the prompt.
        tag: its kind, such as counting; "" without one.
        domain: "train" for one that the run trains on, "held_out", "out_of_domain", "other" for one that the run does
            not know; "" where no run says.
        metadata: what else its row holds.
    """

    id: int
    text: str
    tag: str = ""
    domain: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def row(self) -> dict[str, Any]:
        """Its row as a file of prompts holds it, GenEval's for example: tag, metadata and prompt."""
        return ({"tag": self.tag} if self.tag else {}) | self.metadata | {"prompt": self.text}


def groups_of(prompts: Sequence[Asked]) -> dict[str, set[int]]:
    """Ids by group, for the rows of a table: by domain and by tag, where there are several.

    Returns: by "held_out" for a domain, and "tag:counting" for a tag.
    """
    domains = list(dict.fromkeys(prompt.domain for prompt in prompts))
    tags = list(dict.fromkeys(prompt.tag for prompt in prompts))
    found: dict[str, set[int]] = {}
    if len(domains) > 1:
        found |= {domain: {p.id for p in prompts if p.domain == domain} for domain in domains if domain}
    if 1 < len(tags) <= _MOST_TAGS:
        found |= {f"tag:{tag}": {p.id for p in prompts if p.tag == tag} for tag in tags if tag}
    return found


def save_asked(folder: Path, prompts: Sequence[Asked]) -> None:
    """Write prompts.jsonl. Raises: InputError if the disk does not let it."""
    save_text(folder / FILE, "".join(json.dumps(asdict(prompt)) + "\n" for prompt in prompts))


def read_asked(folder: Path) -> list[Asked]:
    """The prompts of an evaluation. Raises: InputError if its folder has none, or they are damaged."""
    path = folder / FILE
    try:
        return [_asked(parse_json(line)) for line in read_text(path).splitlines()]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged: {printable(error)}; run the evaluation again in another folder"
                         ) from error  # fmt: skip


def _asked(row: dict[str, Any]) -> Asked:
    text = {name: row[name] for name in ("text", "tag", "domain")}
    if not all(isinstance(value, str) for value in text.values()) or not isinstance(row["metadata"], dict):
        raise TypeError("a row is no prompt")
    return Asked(int(row["id"]), metadata=row["metadata"], **text)
