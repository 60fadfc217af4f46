import math

import pytest
import torch

from varfast.kernels import selective_log_softmax


def inputs(shape, dtype, spread=8.0):
    generator = torch.Generator().manual_seed(0)
    logits = (spread * torch.randn(shape, generator=generator)).to(dtype)
    tokens = torch.randint(shape[-1], shape[:-1], generator=generator)
    return logits, tokens, torch.randn(shape[:-1], generator=generator)


def run(logits, tokens, upstream, temperature, **how):
    logits = logits.detach().clone().requires_grad_()
    logp, entropy = selective_log_softmax(logits * 1, tokens, temperature, **how)
    logp.backward(upstream.to(logp.dtype))
    assert not entropy.requires_grad
    return {"logp": logp, "entropy": entropy, "gradient": logits.grad}


@pytest.mark.parametrize("consume_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 4096), (1, 1, 4097), (3, 7, 33), (1, 3, 1)])
def test_logp_entropy_and_gradient_are_as_exact_as_pytorch(path, assert_as_exact, shape, dtype, consume_logits):
    logits, tokens, upstream = inputs(shape, dtype)
    exact = run(logits.double(), tokens, upstream, 0.7, impl="reference")
    plain = run(logits, tokens, upstream, 0.7, impl="reference")
    there = (x.to(path.device) for x in (logits, tokens, upstream))
    got = run(*there, 0.7, consume_logits=consume_logits, impl=path.impl)
    # Interpreted, a bfloat16 gradient is truncated rather than rounded: one unit in the last place, not half of one.
    assert_as_exact(got, plain, exact, floor=2e-6 if dtype == torch.float32 else 4e-3)


def run_biased(logits, bias, tokens, upstream, **how):
    logits, bias = (x.detach().clone().requires_grad_() for x in (logits, bias))
    logp, entropy = selective_log_softmax(logits * 1, tokens, 0.7, bias_V=bias, **how)
    logp.backward(upstream.to(logp.dtype))
    return {"logp": logp, "entropy": entropy, "gradient": logits.grad, "bias": bias.grad}


@pytest.mark.parametrize("consume_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 9, 300), (1, 16, 128), (1, 1, 1)])
def test_bias_and_its_gradient_are_as_exact_as_pytorch(path, assert_as_exact, shape, dtype, consume_logits):
    logits, tokens, upstream = inputs(shape, dtype)
    bias = torch.randn(shape[-1], generator=torch.Generator().manual_seed(1))
    exact = run_biased(logits.double(), bias.double(), tokens, upstream, impl="reference")
    plain = run_biased(logits, bias, tokens, upstream, impl="reference")
    there = (x.to(path.device) for x in (logits, bias, tokens, upstream))
    got = run_biased(*there, consume_logits=consume_logits, impl=path.impl)
    assert got["bias"].dtype == torch.float32
    assert_as_exact(got, plain, exact, floor=2e-6 if dtype == torch.float32 else 4e-3)
    # In another place: the bias is added to the logits first.
    first = run(logits.double() + bias.double(), tokens, upstream, 0.7, impl="reference")
    torch.testing.assert_close(exact["gradient"], first["gradient"], rtol=0, atol=1e-12)
    torch.testing.assert_close(exact["bias"], first["gradient"].sum((0, 1)), rtol=0, atol=1e-12)


def test_log_softmax_of_a_known_distribution(path):
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.125, 0.125]]])).to(path.device)
    logp, entropy = selective_log_softmax(logits, torch.tensor([[2]], device=path.device), 1.0, impl=path.impl)
    assert logp.item() == pytest.approx(math.log(0.125), abs=1e-6)
    assert entropy.item() == pytest.approx(1.75 * math.log(2), abs=1e-6)


def test_selective_log_softmax_gradcheck():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(5, (2, 3))
    assert torch.autograd.gradcheck(lambda x: selective_log_softmax(x, tokens, 0.7, impl="reference")[0], logits)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, b: selective_log_softmax(x, tokens, 0.7, bias_V=b, impl="reference")[0], (logits, bias)
    )


def test_extreme_logits(path):
    rows = torch.tensor([[[1e4, -1e4, 0.0], [-3e38, 0.0, 3e38], [-math.inf, 0.0, 0.0]]], device=path.device)
    logp, entropy = selective_log_softmax(rows, torch.tensor([[0, 2, 1]], device=path.device), 1.0, impl=path.impl)
    torch.testing.assert_close(logp.cpu(), torch.tensor([[0.0, 0.0, -math.log(2)]]))
    if path.impl == "triton":  # the reference's 0 * -inf is NaN; the policy's logits are finite
        torch.testing.assert_close(entropy.cpu(), torch.tensor([[0.0, 0.0, math.log(2)]]))


def test_strided_and_empty_logits(path):
    whole = torch.full((4, 6, 50), math.nan)
    logits, tokens, upstream = inputs((2, 3, 40), torch.float32)
    whole[1:3, 2:5, 5:45] = logits
    there = [x.to(path.device) for x in (whole, tokens, upstream)]
    got, _ = selective_log_softmax(there[0][1:3, 2:5, 5:45], there[1], impl=path.impl)
    want, _ = selective_log_softmax(logits, tokens, impl="reference")
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-5)
    empty, _ = selective_log_softmax(there[0][:0, :3, :40], there[1][:0], impl=path.impl)
    assert empty.shape == (0, 3)


def test_consumed_logits_hold_their_gradient_and_serve_once(path):
    if path.impl != "triton":
        pytest.skip("the reference leaves the logits as they are")
    leaf, tokens, upstream = (x.to(path.device) for x in inputs((2, 3, 40), torch.float32))
    leaf.requires_grad_()
    logits = leaf * 1
    logp, _ = selective_log_softmax(logits, tokens, consume_logits=True, impl="triton")
    logp.backward(upstream, retain_graph=True)
    assert torch.equal(logits.detach(), leaf.grad)
    with pytest.raises(RuntimeError, match="cannot run twice"):
        logp.backward(upstream)


def test_selective_log_softmax_opcheck():
    from varfast.kernels.logprob import _logp_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(2, 3, 40, device=device, requires_grad=True)
    bias = torch.randn(40, device=device, requires_grad=True)
    for given in (None, bias):
        torch.library.opcheck(_logp_triton, (logits, torch.randint(40, (2, 3), device=device), 0.7, given))


def test_selective_log_softmax_refuses_bad_input(path):
    with pytest.raises(ValueError, match=r"bias_V is \(3,\), want \(4,\)"):
        selective_log_softmax(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), bias_V=torch.zeros(3))
    with pytest.raises(ValueError, match="want \\(B, L\\)"):
        selective_log_softmax(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="temperature=-1"):
        selective_log_softmax(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), -1)
    if path.impl == "triton":
        wide = torch.zeros(1, 1, 40_000, device=path.device)
        with pytest.raises(ValueError, match="up to 32768 codes, got 40000"):
            selective_log_softmax(wide, torch.zeros(1, 1, dtype=torch.int64, device=path.device), impl="triton")
