import time

import torch

from varfast.perf.stages import StageClock, stage


def test_clock_adds_up_a_stage_and_starts_anew_after_reading():
    with StageClock(torch.device("cpu")) as clock:
        for _ in range(2):
            with stage("decode"):
                time.sleep(0.02)
        with stage("reward"):
            pass
        read = clock.read()
        assert clock.read() == {}
    assert list(read) == ["decode", "reward"]
    assert read["decode"] >= 40  # ms; sleep takes at least what it is asked
    assert read["reward"] < read["decode"]


def test_stage_without_a_clock_only_names():
    with stage("rollout"):
        pass


def test_stages_are_seen_by_the_profiler():
    with torch.profiler.profile() as profiler, stage("rollout"):
        torch.ones(2).sum()
    assert "rollout" in {event.key for event in profiler.key_averages()}
