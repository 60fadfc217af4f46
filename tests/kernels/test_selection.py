import importlib.util
import sys
from dataclasses import replace

import pytest
import torch

from varfast import kernels
from varfast.kernels import choices, configure, selection
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


def arguments(op, dtype, head_dim=64, vocab=10, width=8):
    """Of an op with a Triton kernel, the tensor that decides first."""
    heads = [torch.randn(1, 2, 3, head_dim, dtype=dtype) for _ in range(3)]
    logits, x, vector = (
        torch.randn(1, 3, vocab, dtype=dtype),
        torch.randn(1, 3, width, dtype=dtype),
        torch.ones(1, width),
    )
    product = torch.randn(1, 3, 3 * 2 * head_dim, dtype=dtype)
    image = torch.randn(1, 32, 2, 2, dtype=dtype)
    return {
        "sample_tokens": (logits, torch.tensor([0, 0, 0]), 0),
        "selective_log_softmax": (logits, torch.zeros(1, 3, dtype=torch.int64)),
        "split_heads": (product, 2, True),
        "split_heads_to_cache": (product, 2, True, *(torch.zeros_like(h) for h in heads[1:]), 0),
        "block_causal_attention": (*heads, (1, 3), torch.ones(2, dtype=dtype)),
        "cached_attention": (*heads, 3, torch.ones(2, dtype=dtype)),
        "layer_norm_modulate": (x, vector, vector),
        "gated_residual": (x, x, vector),
        "channel_moments": (image,),
        "conv3x3": (image, torch.randn(32, 32, 3, 3, dtype=dtype)),
        "group_norm_silu": (image, torch.ones(32), torch.zeros(32), 8),
        "gated_residual_norm": (x, x, vector, vector, vector),
        "invariant_linear": (x, x[0]),
        "gelu_bias": (x, vector[0]),
        "rms_norm": (x, vector[0], 1e-5),
        "residual_rms_norm": (x, x, vector[0], 1e-5),
        "swiglu": (x, x),
        "split_heads_rotary": (product, None, 2, 2),
        "split_heads_rotary_to_cache": (
            product[:, 0],
            None,
            torch.tensor(1),
            *(torch.zeros_like(h) for h in heads[1:]),
            2,
        ),
        "decode_attention": (heads[0][:, :, 0], *heads[1:], torch.tensor(1), 0.5),
        "causal_attention": (*heads, 0.5),
    }[op]


def first_of(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


REFUSED = [
    *(
        (op, {"dtype": torch.float64})
        for op in selection.OPS
        if selection.OPS[op][0].name == "triton" and op != "adamw_step"
    ),
    *(
        (op, {"head_dim": 32})
        for op in ("split_heads", "split_heads_to_cache", "block_causal_attention", "cached_attention")
    ),
    *((op, {"vocab": 32769}) for op in ("sample_tokens", "selective_log_softmax")),
    *((op, {"width": 8200}) for op in ("layer_norm_modulate", "gated_residual", "gated_residual_norm")),
]


@pytest.mark.skipif(not selection.INTERPRETED, reason="interpreted, Triton can run where auto picks it in this test")
@pytest.mark.parametrize(("op", "what"), REFUSED, ids=lambda x: x if isinstance(x, str) else next(iter(x)))
def test_auto_passes_over_a_kernel_that_refuses_and_says_so_once(op, what, monkeypatch, restore):
    ways = (replace(selection.OPS[op][0], auto_on=("cpu",)), selection.OPS[op][-1])
    monkeypatch.setitem(selection.OPS, op, ways)
    assert selection.choose(op, CPU).impl == "triton"
    selection.say_once.cache_clear()
    given = arguments(op, **{"dtype": torch.float32} | what)
    function = getattr(kernels, op)
    with pytest.warns(UserWarning, match=f"{op}: impl='triton' takes .*; 'reference' runs instead") as record:
        outputs = [first_of(function(*given)) for _ in range(2)]
    assert len(record) == 1
    assert record[0].filename == __file__
    wanted = first_of(function(*given, impl="reference"))
    assert all(torch.equal(output, wanted) for output in outputs)
    with pytest.raises(ValueError, match=f"impl='triton' of {op} takes .*; use impl='reference'"):
        function(*given, impl="triton")
    configure({op: "triton"})
    with pytest.raises(ValueError, match=f"impl='triton' of {op} takes"):
        function(*given)


def test_kernels_can_be_imported_without_triton(monkeypatch):
    """Its stand-ins leave functions as they are, and no kernel is launched."""
    from varfast.kernels import _triton

    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("without_triton", _triton.__file__)
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    assert without.tl is None
    assert without.jit(len) is len
    assert without.jit(do_not_specialize=["x"])(len) is len
    assert without.constexpr(3) == 3
    assert "the package triton cannot be imported" in without.NO_TRITON
    monkeypatch.setattr(selection, "NO_TRITON", without.NO_TRITON)
    assert selection.cannot_run_triton(torch.device("cuda")) == without.NO_TRITON
    assert selection.choose("selective_log_softmax", torch.device("cuda")).impl == "reference"
