import numpy as np
import pytest
import torch

from varfast.grpo import group_advantages, groups_without_signal


def test_group_advantages_equal_numpy():
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0)) * 3 + 5
    groups = rewards.double().numpy().reshape(4, 6)
    exact = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(group_advantages(rewards, 6), exact.ravel(), rtol=0, atol=2e-6)


def test_group_advantages_are_exactly_zero_without_signal():
    # The mean of 16 times 0.1 is not 0.1 in float32, and eps is smaller than what is left.
    rewards = torch.cat([torch.full((16,), 0.1), torch.tensor([0.0, 1.0] * 8), torch.full((16,), 1e6)])
    advantages = group_advantages(rewards, 16)
    assert not advantages[:16].any()
    assert not advantages[32:].any()
    torch.testing.assert_close(advantages[16:32], torch.tensor([-1.0, 1.0] * 8))
    assert groups_without_signal(rewards, 16) == 2


def test_group_advantages_are_of_one_group_each():
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0])
    shifted = rewards + torch.tensor([0.0, 0.0, 100.0, 100.0])
    torch.testing.assert_close(group_advantages(rewards, 2), group_advantages(shifted, 2))
    assert not group_advantages(rewards.requires_grad_(), 2).requires_grad


@pytest.mark.parametrize(("size", "group", "message"), [(4, 1, "group_size=1"), (5, 2, "multiple of group_size=2")])
def test_group_advantages_refuse(size, group, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(size), group)
