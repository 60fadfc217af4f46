"""Counts of the networks that rewards run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from varfast.perf.limits import stage_counts
from varfast.perf.memory import held_states
from varfast.perf.plan import plan_memory

CLIP = {"aes": {"type": "aesthetic"}, "clip": {"type": "clip", "pretrained": "openai", "prompt": "a painting"}}
HPS = {"hps": {"type": "hpsv2", "prompt": "a painting"}}


def reward_count(work):
    """Of a step of 512 images."""
    return stage_counts(work, plan_memory(work, None))["reward"]


def test_rewards_that_share_a_network_count_it_once(make_work):
    both = make_work(reward=CLIP)
    assert reward_count(both).flop == pytest.approx(512 * 162e9, rel=0.01)
    assert held_states(both).reward == pytest.approx(4 * 304e6, rel=0.01)
    three = make_work(reward=CLIP | HPS)
    assert reward_count(three).flop == pytest.approx(512 * (162e9 + 334e9), rel=0.02)
    assert reward_count(make_work()).flop == 0


def test_features_of_loo_fid_are_counted_once(make_work):
    fid = {"type": "loo_fid", "reference": "real.npz"}
    both = make_work(reward={"a": fid, "b": fid | {"covariance": "full", "ema": 0.9}})
    assert reward_count(both).flop == pytest.approx(512 * 11.42e9, rel=0.01)
    assert held_states(both).reward == 4 * 21_785_568
    shared = make_work(reward=CLIP | {"a": fid | {"features": "clip"}})
    assert reward_count(shared).flop == reward_count(make_work(reward=CLIP)).flop


@pytest.mark.parametrize(("name", "reward"), [("ViT-L-14", CLIP["clip"]), ("ViT-H-14", HPS["hps"])])
def test_flop_of_a_reward_network_is_what_pytorch_counts(make_work, name, reward):
    import open_clip

    with torch.device("meta"):
        tower = open_clip.model.CLIP(**open_clip.get_model_config(name)).visual
    with FlopCounterMode(display=False) as counter:
        tower(torch.zeros(1, 3, 224, 224, device="meta"))
    work = make_work(reward={"one": reward})
    assert reward_count(work).flop / 512 == pytest.approx(counter.get_total_flops(), rel=0.01)
    parameters = sum(p.numel() for p in tower.parameters())
    assert held_states(work).reward == pytest.approx(4 * parameters, rel=0.01)
