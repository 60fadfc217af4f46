"""invariant_linear: its values, and that a row's bits depend on that row and the weight alone.

Interpreted, the second says that tiles, masks and the order of the sum do not depend on the number of rows; each tile's
product is NumPy's then. That the tensor cores treat all rows of a tile alike, only a GPU can show.
"""

import pytest
import torch

from varfast.kernels import invariant_linear, matmul, reference
from varfast.kernels.selection import INTERPRETED

WAYS = [
    pytest.param("blocks", "cpu", id="blocks"),
    pytest.param(
        "triton", "cpu", id="interpreted", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
    ),
    pytest.param("triton", "cuda", id="cuda", marks=pytest.mark.gpu),
]


def drawn(rows, features, channels, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((rows, channels), (features, channels), features))
    return [t.to(device, dtype) for t in (x, weight / channels**0.5, bias)]


def values(function, leaves, gelu, float32_out):
    """Result and gradients for an upstream gradient that is the same for all."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves, *([None] if len(leaves) == 2 else []), gelu, float32_out)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(leaves[0].dtype).to(out)
    gradients = torch.autograd.grad(out, leaves, upstream)
    return {"out": out} | {f"gradient {i}": g for i, g in enumerate(gradients)}


@pytest.mark.parametrize(("impl", "device"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "features", "channels", "bias", "gelu", "float32_out"),
    [
        (1, 64, 64, True, False, False),
        (130, 300, 100, True, True, False),
        (70, 40, 24, False, False, True),
        (65, 130, 192, False, True, False),
        (3, 8, 72, True, False, True),
    ],
)
def test_invariant_linear_is_as_exact_as_pytorch(
    assert_as_exact, impl, device, dtype, rows, features, channels, bias, gelu, float32_out
):
    leaves = drawn(rows, features, channels, dtype, device)[: 3 if bias else 2]
    got = values(lambda *a: invariant_linear(*a, impl=impl), leaves, gelu, float32_out)
    plain = values(reference.invariant_linear, leaves, gelu, float32_out)
    exact = values(reference.invariant_linear, [leaf.double() for leaf in leaves], gelu, float32_out)
    assert got["out"].dtype == (torch.float32 if float32_out else dtype)
    assert_as_exact(got, plain, exact, floor=1e-6)


@pytest.mark.parametrize(("impl", "device"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("gelu", [False, True])
def test_a_row_alone_has_the_bits_it_has_among_others(impl, device, dtype, gelu):
    x, weight, bias = drawn(300, 192, 128, dtype, device)
    whole = invariant_linear(x, weight, bias, gelu, impl=impl)
    for start, end in [(0, 1), (299, 300), (150, 151), (7, 24), (0, 64), (1, 65), (33, 162), (100, 300), (171, 299)]:
        assert torch.equal(invariant_linear(x[start:end], weight, bias, gelu, impl=impl), whole[start:end]), start
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(1)).to(device)
    assert torch.equal(invariant_linear(x[shuffled], weight, bias, gelu, impl=impl), whole[shuffled])


@pytest.mark.gpu
@pytest.mark.parametrize(("features", "channels"), [(3072, 1024), (1920, 7680), (4096, 1024)])
def test_a_row_of_d16_and_d30_alone_has_the_bits_it_has_among_others(features, channels):
    x, weight, bias = drawn(5000, features, channels, torch.bfloat16, "cuda")
    for gelu in (False, True):
        whole = invariant_linear(x, weight, bias, gelu, impl="triton")
        for start, end in [(0, 1), (4999, 5000), (77, 205), (128, 256), (1, 4097), (513, 530)]:
            assert torch.equal(invariant_linear(x[start:end], weight, bias, gelu, impl="triton"), whole[start:end])


@pytest.mark.parametrize(("impl", "device"), WAYS)
def test_the_gradient_does_not_change_the_bits_of_the_result(impl, device):
    # With a gradient the kernel stores what GELU is applied to as well: the update's result must be the rollout's.
    x, weight, bias = drawn(70, 64, 64, torch.float32, device)
    with_gradient = invariant_linear(x, weight.requires_grad_(), bias, gelu=True, impl=impl)
    assert with_gradient.requires_grad
    with torch.no_grad():
        assert torch.equal(invariant_linear(x, weight, bias, gelu=True, impl=impl), with_gradient)


@pytest.mark.parametrize(("impl", "device"), WAYS)
def test_nothing_outside_the_operands_is_read_or_written(impl, device):
    x, weight, bias = drawn(66, 70, 40, torch.float32, device)
    margins = [torch.full((len(t) + 200, *t.shape[1:]), torch.nan, device=device) for t in (x, weight, bias)]
    for margin, t in zip(margins, (x, weight, bias), strict=True):
        margin[100:-100] = t
    inside = [margin[100:-100] for margin in margins]
    assert torch.equal(invariant_linear(*inside, impl=impl), invariant_linear(x, weight, bias, impl=impl))


@pytest.mark.parametrize(("impl", "device"), WAYS)
def test_more_axes_and_no_rows(impl, device):
    x, weight, bias = drawn(30, 64, 64, torch.float32, device)
    got = invariant_linear(x.view(2, 3, 5, 64), weight, bias, impl=impl)
    assert torch.equal(got, invariant_linear(x, weight, bias, impl=impl).view(2, 3, 5, 64))
    assert invariant_linear(x[:0], weight, bias, impl=impl).shape == (0, 64)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_gelu_far_from_zero_is_the_identity_or_zero():
    if not INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    x = torch.tensor([[-1e9], [-50.0], [0.0], [50.0], [1e9]])
    got = invariant_linear(x, torch.ones(1, 1), gelu=True, impl="triton")
    torch.testing.assert_close(got, x.clamp_min(0.0), rtol=0, atol=0)


def test_the_tile_does_not_depend_on_the_rows_and_wastes_few_features():
    for features, block in ((1024, 256), (3072, 256), (4096, 256), (5760, 256), (7680, 256), (1920, 128)):
        assert matmul._launch_settings(torch.bfloat16, features)["BLOCK_N"] == block


def test_opcheck():
    x, weight, bias = drawn(5, 16, 8, torch.float32)
    arguments = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), True, False, True, "blocks")
    torch.library.opcheck(matmul._linear_op, arguments)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), None, r"x is \(2, 3\), weight \(4, 5\): want"),
        (torch.zeros(2, 3), torch.zeros(4, 3).bfloat16(), None, "want one dtype"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3), r"bias is \(3,\), want \(4,\)"),
    ],
)
def test_invariant_linear_refuses_operands_that_do_not_fit(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        invariant_linear(x, weight, bias)
