from types import SimpleNamespace

import pytest

from varfast.runs import time_left
from varfast.runs.run import Run
from varfast.runs.time_left import TimeLeft, multiples_left


def test_the_first_step_counts_until_there_is_another():
    left = TimeLeft()
    assert left.seconds(5, {}) == 0.0
    left.step(60.0)
    assert left.seconds(5, {}) == 300.0
    for seconds in (2.0, 2.0, 50.0):
        left.step(seconds)
    assert left.step_s == 2.0  # the median: one slow step changes nothing
    assert left.seconds(5, {}) == 10.0


def test_what_is_done_beside_the_steps_counts_as_long_as_it_took_last(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr(time_left.time, "perf_counter", lambda: now_s[0])
    left = TimeLeft()
    left.step(1.0)
    for seconds in (30.0, 7.0):
        with left.aside("grid"):
            now_s[0] += seconds
    assert left.seconds(10, {"grid": 3, "never seen": 5}) == 10.0 + 3 * 7.0


@pytest.mark.parametrize("every", [1, 3, 4, 20])
def test_multiples_left_counts_as_the_steps_do(every):
    for total in range(1, 13):
        for done in range(total + 1):
            ahead = [step for step in range(done + 1, total + 1) if step % every == 0 or step == total]
            assert multiples_left(done, total, every) == len(ahead)


def test_evaluations_grids_and_checkpoints_of_a_run_are_counted(make_config):
    """After step 2 of 10: grids after 5 and 10, checkpoints after 3, 6, 9 and 10, evaluations after 4, 8 and 10."""
    left = TimeLeft()
    left.step(1.0)
    left._aside_s = {"grid": 10.0, "checkpoint": 1000.0}
    run = SimpleNamespace(state=SimpleNamespace(step=2), total_steps=10, _left=left)
    run._before_after = SimpleNamespace(seconds=1e5)
    for every, evaluations in ((4, 3), (None, 1)):  # without them, the table of after
        run.config = make_config(eval__every=every, log__grid_every=5, log__checkpoint_every=3)
        assert Run._left_s(run) == 8 + 2 * 10 + 4 * 1000 + evaluations * 1e5
