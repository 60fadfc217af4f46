import pytest

from varfast.kernels import choices
from varfast.kernels.selection import select


def test_choices_name_an_available_implementation_and_a_reason_for_every_op():
    found = {choice.op: choice for choice in choices()}
    assert {"sample_tokens", "selective_log_softmax", "block_causal_attention", "grpo_token_loss"} <= set(found)
    for choice in found.values():
        assert choice.impl in choice.available
        assert choice.why


def test_select_refuses_what_an_op_does_not_have():
    with pytest.raises(ValueError, match="impl='triton': gated_residual has reference"):
        select("gated_residual", "triton")
