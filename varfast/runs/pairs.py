"""The pairs of a run of DPO on disk: those that it keeps of each step, and those of another run that it learns from.

Axes: B image of a step, N pair.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from varfast.data.pairs import FOLDER, SavedPairs, TokensOf, begin_set, save_step
from varfast.distributed import decided_by_first
from varfast.files import read_json, save_text
from varfast.losses.pairs import Pairs, pair_numbers, preferences
from varfast.policies.protocol import Policy
from varfast.runs.setup import Setup
from varfast.types import Batch, InputError, Prompts, Rewards, Rollout

# In the folder of a run that learns from saved pairs: which ones they were.
LEARNED_FILE = "learned_pairs.json"


def keep_pairs(setup: Setup, step: int, pairs: Pairs, rollout: Rollout, rewards: Rewards) -> None:
    """Write the pairs of a step, from 1, that are used. rollout, rewards: of all its images. Raises: WriteError."""
    folder = setup.folder.path / FOLDER
    if not (folder / "set.json").exists():
        begin_set(folder, _tokens_of(setup, tuple(rollout.tokens_BL.shape[1:])))
    rows_N2 = pairs.rows_N2[pairs.used_N]
    ids_N = rollout.prompts.ids_B[rows_N2[:, 0]].tolist()
    save_step(folder, step, rows_N2, rollout.tokens_BL, [_described(setup, number) for number in ids_N], rewards)


def _described(setup: Setup, number: int) -> dict[str, Any]:
    """A prompt by what it is in any table."""
    if setup.prompts is not None:
        return {"prompt": setup.prompts.prompts[number].text}
    return {"label": number, "prompt": setup.names[number] if setup.names else str(number)}


class LearnedPairs:
    """The pairs that a run learns from in place of samples of its own.

    Raises: InputError as SavedPairs; for a set that is another one than when the run began; and where a folder was
        named in place of its config, which then may not name a path outside of it.
    """

    def __init__(self, setup: Setup, policy: Policy, of_folder: bool) -> None:
        config, address = setup.config, setup.config.loss.saved_pairs
        assert address is not None
        if of_folder:
            raise InputError(
                f"{setup.folder.path} was named, and not its config: if you trust dpo.pairs={address}, pass the config "
                f"as a file, as {setup.folder.config} run.dir={setup.folder.path}"
            )
        texts: Sequence[str] | None = None if setup.prompts is None else setup.prompts.texts
        of = _tokens_of(setup, policy.tokens_shape)
        self._pairs = SavedPairs(address, of, texts, setup.labels, config.run.seed)
        self._count = config.learned_images // 2
        self._temperature, self._cfg, self._device = config.rollout.temperature, config.rollout.cfg, policy.device
        decided_by_first(lambda: self._refuse_other_set(setup.folder.path / LEARNED_FILE, setup.found is not None))

    def __len__(self) -> int:
        return len(self._pairs)

    def batch(self, step: int) -> Batch:
        """Those of a step, from 0, in every process, and what is known of them for metrics.jsonl."""
        found = self._pairs.step(step, self._count)
        tokens_BL = found.tokens_N2L.flatten(0, 1).to(self._device)
        ids_B = found.ids_N.repeat_interleave(2).to(self._device)
        unknown_BL = torch.zeros(
            tokens_BL.shape, device=self._device
        )  # what nothing reads: by which model they were made
        rollout = Rollout(
            Prompts(ids_B), tokens_BL, unknown_BL, unknown_BL, self._temperature, on_policy=True, cfg=self._cfg
        )
        used_N = torch.ones(self._count, dtype=torch.bool, device=self._device)
        return replace(preferences(rollout, used_N), numbers=pair_numbers(found.rewards_N2.to(self._device), used_N))

    def _refuse_other_set(self, path: Path, going_on: bool) -> None:
        now = {"pairs": len(self._pairs), "sha256": self._pairs.digest}
        if not (going_on and path.exists()):
            save_text(path, json.dumps({"from": str(self._pairs.path), **now}) + "\n")
            return
        then = read_json(path)
        if not isinstance(then, dict) or any(then.get(key) != value for key, value in now.items()):
            raise InputError(
                f"dpo.pairs: {self._pairs.path} has changed since this run began: {len(self._pairs)} pairs now, and "
                f"not those that {path} notes; bring the set back as it was, or choose another run.dir"
            )


def _tokens_of(setup: Setup, shape: tuple[int, ...]) -> TokensOf:
    return TokensOf(setup.config.policy.family, shape, setup.config.policy.vocab_size)
