import pytest
import torch

from varfast.kernels import choices, configure
from varfast.kernels.selection import select

CPU = torch.device("cpu")


@pytest.fixture
def restore():
    yield
    configure({})


def test_choices_name_an_available_implementation_and_a_reason_for_every_op():
    found = {choice.op: choice for choice in choices(CPU)}
    assert {"sample_tokens", "selective_log_softmax", "block_causal_attention", "grpo_token_loss"} <= set(found)
    for choice in found.values():
        assert choice.impl in choice.available
        assert choice.why


def test_select_refuses_what_an_op_does_not_have():
    with pytest.raises(ValueError, match="impl='fast': gated_residual has .*reference"):
        select("gated_residual", "fast", CPU)


def test_configure_says_what_auto_means(restore):
    configure({"gated_residual": "reference", "sample_tokens": "auto"})
    choice = next(c for c in choices(CPU) if c.op == "gated_residual")
    assert (choice.impl, choice.why) == ("reference", "asked for in the config")
    configure({})
    assert all(c.why != "asked for in the config" for c in choices(CPU))
    with pytest.raises(ValueError, match="there is no op softmax; there are"):
        configure({"softmax": "reference"})
    with pytest.raises(ValueError, match="impl='fast': gated_residual has"):
        configure({"gated_residual": "fast"})
