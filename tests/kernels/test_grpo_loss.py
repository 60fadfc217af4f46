import math
from fractions import Fraction

import pytest
import torch

from varfast.kernels import GRPO_STATS, grpo_token_loss
from varfast.kernels.reference import k3


def naive_loss(logp, old, ref, advantages, eps, beta):
    """The formula as the paper prints it, for float64."""
    ratio = torch.exp(logp - old)
    surrogate = torch.min(ratio * advantages[:, None], ratio.clamp(1 - eps, 1 + eps) * advantages[:, None])
    q = ref - logp
    return -(surrogate - beta * (torch.exp(q) - q - 1)).mean(dim=1).mean()


def inputs(batch=6, length=50, spread=0.3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logp = -3 + torch.randn(batch, length, generator=generator, dtype=torch.float64)
    old = logp + spread * torch.randn(batch, length, generator=generator, dtype=torch.float64)
    ref = logp + spread * torch.randn(batch, length, generator=generator, dtype=torch.float64)
    advantages = torch.randn(batch, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (logp, old, ref, advantages)]


@pytest.mark.parametrize("spread", [0.3, 0.02, 3.0])
def test_grpo_token_loss_and_gradient_equal_float64_autograd(spread):
    logp, old, ref, advantages = inputs(spread=spread)
    logp.requires_grad_()
    loss, _ = grpo_token_loss(logp, old, ref, advantages, 0.2, 0.2)
    loss.backward()
    wide = logp.detach().double().requires_grad_()
    exact = naive_loss(wide, old.double(), ref.double(), advantages.double(), 0.2, 0.2)
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    error = (logp.grad.double() - wide.grad).norm() / wide.grad.norm()
    assert float(error) < 1e-6


@pytest.mark.parametrize("q", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.0999, 0.1001, 0.5, 5.0, 80.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_k3_keeps_its_digits_in_float32(q, sign):
    ref = torch.tensor(sign * q, dtype=torch.float32)
    logp = torch.zeros((), requires_grad=True)
    value = k3(logp, ref)
    value.backward()
    exact = Fraction(float(ref))
    terms = (exact**n / math.factorial(n) for n in range(2, 400))
    assert value.item() == pytest.approx(float(sum(terms)), rel=2e-6)
    assert float(logp.grad) == pytest.approx(-math.expm1(float(ref)), rel=2e-6)


def test_k3_gradient_is_finite_where_k3_is_huge():
    logp = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    k3(logp, torch.tensor([85.0, -1e6, -1e30])).sum().backward()
    assert logp.grad.isfinite().all()


def test_grpo_token_loss_gradcheck_in_float64():
    logp, old, ref, advantages = inputs(2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: grpo_token_loss(x, old, ref, advantages, 0.2, 0.2)[0], logp.requires_grad_()
    )


def test_grpo_token_loss_averages_and_statistics_by_hand():
    # One image rewarded, one punished; ratios 1, 2 and 0.5.
    logp = torch.tensor([[0.0, math.log(2.0)], [0.0, math.log(0.5)]])
    zero = torch.zeros(2, 2)
    loss, stats = grpo_token_loss(logp, zero, None, torch.tensor([1.0, -1.0]), 0.2, 0.0)
    # Tokens: -1 and -min(2, 1.2) = -1.2; +1 and -min(-0.5, -0.8) = +0.8.
    assert float(loss) == pytest.approx((-1 - 1.2 + 1 + 0.8) / 4)
    named = dict(zip(GRPO_STATS, stats.tolist(), strict=True))
    assert named["kl"] == 0.0
    assert named["clip_fraction"] == 0.5
    assert named["ratio_mean"] == pytest.approx(4.5 / 4)
    assert named["ratio_gap_mean"] == pytest.approx(1.5 / 4)
    assert named["ratio_gap_max"] == pytest.approx(1.0)


def test_grpo_token_loss_clip_cuts_the_gradient_only_where_it_would_overshoot():
    logp = torch.tensor([[math.log(2.0), math.log(0.5)], [math.log(2.0), math.log(0.5)]], requires_grad=True)
    loss, _ = grpo_token_loss(logp, torch.zeros(2, 2), None, torch.tensor([1.0, -1.0]), 0.2, 0.0)
    loss.backward()
    assert (logp.grad == 0).tolist() == [[True, False], [False, True]]


def test_grpo_token_loss_refuses_bad_input():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="logp_ref_BL is \\(2, 4\\)"):
        grpo_token_loss(x, x, torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="want one an image"):
        grpo_token_loss(x, x, None, torch.zeros(3))
