"""Group-relative advantages: how much better an image was than the others of its prompt.

Axes: B image; B = P prompts x G samples, group-major; L token over all scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from varfast.losses.config import GRPOConfig
from varfast.rewards import WeightedSum
from varfast.types import Normalise, Rewards


def group_advantages(rewards_B: Tensor, group_size: int, eps: float | None = 1e-6) -> Tensor:
    """Centre and scale rewards within each label's group.

    A_i = (r_i - mean_g) / (std_g + eps), population std, in float32; exactly 0 where a group's rewards are all equal.

    Args:
        rewards_B: (B,) finite; rows of one label are adjacent.
        group_size: G >= 2, divides B.
        eps: > 0, in units of the reward. None: A_i = r_i - mean_g, in units of the reward (arXiv:2503.20783).
    Returns: (B,) float32, no gradient.
    Raises: ValueError if G < 2 or B % G != 0.
    Source: GRPO, arXiv:2402.03300, eq. 2 of arXiv:2505.23331.
    """
    rewards_PG = _groups(rewards_B, group_size)
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    scale_P1 = 1.0 if eps is None else rewards_PG.std(dim=1, correction=0, keepdim=True) + eps
    # The mean of equal numbers is not always that number in float32, and eps is too small to hide the difference.
    advantages_PG = torch.where(_all_equal(rewards_PG).unsqueeze(1), 0.0, centred_PG / scale_P1)
    return advantages_PG.flatten()


def step_advantages(rewards: Rewards, reward: WeightedSum, group_size: int, config: GRPOConfig) -> Tensor:
    """`combined_advantages` of the images of a step, as a run's config sets them: (B,) float32."""
    eps = config.advantage_eps if config.normalise_std else None
    return combined_advantages(rewards, reward.weights, group_size, config.combine, eps, reward.apart)


def combined_advantages(
    rewards: Rewards,
    weights: dict[str, float],
    group_size: int,
    combine: Literal["sum_then_normalise", "normalise_then_sum"] = "sum_then_normalise",
    eps: float | None = 1e-6,
    apart: Mapping[str, Normalise] | None = None,
) -> Tensor:
    """Advantages of several rewards at once.

    sum_then_normalise: group_advantages of the weighted sum; a component counts by its weight times its spread.
    normalise_then_sum: A = sum_i w_i A_i, the weighted sum of each component's group_advantages; its spread, and its
    units, do not count. Exactly 0 where each component's rewards are all equal within the group.

    A component that is named in `apart` is not among those: A = A_(others) + w_i A_i, whatever `combine` says. So a
    reward of images and one of their distribution, whose numbers have nothing to do with one another, count as their
    weights say.

    Args:
        rewards: total_B and the components, before their weights.
        weights: of the components, by name.
        group_size, eps: as in group_advantages.
        apart: how components are normalised by themselves: "group": group_advantages; "batch": over the whole step, so
            that groups may differ in their mean; eps is in units of the standard deviation over the step then, so
            that the scale of the reward does not matter. "none": its raw numbers.
    Returns: (B,) float32, no gradient.
    Source of A_(images) + A_(distribution): arXiv:2603.23086.
    """
    apart = apart or {}
    together = [name for name in weights if name not in apart]
    if not apart and combine == "sum_then_normalise":
        return group_advantages(rewards.total_B, group_size, eps)
    parts = []
    if together and combine == "sum_then_normalise":
        total_B = torch.stack([weights[name] * rewards.components[name] for name in together]).sum(dim=0)
        parts.append(group_advantages(total_B, group_size, eps))
    elif together:
        parts += [weights[name] * group_advantages(rewards.components[name], group_size, eps) for name in together]
    parts += [weights[name] * _alone(rewards.components[name], how, group_size, eps) for name, how in apart.items()]
    return torch.stack(parts).sum(dim=0)


def _alone(rewards_B: Tensor, how: Normalise, group_size: int, eps: float | None) -> Tensor:
    rewards_B = rewards_B.detach().float()
    if how == "none":
        return rewards_B
    # In units of its own spread: a distance of moments may move by 1e-6 with an image, as little as eps.
    rewards_B = rewards_B / rewards_B.std(correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    return group_advantages(rewards_B, group_size if how == "group" else len(rewards_B), eps)


def groups_without_signal(rewards_B: Tensor, group_size: int) -> Tensor:
    """Number of groups whose rewards, or advantages, are all equal, () int64: only a KL term moves the policy there."""
    return _all_equal(_groups(rewards_B, group_size)).sum()


def _groups(rewards_B: Tensor, group_size: int) -> Tensor:
    if group_size < 2:
        raise ValueError(f"group_size={group_size}: an advantage is relative to a group; use 2 or more (the paper: 16)")
    if rewards_B.ndim != 1 or rewards_B.shape[0] % group_size:
        raise ValueError(
            f"rewards are {tuple(rewards_B.shape)}, want (B,) with B a multiple of group_size={group_size}"
        )
    return rewards_B.detach().float().view(-1, group_size)


def _all_equal(rewards_PG: Tensor) -> Tensor:
    return rewards_PG.amax(dim=1) == rewards_PG.amin(dim=1)
