import math
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from varfast.kernels import GRPO_STATS, grpo_token_loss
from varfast.kernels.reference import k3
from varfast.kernels.selection import choose


@pytest.fixture(
    params=[
        ("reference", "cpu"),
        ("cpp", "cpu"),
        pytest.param(("reference", "cuda"), marks=pytest.mark.gpu),
        pytest.param(("cuda", "cuda"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)
def where(request):
    """An implementation and its device; test_csrc.py fails where the extension is missing but need not be."""
    impl, device = request.param
    if impl not in choose("grpo_token_loss", torch.device(device)).available:
        pytest.skip("the extension is not built")
    return SimpleNamespace(impl=impl, device=device)


@pytest.fixture
def extension(where):
    """The same, of the extension's alone."""
    if where.impl == "reference":
        pytest.skip("of the extension")
    return where


def naive(logp, old, ref, advantages, eps, beta, ratio="token", kl_gradient="k3"):
    """The formulas as the papers print them, for float64: loss and statistics."""
    token_ratio = torch.exp(logp - old)
    advantages = advantages if advantages.ndim == 2 else advantages[:, None]
    of_image = torch.exp((logp - old).mean(dim=1, keepdim=True))
    if advantages.shape == logp.shape:  # GSPO-token: the value of the image's, the gradient of each token
        of_image = of_image.detach() * torch.exp(logp - logp.detach())
    ratio = token_ratio if ratio == "token" else of_image.expand(logp.shape)
    gain, clipped_gain = ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages
    q = torch.zeros_like(logp) if ref is None else ref - logp
    kl = torch.exp(q) - q - 1
    penalty = kl if kl_gradient == "k3" else token_ratio * kl
    loss = -(torch.min(gain, clipped_gain) - beta * penalty).mean(dim=1).mean()
    gap = (token_ratio - 1).abs()
    stats = torch.stack([kl.mean(), (clipped_gain < gain).double().mean(), ratio.mean(), gap.mean(), gap.max()])
    return loss, stats.detach()


def inputs(batch=6, length=50, spread=0.3, dtype=torch.float32, reference=True):
    generator = torch.Generator().manual_seed(0)
    logp = -3 + torch.randn(batch, length, generator=generator, dtype=torch.float64)
    old = logp + spread * torch.randn(batch, length, generator=generator, dtype=torch.float64)
    ref = logp + spread * torch.randn(batch, length, generator=generator, dtype=torch.float64)
    # The gradient jumps at the bounds of the clip: rounding must not decide on which side of them a token lies.
    gap = (logp - old).exp() - 1
    old += 1e-3 * ((gap.abs() - 0.2).abs() < 1e-5)
    advantages = torch.randn(batch, generator=generator, dtype=torch.float64)
    return [x.to(dtype) if x is not None else None for x in (logp, old, ref if reference else None, advantages)]


def measure(function, logp, old, ref, advantages, eps=0.2, beta=0.2, **how):
    """Loss, statistics and the gradient for an upstream gradient of 1.7."""
    logp = logp.detach().requires_grad_()
    loss, stats = function(logp, old, ref, advantages, eps, beta, **how)
    assert not stats.requires_grad
    (1.7 * loss).backward()
    return {"loss": loss.detach(), "stats": stats, "gradient": logp.grad}


def run(where, *tensors, eps=0.2, beta=0.2, **how):
    there = [x.to(where.device) if x is not None else None for x in tensors]
    found = measure(partial(grpo_token_loss, impl=where.impl), *there, eps, beta, **how)
    return {name: x.cpu() for name, x in found.items()}


@pytest.mark.parametrize("reference", [True, False], ids=["ref", "no ref"])
@pytest.mark.parametrize("spread", [0.3, 0.02, 3.0])
@pytest.mark.parametrize("shape", [(6, 50), (1, 1), (1, 7), (7, 1), (3, 5), (2, 3), (13, 681), (512, 680)])
def test_grpo_token_loss_and_gradient_are_as_exact_as_pytorch(where, assert_as_exact, shape, spread, reference):
    tensors = inputs(*shape, spread, reference=reference)
    exact = measure(naive, *(x.double() if x is not None else None for x in tensors))
    plain = measure(lambda *arguments: grpo_token_loss(*arguments, impl="reference"), *tensors)
    got = run(where, *tensors)
    assert all(x.dtype == torch.float32 for x in got.values())
    for name in exact:
        scale = float(exact[name].abs().max())
        assert_as_exact({name: got[name]}, {name: plain[name]}, {name: exact[name]}, floor=3e-7 * scale + 1e-10)
    assert float(got["loss"]) == pytest.approx(float(exact["loss"]), rel=1e-6, abs=1e-7 * float(exact["stats"][2]))


# What an (8, 44) array of advantages looks like to the kernel, from one of other strides.
VIEWS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "shifted": lambda x: torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape),
    "every second": lambda x: torch.stack([x, x * math.nan], dim=-1)[..., 0],
    "padded rows": lambda x: torch.cat([x, x[:, :3] * math.nan], dim=1)[:, : x.shape[1]],
    "one an image": lambda x: x[:, :1].expand(x.shape),
    "one a position": lambda x: x[:1].expand(x.shape),
    "one": lambda x: x[:1, :1].expand(x.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_grpo_token_loss_takes_an_advantage_a_token_of_any_strides(where, assert_as_exact, view):
    logp, old, ref, _ = inputs(8, 44)
    dense = torch.randn(8, 44, generator=torch.Generator().manual_seed(3))
    strided = VIEWS[view](dense)
    exact = measure(naive, *(x.double() for x in (logp, old, ref, strided)))
    same_dtype = measure(lambda *arguments: grpo_token_loss(*arguments, impl="reference"), logp, old, ref, strided)
    got = run(where, logp, old, ref, VIEWS[view](dense.to(where.device)))
    assert_as_exact(got, same_dtype, exact, floor=1e-6)
    # The strides change no bit.
    contiguous = run(where, logp, old, ref, strided.contiguous())
    assert all(torch.equal(got[name], contiguous[name]) for name in contiguous)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (13, 681)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_advantage_an_image_equals_the_same_for_all_its_tokens(where, shape, dtype):
    logp, old, ref, advantages = inputs(*shape)
    image = run(where, logp, old, ref, advantages.to(dtype))
    token = run(where, logp, old, ref, advantages.to(dtype).unsqueeze(1).repeat(1, shape[1]))
    assert all(torch.equal(image[name], token[name]) for name in image)


def test_one_advantage_an_image_is_not_copied_to_its_tokens(monkeypatch):
    import varfast.kernels.grpo_loss as module

    found = []
    monkeypatch.setattr(module, "run", lambda op, impl, *arguments: found.append(arguments[3]))
    for advantages in (torch.ones(2), torch.ones(2, dtype=torch.float64), torch.ones(2, 2)[:, 0]):
        grpo_token_loss(torch.zeros(2, 300), torch.zeros(2, 300), None, advantages)
        assert found[-1].shape == (2, 300)
        assert found[-1].stride(1) == 0
        assert found[-1].dtype == torch.float32
    given = torch.ones(300, 2).t()
    grpo_token_loss(torch.zeros(2, 300), torch.zeros(2, 300), None, given)
    assert found[-1] is given


def test_grpo_token_loss_by_hand_with_an_advantage_a_token(where):
    # Ratios 1, 2 and 0.5, 1; each token pushed its own way.
    logp = torch.tensor([[0.0, math.log(2.0)], [math.log(0.5), 0.0]])
    advantages = torch.tensor([[1.0, -1.0], [-2.0, 0.0]])
    found = run(where, logp, torch.zeros(2, 2), None, advantages, beta=0.0)
    # -1; -min(-2, -1.2) = 2; -min(-1, -1.6) = 1.6; 0.
    assert float(found["loss"]) == pytest.approx((-1 + 2 + 1.6) / 4)
    torch.testing.assert_close(found["gradient"], 1.7 / 4 * torch.tensor([[-1.0, 2.0], [0.0, 0.0]]))
    assert float(found["stats"][1]) == 0.25  # the third token alone is cut off


def test_grpo_token_loss_of_a_million_tokens(where):
    tensors = inputs(1601, 701)  # more than the CUDA grid covers at once
    got, exact = run(where, *tensors), measure(naive, *(x.double() for x in tensors))
    assert float(got["loss"]) == pytest.approx(float(exact["loss"]), rel=1e-6, abs=1e-7)
    torch.testing.assert_close(got["stats"].double(), exact["stats"], rtol=1e-6, atol=0)
    assert float((got["gradient"].double() - exact["gradient"]).norm() / exact["gradient"].norm()) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# One ratio an image; the unbiased gradient of the KL

HOW = {
    "sequence": {"ratio": "sequence"},
    "unbiased": {"kl_gradient": "unbiased"},
    "both": {"ratio": "sequence", "kl_gradient": "unbiased"},
}


@pytest.fixture(params=HOW, ids=str)
def how(request):
    return HOW[request.param]


def drifted(batch, length, spread):
    """Inputs whose images, not only their tokens, have moved from the old policy: some beyond the clip."""
    logp, old, ref, advantages = inputs(batch, length, spread, torch.float64)
    return logp, old - torch.linspace(-0.4, 0.41, batch, dtype=torch.float64)[:, None], ref, advantages


@pytest.mark.parametrize("advantage", ["image", "token"])
@pytest.mark.parametrize("spread", [0.02, 0.3])
@pytest.mark.parametrize("shape", [(6, 50), (1, 1), (7, 1), (3, 5), (13, 681)])
def test_settings_of_the_loss_equal_autograd_of_the_formula_in_float64(where, how, shape, spread, advantage):
    logp, old, ref, advantages = drifted(*shape, spread)
    if advantage == "token":
        advantages = advantages[:, None] * torch.linspace(0.5, 1.5, shape[1], dtype=torch.float64)
    exact = measure(naive, logp, old, ref, advantages, **how)
    got = run(where, logp, old, ref, advantages, **how)
    for name in exact:
        torch.testing.assert_close(got[name], exact[name], rtol=1e-10, atol=1e-13)
    rounded = [x.float() for x in (logp, old, ref, advantages)]
    narrow, exact = run(where, *rounded, **how), measure(naive, *(x.double() for x in rounded), **how)
    for name in exact:  # losses of images cancel: their size is that of the ratios
        error = float((narrow[name].double() - exact[name]).norm() / (1.0 if name == "loss" else exact[name].norm()))
        assert error < 1e-6, (name, error)


def test_sequence_ratio_by_hand(where):
    # Means of the log-ratios: ln(1.1), within; ln(2), above. Of the tokens' ratios two would be cut off.
    logp = torch.tensor([[math.log(1.21), 0.0], [math.log(4.0), 0.0]])
    found = run(where, logp, torch.zeros(2, 2), None, torch.tensor([1.0, 3.0]), beta=0.0, ratio="sequence")
    named = dict(zip(GRPO_STATS, found["stats"].tolist(), strict=True))
    assert float(found["loss"]) == pytest.approx(-(1.1 + 3 * 1.2) / 2)
    torch.testing.assert_close(found["gradient"], 1.7 * torch.tensor([[-1.1, -1.1], [0.0, 0.0]]) / 4)
    assert (named["clip_fraction"], named["ratio_mean"]) == (0.5, pytest.approx((1.1 + 2.0) / 2))
    # The health sign stays that of the tokens.
    assert named["ratio_gap_max"] == pytest.approx(3.0)
    assert named["ratio_gap_mean"] == pytest.approx((0.21 + 3.0) / 4)


def test_unbiased_kl_gradient_by_hand(where):
    logp, old, ref = torch.tensor([[0.5, -0.25]]), torch.tensor([[0.2, -0.25]]), torch.tensor([[0.1, 0.5]])
    found = run(where, logp, old, ref, torch.zeros(1), beta=1.0, kl_gradient="unbiased")
    ratio = torch.tensor([[math.exp(0.3), 1.0]])
    torch.testing.assert_close(found["gradient"], 1.7 * ratio * (logp - ref) / 2)
    plain = [math.exp(q) - q - 1 for q in (-0.4, 0.75)]
    assert float(found["stats"][0]) == pytest.approx(sum(plain) / 2)  # the KL that is logged stays k3
    assert float(found["loss"]) == pytest.approx((math.exp(0.3) * plain[0] + plain[1]) / 2)


def test_unbiased_kl_gradient_has_the_expectation_of_the_kls_gradient():
    """Off policy, summed over all tokens of a small vocabulary with their probabilities; k3's own has another one."""
    generator = torch.Generator().manual_seed(0)
    policy, old, ref = (torch.randn(1, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    policy.requires_grad_()
    logp, logp_old, logp_ref = (x.log_softmax(dim=1) for x in (policy, old, ref))
    truth = torch.autograd.grad((logp.exp() * (logp - logp_ref)).sum(), policy, retain_graph=True)[0]
    found = {}
    for how in ("k3", "unbiased"):
        each = [
            logp_old[0, token].exp()
            * grpo_token_loss(
                *(x[:, token : token + 1] for x in (logp, logp_old, logp_ref)), torch.zeros(1, dtype=torch.float64),
                kl_beta=1.0, kl_gradient=how, impl="reference",
            )[0]
            for token in range(7)
        ]  # fmt: skip
        found[how] = torch.autograd.grad(torch.stack(each).sum(), policy, retain_graph=True)[0]
    torch.testing.assert_close(found["unbiased"], truth, rtol=1e-12, atol=1e-14)
    assert float((found["k3"] - truth).norm() / truth.norm()) > 0.1


def test_settings_of_the_loss_survive_an_old_policy_that_gave_no_probability(extension):
    logp, old = torch.zeros(1, 4), torch.full((1, 4), -math.inf)
    got = run(extension, logp, old, None, torch.tensor([2.0]), ratio="sequence")
    assert float(got["loss"]) == pytest.approx(-2.4)
    assert (got["gradient"] == 0).all()


def test_sequence_ratio_is_bitwise_repeatable_and_takes_any_strides(where, how):
    tensors = [x.float() for x in drifted(33, 681, 0.3)]
    first = run(where, *tensors, **how)
    views = [x.t().contiguous().t() for x in tensors[:3]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    again = run(where, *views, tensors[3], **how)
    torch.set_num_threads(threads)
    for name in first:
        if where.impl == "cpp":
            assert torch.equal(again[name], first[name])
        torch.testing.assert_close(again[name], first[name], rtol=1e-6, atol=1e-9)


def test_grpo_token_loss_names_an_unknown_setting():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="ratio='image': want token or sequence"):
        grpo_token_loss(x, x, None, x[:, 0], ratio="image")
    with pytest.raises(ValueError, match="kl_gradient='k2': want k3 or unbiased"):
        grpo_token_loss(x, x, None, x[:, 0], kl_gradient="k2")


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_grpo_token_loss_in_float64_equals_the_formula(where, spread):
    tensors = inputs(13, 681, spread, torch.float64)
    got, exact = run(where, *tensors), measure(naive, *tensors)
    for name in exact:
        torch.testing.assert_close(got[name], exact[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kl_gradient", ["k3", "unbiased"])
def test_grpo_token_loss_gradcheck_in_float64(where, kl_gradient):
    logp, old, ref, advantages = (x.to(where.device) for x in inputs(2, 5, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda x: grpo_token_loss(x, old, ref, advantages, 0.2, 0.2, kl_gradient=kl_gradient, impl=where.impl)[0],
        logp.requires_grad_(),
    )


def test_extension_passes_opcheck(extension):
    for dtype in (torch.float32, torch.float64):
        logp, old, ref, advantages = (x.to(extension.device) for x in inputs(3, 5, dtype=dtype))
        logp.requires_grad_()
        for other, given in ((ref, advantages[:, None].expand(logp.shape)), (None, old)):
            for flags in ((), (True, True)):
                arguments = (logp, old, other, given, 0.2, 0.2, *flags)
                torch.library.opcheck(torch.ops.varfast.grpo_token_loss.default, arguments)
        upstream = torch.tensor(1.7, dtype=dtype, device=extension.device)
        torch.library.opcheck(torch.ops.varfast.grpo_token_loss_backward.default, (logp.detach(), upstream))


def test_grpo_token_loss_compiled_in_one_graph_equals_eager(where):
    if where.impl == "reference":
        pytest.skip("no op to compile")
    logp, old, ref, advantages = (x.to(where.device) for x in inputs())

    def loss(x):
        return grpo_token_loss(2 * x, old, ref, advantages, 0.2, 0.2, impl=where.impl)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        x = logp.clone().requires_grad_()
        try:
            value, stats = function(x)
        except torch._inductor.exc.InductorError as error:
            pytest.skip(f"no compiler: {error}")
        value.backward()
        results.append((value, stats, x.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("impl_sees", ["transposed", "shifted", "expanded", "strided"])
def test_grpo_token_loss_takes_any_strides(where, impl_sees):
    logp, old, ref, advantages = inputs(8, 44)

    def view(x):
        if impl_sees == "transposed":
            return x.t().contiguous().t()
        if impl_sees == "shifted":  # contiguous, but not where 128-bit loads may start
            return torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape)
        if impl_sees == "expanded":
            return x[:1].expand(x.shape)
        return torch.stack([x, torch.full_like(x, math.nan)], dim=-1)[..., 0]

    there = [x.to(where.device) for x in (logp, old, ref, advantages)]
    views = [view(x) for x in there[:3]]
    spaced = torch.stack([there[3], there[3] * math.nan], dim=-1)[:, 0]
    call = lambda *arguments: grpo_token_loss(*arguments, impl=where.impl)  # noqa: E731
    got, plain = measure(call, *views, spaced), measure(call, *(x.contiguous() for x in views), there[3])
    for name in plain:
        torch.testing.assert_close(got[name], plain[name], rtol=1e-6, atol=1e-9)


def test_grpo_token_loss_computes_bfloat16_in_float32(where):
    logp, old, ref, advantages = inputs()
    got = run(where, logp.bfloat16(), old, ref.half(), advantages)
    wide = run(where, logp.bfloat16().float(), old, ref.half().float(), advantages)
    assert got["loss"].dtype == torch.float32
    assert torch.equal(got["loss"], wide["loss"])
    assert torch.equal(got["stats"], wide["stats"])
    assert torch.equal(got["gradient"], wide["gradient"].bfloat16())


def test_grpo_token_loss_is_bitwise_repeatable(where):
    tensors = inputs(64, 681)
    threads = torch.get_num_threads()
    results = []
    for number in (threads, 1, threads, 2):
        if where.impl == "cpp":  # the order of additions does not depend on the threads
            torch.set_num_threads(number)
        results.append(run(where, *tensors))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


@pytest.mark.parametrize("sign", [1, -1])
def test_grpo_token_loss_survives_log_ratios_of_80(where, sign):
    gap = 80.0 * sign
    logp = torch.zeros(2, 6)
    tensors = logp, logp - gap, logp + gap, torch.tensor([1.0, -1.0])
    exact = measure(naive, *(x.double() for x in tensors))
    got = run(where, *tensors)
    for name in exact:
        torch.testing.assert_close(got[name].double(), exact[name], rtol=2e-6, atol=1e-7)


def test_grpo_token_loss_where_the_old_policy_gave_no_probability(where):
    logp, old = torch.zeros(1, 4), torch.full((1, 4), -math.inf)
    got = run(where, logp, old, None, torch.tensor([2.0]))
    assert float(got["loss"]) == pytest.approx(-2.4)  # the clip bounds what there is to gain
    assert got["stats"][1:].tolist() == [1.0, math.inf, math.inf, math.inf]
    if where.impl != "reference":  # whose gradient is 0 * inf
        assert (got["gradient"] == 0).all()
    assert float(run(where, logp, old, None, torch.tensor([-2.0]))["loss"]) == math.inf


def test_grpo_token_loss_does_not_hide_nan(where):
    for index in range(3):
        tensors = inputs(3, 40)
        tensors[index][1, 17] = math.nan
        got = run(where, *tensors)
        assert got["loss"].isnan()
        assert got["stats"].isnan().tolist() == [index != 1, False, index != 2, index != 2, index != 2]
        assert got["gradient"].isnan().nonzero().tolist() == [[1, 17]]


def test_extension_lets_the_bounds_of_the_clip_through(extension):
    zero = torch.zeros(2, 2)
    got = run(extension, zero, zero, None, torch.tensor([1.0, -1.0]), eps=0.0, beta=0.0)
    torch.testing.assert_close(got["gradient"], 1.7 / 4 * torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    assert got["stats"].tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("q", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.0999, 0.1001, 0.5, 5.0, 80.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_k3_keeps_its_digits_in_float32(where, q, sign):
    ref = torch.tensor(sign * q, dtype=torch.float32)
    logp = torch.zeros((), requires_grad=True)
    value = k3(logp, ref)
    value.backward()
    exact = Fraction(float(ref))
    truth = float(sum(exact**n / math.factorial(n) for n in range(2, 400)))
    assert value.item() == pytest.approx(truth, rel=2e-6)
    assert float(logp.grad) == pytest.approx(-math.expm1(float(ref)), rel=2e-6)
    zero = torch.zeros(1, 1)
    got = run(where, zero, zero, ref.view(1, 1), torch.zeros(1), beta=1.0)
    assert float(got["stats"][0]) == pytest.approx(truth, rel=2e-6)
    assert float(got["loss"]) == pytest.approx(truth, rel=2e-6)
    assert float(got["gradient"]) == pytest.approx(-1.7 * math.expm1(float(ref)), rel=2e-6)


def test_k3_gradient_is_finite_where_k3_is_huge():
    logp = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    k3(logp, torch.tensor([85.0, -1e6, -1e30])).sum().backward()
    assert logp.grad.isfinite().all()


def test_grpo_token_loss_averages_and_statistics_by_hand(where):
    # One image rewarded, one punished; ratios 1, 2 and 0.5.
    logp = torch.tensor([[0.0, math.log(2.0)], [0.0, math.log(0.5)]])
    found = run(where, logp, torch.zeros(2, 2), None, torch.tensor([1.0, -1.0]), beta=0.0)
    # Tokens: -1 and -min(2, 1.2) = -1.2; +1 and -min(-0.5, -0.8) = +0.8.
    assert float(found["loss"]) == pytest.approx((-1 - 1.2 + 1 + 0.8) / 4)
    named = dict(zip(GRPO_STATS, found["stats"].tolist(), strict=True))
    assert named["kl"] == 0.0
    assert named["clip_fraction"] == 0.5
    assert named["ratio_mean"] == pytest.approx(4.5 / 4)
    assert named["ratio_gap_mean"] == pytest.approx(1.5 / 4)
    assert named["ratio_gap_max"] == pytest.approx(1.0)


def test_grpo_token_loss_clip_cuts_the_gradient_only_where_it_would_overshoot(where):
    logp = torch.tensor([[math.log(2.0), math.log(0.5)], [math.log(2.0), math.log(0.5)]])
    found = run(where, logp, torch.zeros(2, 2), None, torch.tensor([1.0, -1.0]), beta=0.0)
    assert (found["gradient"] == 0).tolist() == [[True, False], [False, True]]


def test_grpo_token_loss_refuses_bad_input(where):
    x = torch.zeros(2, 3, device=where.device)
    zeros = lambda *shape: torch.zeros(*shape, device=where.device)  # noqa: E731
    with pytest.raises(ValueError, match="logp_ref_BL is \\(2, 4\\)"):
        grpo_token_loss(x, x, zeros(2, 4), zeros(2), impl=where.impl)
    for shape in ((3,), (2, 1), (3, 2), ()):
        with pytest.raises(ValueError, match="want one a token, \\(B, L\\), or one an image, \\(B,\\)"):
            grpo_token_loss(x, x, None, x.new_zeros(shape), impl=where.impl)
    for shape in ((0, 3), (2, 0), (0, 0)):
        with pytest.raises(ValueError, match="at least one token"):
            grpo_token_loss(zeros(*shape), zeros(*shape), None, zeros(shape[0]), impl=where.impl)


def test_extension_refuses_what_the_public_function_would_not_pass(extension):
    call = torch.ops.varfast.grpo_token_loss
    x = torch.zeros(2, 3, device=extension.device)
    with pytest.raises(RuntimeError, match="want the shape of logp_BL"):
        call(x, x[:1], None, x, 0.2, 0.2)
    for advantages in (x[:, 0], x[:, :1], x[:1]):
        with pytest.raises(RuntimeError, match="want the shape of logp_BL"):
            call(x, x, None, advantages, 0.2, 0.2)
    with pytest.raises(RuntimeError, match="want one dtype"):
        call(x, x.double(), None, x, 0.2, 0.2)
    with pytest.raises(RuntimeError, match="want float32 or float64"):
        call(x.half(), x.half(), None, x.half(), 0.2, 0.2)


@pytest.mark.parametrize(("impl", "device"), [("cuda", "cpu"), pytest.param("cpp", "cuda", marks=pytest.mark.gpu)])
def test_grpo_token_loss_refuses_an_implementation_of_another_device(impl, device):
    x = torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match=f"impl='{impl}' of grpo_token_loss cannot run on {device}"):
        grpo_token_loss(x, x, None, x[:, 0], impl=impl)


# ---------------------------------------------------------------------------------------------------------------------
# CUDA


@pytest.fixture
def on_gpu():
    if "cuda" not in choose("grpo_token_loss", torch.device("cuda")).available:
        pytest.skip("the extension is not built with CUDA")
    return [x.cuda() for x in inputs(512, 680)]


def cuda_loss(*tensors):
    return measure(lambda *arguments: grpo_token_loss(*arguments, impl="cuda"), *tensors)


def assert_same(got, expected):
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.gpu
def test_cuda_runs_one_kernel_forward_and_one_backward(on_gpu):
    logp, old, ref, advantages = on_gpu
    logp.requires_grad_()

    def step():
        loss, _ = grpo_token_loss(logp, old, ref, advantages, impl="cuda")
        torch.autograd.grad(loss, logp, one)

    one = torch.ones((), device="cuda")
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 2, kernels


@pytest.mark.gpu
def test_cuda_does_not_synchronise(on_gpu):
    cuda_loss(*on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda_loss(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_launches_on_many_streams_do_not_mix(on_gpu):
    expected = cuda_loss(*on_gpu)
    torch.cuda.synchronize()
    found = []
    for stream in [torch.cuda.Stream() for _ in range(8)] * 4:
        with torch.cuda.stream(stream):
            found.append(cuda_loss(*on_gpu))
    torch.cuda.synchronize()
    for got in found:
        assert_same(got, expected)


@pytest.mark.gpu
def test_cuda_captured_in_a_graph_equals_eager_at_every_replay(on_gpu):
    logp, old, ref, advantages = on_gpu
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        cuda_loss(*on_gpu)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda_loss(*on_gpu)
    for shift in (0.0, 0.1, -0.2):
        old.add_(shift)
        graph.replay()
        assert_same(captured, cuda_loss(logp, old, ref, advantages))


@pytest.mark.gpu
def test_cuda_still_counts_when_all_tickets_are_given_out(on_gpu):
    # csrc/grpo_loss_cuda.cu has 4096; beyond, a launch clears one of its own. 20 blocks a launch.
    few = [x[:29] for x in on_gpu]
    expected = cuda_loss(*few)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4100):
            loss, stats = grpo_token_loss(*few, impl="cuda")
    for _ in range(3):
        graph.replay()
        assert torch.equal(loss, expected["loss"])
        assert torch.equal(stats, expected["stats"])
