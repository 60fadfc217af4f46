import pytest
import torch
from torch import nn

from varfast.kernels import residual_rms_norm, rms_norm

EPS = 1e-5
HAS_CPP = True
SHAPES = [(2, 33, 192), (1, 1, 64), (3, 5, 100), (70, 130)]


def inputs(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, branch = ((1.0 + 2 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2))
    weight = (1.0 + 0.3 * torch.randn(shape[-1], generator=generator)).to(dtype)
    return x, branch, weight, [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]


def run(x, branch, weight, upstream, impl, device="cpu", dtype=None, residual=True):
    x, branch, weight = (t.detach().to(device, dtype, copy=True).requires_grad_() for t in (x, branch, weight))
    if residual:
        outputs = residual_rms_norm(x, branch, weight, EPS, impl=impl)
    else:
        outputs = (rms_norm(x, weight, EPS, impl=impl),)
    torch.autograd.backward(outputs, [u.to(o) for u, o in zip(upstream, outputs, strict=False)])
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return found | {"x": x.grad, "weight": weight.grad} | ({"branch": branch.grad} if residual else {})


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_and_every_gradient_are_as_exact_as_pytorch(path, assert_as_exact, shape, dtype, residual):
    if (path.impl, dtype) == ("triton", torch.float64):
        pytest.skip("refused")
    given = inputs(shape, dtype)
    exact = run(*given, "reference", dtype=torch.float64, residual=residual)
    plain = run(*given, "reference", residual=residual)
    got = run(*given, path.impl, path.device, residual=residual)
    # Interpreted, a bfloat16 is truncated rather than rounded: one unit in the last place, not half of one.
    truncates = dtype == torch.bfloat16 and (path.impl, path.device) == ("triton", "cpu")
    assert_as_exact(got, plain, exact, floor=4e-2 if truncates else 1e-12 if dtype == torch.float64 else 1e-6)


def test_rms_norm_equals_pytorchs_module_and_its_gradients():
    """nn.RMSNorm is written by others."""
    x, _, weight, (upstream, _) = inputs((2, 5, 96), torch.float64)
    module = nn.RMSNorm(96, eps=EPS, dtype=torch.float64)
    module.weight.data.copy_(weight)
    theirs = x.clone().requires_grad_()
    module(theirs).backward(upstream)
    got = run(x, x, weight, [upstream], "reference", residual=False)
    torch.testing.assert_close(got["output 0"], module(x))
    torch.testing.assert_close(got["x"], theirs.grad)
    torch.testing.assert_close(got["weight"], module.weight.grad)


def test_rms_norm_rounds_before_it_multiplies_by_the_weight():
    """As Llama's and LlamaGen's code: in bfloat16 the product of two rounded numbers, rounded."""
    x, _, weight, _ = inputs((7, 96), torch.bfloat16)
    wide = x.float()
    want = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x) * weight
    assert torch.equal(rms_norm(x, weight, EPS, impl="reference"), want)


def test_residual_rms_norm_is_the_sum_and_its_norm(path):
    x, branch, weight, _ = (
        t.to(path.device) if isinstance(t, torch.Tensor) else t for t in inputs((4, 50), torch.float32)
    )
    new, out = residual_rms_norm(x, branch, weight, EPS, impl=path.impl)
    assert torch.equal(new, x + branch)
    assert torch.equal(out, rms_norm(new, weight, EPS, impl=path.impl))


def test_rms_norm_reads_nothing_beside_its_inputs(path):
    x, branch, weight, _ = inputs((3, 50), torch.float32)
    margins = torch.full((5, 90), float("nan"), device=path.device)
    views = []
    for tensor in (x, branch):
        whole = margins.clone()
        whole[1:4, 20:70] = tensor.to(path.device)
        views.append(whole[1:4, 20:70])
    row = margins[0].clone()
    row[20:70] = weight.to(path.device)
    got = residual_rms_norm(*views, row[20:70], EPS, impl=path.impl)
    want = residual_rms_norm(x, branch, weight, EPS, impl="reference")
    for have, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(have.cpu(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("unused", [0, 1])
def test_gradient_when_one_of_the_two_outputs_is_not_used(path, unused):
    x, branch, weight, upstream = inputs((5, 64), torch.float32)

    def gradients(impl, device):
        leaves = [t.clone().to(device).requires_grad_() for t in (x, branch, weight)]
        residual_rms_norm(*leaves, EPS, impl=impl)[1 - unused].backward(upstream[0].to(device))
        return [None if leaf.grad is None else leaf.grad.cpu() for leaf in leaves]

    for got, want in zip(gradients(path.impl, path.device), gradients("reference", "cpu"), strict=True):
        if want is None:
            assert got is None
        else:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_rms_norm_of_nothing(path):
    x = torch.empty(0, 3, 8, device=path.device, requires_grad=True)
    weight = torch.ones(8, device=path.device, requires_grad=True)
    new, out = residual_rms_norm(x, x, weight, EPS, impl=path.impl)
    (new.sum() + out.sum()).backward()
    assert x.grad.shape == out.shape == (0, 3, 8)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_rms_norm_is_bitwise_repeatable(path):
    given = inputs((3, 70, 130), torch.float32)
    runs = [run(*given, path.impl, path.device) for _ in range(3)]
    assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:] for name in runs[0])


def test_a_row_has_the_same_bits_alone_and_among_others(path):
    """Strict mode needs that."""
    if path.impl == "reference":
        pytest.skip("PyTorch promises no such thing")
    x, branch, weight, _ = (
        t.to(path.device) if isinstance(t, torch.Tensor) else t for t in inputs((9, 200), torch.bfloat16)
    )
    whole = residual_rms_norm(x, branch, weight, EPS, impl=path.impl)
    for row in range(9):
        alone = residual_rms_norm(x[row : row + 1], branch[row : row + 1], weight, EPS, impl=path.impl)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, whole, strict=True))


def test_rms_norm_passes_nan_on(path):
    x = torch.ones(3, 20)
    x[1, 3] = float("nan")
    out = rms_norm(x.to(path.device), torch.ones(20, device=path.device), EPS, impl=path.impl)
    assert out.isnan().any(dim=1).tolist() == [False, True, False]


def test_rms_norm_opcheck(path):
    if path.impl == "reference":
        pytest.skip("not an op of PyTorch's library")
    from varfast.kernels.rms_norm import _rms_norm_backward_op, _rms_norm_op

    forward, backward = _rms_norm_op, _rms_norm_backward_op
    if path.impl == "cpp":
        forward, backward = torch.ops.varfast.rms_norm_cpp, torch.ops.varfast.rms_norm_backward_cpp
    x, branch, weight, (d_new, d_out) = inputs((5, 24), torch.float32)
    x, branch, weight, d_new, d_out = (t.to(path.device) for t in (x, branch, weight, d_new, d_out))
    leaves = [t.clone().requires_grad_() for t in (x, branch, weight)]
    torch.library.opcheck(forward, (*leaves, EPS))
    torch.library.opcheck(forward, (leaves[0], None, leaves[2], EPS))
    rstd = torch.rand(5, device=path.device)
    torch.library.opcheck(backward, (d_new, d_out, x, weight, rstd))
    torch.library.opcheck(backward, (None, d_out, x, weight, rstd))


def test_rms_norm_refuses_what_does_not_fit():
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight is \(7,\): want \(8,\)"):
        rms_norm(x, torch.zeros(7), EPS)
    with pytest.raises(ValueError, match="x is \\(8,\\): want two axes or more"):
        rms_norm(x[0], torch.zeros(8), EPS)
    with pytest.raises(ValueError, match=r"branch is \(2, 8\) of torch.float64: want \(2, 8\) of torch.float32"):
        residual_rms_norm(x, x.double(), torch.zeros(8), EPS)
