"""The prompts of a run that trains a text-conditioned model. A prompt's id is its row in this table.

Everything that flows through a step holds ids, as it holds labels for class-conditional families: the table is read
once, a policy turns its texts into tokens once (`Policy.set_prompts`), and rewards, grids and reports look up texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from varfast.data.config import DRAWN, HUB_DATASETS, PromptsConfig
from varfast.files import parse_json, read_text, save_text
from varfast.printable import printable
from varfast.types import InputError

PROMPTS_FILE = "prompts.jsonl"
Domain = Literal["train", "held_out", "out_of_domain"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)
# What the largest public sets have: a table of more is a mistake.
_MOST = 10_000_000
_MOST_LETTERS = 20_000
_EXAMPLE = '{"prompt": "a red cube", "tag": "colour"}'


@dataclass(frozen=True)
class Prompt:
    """What an image is to show.

    Attributes:
        text: of the user.
        tag: what it tests, as "colour" or "counting"; "": none.
        metadata: what else the source says of it, for rewards and official evaluators.
        domain: "train": a run draws from it; else it is for evaluation alone.
    """

    text: str
    tag: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    domain: Domain = "train"


@dataclass(frozen=True)
class PromptSet:
    """A table of prompts.

    Attributes:
        prompts: row i is id i.
    """

    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def texts(self) -> list[str]:
        """Of all rows."""
        return [prompt.text for prompt in self.prompts]

    def ids(self, domain: Domain) -> list[int]:
        """Rows of a domain, ascending."""
        return [row for row, prompt in enumerate(self.prompts) if prompt.domain == domain]

    @property
    def domains(self) -> list[Domain]:
        """Those that have a prompt, in the order of DOMAINS."""
        there = {prompt.domain for prompt in self.prompts}
        return [domain for domain in DOMAINS if domain in there]

    @classmethod
    def of(cls, texts: Sequence[str]) -> PromptSet:
        """Texts alone, as a user of the Python API gives them. Raises: InputError for what is no text."""
        return cls(tuple(Prompt(_text(text, "prompts", number)) for number, text in enumerate(texts, 1)))


def run_prompts(config: PromptsConfig, seed: int, folder: Path, going_on: bool, of_folder: bool) -> PromptSet:
    """The prompts of a run: of the file in its folder if it goes on, else of their source. Nothing is written.

    Args:
        of_folder: no source outside of the folder is read.
    Raises: InputError for what cannot be read, or has no prompt to train on.
    """
    saved = folder / PROMPTS_FILE
    if (going_on or of_folder) and saved.exists():
        return saved_prompts(folder)
    if of_folder and config.source not in DRAWN:
        raise InputError(
            f"{saved} is gone; {folder} was named, and not its config: if you trust prompts.source="
            f"{printable(config.source)}, pass the config as a file, as {folder / 'config.yaml'} run.dir={folder}"
        )
    if going_on:
        print(f"{saved} is gone; the prompts are what prompts.source={printable(config.source)} holds now, unchecked")
    return read_prompts(config, seed)


def read_prompts(config: PromptsConfig, seed: int) -> PromptSet:
    """The prompts that a config names, each text once: those of training and those that are kept for evaluation.

    Args:
        seed: of the run, which chooses what is held out, and the share of the rest that it trains on.
    Raises: InputError for what cannot be read, or has no prompt to train on.
    """
    found = list(_once(_read(config.source, config)))
    wanted = None if config.tags is None else set(config.tags)
    if wanted is not None and (unknown := wanted - {prompt.tag for prompt in found}):
        known = ", ".join(sorted({printable(prompt.tag) for prompt in found if prompt.tag})[:20]) or "none"
        raise InputError(
            f"prompts.tags: no prompt of {config.source} has the tag {sorted(unknown)[0]!r}; it has {known}"
        )
    apart = [prompt for prompt in found if prompt.domain != "train"]
    train = [prompt for prompt in found if prompt.domain == "train" and (wanted is None or prompt.tag in wanted)]
    count = int(config.held_out) if config.held_out >= 1 else round(config.held_out * len(train))
    if count >= len(train):
        raise InputError(
            f"prompts: {len(train)} prompts of {config.source} to train on, of which held_out={config.held_out:g} "
            "leaves none; lower it, or give more prompts"
        )
    order = _order(len(train), seed)
    held_out, left = order[:count], order[count:]
    kept = sorted(left[: max(1, round(config.share * len(left)))])
    rows = [train[i] for i in kept]
    rows += [replace(train[i], domain="held_out") for i in sorted(held_out)] + apart
    if config.out_of_domain is not None:
        there = {prompt.text for prompt in rows}
        others = _once(_read(config.out_of_domain, config))
        rows += [replace(prompt, domain="out_of_domain") for prompt in others if prompt.text not in there]
    return PromptSet(tuple(rows))


def drawn(ids: Sequence[int], most: int, seed: int) -> list[int]:
    """At most `most` of the ids, in their order: a choice that is fixed by the seed."""
    if len(ids) <= most:
        return list(ids)
    return [ids[place] for place in sorted(_order(len(ids), seed)[:most])]


def save_prompts(prompts: PromptSet, folder: Path) -> None:
    """Keep a run's prompts in its folder, from which it goes on. Raises: WriteError."""
    save_text(folder / PROMPTS_FILE, "".join(f"{line}\n" for line in _lines(prompts)))


def saved_prompts(folder: Path) -> PromptSet:
    """The prompts that a run keeps in its folder. Raises: InputError if they are missing or damaged."""
    path = folder / PROMPTS_FILE
    if not path.exists():
        raise InputError(f"{folder} has no {PROMPTS_FILE}, which holds the prompts of its run")
    return PromptSet(tuple(_of_rows(_json_lines(path), str(path), "prompt", "tag")))


def _lines(prompts: PromptSet) -> Iterator[str]:
    for prompt in prompts.prompts:
        of_run = {"prompt": prompt.text, "tag": prompt.tag, "domain": prompt.domain}
        yield json.dumps(dict(prompt.metadata) | of_run, ensure_ascii=False)


def _order(count: int, seed: int) -> list[int]:
    """A random order of `count` rows, a function of the seed alone."""
    import torch

    from varfast.randomness import Purpose, keyed_generator

    order: list[int] = torch.randperm(count, generator=keyed_generator(seed, Purpose.PROMPTS)).tolist()
    return order


def _once(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """Without those whose text came before."""
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.text not in seen:
            seen.add(prompt.text)
            yield prompt


def _read(source: str, config: PromptsConfig) -> list[Prompt]:
    if source in DRAWN:
        from varfast.data.captions import WORLDS

        return WORLDS[source].prompts()
    if source.startswith(HUB_DATASETS):
        rows: Iterable[Mapping[str, Any]] = _hub_rows(source, config.split)
        found = list(_of_rows(rows, source, config.column, config.tag_column))
    else:
        path = Path(source).expanduser()
        if path.suffix in (".jsonl", ".json"):
            found = list(_of_rows(_json_lines(path), source, config.column, config.tag_column))
        else:
            lines = read_text(path).split("\n")
            found = [Prompt(_text(line, source, n)) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{source} holds no prompt")
    return found


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise InputError(
                f"{path}, line {number} is not JSON: {printable(error)}; want an object a line, as {_EXAMPLE}"
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is no JSON object; want one a line, as {_EXAMPLE}")
        yield row


def _hub_rows(source: str, split: str) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"prompts of {source} need the package datasets: pip install datasets") from error
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(source.removeprefix(HUB_DATASETS), split=split)
    except (OSError, ValueError) as error:  # no such set or split, no network
        raise InputError(f"{source}, split {split!r} cannot be read: {printable(error, 500)}") from error
    return rows


def _of_rows(rows: Iterable[Mapping[str, Any]], source: str, column: str, tag_column: str) -> Iterator[Prompt]:
    for number, row in enumerate(rows, 1):
        if number > _MOST:
            raise InputError(f"{source} holds more than {_MOST} prompts")
        if column not in row:
            known = ", ".join(printable(str(key)) for key in row)[:300]
            raise InputError(
                f"{source}, row {number} has no {column!r}, only {known}; prompts.column names the text's key"
            )
        tag, domain = row.get(tag_column), row.get("domain", "train")
        if domain not in DOMAINS:
            raise InputError(
                f"{source}, row {number}: domain={printable(domain, 60)}: want one of {', '.join(DOMAINS)}"
            )
        metadata = {str(key): value for key, value in row.items() if key not in (column, tag_column, "domain")}
        yield Prompt(_text(row[column], source, number), "" if tag is None else str(tag), metadata, domain)


def _text(text: object, source: str, number: int) -> str:
    """As it is given, without white space around it."""
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{source}, prompt {number} is {printable(repr(text), 60)}; want text")
    if len(text) > _MOST_LETTERS:
        raise InputError(f"{source}, prompt {number} has {len(text)} letters; want at most {_MOST_LETTERS}")
    return text.strip()
