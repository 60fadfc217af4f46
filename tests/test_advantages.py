import numpy as np
import pytest
import torch

from varfast.advantages import combined_advantages, group_advantages, groups_without_signal
from varfast.types import Rewards


def test_group_advantages_equal_numpy():
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0)) * 3 + 5
    groups = rewards.double().numpy().reshape(4, 6)
    exact = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(group_advantages(rewards, 6), exact.ravel(), rtol=0, atol=2e-6)


def test_group_advantages_without_division_are_in_units_of_the_reward():
    rewards = torch.tensor([0.0, 1.0, 5.0, 5.5, 0.1, 0.1])
    expected = torch.tensor([-0.5, 0.5, -0.25, 0.25, 0.0, 0.0])
    torch.testing.assert_close(group_advantages(rewards, 2, None), expected)
    both = Rewards(2 * rewards, {"score": rewards})
    for combine in ("sum_then_normalise", "normalise_then_sum"):
        torch.testing.assert_close(combined_advantages(both, {"score": 2.0}, 2, combine, None), 2 * expected)


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


def two_rewards():
    """Of very different spread: a score of 1 to 10, and a bit. No signal: `score` in the last group of four."""
    generator = torch.Generator().manual_seed(1)
    components = {"score": torch.randn(12, generator=generator) * 3 + 5, "bit": torch.tensor([0.0, 1, 1] * 4)}
    components["score"][8:] = 0.1
    weights = {"score": 2.0, "bit": -0.5}
    return Rewards(2.0 * components["score"] - 0.5 * components["bit"], components), weights


def test_combined_advantages_equal_numpy_either_way():
    rewards, weights = two_rewards()

    def advantages(values):
        groups = np.asarray(values, dtype=np.float64).reshape(3, 4)
        spread = groups - groups.mean(1, keepdims=True)
        return np.where(np.ptp(groups, axis=1, keepdims=True) > 0, spread / (groups.std(1, keepdims=True) + 1e-6), 0.0)

    score, bit = (rewards.components[name].numpy() for name in ("score", "bit"))
    expected = {
        "sum_then_normalise": advantages(2.0 * score - 0.5 * bit),
        "normalise_then_sum": 2.0 * advantages(score) - 0.5 * advantages(bit),
    }
    for combine, values in expected.items():
        np.testing.assert_allclose(combined_advantages(rewards, weights, 4, combine), values.ravel(), atol=3e-6)
    assert abs(expected["sum_then_normalise"] - expected["normalise_then_sum"]).max() > 0.1


def test_combined_advantages_are_exactly_zero_without_signal():
    rewards, weights = two_rewards()
    for name in weights:
        rewards.components[name][4:8] = 0.1
    rewards = Rewards(sum(weights[n] * rewards.components[n] for n in weights), rewards.components)
    for combine in ("sum_then_normalise", "normalise_then_sum"):
        advantages = combined_advantages(rewards, weights, 4, combine)
        assert not advantages[4:8].any()
        assert groups_without_signal(advantages, 4) == 1


def test_combined_advantages_of_one_reward_differ_by_its_weight_alone():
    rewards = Rewards(3.0 * two_rewards()[0].components["score"], {"score": two_rewards()[0].components["score"]})
    plain, weighted = (
        combined_advantages(rewards, {"score": 3.0}, 4, c) for c in ("sum_then_normalise", "normalise_then_sum")
    )
    torch.testing.assert_close(3.0 * plain, weighted)


def test_combined_advantages_of_a_component_apart_equal_numpy_and_do_not_know_its_scale():
    rewards, weights = two_rewards()
    fid = torch.randn(12, generator=torch.Generator().manual_seed(2)) * 1e-3 + 0.01
    fid[4:8] += 0.002  # a group whose images are all good for the distribution
    weights = weights | {"fid": 0.7}

    def advantages(values, groups):
        values = np.asarray(values, dtype=np.float64).reshape(groups, -1)
        spread = values - values.mean(1, keepdims=True)
        return np.where(np.ptp(values, axis=1, keepdims=True) > 0, spread / values.std(1, keepdims=True).clip(1e-30), 0)

    score, bit = (rewards.components[name].numpy() for name in ("score", "bit"))
    others = {
        "sum_then_normalise": advantages(2.0 * score - 0.5 * bit, 3).ravel(),
        "normalise_then_sum": 2.0 * advantages(score, 3).ravel() - 0.5 * advantages(bit, 3).ravel(),
    }
    alone = {"group": advantages(fid, 3).ravel(), "batch": advantages(fid, 1).ravel(), "none": fid.double().numpy()}
    for combine, of_others in others.items():
        for how, of_fid in alone.items():
            for scale in (1.0, 1e-6, 1e6) if how != "none" else (1.0,):
                components = rewards.components | {"fid": fid * scale}
                total_B = sum(weights[name] * value for name, value in components.items())
                found = combined_advantages(Rewards(total_B, components), weights, 4, combine, apart={"fid": how})
                np.testing.assert_allclose(found, of_others + 0.7 * of_fid, atol=2e-5)
    assert alone["batch"][4:8].mean() > 0.5 > abs(alone["group"][4:8].mean())


def test_combined_advantages_of_components_that_are_all_apart():
    components = {"a": torch.tensor([0.0, 1.0, 5.0, 6.0]), "b": torch.tensor([3.0, 3.0, 3.0, 3.0])}
    found = combined_advantages(
        Rewards(components["a"] + components["b"], components),
        {"a": 2.0, "b": 1.0},
        2,
        apart={"a": "group", "b": "batch"},
    )
    torch.testing.assert_close(found, torch.tensor([-2.0, 2.0, -2.0, 2.0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("size", "group", "message"), [(4, 1, "group_size=1"), (5, 2, "multiple of group_size=2")])
def test_group_advantages_refuse(size, group, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(size), group)
