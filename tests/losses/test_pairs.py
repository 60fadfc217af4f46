"""Which images of a prompt become a pair."""

import math

import pytest
import torch

from varfast.losses.pairs import best_and_worst, pair_numbers


def by_hand(rewards, group_size, k, min_margin):
    """(row of the better one, row of the worse one, whether it is used) of every pair, by sorting a list."""
    found = []
    for first in range(0, len(rewards), group_size):
        group = sorted(range(first, first + group_size), key=lambda row: (-rewards[row], row))
        for rank in range(k):
            best, worst = group[rank], group[-1 - rank]
            margin = rewards[best] - rewards[worst]
            found.append((best, worst, margin > 0 and margin >= min_margin))
    return found


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("min_margin", [0.0, 0.5])
def test_best_and_worst_are_those_of_a_sorted_list(k, min_margin):
    generator = torch.Generator().manual_seed(0)
    for size in (4, 5, 8):
        # Few values, so that there are ties; some below 0.
        rewards = torch.randint(-2, 3, (6 * size,), generator=generator) * 0.25
        found = best_and_worst(rewards, size, k, min_margin)
        wanted = by_hand(rewards.tolist(), size, k, min_margin)
        assert [
            (*rows, used) for rows, used in zip(found.rows_N2.tolist(), found.used_N.tolist(), strict=True)
        ] == wanted


def test_equal_rewards_make_no_pair_that_is_used():
    found = best_and_worst(torch.tensor([0.1] * 3 + [0.1, 0.1, 0.1 + 1e-9]), 3)
    assert found.used_N.tolist() == [False, False]  # 1e-9 is lost in float32
    assert (found.rows_N2[:, 0] != found.rows_N2[:, 1]).all()
    assert best_and_worst(torch.tensor([-1e-30, -2e-30]), 2).used_N.tolist() == [True]


def test_a_margin_as_large_as_the_least_one_is_used():
    rewards = torch.tensor([0.0, 0.5, 0.0, 0.25])
    assert best_and_worst(rewards, 2, min_margin=0.5).used_N.tolist() == [True, False]
    assert best_and_worst(rewards, 2, min_margin=0.25).used_N.tolist() == [True, True]


def test_what_makes_no_pair_is_refused():
    with pytest.raises(ValueError, match="group_size=1: a pair needs 2 images of a prompt"):
        best_and_worst(torch.zeros(4), 1)
    with pytest.raises(ValueError, match="multiple of group_size=3"):
        best_and_worst(torch.zeros(4), 3)
    with pytest.raises(ValueError, match="pairs_per_prompt=2: want 1 to 1, half of the group"):
        best_and_worst(torch.zeros(6), 3, 2)


def test_numbers_are_of_the_pairs_that_are_used():
    numbers = pair_numbers(torch.tensor([[1.0, -1.0], [5.0, 5.0], [0.5, 0.0]]), torch.tensor([True, False, True]))
    assert {name: float(value) for name, value in numbers.items()} == {
        "pairs": 2,
        "reward_chosen": 0.75,
        "reward_rejected": -0.5,
        "reward_margin": 1.25,
    }
    assert math.isnan(pair_numbers(torch.zeros(1, 2), torch.tensor([False]))["reward_margin"])
