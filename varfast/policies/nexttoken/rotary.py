"""Tables of rotary positions: cosine and sine of the angle by which each pair of channels of q and k is turned.

Axes: N place of the sequence of inputs, P pair of channels (head dim / 2), 2 cosine and sine.
Sources: Su et al., arXiv:2104.09864; the two-dimensional table is LlamaGen's (Sun et al., arXiv:2406.06525).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def _frequencies(channels: int, base: float) -> Tensor:
    """(channels / 2,) float32, falling from 1."""
    return 1.0 / base ** (torch.arange(0, channels, 2, dtype=torch.float32)[: channels // 2] / channels)


def _table(angle_NP: Tensor) -> Tensor:
    return torch.stack([angle_NP.cos(), angle_NP.sin()], dim=-1)


@lru_cache(maxsize=16)
def rotary_1d(num_places: int, head_dim: int, device: torch.device, base: float = 10000.0) -> Tensor:
    """Pair p of place n is turned by n * base^(-2p / head_dim): (N, P, 2) float32."""
    with torch.device("cpu"):
        place_N = torch.arange(num_places, dtype=torch.float32)
        return _table(torch.outer(place_N, _frequencies(head_dim, base))).to(device)


@lru_cache(maxsize=16)
def rotary_2d(side: int, head_dim: int, device: torch.device, base: float = 10000.0) -> Tensor:
    """Of a class token and all tokens of a square image in raster order but the last: (side^2, P, 2) float32.

    The first half of the pairs is turned by the row, the second by the column, each with frequencies
    base^(-2j / (head_dim / 2)). The class token has cosines and sines of 0, as in the published models: its query and
    key are zero vectors, so that all places score it 0, and its value counts still.
    """
    with torch.device("cpu"):
        line = torch.outer(torch.arange(side, dtype=torch.float32), _frequencies(head_dim // 2, base))
        row, column = line.unsqueeze(1).expand(-1, side, -1), line.unsqueeze(0).expand(side, -1, -1)
        table = _table(torch.cat([row, column], dim=-1).flatten(0, 1))
        return torch.cat([torch.zeros_like(table[:1]), table[:-1]]).to(device)
