import math

import numpy as np
import pytest
import torch

from varfast.kernels import gelu
from varfast.kernels.extension import NO_EXTENSION

DTYPES = [torch.float32, torch.bfloat16]
# Empty, one row, rows that do not fill a chunk of the bias's gradient, a width that no vector divides, the digits'.
SHAPES = [(0, 64), (1, 5), (3, 7, 33), (2, 65, 512)]


@pytest.fixture(params=["cpp", "reference"])
def impl(request):
    """test_csrc.py fails where the extension is missing but need not be."""
    if request.param == "cpp" and NO_EXTENSION:
        pytest.skip(NO_EXTENSION)
    return request.param


def inputs(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, grad = (3 * torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return x, torch.randn(shape[-1], generator=generator).to(dtype), grad


def naive(x, bias, grad):
    """By tanh, as in the public code, in float64: GELU and its gradients in x and bias."""
    s = (x.double() + bias.double()).numpy()
    slope = math.sqrt(2 / math.pi)
    tanh = np.tanh(slope * (s + 0.044715 * s**3))
    derivative = 0.5 * (1 + tanh) + 0.5 * s * (1 - tanh**2) * slope * (1 + 3 * 0.044715 * s**2)
    d_x = grad.double().numpy() * derivative
    return [torch.from_numpy(a) for a in (0.5 * s * (1 + tanh), d_x, d_x.reshape(-1, s.shape[-1]).sum(axis=0))]


def found(x, bias, grad, impl):
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    out = gelu(x, bias, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, (x, bias), grad)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_and_its_gradients_no_worse_than_pytorch(impl, shape, dtype):
    tensors = inputs(shape, dtype)
    for ours, peer, exact in zip(found(*tensors, impl), found(*tensors, "reference"), naive(*tensors), strict=True):
        assert ours.dtype == dtype
        assert ours.shape == exact.shape
        if exact.numel():
            rounding = 1.2e-7 * max(1.0, float(exact.abs().max()))
            assert (ours - exact).abs().max() <= 2 * (peer - exact).abs().max() + rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_without_bias_and_of_numbers_that_are_far_from_0(impl, dtype):
    x = torch.tensor([-1e4, -60.0, -9.95, -9.85, -1e-30, 0.0, 1e-30, 9.85, 9.95, 60.0, 1e4]).to(dtype)
    far = x.detach().requires_grad_()
    out = gelu(far, impl=impl)
    (d_x,) = torch.autograd.grad(out.sum(), far)
    ends = x.abs() > 9
    assert out.isfinite().all()
    torch.testing.assert_close(out[ends], x[ends].clamp_min(0), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(d_x, (x > 0) + 0.5 * (x.abs() < 1).to(dtype) * (1 - 2 * (x > 0)), rtol=0, atol=1e-6)


def test_gelu_keeps_what_is_not_a_number(impl):
    x = torch.tensor([0.0, math.nan, 1.0], requires_grad=True)
    out = gelu(x, impl=impl)
    (d_x,) = torch.autograd.grad(out.sum(), x)
    assert out.isnan().tolist() == d_x.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpp_gelu_reads_any_strides_and_repeats_itself_on_any_number_of_threads(dtype):
    if NO_EXTENSION:
        pytest.skip(NO_EXTENSION)
    x, bias, grad = inputs((300, 96), dtype)
    first, threads = found(x, bias, grad, "cpp"), torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        again = found(x.T.contiguous().T, bias, grad.T.contiguous().T, "cpp")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_cpp_gelu_passes_opcheck():
    if NO_EXTENSION:
        pytest.skip(NO_EXTENSION)
    x, bias, grad = inputs((4, 33), torch.float32)
    torch.library.opcheck(torch.ops.varfast.gelu_cpp.default, (x.requires_grad_(), bias.requires_grad_()))
    torch.library.opcheck(torch.ops.varfast.gelu_backward_cpp.default, (grad, x.detach(), None))


def test_gelu_refuses_another_bias_and_float16_in_cpp():
    with pytest.raises(ValueError, match=r"bias_C is torch.float32 \(3,\), want torch.float32 \(4,\)"):
        gelu(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"bias_C is torch.float64 \(4,\), want torch.float32"):
        gelu(torch.zeros(2, 4), torch.zeros(4, dtype=torch.float64))
    if NO_EXTENSION is None:
        with pytest.raises(
            ValueError, match="impl='cpp' of gelu takes float32, float64 or bfloat16, got torch.float16"
        ):
            gelu(torch.zeros(2, 4, dtype=torch.float16), impl="cpp")
