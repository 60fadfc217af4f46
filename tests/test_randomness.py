import os

import pytest
import torch

from varfast.randomness import Purpose, deterministic, keyed_generator, order_may_vary


def draw(*key):
    return torch.rand(8, generator=keyed_generator(*key))


def test_a_generator_depends_on_every_part_of_its_key():
    first = draw(3, Purpose.LABELS, 5)
    assert torch.equal(first, draw(3, Purpose.LABELS, 5))
    others = ((4, Purpose.LABELS, 5), (3, Purpose.MINIBATCHES, 5), (3, Purpose.LABELS, 6), (3, Purpose.LABELS, 5, 1))
    for other in others:
        assert not torch.equal(first, draw(*other))


def unordered():
    return torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_deterministic_refuses_what_has_no_fixed_order_and_leaves_no_trace():
    with deterministic(True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
        assert not torch.utils.deterministic.fill_uninitialized_memory  # it would cost a write of all memory
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"), deterministic(True):
        unordered()
    with deterministic(False):
        unordered()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_order_may_vary_warns_where_deterministic_raises():
    with deterministic(True):
        with order_may_vary(), pytest.warns(UserWarning, match="put_ does not have a deterministic implementation"):
            unordered()
        with pytest.raises(RuntimeError, match="put_ does not have"):
            unordered()
    with order_may_vary():
        assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
