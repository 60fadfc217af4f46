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
from torch.nn.functional import pad


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
        version: how often the table has changed. What was captured with another one reads memory that is gone.
    """

    def __init__(self) -> None:
        self.version = -1
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptTable:
        return self

    def __len__(self) -> int:
        """P, without the unguided ones."""
        return len(self._length_P)

    @property
    def places(self) -> int:
        """T, of the longest prompt: of all, so that no result depends on what else is in a batch."""
        return self._token_2PT.shape[2]

    def clear(self) -> None:
        """Without a prompt."""
        self._id_of: dict[str, int] = {}
        # The device is named because a model is made without memory (on the device meta) before its weights are read.
        self._token_2PT = torch.zeros(2, 0, 1, dtype=torch.int32, device="cpu")
        self._length_P = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.version += 1

    def add(
        self,
        texts: Sequence[str],
        prompts: Sequence[Sequence[int]],
        unguided: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        """More rows, behind those that are there.

        Args:
            texts: of each.
            prompts: token ids of each, at least one.
            unguided: as many of each, as guidance has it.
        """
        both = (prompts, unguided)
        assert len(texts) == len(prompts) == len(unguided)
        places = max(self.places, *map(len, prompts))
        # Padding is looked up, and not read: any token will do.
        flat = [token for rows in both for row in rows for token in (*row, *[row[-1]] * (places - len(row)))]
        new_2PT = torch.tensor(flat, dtype=torch.int32, device=device).view(2, -1, places)
        old_2PT = pad(self._token_2PT.to(device), (0, places - self.places))
        for row, text in enumerate(texts, len(self)):
            self._id_of.setdefault(text, row)
        length_P = torch.tensor([len(row) for row in prompts], dtype=torch.int64, device=device)
        self._token_2PT = torch.cat([old_2PT, new_2PT], dim=1)
        self._length_P = torch.cat([self._length_P.to(device), length_P])
        self.version += 1

    def id_of(self, text: str) -> int | None:
        """Row of a text; None: it is not in the table."""
        return self._id_of.get(text)

    def rows(self, ids_R: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (R, T) int32, padded at the end, and lengths (R,) int64."""
        assert len(self), "no prompts have been set"
        token_RT = self._token_2PT.flatten(0, 1).index_select(0, ids_R)
        return token_RT, self._length_P.index_select(0, ids_R % len(self))

    def unguided(self, ids_R: Tensor) -> Tensor:
        """Ids of the same prompts without what they say."""
        return ids_R + len(self)
