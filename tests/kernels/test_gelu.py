import pytest
import torch
import torch.nn.functional as F

from varfast.kernels import gelu, gelu_bias, linear_gelu

HAS_CPP = True


def inputs(shape, dtype, size=1.0):
    generator = torch.Generator().manual_seed(0)
    x = (size * torch.randn(shape, generator=generator)).to(dtype)
    bias = torch.randn(shape[-1], generator=generator).to(torch.promote_types(dtype, torch.float32))
    upstream = torch.randn(shape, generator=generator)
    return x, bias, upstream


def truth(x, bias, upstream):
    """By PyTorch in float64."""
    x, bias = (t.detach().double().requires_grad_() for t in (x, bias))
    out = F.gelu(x + bias, approximate="tanh")
    out.backward(upstream.double())
    return {"out": out.detach(), "d x": x.grad, "d bias": bias.grad}


def run(x, bias, upstream, impl, device="cpu"):
    x, bias = (t.detach().to(device, copy=True).requires_grad_() for t in (x, bias))
    out = gelu_bias(x, bias, impl=impl)
    assert out.dtype == x.dtype
    out.backward(upstream.to(device, x.dtype))
    return {"out": out.detach(), "d x": x.grad, "d bias": bias.grad}


@pytest.mark.parametrize("size", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 70, 300), (1, 1, 8), (3, 129)])
def test_gelu_bias_and_every_gradient_are_as_exact_as_pytorch(path, assert_as_exact, shape, dtype, size):
    if (path.impl, dtype) == ("triton", torch.float64):
        pytest.skip("refused")
    x, bias, upstream = inputs(shape, dtype, size)
    upstream = upstream.to(dtype)
    exact, plain = truth(x, bias, upstream), run(x, bias, upstream, "reference")
    # Interpreted, a bfloat16 is truncated rather than rounded: one unit in the last place, not half of one.
    truncates = dtype == torch.bfloat16 and (path.impl, path.device) == ("triton", "cpu")
    got = run(x, bias, upstream, path.impl, path.device)
    assert_as_exact(
        got, plain, exact, floor=2e-2 * max(1.0, size) if truncates else 1e-12 if dtype == torch.float64 else 1e-6
    )


def test_gelu_bias_over_its_range(path):
    """Far from 0 on both sides, where exp overflows: 0 and x, and slopes of 0 and 1."""
    x = torch.tensor([-1e4, -100.0, -20.0, -8.0, -3.0, -1e-3, 0.0, 1e-3, 3.0, 8.0, 20.0, 100.0, 1e4])[None]
    bias = torch.zeros(13)
    exact = truth(x, bias, torch.ones_like(x))
    got = run(x, bias, torch.ones_like(x), path.impl, path.device)
    for name in exact:
        torch.testing.assert_close(got[name].cpu().double(), exact[name], rtol=1e-5, atol=1e-6)


def test_gelu_bias_passes_nan_on(path):
    x = torch.zeros(2, 20)
    x[1, 3] = float("nan")
    out = gelu_bias(x.to(path.device), torch.zeros(20, device=path.device), impl=path.impl)
    assert out.isnan().nonzero().tolist() == [[1, 3]]


def test_gelu_bias_reads_nothing_beside_its_inputs(path):
    x, bias, upstream = inputs((5, 50), torch.float32)
    seas = [torch.full((9, 90), float("nan"), device=path.device) for _ in range(2)]
    views = [sea[2:7, 20:70].copy_(t) for sea, t in zip(seas, (x, upstream), strict=True)]
    row = torch.full((90,), float("nan"), device=path.device)
    row[20:70] = bias.to(path.device)
    got, exact = run(views[0], row[20:70], views[1], path.impl, path.device), truth(x, bias, upstream)
    for name in exact:
        torch.testing.assert_close(got[name].cpu().double(), exact[name], rtol=1e-5, atol=1e-5)


def test_gelu_bias_is_bitwise_repeatable(path):
    given = inputs((3, 70, 130), torch.float32)
    runs = [run(*given, path.impl, path.device) for _ in range(3)]
    assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:] for name in runs[0])


def test_gelu_bias_does_not_depend_on_the_number_of_threads(path):
    if path.impl != "cpp":
        pytest.skip("Triton has no such number, and the order of PyTorch's sums depends on it")
    given, before = inputs((400, 700), torch.float32), torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            runs.append(run(*given, path.impl))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_gelu_bias_of_nothing(path):
    x = torch.empty(0, 3, 8, device=path.device, requires_grad=True)
    bias = torch.ones(8, device=path.device, requires_grad=True)
    gelu_bias(x, bias, impl=path.impl).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_gelu_bias_opcheck(path):
    if path.impl == "reference":
        pytest.skip("not an op")
    forward, backward = gelu._gelu_op, gelu._gelu_backward_op
    if path.impl == "cpp":
        forward, backward = torch.ops.varfast.gelu_cpp, torch.ops.varfast.gelu_backward_cpp
    x, bias, upstream = (t.to(path.device) for t in inputs((5, 24), torch.float32))
    torch.library.opcheck(forward, (x.clone().requires_grad_(), bias.clone().requires_grad_()))
    torch.library.opcheck(backward, (upstream, x, bias))


def test_gelu_bias_refuses_a_bias_of_another_size(path):
    x = torch.zeros(2, 8, device=path.device)
    with pytest.raises(ValueError, match=r"bias is \(7,\): want \(8,\)"):
        gelu_bias(x, torch.zeros(7, device=path.device), impl=path.impl)


# ---------------------------------------------------------------------------------------------------------------------
# linear_gelu

IMPLS = [
    ("library", "cpu", torch.float32),
    ("library", "cpu", torch.bfloat16),
    ("reference", "cpu", torch.float32),
    ("reference", "cpu", torch.bfloat16),
    pytest.param("library", "cuda", torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param("quack", "cuda", torch.bfloat16, marks=pytest.mark.gpu),
]


def layer(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 64, generator=generator).to(dtype)
    weight, bias = torch.randn(128, 64, generator=generator) / 8, torch.randn(128, generator=generator)
    upstream = torch.randn(2, 40, 128, generator=generator).to(dtype)
    return [t.to(device) for t in (x, weight, bias, upstream)]


@pytest.mark.parametrize(("impl", "device", "dtype"), IMPLS)
def test_linear_gelu_and_every_gradient_equal_float64(impl, device, dtype):
    """Of the weight as it is read, in the dtype of x; the gradient goes to the float32 weight."""
    reason = {i.name: i.cannot(torch.device(device)) for i in gelu_impls()}[impl]
    if reason:
        pytest.skip(reason)
    x, weight, bias, upstream = layer(dtype, device)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = linear_gelu(*leaves, impl=impl)
    out.backward(upstream)
    wide = [t.double().cpu().requires_grad_() for t in (x, weight.to(dtype), bias)]
    exact = F.gelu(F.linear(*wide), approximate="tanh")
    exact.backward(upstream.double().cpu())
    assert (out.dtype, leaves[1].grad.dtype) == (dtype, torch.float32)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    pairs = [(out, exact), *((a.grad, b.grad) for a, b in zip(leaves, wide, strict=True))]
    for got, wanted in pairs:
        error = (got.detach().cpu().double() - wanted.detach()).norm() / wanted.detach().norm()
        assert float(error) < tolerance


def gelu_impls():
    from varfast.kernels.selection import OPS

    return OPS["linear_gelu"]


def test_linear_gelu_picks_an_implementation_with_gradient_and_none_that_rounds_otherwise():
    """One name for rollout and update: what auto picks must not depend on whether a gradient is wanted."""
    x, weight, bias, _ = layer(torch.bfloat16)
    with torch.no_grad():
        sampled = linear_gelu(x, weight, bias)
    updated = linear_gelu(x, weight.requires_grad_(), bias)
    assert torch.equal(sampled, updated)
    assert updated.requires_grad


def test_linear_gelu_epilogue_refuses_a_gradient_and_the_cpu():
    x, weight, bias, _ = layer(torch.bfloat16)
    with pytest.raises(ValueError, match="cannot run on cpu: on a CPU it is GELU by erf"):
        linear_gelu(x, weight, bias, impl="epilogue")
    assert gelu._refuses_epilogue(x, weight, weight, bias) is None
    assert "no gradient" in gelu._refuses_epilogue(x, weight.requires_grad_(), weight, bias)
    with torch.no_grad():
        assert gelu._refuses_epilogue(x, weight, weight, bias) is None


def test_linear_gelu_by_quack_says_what_is_missing(monkeypatch):
    x, weight, bias, _ = layer(torch.bfloat16)
    with pytest.raises(ValueError, match="'quack' of linear_gelu cannot run on cpu: it needs a CUDA device"):
        linear_gelu(x, weight, bias, impl="quack")
    monkeypatch.setattr(gelu, "_quack", lambda: torch)  # a module of that name that lacks the function
    gelu._cannot_quack.cache_clear()
    try:
        assert "gemm_act cannot be imported" in gelu._cannot_quack(torch.device("cuda:7"))
    finally:
        gelu._cannot_quack.cache_clear()


def test_linear_gelu_by_quack_takes_its_functions_results(monkeypatch, assert_as_exact):
    """With quack's product in PyTorch: names and order of its arguments, which are checked on a GPU."""
    asked = []

    class Quack:
        @staticmethod
        def gemm_act(A, B, C=None, bias=None, activation=None, store_preact=True, tuned=True):
            asked.append((activation, store_preact, tuned))
            before = A.float() @ B.float() + bias
            return before.to(A.dtype) if store_preact else None, F.gelu(before, approximate="tanh").to(A.dtype)

    monkeypatch.setattr(gelu, "_quack", lambda: Quack)
    monkeypatch.setattr(gelu, "_gelu_backward_op", by_autograd)
    x, weight, bias, upstream = layer(torch.bfloat16)

    def results(function, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight, bias)]
        out = function(*leaves)
        out.backward(upstream.to(out.dtype))
        names = ("out", "d_x", "d_weight", "d_bias")
        return dict(zip(names, [out.detach(), *(leaf.grad for leaf in leaves)], strict=True))

    def by(function):
        def call(x, w, b):
            return function(x.bfloat16(), w, w.detach().bfloat16(), b)

        return call

    exact = results(lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"), torch.float64)
    plain = results(by(gelu._product_then_gelu), torch.float32)
    assert_as_exact(results(by(gelu._by_quack), torch.float32), plain, exact, floor=1e-6)
    with torch.no_grad():
        gelu._by_quack(x, weight, weight.bfloat16(), bias)
    assert asked == [("gelu_tanh_approx", True, False), ("gelu_tanh_approx", False, False)]


def by_autograd(d_out, before, bias):
    assert bias is None
    leaf = before.float().requires_grad_()
    with torch.enable_grad():
        F.gelu(leaf, approximate="tanh").backward(d_out.float())
    return leaf.grad.to(before.dtype), leaf.grad.sum(dim=0)


def test_linear_gelu_refuses_sizes_that_do_not_fit():
    x, weight, bias, _ = layer(torch.float32)
    with pytest.raises(ValueError, match=r"x \(2, 40, 64\), weight \(128, 64\) and bias \(127,\) do not fit"):
        linear_gelu(x, weight, bias[:-1])
