import math

import pytest
import torch

from varfast.kernels import selective_log_softmax


def inputs(shape, dtype, spread=8.0):
    generator = torch.Generator().manual_seed(0)
    logits = (spread * torch.randn(shape, generator=generator)).to(dtype)
    tokens = torch.randint(shape[-1], shape[:-1], generator=generator)
    return logits, tokens, torch.randn(shape[:-1], generator=generator)


def run(logits, tokens, upstream, temperature, bias=None, upstream_entropy=None, **how):
    """Both outputs and the gradients of logits and bias, for upstream gradients of logp, entropy or both."""
    leaves = [x.detach().clone().requires_grad_() for x in (logits, bias) if x is not None]
    bias = leaves[1] if len(leaves) == 2 else None
    outputs = selective_log_softmax(leaves[0] * 1, tokens, temperature, bias_V=bias, **how)
    given = [(y, u.to(y.dtype)) for y, u in zip(outputs, (upstream, upstream_entropy), strict=True) if u is not None]
    differentiated, upstreams = zip(*given, strict=True)
    gradients = torch.autograd.grad(differentiated, leaves, upstreams)
    named = zip(("gradient", "bias"), gradients, strict=False)
    return {"logp": outputs[0].detach(), "entropy": outputs[1].detach()} | dict(named)


@pytest.mark.parametrize("consume_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 4096), (1, 1, 4097), (3, 7, 33), (1, 3, 1)])
def test_logp_entropy_and_gradient_are_as_exact_as_pytorch(path, assert_as_exact, shape, dtype, consume_logits):
    logits, tokens, upstream = inputs(shape, dtype)
    exact = run(logits.double(), tokens, upstream, 0.7, impl="reference")
    same_dtype = run(logits, tokens, upstream, 0.7, impl="reference")
    there = (x.to(path.device) for x in (logits, tokens, upstream))
    got = run(*there, 0.7, consume_logits=consume_logits, impl=path.impl)
    # Interpreted, a bfloat16 gradient is truncated rather than rounded: one unit in the last place, not half of one.
    assert_as_exact(got, same_dtype, exact, floor=2e-6 if dtype == torch.float32 else 4e-3)


def biased(shape, dtype):
    logits, tokens, upstream = inputs(shape, dtype)
    generator = torch.Generator().manual_seed(1)
    bias, upstream_entropy = torch.randn(shape[-1], generator=generator), torch.randn(shape[:-1], generator=generator)
    return logits, tokens, upstream, bias, upstream_entropy


@pytest.mark.parametrize("consume_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 9, 300), (1, 16, 128), (1, 1, 1)])
def test_bias_and_its_gradient_are_as_exact_as_pytorch(path, assert_as_exact, shape, dtype, consume_logits):
    logits, tokens, upstream, bias, _ = biased(shape, dtype)
    exact = run(logits.double(), tokens, upstream, 0.7, bias.double(), impl="reference")
    same_dtype = run(logits, tokens, upstream, 0.7, bias, impl="reference")
    logits_there, tokens_there, upstream_there, bias_there = (
        x.to(path.device) for x in (logits, tokens, upstream, bias)
    )
    how = {"consume_logits": consume_logits, "impl": path.impl}
    got = run(logits_there, tokens_there, upstream_there, 0.7, bias_there, **how)
    assert got["bias"].dtype == torch.float32
    assert_as_exact(got, same_dtype, exact, floor=2e-6 if dtype == torch.float32 else 4e-3)
    # In another place: the bias is added to the logits first.
    first = run(logits.double() + bias.double(), tokens, upstream, 0.7, impl="reference")
    torch.testing.assert_close(exact["gradient"], first["gradient"], rtol=0, atol=1e-12)
    torch.testing.assert_close(exact["bias"], first["gradient"].sum((0, 1)), rtol=0, atol=1e-12)


def entropy_gradient(logits, upstream_entropy, temperature):
    """-u p (log p + H) / temperature, the derivative of H = -sum p log p, in float64."""
    logp = (logits.double() / temperature).log_softmax(-1)
    p = logp.exp()
    plogp = torch.where(p == 0, 0.0, p * logp)
    return -upstream_entropy.double().unsqueeze(-1) * (plogp - p * plogp.sum(-1, keepdim=True)) / temperature


@pytest.mark.parametrize("both", [False, True], ids=["entropy", "logp and entropy"])
@pytest.mark.parametrize("consume_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 4096), (1, 1, 4097), (2, 17, 33), (1, 2, 1)])
def test_entropy_gradient_is_as_exact_as_pytorch(path, assert_as_exact, shape, dtype, consume_logits, both):
    logits, tokens, upstream, bias, upstream_entropy = biased(shape, dtype)
    upstream = upstream if both else None
    exact = run(logits.double(), tokens, upstream, 0.7, bias.double(), upstream_entropy, impl="reference")
    same_dtype = run(logits, tokens, upstream, 0.7, bias, upstream_entropy, impl="reference")
    logits_there, tokens_there, bias_there, entropy_there = (
        x.to(path.device) for x in (logits, tokens, bias, upstream_entropy)
    )
    upstream_there = upstream.to(path.device) if both else None
    how = {"consume_logits": consume_logits, "impl": path.impl}
    got = run(logits_there, tokens_there, upstream_there, 0.7, bias_there, entropy_there, **how)
    assert_as_exact(got, same_dtype, exact, floor=2e-6 if dtype == torch.float32 else 4e-3)
    formula = entropy_gradient(logits.double() + bias.double(), upstream_entropy, 0.7)
    if both:
        alone = run(logits.double(), tokens, upstream, 0.7, bias.double(), impl="reference")
        formula = formula + alone["gradient"]
    torch.testing.assert_close(exact["gradient"], formula, rtol=0, atol=1e-12)


def test_an_unused_entropy_does_not_change_the_gradient(path):
    """The backward kernel without the entropy's term: the same bits as one whose entropy has a gradient of 0."""
    logits, tokens, upstream, bias, _ = (x.to(path.device) for x in biased((2, 9, 40), torch.float32))
    alone = run(logits, tokens, upstream, 0.7, bias, impl=path.impl)
    with_zero = run(logits, tokens, upstream, 0.7, bias, torch.zeros_like(upstream), impl=path.impl)
    assert all(torch.equal(alone[name], with_zero[name]) for name in alone)


@pytest.mark.parametrize("consume_logits", [False, True])
def test_the_backward_kernel_computes_the_entropys_term_only_where_it_is_needed(consume_logits):
    from varfast.kernels.aot import _launches
    from varfast.kernels.selection import launches_recorded

    for differentiated, entropy in (((0,), False), ((1,), True), ((0, 1), True)):
        with launches_recorded(), _launches() as launches:
            logits, tokens = torch.zeros(1, 2, 8, requires_grad=True), torch.zeros(1, 2, dtype=torch.int64)
            outputs = selective_log_softmax(logits * 1, tokens, consume_logits=consume_logits, impl="triton")
            torch.stack([outputs[i].sum() for i in differentiated]).sum().backward()
        assert [keywords.get("ENTROPY") for _, _, keywords in launches] == [None, entropy]


def test_log_softmax_of_a_known_distribution(path):
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.125, 0.125]]])).to(path.device)
    logp, entropy = selective_log_softmax(logits, torch.tensor([[2]], device=path.device), 1.0, impl=path.impl)
    assert logp.item() == pytest.approx(math.log(0.125), abs=1e-6)
    assert entropy.item() == pytest.approx(1.75 * math.log(2), abs=1e-6)


def test_selective_log_softmax_gradcheck():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(5, (2, 3))
    assert torch.autograd.gradcheck(lambda x: selective_log_softmax(x, tokens, 0.7, impl="reference"), logits)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, b: selective_log_softmax(x, tokens, 0.7, bias_V=b, impl="reference"), (logits, bias)
    )


def test_extreme_logits(path):
    rows = torch.tensor([[[1e4, -1e4, 0.0], [-3e38, 0.0, 3e38], [-math.inf, 0.0, 0.0]]], device=path.device)
    logp, entropy = selective_log_softmax(rows, torch.tensor([[0, 2, 1]], device=path.device), 1.0, impl=path.impl)
    torch.testing.assert_close(logp.cpu(), torch.tensor([[0.0, 0.0, -math.log(2)]]))
    torch.testing.assert_close(entropy.cpu(), torch.tensor([[0.0, 0.0, math.log(2)]]))


@pytest.mark.parametrize("both", [False, True], ids=["entropy", "logp and entropy"])
def test_entropy_gradient_where_probabilities_are_zero(path, both):
    """A probability of 0, of a logit of -inf or one that underflows, has no part in the gradient."""
    rows = torch.tensor([[[-math.inf, 0.0, 1.0, -math.inf], [-1e4, 0.0, 1.0, -200.0], [0.0, -math.inf, -1e30, -3e38]]])
    tokens, upstream = torch.tensor([[1, 1, 0]]), torch.tensor([[1.0, -2.0, 3.0]])
    there = [x.to(path.device) for x in (rows, tokens, upstream)]
    got = run(*there[:2], there[2] if both else None, 0.7, upstream_entropy=there[2], impl=path.impl)
    want = entropy_gradient(rows, upstream, 0.7)
    if both:
        p = (rows.double() / 0.7).softmax(-1)
        want += upstream[..., None] * (torch.nn.functional.one_hot(tokens, 4) - p) / 0.7
    assert want.isfinite().all()
    torch.testing.assert_close(got["gradient"].double().cpu(), want, rtol=1e-6, atol=1e-6)
    assert (got["gradient"][0, 2] == 0).all()  # certain of one token


@pytest.mark.parametrize("both", [False, True], ids=["entropy", "logp and entropy"])
def test_entropy_gradient_does_not_hide_nan(path, both):
    logits, tokens, upstream = inputs((1, 3, 20), torch.float32)
    logits[0, 1, 7] = math.nan
    there = [x.to(path.device) for x in (logits, tokens, upstream)]
    got = run(*there[:2], there[2] if both else None, 0.7, upstream_entropy=there[2], impl=path.impl)
    assert got["gradient"].isnan().all(-1).tolist() == [[False, True, False]]
    assert got["entropy"].isnan().tolist() == [[False, True, False]]


def test_strided_and_empty_logits(path):
    whole = torch.full((4, 6, 50), math.nan)
    logits, tokens, upstream = inputs((2, 3, 40), torch.float32)
    whole[1:3, 2:5, 5:45] = logits
    there = [x.to(path.device) for x in (whole, tokens, upstream)]
    got, _ = selective_log_softmax(there[0][1:3, 2:5, 5:45], there[1], impl=path.impl)
    want, _ = selective_log_softmax(logits, tokens, impl="reference")
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-5)
    leaf = there[0][:0, :3, :40].clone().requires_grad_()
    empty, no_entropy = selective_log_softmax(leaf, there[1][:0], impl=path.impl)
    assert empty.shape == no_entropy.shape == (0, 3)
    (gradient,) = torch.autograd.grad(empty.sum() + no_entropy.sum(), leaf)
    assert gradient.shape == leaf.shape


def test_consumed_logits_hold_their_gradient_and_serve_once(path):
    if path.impl != "triton":
        pytest.skip("the reference leaves the logits as they are")
    leaf, tokens, upstream = (x.to(path.device) for x in inputs((2, 3, 40), torch.float32))
    leaf.requires_grad_()
    logits = leaf * 1
    logp, entropy = selective_log_softmax(logits, tokens, consume_logits=True, impl="triton")
    logp.backward(upstream, retain_graph=True)
    assert torch.equal(logits.detach(), leaf.grad)
    with pytest.raises(RuntimeError, match="cannot run twice"):
        logp.backward(upstream, retain_graph=True)
    with pytest.raises(RuntimeError, match="log-probability and entropy in one backward pass"):
        entropy.backward(upstream)


def test_strided_upstream_gradients(path):
    logits, tokens, upstream, _, upstream_entropy = (x.to(path.device) for x in biased((3, 5, 20), torch.float32))
    want = run(logits, tokens, upstream, 0.7, upstream_entropy=upstream_entropy, impl=path.impl)
    transposed = [x.t().contiguous().t() for x in (upstream, upstream_entropy)]
    got = run(logits, tokens, transposed[0], 0.7, upstream_entropy=transposed[1], impl=path.impl)
    assert torch.equal(got["gradient"], want["gradient"])


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
