import numpy as np
import pytest
import torch

from varfast.kernels import gated_residual, gated_residual_norm, layer_norm_modulate

EPS = 1e-6
HAS_CPP = True


def inputs(batch, length, width, dtype, offset=1.0):
    generator = torch.Generator().manual_seed(0)
    x = (offset + 2 * torch.randn(batch, length, width, generator=generator)).to(dtype)
    branch = torch.randn(batch, length, width, generator=generator).to(dtype)
    six = torch.randn(batch, 6, width, generator=generator).to(dtype)  # gate, scale, shift are strided views of it
    upstream = [torch.randn(batch, length, width, generator=generator) for _ in range(2)]
    return x, branch, six, upstream


def bias_of(branch):
    """In float32 beside 16 bits, as the model has it."""
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(branch.shape[-1], generator=generator, dtype=torch.float64)
    return bias.to(branch.device, torch.promote_types(branch.dtype, torch.float32))


def run(op, x, branch, six, upstream, with_bias=True, **how):
    bias = bias_of(branch) if with_bias and op != "norm" else None
    x, branch, six = (t.detach().clone().requires_grad_() for t in (x, branch, six))
    gate, scale, shift = six.unbind(1)[1:4]
    if bias is not None:
        how["bias_C"] = bias.requires_grad_()
    if op == "norm":
        outputs = (layer_norm_modulate(x, scale, shift, EPS, **how),)
    elif op == "residual":
        outputs = (gated_residual(x, branch, gate, **how),)
    else:
        outputs = gated_residual_norm(x, branch, gate, scale, shift, EPS, **how)
    torch.autograd.backward(outputs, [u.to(o) for u, o in zip(upstream, outputs, strict=False)])
    found = {f"output {i}": o for i, o in enumerate(outputs)} | {"x": x.grad}
    # One gradient holds those of gate, scale and shift.
    found |= {"six": six.grad} | ({} if op == "norm" else {"branch": branch.grad})
    return found | ({} if bias is None else {"bias": bias.grad})


@pytest.mark.parametrize("op", ["norm", "residual", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 33, 192), (1, 1, 64), (3, 5, 100), (1, 70, 130)])
def test_adaln_and_every_gradient_are_as_exact_as_pytorch(path, assert_as_exact, op, dtype, shape):
    with_bias = shape != (3, 5, 100)
    if (path.impl, op) == ("cpp", "residual"):
        pytest.skip("in C++ with the norm alone")
    x, branch, six, upstream = inputs(*shape, dtype)
    exact = run(op, *(t.double() for t in (x, branch, six)), upstream, with_bias, impl="reference")
    plain = run(op, x, branch, six, upstream, with_bias, impl="reference")
    there = [t.to(path.device) for t in (x, branch, six)]
    got = run(op, *there, [u.to(path.device) for u in upstream], with_bias, impl=path.impl)
    # Interpreted, a bfloat16 is truncated rather than rounded: one unit in the last place, not half of one.
    truncates = dtype == torch.bfloat16 and (path.impl, path.device) == ("triton", "cpu")
    assert_as_exact(got, plain, exact, floor=2e-2 if truncates else 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-12)])
def test_layer_norm_modulate_equals_numpy(dtype, tolerance):
    x, _, six, _ = inputs(2, 5, 192, dtype)
    wide, scale, shift = x.double().numpy(), *(six[:, i, None].double().numpy() for i in (2, 3))
    normed = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + EPS)
    got = layer_norm_modulate(x, six[:, 2], six[:, 3], EPS, impl="reference")
    np.testing.assert_allclose(got.double().numpy(), normed * (1 + scale) + shift, rtol=0, atol=tolerance)


@pytest.mark.parametrize("op", ["norm", "residual", "both"])
def test_reference_gradcheck(op):
    sizes = ((2, 3, 6), (2, 3, 6), (2, 6), (2, 6), (2, 6), (6,))
    x, branch, gate, scale, shift, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes)
    function, arguments = {
        "norm": (lambda *a: layer_norm_modulate(*a, EPS), (x, scale, shift)),
        "residual": (gated_residual, (x, branch, gate, bias)),
        "both": (lambda *a: gated_residual_norm(*a[:-1], EPS, a[-1]), (x, branch, gate, scale, shift, bias)),
    }[op]
    assert torch.autograd.gradcheck(function, arguments)


def test_gated_residual_gates_each_image_by_itself(path):
    if path.impl == "cpp":
        pytest.skip("in C++ with the norm alone")
    x, branch = torch.ones(2, 2, 3), torch.full((2, 2, 3), 10.0)
    gate = torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.0, -1.0]])
    got = gated_residual(*(t.to(path.device) for t in (x, branch, gate)), impl=path.impl)
    assert got[:, 1].tolist() == [[1.0, 11.0, 21.0], [6.0, 1.0, -9.0]]


def test_adaln_reads_nothing_beside_its_inputs(path):
    x, branch, six, _ = inputs(2, 3, 50, torch.float32)
    margins = torch.full((4, 5, 70), float("nan"), device=path.device)
    views = []
    for tensor in (x, branch):
        whole = margins.clone()
        whole[1:3, 1:4, 10:60] = tensor.to(path.device)
        views.append(whole[1:3, 1:4, 10:60])
    gate, scale, shift = six.to(path.device).unbind(1)[1:4]
    new, out = gated_residual_norm(*views, gate, scale, shift, EPS, impl=path.impl)
    want = gated_residual_norm(x, branch, *six.unbind(1)[1:4], EPS, impl="reference")
    torch.testing.assert_close(new.cpu(), want[0])
    torch.testing.assert_close(out.cpu(), want[1], rtol=0, atol=1e-5)


def test_layer_norm_of_a_large_offset_keeps_its_digits(path, assert_as_exact):
    x, branch, six, upstream = inputs(1, 4, 256, torch.float32, offset=1000.0)
    exact = run("norm", *(t.double() for t in (x, branch, six)), upstream, impl="reference")
    plain = run("norm", x, branch, six, upstream, impl="reference")
    got = run(
        "norm", *(t.to(path.device) for t in (x, branch, six)), [u.to(path.device) for u in upstream], impl=path.impl
    )
    assert_as_exact(got, plain, exact, floor=3e-4)  # 1000 has 6e-5 of rounding


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_adaln_of_nothing(path, shape):
    x = torch.empty(shape, device=path.device, requires_grad=True)
    vector = torch.empty(shape[0], 8, device=path.device, requires_grad=True)
    new, out = gated_residual_norm(x, x, vector, vector, vector, EPS, impl=path.impl)
    assert new.shape == out.shape == shape
    (new.sum() + out.sum()).backward()
    assert x.grad.shape == shape
    assert torch.equal(vector.grad, torch.zeros_like(vector))


def test_adaln_is_bitwise_repeatable(path):
    x, branch, six, upstream = inputs(2, 70, 128, torch.float32)
    there = [t.to(path.device) for t in (x, branch, six)], [u.to(path.device) for u in upstream]
    runs = [run("both", *there[0], there[1], impl=path.impl) for _ in range(3)]
    assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:] for name in runs[0])


def test_adaln_does_not_depend_on_the_number_of_threads(path):
    if path.impl == "triton":
        pytest.skip("it has no such number")
    inputs_, before = inputs(8, 70, 96, torch.float32), torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            runs.append(run("both", *inputs_, impl=path.impl))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("unused", [0, 1])
def test_gradient_when_one_of_the_two_outputs_is_not_used(path, unused):
    x, branch, six, upstream = inputs(2, 5, 64, torch.float32)

    def gradients(impl, device):
        leaves = [t.detach().clone().to(device).requires_grad_() for t in (x, branch, six)]
        gate, scale, shift = leaves[2].unbind(1)[1:4]
        outputs = gated_residual_norm(*leaves[:2], gate, scale, shift, EPS, impl=impl)
        outputs[1 - unused].backward(upstream[0].to(device))
        return [leaf.grad.cpu() for leaf in leaves]

    for got, want in zip(gradients(path.impl, path.device), gradients("reference", "cpu"), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_adaln_in_cpp_takes_vectors_of_another_dtype_but_no_such_branch(path):
    if path.impl != "cpp":
        pytest.skip("of the extension")
    x, branch, six, _ = inputs(2, 3, 50, torch.bfloat16)
    vectors = six.float().unbind(1)[1:4]
    got = gated_residual_norm(x, branch, *vectors, EPS, impl="cpp")
    for have, want in zip(got, gated_residual_norm(x, branch, *vectors, EPS, impl="reference"), strict=True):
        torch.testing.assert_close(have, want)
    with pytest.raises(ValueError, match="takes stream and branch of one dtype"):
        gated_residual_norm(x, branch.float(), *vectors, EPS, impl="cpp")
    with pytest.raises(ValueError, match="takes float32, float64 or bfloat16, got torch.float16"):
        layer_norm_modulate(x.half(), *vectors[1:], EPS, impl="cpp")


def test_adaln_in_cpp_opcheck(path):
    if path.impl != "cpp":
        pytest.skip("of the extension")
    x, branch = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
    gate, scale, shift = (torch.randn(2, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(8, requires_grad=True)
    torch.library.opcheck(torch.ops.varfast.adaln_cpp, (x, branch, bias, gate, scale, shift, EPS))
    torch.library.opcheck(torch.ops.varfast.adaln_cpp, (x, None, None, None, scale, shift, EPS))
    mean, rstd = torch.randn(2, 3), torch.rand(2, 3)
    x, branch, bias, gate, scale = (t.detach() for t in (x, branch, bias, gate, scale))
    torch.library.opcheck(torch.ops.varfast.adaln_backward_cpp, (x, x, x, branch, bias, gate, scale, mean, rstd))
    torch.library.opcheck(torch.ops.varfast.adaln_backward_cpp, (None, x, x, None, None, None, scale, mean, rstd))


def test_adaln_opcheck():
    from varfast.kernels.adaln_triton import adaln_op

    how = {"device": "cuda" if torch.cuda.is_available() else "cpu", "requires_grad": True}
    x, branch = (torch.randn(2, 3, 8, **how) for _ in range(2))
    gate, scale, shift = (torch.randn(2, 8, **how) for _ in range(3))
    bias = torch.randn(8, **how)
    torch.library.opcheck(adaln_op, (x, branch, bias, gate, scale, shift, EPS))
    torch.library.opcheck(adaln_op, (x, branch, None, gate, scale, shift, EPS))
    torch.library.opcheck(adaln_op, (x, None, None, None, scale, shift, EPS))
    torch.library.opcheck(adaln_op, (x, branch, bias, gate, None, None, 0.0))
