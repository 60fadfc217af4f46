"""The stages of a GRPO step at the digits' size: 512 images of 30 tokens, 32 a minibatch, on a CPU.

    pytest bench --benchmark-only

FLOPs of a forward pass, an image (width 128, 2 blocks, 30 tokens, 64 codes): linear 2 x 30 x 2 x 12 x 128^2 = 23.6 M,
adaLN 2 x 2 x 6 x 128^2 = 0.4 M, attention 2 x 2 x 2 x 30^2 x 128 = 0.9 M, head 2 x 30 x 128 x 64 = 0.5 M: 25 MFLOP;
forward and backward 76 MFLOP.
"""

import pytest
import torch

from varfast.grpo import group_advantages
from varfast.types import ScoredRollout
from varfast.update import Updater


@pytest.fixture(scope="module")
def setting(digits_policy):
    config, policy = digits_policy
    labels = torch.arange(512) % 10
    return config, policy, labels, policy.sample(labels, 0.7, seed=0)


def test_rollout(benchmark, report_images, setting):
    _, policy, labels, _ = setting
    benchmark(policy.sample, labels, 0.7, seed=0)
    report_images(benchmark, 512)


def test_decode(benchmark, report_images, setting):
    _, policy, _, rollout = setting
    benchmark(policy.decode, rollout.tokens_BL)
    report_images(benchmark, 512)


def test_update(benchmark, report_images, setting):
    config, policy, _, rollout = setting
    rewards = torch.randn(512, generator=torch.Generator().manual_seed(0))
    scored = ScoredRollout(rollout, group_advantages(rewards, config.rollout.group_size))
    updater = Updater(policy, policy.frozen_copy(), config.grpo, config.update, 1, 0)
    benchmark(updater.step, scored, 0)
    report_images(benchmark, 512)
