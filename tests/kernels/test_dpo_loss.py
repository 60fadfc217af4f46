"""dpo_loss. The truth is the formula as the paper prints it, differentiated by autograd in float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from varfast.kernels import DPO_STATS, dpo_loss
from varfast.kernels.selection import choose

LOSS_TYPES = ["sigmoid", "hinge", "ipo"]


@pytest.fixture(
    params=[
        ("reference", "cpu"),
        ("cpp", "cpu"),
        pytest.param(("cuda", "cuda"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)
def where(request):
    """An implementation and its device; test_csrc.py fails where the extension is missing but need not be."""
    impl, device = request.param
    if impl not in choose("dpo_loss", torch.device(device)).available:
        pytest.skip("the extension is not built")
    return SimpleNamespace(impl=impl, device=device)


def naive(logp, ref, beta, eps, loss_type):
    """Pair by pair."""
    losses, stats = [], []
    total = torch.mean if loss_type == "ipo" else torch.sum
    for chosen, rejected, ref_chosen, ref_rejected in zip(logp[::2], logp[1::2], ref[::2], ref[1::2], strict=True):
        gap = (total(chosen) - total(rejected)) - (total(ref_chosen) - total(ref_rejected))
        if loss_type == "sigmoid":
            z = beta * gap
            losses.append(-(1 - eps) * torch.sigmoid(z).log() - eps * torch.sigmoid(-z).log())
        else:
            losses.append((1 - beta * gap).clamp(min=0) if loss_type == "hinge" else (gap - 1 / (2 * beta)) ** 2)
        rewards = [beta * (total(chosen) - total(ref_chosen)), beta * (total(rejected) - total(ref_rejected))]
        right = (rewards[0] > rewards[1]).double()
        stats.append(torch.stack([*rewards, rewards[0] - rewards[1], right, total(chosen), total(rejected)]))
    return torch.stack(losses).mean(), torch.stack(stats).mean(dim=0).detach()


def inputs(batch=6, length=50, spread=0.3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logp = -4 + torch.randn(batch, length, generator=generator, dtype=torch.float64)
    ref = logp + spread * torch.randn(batch, length, generator=generator, dtype=torch.float64)
    return logp.to(dtype), ref.to(dtype)


def measure(function, logp, *others, **how):
    """Loss, statistics and the gradient for an upstream gradient of 1.7."""
    logp = logp.detach().requires_grad_()
    loss, stats = function(logp, *others, **how)
    assert not stats.requires_grad
    (1.7 * loss).backward()
    return {"loss": loss.detach(), "stats": stats, "gradient": logp.grad}


def run(where, logp, ref, beta=0.1, eps=0.0, loss_type="sigmoid"):
    how = {"beta": beta, "label_smoothing": eps, "loss_type": loss_type, "impl": where.impl}
    return {name: x.cpu() for name, x in measure(dpo_loss, logp.to(where.device), ref.to(where.device), **how).items()}


@pytest.mark.parametrize(
    ("loss_type", "eps"), [("sigmoid", 0.0), ("sigmoid", 0.1), ("hinge", 0.0), ("ipo", 0.0)], ids=str
)
@pytest.mark.parametrize("spread", [0.02, 0.3, 3.0])
@pytest.mark.parametrize("shape", [(2, 1), (2, 577), (6, 50), (66, 576)])
def test_dpo_loss_and_gradient_equal_float64(where, shape, spread, loss_type, eps):
    """To 1e-6, relative. One beta is the usual one, the other makes the margins of most pairs about 1."""
    logp, ref = inputs(*shape, spread)
    for beta in (0.1, 1 / (spread * shape[1] ** 0.5)):
        exact = measure(naive, logp.double(), ref.double(), beta, eps, loss_type)
        got = run(where, logp, ref, beta, eps, loss_type)
        for name in exact:
            assert got[name].dtype == torch.float32
            torch.testing.assert_close(got[name].double(), exact[name], rtol=1e-6, atol=1e-12, msg=name)


@pytest.mark.parametrize("pairs", [1, 3, 7, 100])
def test_dpo_loss_of_equal_weights_is_ln_2(where, pairs):
    logp, _ = inputs(2 * pairs, 33)
    for eps in (0.0, 0.1):
        got = run(where, logp, logp.clone(), eps=eps)
        assert float(got["loss"]) == float(torch.tensor(math.log(2.0)))
        assert got["stats"][:4].tolist() == [0.0, 0.0, 0.0, 0.0]
        slope = 1.7 * 0.1 * (0.5 - eps) / pairs
        assert got["gradient"][0::2].tolist() == [[pytest.approx(-slope, rel=1e-6)] * 33] * pairs
        assert torch.equal(got["gradient"][1::2], -got["gradient"][0::2])


def test_dpo_loss_of_swapped_pairs_is_the_loss_of_the_other_order(where):
    logp, ref = inputs(8, 20)
    other = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    one, swapped = run(where, logp, ref), run(where, logp[other], ref[other])
    margin, back = float(one["stats"][2]), float(swapped["stats"][2])
    assert back == -margin
    # -log sigma(z) + log sigma(-z) = -z
    assert float(one["loss"] - swapped["loss"]) == pytest.approx(-margin, rel=1e-5)
    assert swapped["stats"].tolist() == [one["stats"][i] for i in (1, 0)] + [-margin, 1 - one["stats"][3]] + [
        one["stats"][i] for i in (5, 4)
    ]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_dpo_loss_of_large_margins_does_not_overflow(where, loss_type):
    """Margins of 2e6: of one pair right, of the other wrong."""
    ref = torch.full((4, 10), -5.0)
    logp = ref + torch.tensor([1e5, -1e5, -1e5, 1e5]).unsqueeze(1)
    exact = measure(naive, logp.double()[2:], ref.double()[2:], 1.0, 0.0, "hinge" if loss_type != "ipo" else "ipo")
    wrong = run(where, logp[2:], ref[2:], 1.0, 0.0, loss_type)
    torch.testing.assert_close(wrong["loss"].double(), exact["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(wrong["gradient"].double(), exact["gradient"], rtol=1e-6, atol=0)
    right = run(where, logp[:2], ref[:2], 1.0, 0.0, loss_type)
    if loss_type != "ipo":
        assert float(right["loss"]) == 0.0
        assert not right["gradient"].any()
    both = run(where, logp, ref, 1.0, 0.2 if loss_type == "sigmoid" else 0.0, loss_type)
    assert all(x.isfinite().all() for x in both.values())
    assert float(both["stats"][3]) == 0.5


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_dpo_loss_of_nan_or_infinity_is_not_finite(where, bad, loss_type):
    """A run must see it. The pair is not counted as right, and the other pair's gradient is as before."""
    logp, ref = inputs(4, 9)
    good = run(where, logp, ref, loss_type=loss_type)
    logp[1, 4] = bad
    got = run(where, logp, ref, loss_type=loss_type)
    assert not got["loss"].isfinite()
    assert not got["stats"][[1, 2, 5]].isfinite().any()
    assert got["stats"][3] <= good["stats"][3]
    if math.isnan(bad) and loss_type != "hinge":  # a hinge's slope is a constant
        assert got["gradient"][:2].isnan().all()
    assert torch.equal(got["gradient"][2:], good["gradient"][2:])


VIEWS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "shifted": lambda x: torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape),
    "every second": lambda x: torch.stack([x, x * math.nan], dim=-1)[..., 0],
    "padded rows": lambda x: torch.cat([x, x[:, :3] * math.nan], dim=1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("view", VIEWS)
def test_dpo_loss_takes_any_strides(where, view):
    logp, ref = inputs(8, 44)
    want = run(where, logp, ref)
    for strided in ((VIEWS[view](logp), ref), (logp, VIEWS[view](ref))):
        got = run(where, *strided)
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dpo_loss_of_other_dtypes(where, dtype):
    logp, ref = inputs(4, 30, dtype=dtype)
    exact = measure(naive, logp.double(), ref.double(), 0.1, 0.1, "sigmoid")
    got = run(where, logp, ref, eps=0.1)
    wide = torch.promote_types(dtype, torch.float32)
    assert (got["loss"].dtype, got["stats"].dtype, got["gradient"].dtype) == (wide, wide, dtype)
    for name, rtol in (("loss", 1e-6), ("stats", 1e-6), ("gradient", 1e-6 if dtype == torch.float64 else 4e-3)):
        torch.testing.assert_close(got[name].double(), exact[name], rtol=rtol, atol=1e-12)


def test_dpo_loss_is_bitwise_repeatable_whatever_the_threads(where):
    logp, ref = inputs(130, 600)
    first = run(where, logp, ref)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            again = run(where, logp, ref)
            assert all(torch.equal(again[name], first[name]) for name in first)
    finally:
        torch.set_num_threads(threads)


def test_dpo_loss_opcheck(where):
    if where.impl == "reference":
        pytest.skip("not an op of PyTorch's library")
    logp, ref = (x.to(where.device) for x in inputs(4, 7))
    torch.library.opcheck(torch.ops.varfast.dpo_loss, (logp.requires_grad_(), ref, 0.1, 0.1, 0))


def test_dpo_loss_backward_writes_one_number_an_image(where):
    if where.impl == "reference":
        pytest.skip("of the extension")
    logp, ref = (x.to(where.device) for x in inputs(4, 7))
    asked = torch.ops.varfast.dpo_loss(logp.requires_grad_(), ref, 0.1, 0.1, 0)[0]
    assert torch.autograd.grad(asked, logp)[0].stride() == (1, 0)


def test_dpo_loss_gives_the_reference_no_gradient(where):
    logp, ref = (x.to(where.device).requires_grad_() for x in inputs(2, 5))
    dpo_loss(logp, ref, beta=0.1, impl=where.impl)[0].backward()
    assert ref.grad is None
    assert logp.grad is not None


def test_dpo_stats_are_named():
    assert DPO_STATS == (
        "reward_chosen",
        "reward_rejected",
        "reward_margin",
        "pair_accuracy",
        "logp_chosen",
        "logp_rejected",
    )


def test_dpo_loss_refuses_what_does_not_fit():
    logp, ref = inputs(4, 3)
    for bad in (logp[:3], logp[:0], logp[:, :0], logp[0]):
        with pytest.raises(ValueError, match=r"want \(B, L\), B even"):
            dpo_loss(bad, bad, beta=0.1)
    with pytest.raises(ValueError, match=r"logp_ref_BL is \(2, 3\), logp_BL \(4, 3\): want one shape"):
        dpo_loss(logp, ref[:2], beta=0.1)
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="want a number above 0"):
            dpo_loss(logp, ref, beta=beta)
    for eps in (-0.1, 0.5, math.nan):
        with pytest.raises(ValueError, match="want 0 to below 0.5"):
            dpo_loss(logp, ref, beta=0.1, label_smoothing=eps)
    with pytest.raises(ValueError, match="label_smoothing=0.1 with loss_type='ipo'"):
        dpo_loss(logp, ref, beta=0.1, label_smoothing=0.1, loss_type="ipo")
    with pytest.raises(ValueError, match="loss_type='kto': want one of sigmoid, hinge, ipo"):
        dpo_loss(logp, ref, beta=0.1, loss_type="kto")
