import pytest
import torch
import torch.nn.functional as F

from varfast.kernels import swiglu

HAS_CPP = True


def inputs(shape, dtype, size=1.0):
    generator = torch.Generator().manual_seed(0)
    gate, up, upstream = (torch.randn(shape, generator=generator) for _ in range(3))
    return (size * gate).to(dtype), up.to(dtype), upstream.to(dtype)


def truth(gate, up, upstream):
    """By PyTorch in float64."""
    gate, up = (t.detach().double().requires_grad_() for t in (gate, up))
    out = F.silu(gate) * up
    out.backward(upstream.double())
    return {"out": out.detach(), "d gate": gate.grad, "d up": up.grad}


def run(gate, up, upstream, impl, device="cpu"):
    gate, up = (t.detach().to(device, copy=True).requires_grad_() for t in (gate, up))
    out = swiglu(gate, up, impl=impl)
    assert out.dtype == gate.dtype
    out.backward(upstream.to(device))
    return {"out": out.detach(), "d gate": gate.grad, "d up": up.grad}


@pytest.mark.parametrize("size", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 70, 300), (1, 1, 8), (3, 129)])
def test_swiglu_and_every_gradient_are_as_exact_as_pytorch(path, assert_as_exact, shape, dtype, size):
    if (path.impl, dtype) == ("triton", torch.float64):
        pytest.skip("refused")
    given = inputs(shape, dtype, size)
    # Interpreted, a bfloat16 is truncated rather than rounded: one unit in the last place, not half of one.
    truncates = dtype == torch.bfloat16 and (path.impl, path.device) == ("triton", "cpu")
    floor = 4e-2 * max(1.0, size) if truncates else 1e-12 if dtype == torch.float64 else 1e-6
    assert_as_exact(run(*given, path.impl, path.device), run(*given, "reference"), truth(*given), floor=floor)


def test_swiglu_over_its_range(path):
    """Far from 0 on both sides, where exp overflows: 0 and x, and slopes of 0 and 1."""
    gate = torch.tensor([-1e4, -100.0, -20.0, -8.0, -3.0, -1e-3, 0.0, 1e-3, 3.0, 8.0, 20.0, 100.0, 1e4])[None]
    given = (gate, torch.full_like(gate, 0.7), torch.ones_like(gate))
    got, exact = run(*given, path.impl, path.device), truth(*given)
    for name in exact:
        torch.testing.assert_close(got[name].cpu().double(), exact[name], rtol=1e-5, atol=1e-6)


def test_swiglu_of_the_halves_of_one_product_reads_nothing_else(path):
    generator = torch.Generator().manual_seed(0)
    sea = torch.full((9, 150), float("nan"))
    product = torch.randn(5, 100, generator=generator)
    sea[2:7, 20:120] = product
    gate, up = sea.to(path.device)[2:7, 20:120].chunk(2, dim=-1)
    leaf = gate.detach().requires_grad_()
    out = swiglu(leaf, up, impl=path.impl)
    out.sum().backward()
    exact = truth(*product.chunk(2, dim=-1), torch.ones(5, 50))
    torch.testing.assert_close(out.detach().cpu().double(), exact["out"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.cpu().double(), exact["d gate"], rtol=1e-5, atol=1e-6)
    assert out.is_contiguous()


def test_swiglu_passes_nan_on(path):
    gate, up, _ = inputs((2, 20), torch.float32)
    gate[1, 3] = float("nan")
    out = swiglu(gate.to(path.device), up.to(path.device), impl=path.impl)
    assert out.isnan().nonzero().tolist() == [[1, 3]]


def test_swiglu_of_nothing(path):
    gate = torch.empty(0, 3, 8, device=path.device, requires_grad=True)
    swiglu(gate, gate, impl=path.impl).sum().backward()
    assert gate.grad.shape == gate.shape


def test_swiglu_opcheck(path):
    if path.impl == "reference":
        pytest.skip("not an op of PyTorch's library")
    from varfast.kernels.swiglu import _swiglu_backward_op, _swiglu_op

    forward, backward = _swiglu_op, _swiglu_backward_op
    if path.impl == "cpp":
        forward, backward = torch.ops.varfast.swiglu_cpp, torch.ops.varfast.swiglu_backward_cpp
    gate, up, upstream = (t.to(path.device) for t in inputs((5, 24), torch.float32))
    torch.library.opcheck(forward, (gate.clone().requires_grad_(), up.clone().requires_grad_()))
    torch.library.opcheck(backward, (upstream, gate, up))


def test_swiglu_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"gate is \(2, 8\) .*, up \(2, 7\) .*: want \(\.\.\., F\), one shape"):
        swiglu(torch.zeros(2, 8), torch.zeros(2, 7))
    with pytest.raises(ValueError, match="one shape and dtype"):
        swiglu(torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bfloat16))
