"""Pairs of a preferred and a rejected image on disk: written by one run, learned from by another.

    pairs/set.json                 what the tokens are of: family, shape, size of the vocabulary
    pairs/step_000001.safetensors  tokens, (N, 2, ...) int32: of each pair the preferred image, then the rejected one
    pairs/step_000001.jsonl        a line for each pair: {"label": 3, "prompt": "...", "reward": [0.9, 0.2], "rewards":
                                   {"bright": [0.9, 0.2]}}; rewards of both images

A prompt is kept as the text that it is (a label by its number too), not as its row in the run's table of prompts, so
that a set fits a run with another table. A step counts once its .safetensors is there, which is written last.

Axes: N pair of a step, M pair of the whole set, L token.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from varfast.files import open_regular, parse_json, read_json, reason, save_text, write_atomically
from varfast.printable import printable
from varfast.randomness import Purpose, keyed_generator
from varfast.types import InputError, Rewards

FOLDER, _ABOUT = "pairs", "set.json"
_FORMAT = 1
_MOST_LINE_BYTES = 2**20
_MOST_PAIRS = 100_000_000


@dataclass(frozen=True)
class TokensOf:
    """What the tokens of a set are of. Sets and policies of equal ones fit together.

    Attributes:
        family: policy.family.
        shape: of an image's tokens.
        vocab_size: V.
    """

    family: str
    shape: tuple[int, ...]
    vocab_size: int


@dataclass(frozen=True)
class SavedBatch:
    """Pairs of a step.

    Attributes:
        ids_N: (N,) int64, prompts.
        tokens_N2L: (N, 2, ...) int64, the preferred image first.
        rewards_N2: (N, 2) float32.
    """

    ids_N: Tensor
    tokens_N2L: Tensor
    rewards_N2: Tensor


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def begin_set(folder: Path, of: TokensOf) -> None:
    """Write what a set is of, before its first step. Raises: WriteError."""
    about = {"format": _FORMAT, "family": of.family, "shape": list(of.shape), "vocab_size": of.vocab_size}
    save_text(folder / _ABOUT, json.dumps(about) + "\n")


def save_step(
    folder: Path, step: int, rows_N2: Tensor, tokens_BL: Tensor, prompts_N: Sequence[dict[str, Any]], rewards: Rewards
) -> None:
    """Write the pairs of a step, in place of those of an earlier attempt at it.

    Args:
        step: from 1.
        rows_N2: of the preferred and the rejected image among the images of the step.
        tokens_BL, rewards: of those images.
        prompts_N: {"prompt": text}, and {"label": number} of a family that is conditioned on labels.
    Raises: WriteError.
    """
    if not len(rows_N2):
        return
    of_pairs = rewards.total_B[rows_N2].tolist()
    parts = {name: score_B[rows_N2].tolist() for name, score_B in rewards.components.items()}
    lines = [
        {**prompt, "reward": of_pairs[i], "rewards": {name: scores[i] for name, scores in parts.items()}}
        for i, prompt in enumerate(prompts_N)
    ]
    path = folder / f"step_{step:06d}.safetensors"
    content = safetensors.torch.save({"tokens": tokens_BL[rows_N2].to("cpu", torch.int32)}, {"format": "pt"})
    save_text(path.with_suffix(".jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
    write_atomically(path, lambda file: file.write(content))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def set_folder(address: str) -> Path:
    """Where a set lies that is named by its folder, or by that of its run. Raises: InputError if there is none."""
    path = Path(address).expanduser()
    for folder in (path, path / FOLDER):
        if (folder / _ABOUT).is_file():
            return folder
    raise InputError(
        f"dpo.pairs={address}: there is no {path / FOLDER / _ABOUT}; want the folder of a run with dpo.save_pairs=true"
    )


class SavedPairs:
    """A set that a run learns from. Its tokens stay on the disk until a step needs them.

    Args:
        address: its folder, or that of the run that wrote it.
        of: what the policy's tokens are.
        prompts: texts of the run's table of prompts, whose place is their id; None: ids are labels.
        drawn: ids that the run trains on; the others are kept for evaluation.
        seed: of the run, for the order.
    Attributes:
        ids_M: (M,) int64, the prompt of each pair.
        digest: SHA-256 of prompts and rewards, which says whether it is still the same set.
    Raises: InputError for a folder that holds no such set, a set of other tokens, and a prompt that is not in the
        table or kept for evaluation, which it names.
    """

    def __init__(
        self, address: str, of: TokensOf, prompts: Sequence[str] | None, drawn: Iterable[int], seed: int
    ) -> None:
        self.path = set_folder(address)
        self._of, self._seed = of, seed
        self._check_about()
        table = None if prompts is None else {text: i for i, text in reversed(list(enumerate(prompts)))}
        known = frozenset(drawn)
        hashed, ids, rewards = hashlib.sha256(), list[int](), list[list[float]]()
        self._places: list[tuple[Path, int]] = []  # of each pair its file and its place there
        for file in self._files():
            for number, line in enumerate(_lines(file.with_suffix(".jsonl"))):
                hashed.update(line)
                where = f"{file.with_suffix('.jsonl')}: line {number + 1}"
                row = _row(line, where)
                ids.append(_prompt_id(row, table, known, where))
                rewards.append(row["reward"])
                self._places.append((file, number))
        if not ids:
            raise InputError(f"dpo.pairs={address}: {self.path} holds no pairs; its run has not saved a step yet")
        self.ids_M, self._rewards_M2, self.digest = torch.tensor(ids), torch.tensor(rewards), hashed.hexdigest()

    def __len__(self) -> int:
        return len(self.ids_M)

    def step(self, step: int, count: int) -> SavedBatch:
        """The pairs of a step: `count` of them, the next ones of an order that is drawn anew for every pass.

        A function of seed and step alone: a run that goes on reads what it would have read.
        Raises: InputError for a file that has changed or is damaged.
        """
        rows = torch.tensor(
            [self._order(n // len(self))[n % len(self)] for n in range(step * count, (step + 1) * count)]
        )
        tokens = torch.stack([self._tokens(*self._places[row]) for row in rows.tolist()])
        return SavedBatch(self.ids_M[rows], tokens, self._rewards_M2[rows])

    def _order(self, epoch: int) -> list[int]:
        if self._drawn[0] != epoch:
            generator = keyed_generator(self._seed, Purpose.PAIRS, epoch)
            self._drawn = epoch, torch.randperm(len(self), generator=generator).tolist()
        return self._drawn[1]

    _drawn: tuple[int, list[int]] = (-1, [])

    def _tokens(self, file: Path, place: int) -> Tensor:
        """(2, ...) int64 of one pair."""
        try:
            open_regular(file).close()
            with safe_open(file, framework="pt") as opened:
                found: Tensor = opened.get_slice("tokens")[place : place + 1]
        except (OSError, SafetensorError, IndexError) as error:
            raise InputError(f"{file} cannot be read: {printable(error)}") from error
        if found.shape != (1, 2, *self._of.shape) or found.dtype != torch.int32:
            raise InputError(
                f"{file} holds tokens {found.dtype} {list(found.shape)} at place {place}, want int32 "
                f"{[1, 2, *self._of.shape]}; it is damaged, or of another set than {_ABOUT} says"
            )
        if not ((found >= 0) & (found < self._of.vocab_size)).all():
            raise InputError(f"{file} holds tokens outside of 0..{self._of.vocab_size - 1}; it is damaged")
        return found[0].long()

    def _check_about(self) -> None:
        about = read_json(self.path / _ABOUT)
        wanted = {"format": _FORMAT, "family": self._of.family, "shape": list(self._of.shape)}
        wanted["vocab_size"] = self._of.vocab_size
        found = {key: about.get(key) for key in wanted} if isinstance(about, dict) else {}
        if found != wanted:
            different = ", ".join(f"{k} {printable(found.get(k))}" for k in wanted if found.get(k) != wanted[k])
            raise InputError(
                f"dpo.pairs: {self.path} is of another kind of tokens ({different}) than this policy ("
                f"{', '.join(f'{key} {value}' for key, value in wanted.items())})"
            )

    def _files(self) -> list[Path]:
        """Of complete steps, in their order."""
        try:
            found = [f for f in self.path.iterdir() if re.fullmatch(r"step_[0-9]{6,9}\.safetensors", f.name)]
        except OSError as error:
            raise InputError(f"dpo.pairs: {self.path} cannot be read: {reason(error)}") from error
        return sorted(found, key=lambda file: int(file.stem.removeprefix("step_")))


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open_regular(path) as file:
            while line := file.readline(_MOST_LINE_BYTES):
                yield line
    except OSError as error:
        raise InputError(f"dpo.pairs: {path} cannot be read: {reason(error)}") from error


def _row(line: bytes, where: str) -> dict[str, Any]:
    """A line with a prompt and the rewards of both images."""
    try:
        row = parse_json(line)
        row["reward"] = [float(number) for number in row["reward"]]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise InputError(f"{where} is no pair as varfast writes it ({printable(error)})") from error
    if len(row["reward"]) != 2 or not all(abs(number) < float("inf") for number in row["reward"]):
        raise InputError(f"{where}: reward is {row['reward']}, want two numbers")
    return dict(row)


def _prompt_id(row: dict[str, Any], table: dict[str, int] | None, drawn: frozenset[int], where: str) -> int:
    if table is None:
        label = row.get("label")
        if type(label) is not int or label not in drawn:
            raise InputError(
                f"{where}: label is {printable(label)}, and this run trains on the {len(drawn)} labels {min(drawn)} to "
                f"{max(drawn)} that rollout.labels and rollout.label_share leave"
            )
        return label
    text = row.get("prompt")
    if not isinstance(text, str) or text not in table:
        raise InputError(
            f"{where}: the prompt {printable(text)!r} is not among this run's prompts; add it to prompts.source"
        )
    if table[text] not in drawn:
        raise InputError(
            f"{where}: the prompt {printable(text)!r} is kept for evaluation in this run; choose prompts (held_out, "
            "share, tags, run.seed) as the run that saved the pairs did"
        )
    return table[text]
