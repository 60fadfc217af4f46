"""Prompts of several places and of unequal length in one batch, and the table that a run looks them up in.

Prompts are right-padded: row r has its prompt at places 0 ... p - 1, its image token j at place p + j, and padding at
its end. Nothing that counts sees padding: causal attention does not look ahead. So a row is computed as it would be
alone, teacher forcing needs no mask, and positions are those of the prompt itself.

Axes: R row of the model, P prompt of the table, T place of the longest prompt, N token of an image, L place
(T + N - 1), M places that are taken, C channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varfast.types import InputError


class Prompted(NamedTuple):
    """Inputs of the places of prompts.

    Attributes:
        x_BTC: in the dtype of the weights.
        length_B: int64, places of each prompt; None: each has one, T is 1.
    """

    x_BTC: Tensor
    length_B: Tensor | None


def sequence_of(length_R: Tensor, prompt_places: int, num_tokens: int) -> Tensor:
    """Where each place of a sequence is in [prompt of T places, tokens 0 ... N - 2]: (R, L) int64.

    The prompt, the tokens, and then the padding of the prompt: everything is taken once.
    """
    place_L = torch.arange(prompt_places + num_tokens - 1, device=length_R.device)
    length_R1, taken_R1 = length_R.unsqueeze(1), length_R.unsqueeze(1) + num_tokens - 1
    of_token_RL, of_padding_RL = place_L + (prompt_places - length_R1), place_L - (num_tokens - 1)
    after_RL = torch.where(place_L < taken_R1, of_token_RL, of_padding_RL)
    return torch.where(place_L < length_R1, place_L, after_RL)


def token_places(length_R: Tensor, num_tokens: int) -> Tensor:
    """(R, N) int64: the place that predicts each token of an image: the last of the prompt, then those of tokens."""
    return length_R.unsqueeze(1) - 1 + torch.arange(num_tokens, device=length_R.device)


def places_of(x_RLC: Tensor, place_RM: Tensor) -> Tensor:
    """(R, M, C): the rows of x at these places, which are different ones within a row. Differentiable in x.

    The gradient is written, not added: gather's own would add with atomics.
    """
    taken: Tensor = _Places.apply(x_RLC, place_RM)
    return taken


class _Places(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RLC: Tensor, place_RM: Tensor) -> Tensor:
        first_R1 = torch.arange(len(x_RLC), device=x_RLC.device).unsqueeze(1) * x_RLC.shape[1]
        index = (place_RM + first_R1).flatten()
        ctx.save_for_backward(index)
        ctx.shape = x_RLC.shape
        return x_RLC.flatten(0, 1).index_select(0, index).unflatten(0, place_RM.shape)

    @staticmethod
    def backward(ctx: Any, grad_RMC: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        rows, places, channels = ctx.shape
        grad = grad_RMC.new_zeros(rows * places, channels).index_copy_(0, index, grad_RMC.flatten(0, 1))
        return grad.view(ctx.shape), None


class PromptTable:
    """The prompts of a run as token ids; a prompt's id is its row. All copies of a model share one table.

    Row P + i is prompt i as guidance has it: without what it says.

    Attributes:
        version: how often the table was set. What was captured with another one reads memory that is gone.
        length_P: places of each prompt, with the unguided ones 2 P.
    """

    def __init__(self) -> None:
        self.version = 0
        self._token_PT = torch.zeros(0, 1, dtype=torch.int32)
        self.length_P = torch.zeros(0, dtype=torch.int64)

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptTable:
        return self

    def __len__(self) -> int:
        """P, without the unguided ones."""
        return len(self.length_P) // 2

    @property
    def places(self) -> int:
        """T, of the longest prompt: of all, so that no result depends on what else is in a batch."""
        return self._token_PT.shape[1]

    def set(self, prompts: Sequence[Sequence[int]], unguided: Sequence[Sequence[int]], device: torch.device) -> None:
        """Replace the table.

        Args:
            prompts: token ids of each, at least one.
            unguided: the same prompts as guidance has them.
        Raises: InputError if there are none.
        """
        rows = [*prompts, *unguided]
        assert len(prompts) == len(unguided)
        assert all(rows), "a prompt has a place at least"
        if not rows:
            raise InputError("prompts: got none, want at least one text")
        places = max(map(len, rows))
        flat = [token for row in rows for token in (*row, *[row[-1]] * (places - len(row)))]  # the padding is not read
        self._token_PT = torch.tensor(flat, dtype=torch.int32, device=device).view(-1, places)
        self.length_P = torch.tensor([len(row) for row in rows], device=device)
        self.version += 1

    def rows(self, ids_R: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (R, T) int32, padded at the end, and lengths (R,) int64."""
        return self._token_PT.index_select(0, ids_R), self.length_P.index_select(0, ids_R)

    def unguided(self, ids_R: Tensor) -> Tensor:
        """Ids of the same prompts without what they say."""
        return ids_R + len(self)
