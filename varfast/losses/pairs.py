"""Pairs of a preferred and a rejected image, from the rewards of the samples of each prompt.

Axes: B image, B = P prompts x G samples, group-major; N pair, N = P x k, the k pairs of a prompt adjacent; L token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varfast.losses.config import DPOConfig
from varfast.types import Batch, Rewards, Rollout


@dataclass(frozen=True)
class Pairs:
    """Attributes:
    rows_N2: (N, 2) int64, rows of the rollout: the preferred image, then the rejected one.
    used_N: (N,) bool, False for a pair that is left out.
    """

    rows_N2: Tensor
    used_N: Tensor


def best_and_worst(rewards_B: Tensor, group_size: int, pairs_per_prompt: int = 1, min_margin: float = 0.0) -> Pairs:
    """The best image of each group against the worst one, the second best against the second worst, and so on.

    Of equal rewards the image that was sampled first counts as the better one, so that the pairs are a function of the
    rewards. A pair is left out where its rewards are equal, or closer than min_margin.

    Args:
        rewards_B: (B,) finite; rows of one prompt are adjacent.
        group_size: G >= 2, divides B.
        pairs_per_prompt: k, with 2 k <= G, so that no image is in two pairs.
        min_margin: >= 0, in units of the reward.
    Returns: on the device of the rewards, without waiting for it.
    Raises: ValueError for G < 2, B % G != 0 or 2 k > G.
    Source: best and worst of N samples, arXiv:2505.17017.
    """
    if group_size < 2:
        raise ValueError(f"group_size={group_size}: a pair needs 2 images of a prompt; use 2 or more")
    if rewards_B.ndim != 1 or rewards_B.shape[0] % group_size:
        raise ValueError(
            f"rewards are {tuple(rewards_B.shape)}, want (B,) with B a multiple of group_size={group_size}"
        )
    if not 1 <= pairs_per_prompt <= group_size // 2:
        raise ValueError(f"pairs_per_prompt={pairs_per_prompt}: want 1 to {group_size // 2}, half of the group")
    rewards_PG = rewards_B.detach().view(-1, group_size)
    order_PG = rewards_PG.argsort(dim=1, descending=True, stable=True)
    best_Pk, worst_Pk = order_PG[:, :pairs_per_prompt], order_PG.flip(1)[:, :pairs_per_prompt]
    first_P1 = torch.arange(len(rewards_PG), device=rewards_B.device).unsqueeze(1) * group_size
    rows_N2 = (torch.stack([best_Pk, worst_Pk], dim=2) + first_P1.unsqueeze(2)).view(-1, 2)
    margin_N = _margins(rewards_B.detach()[rows_N2])
    return Pairs(rows_N2, (margin_N > 0) & (margin_N >= min_margin))


def pairs_of(rewards: Rewards, group_size: int, config: DPOConfig) -> Pairs:
    """`best_and_worst` of the images of a step by their total reward, as a run's config sets them."""
    return best_and_worst(rewards.total_B, group_size, config.pairs_per_prompt, config.min_margin)


def preferences(rollout: Rollout, used_N: Tensor) -> Batch:
    """The batch of pairs whose images are rows 2 i and 2 i + 1 of a rollout.

    Its advantages are 1 for the preferred image, -1 for the rejected one, and 0 for both of a pair that is not used.
    """
    used_N = used_N.float()
    return Batch.of(rollout, torch.stack([used_N, -used_N], dim=1).flatten())


def pair_numbers(rewards_N2: Tensor, used_N: Tensor) -> dict[str, Tensor]:
    """Of a step's metrics, () each: pairs, the number of those used, and their mean rewards and margin.

    rewards_N2: (N, 2), of the preferred and of the rejected image. NaN without a pair.
    """
    used = used_N.sum()
    chosen, rejected = torch.where(used_N.unsqueeze(1), rewards_N2.double(), 0.0).sum(dim=0) / used
    return {"pairs": used, "reward_chosen": chosen, "reward_rejected": rejected, "reward_margin": chosen - rejected}


def _margins(rewards_N2: Tensor) -> Tensor:
    return rewards_N2[:, 0].double() - rewards_N2[:, 1].double()
