import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import log_softmax

from varfast.kernels import sample_tokens, sampling_segments
from varfast.kernels.reference import philox4x32, uniform_Bl
from varfast.kernels.selection import INTERPRETED

MORE_TRITON = ("triton_segments",)


def key(seed=0, step=0, first=0):
    return torch.tensor([seed, step, first])


@pytest.fixture
def draw(path):
    """sample_tokens by one implementation on its device, results on the CPU."""

    def on_device(x):
        return x.to(path.device) if isinstance(x, torch.Tensor) else x

    def run(*args, **kwargs):
        kwargs = {name: on_device(value) for name, value in kwargs.items()}
        return tuple(x.cpu() for x in sample_tokens(*map(on_device, args), **kwargs, impl=path.impl))

    # The interpreter runs a row at a time, in Python.
    run.rows = 600 if path.impl != "reference" and path.device == "cpu" else 1_000_000
    return run


# Known answers of the Random123 distribution for philox4x32-10.
@pytest.mark.parametrize(
    ("counter", "philox_key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox4x32_known_answers(counter, philox_key, expected):
    words = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, philox_key)))
    assert tuple(int(w) for w in words) == expected


def test_uniform_is_uniform_and_open():
    u = uniform_Bl(key(7), 3, 1000, 256).flatten().numpy()
    assert u.min() > 0
    assert u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert len(np.unique(u)) == len(u)


@pytest.mark.parametrize(
    "other", [key(1), key(2**40), key(step=1), key(first=1)], ids=["seed", "high", "step", "sample"]
)
def test_uniform_depends_on_every_part_of_the_key(other):
    assert not torch.equal(uniform_Bl(key(), 0, 4, 4), uniform_Bl(other, 0, 4, 4))
    assert not torch.equal(uniform_Bl(key(), 0, 4, 4), uniform_Bl(key(), 1, 4, 4))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sample_tokens_frequencies_match_softmax_tails_included(draw, temperature):
    # Probabilities from 0.3 down to 1e-6 at temperature 1.
    logits_V = torch.linspace(0, -12.5, 64)
    draws = draw.rows
    tokens, _, _ = draw(logits_V.expand(100, draws // 100, 64), key(11), 0, temperature)
    assert_drawn_from(tokens, log_softmax(logits_V.double().numpy() / temperature), draws)


def test_sample_tokens_frequencies_match_softmax_over_4096_codes(draw):
    logits_V = 2 * torch.randn(4096, generator=torch.Generator().manual_seed(6))
    rows, steps = (draw.rows, 1) if draw.rows < 10_000 else (10_000, 4)
    tokens = [draw(logits_V.expand(100, rows // 100, 4096), key(12, step), 1)[0] for step in range(steps)]
    assert_drawn_from(torch.cat(tokens), log_softmax(logits_V.double().numpy()), rows * steps)


def assert_drawn_from(tokens, logp_V, draws):
    observed = torch.bincount(tokens.flatten(), minlength=len(logp_V)).numpy()
    order = np.argsort(logp_V)
    observed, expected = observed[order], np.exp(logp_V[order]) * draws
    # Neighbours in probability are pooled until each cell expects 5, as the test asks.
    cell = np.floor(np.cumsum(expected) / 5)
    pooled = [np.array([x[cell == c].sum() for c in np.unique(cell)]) for x in (observed, expected)]
    assert stats.chisquare(pooled[0], pooled[1] * pooled[0].sum() / pooled[1].sum()).pvalue > 1e-3
    tail = np.cumsum(expected) < draws / 100
    assert tail.sum() > 10
    assert stats.binomtest(int(observed[tail].sum()), draws, expected[tail].sum() / draws).pvalue > 1e-3


def test_sample_tokens_frequencies_match_softmax_over_16384_codes_drawn_place_by_place(draw):
    """As a next-token model samples: one token an image and call, its place on the device."""
    logits_V = 2 * torch.randn(16384, generator=torch.Generator().manual_seed(7))
    images, places = (20, 10) if draw.rows < 10_000 else (400, 10)
    tokens = [
        draw(logits_V.expand(images, 1, 16384), key(13, 2), 0, first_token=torch.tensor(place))[0]
        for place in range(places)
    ]
    assert_drawn_from(torch.cat(tokens), log_softmax(logits_V.double().numpy()), images * places)


@pytest.mark.parametrize("inference", [{}, {"top_k": 20, "top_p": 0.9}])
def test_tokens_drawn_place_by_place_are_those_of_the_whole_scale(draw, inference):
    logits = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(8))
    whole = draw(logits, key(4, 1, 2), 0, 0.8, **inference)
    places = [
        draw(logits[:, place : place + 1], key(4, 1, 2), 0, 0.8, first_token=torch.tensor(place), **inference)
        for place in range(5)
    ]
    for together, alone in zip(whole, zip(*places, strict=True), strict=True):
        assert torch.equal(together, torch.cat(alone, dim=1))


def test_sample_tokens_ties_are_drawn_equally(draw):
    tokens, logp, entropy = draw(torch.zeros(10, draw.rows // 10, 10), key(3), 0)
    assert stats.chisquare(torch.bincount(tokens.flatten(), minlength=10).numpy()).pvalue > 1e-3
    assert torch.allclose(logp, torch.tensor(-math.log(10)))
    assert torch.allclose(entropy, torch.tensor(math.log(10)))


def test_sample_tokens_never_draws_probability_zero(draw):
    count = min(draw.rows, 30_000) // 64
    logits = torch.full((64, count, 33), -math.inf)
    logits[..., 5::7] = torch.randn(64, count, 4, generator=torch.Generator().manual_seed(0))
    tokens, logp, entropy = draw(logits, key(5), 2)
    assert set(tokens.unique().tolist()) == {5, 12, 19, 26}
    assert logp.isfinite().all()
    assert entropy.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sample_tokens_logp_and_entropy_equal_float64(draw, path, dtype):
    if dtype == torch.float64 and path.impl != "reference":
        with pytest.raises(ValueError, match="takes float32, bfloat16 or float16, got torch.float64"):
            draw(torch.zeros(1, 1, 4, dtype=dtype), key(), 0)
        return
    logits = (5 * torch.randn(3, 7, 129, generator=torch.Generator().manual_seed(1))).to(dtype)
    tokens, logp, entropy = draw(logits, key(2), 0, 0.7)
    exact = log_softmax(logits.double().numpy() / 0.7, axis=-1)
    chosen = np.take_along_axis(exact, tokens.numpy()[..., None], -1)[..., 0]
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    np.testing.assert_allclose(logp.double().numpy(), chosen, rtol=0, atol=tolerance)
    np.testing.assert_allclose(entropy.double().numpy(), -(np.exp(exact) * exact).sum(-1), rtol=0, atol=tolerance)


def test_sample_tokens_do_not_depend_on_the_batch_split(draw):
    logits = torch.randn(10, 9, 50, generator=torch.Generator().manual_seed(2))
    whole = draw(logits, key(4, 6), 1)
    for size in (1, 3, 5):
        parts = [draw(logits[i : i + size], key(4, 6, i), 1) for i in range(0, 10, size)]
        for together, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(together, torch.cat(pieces))


def test_sample_tokens_top_k_keeps_the_k_largest(draw):
    logits = torch.randn(4, 30, 40, generator=torch.Generator().manual_seed(3))
    tokens, logp, _ = draw(logits, key(8), 0, top_k=3)
    largest = logits.topk(3, dim=-1)
    assert (tokens.unsqueeze(-1) == largest.indices).any(-1).all()
    among = (tokens.unsqueeze(-1) == largest.indices).float()
    torch.testing.assert_close(logp, (largest.values.log_softmax(-1) * among).sum(-1))


def test_sample_tokens_top_p_keeps_the_smallest_nucleus(draw):
    prob = torch.tensor([0.04, 0.5, 0.16, 0.3])
    for top_p, kept in [(0.45, {1}), (0.75, {1, 3}), (0.85, {1, 2, 3}), (0.97, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3})]:
        tokens, logp, _ = draw(prob.log().expand(1, min(500, draw.rows // 10), 4), key(9), 0, top_p=top_p)
        assert set(tokens.unique().tolist()) == kept
        total = prob[sorted(kept)].sum()
        torch.testing.assert_close(logp, (prob / total).log()[tokens])


def test_sample_tokens_guidance_mixes_before_temperature_and_filters(draw):
    generator = torch.Generator().manual_seed(4)
    cond, uncond = torch.randn(2, 6, 20, generator=generator), torch.randn(2, 6, 20, generator=generator)
    mixed = 2.5 * cond - 1.5 * uncond
    guided = draw(cond, key(), 0, 0.9, uncond_logits_BlV=uncond, guidance=1.5, top_k=5, top_p=0.8)
    for got, want in zip(guided, draw(mixed, key(), 0, 0.9, top_k=5, top_p=0.8), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (1, 1, 1), (3, 5, 4097)])
def test_sample_tokens_odd_shapes(draw, shape):
    tokens, logp, entropy = draw(torch.randn(shape), key(), 0)
    assert tokens.shape == logp.shape == entropy.shape == shape[:2]
    assert ((tokens >= 0) & (tokens < shape[2])).all()


def test_sample_tokens_extreme_logits(draw):
    logits = torch.tensor([[[1e4, -1e4, 0.0], [3e38, 0.0, -3e38], [-1e30, -1e30, -1e30]]])
    tokens, logp, entropy = draw(logits, key(), 0)
    assert tokens[0, :2].tolist() == [0, 0]
    assert logp[0, :2].tolist() == [0.0, 0.0]
    assert entropy.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"key": torch.zeros(2, dtype=torch.int64)}, "key: got"),
        ({"bias_V": torch.zeros(3)}, "bias_V is"),
        ({"first_token": torch.zeros(1, dtype=torch.int64)}, "first_token is torch.int64"),
        ({"impl": "fast"}, "impl='fast': sample_tokens has triton, triton_segments, reference"),
    ],
)
def test_sample_tokens_refuses_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_tokens(**({"logits_BlV": torch.zeros(1, 1, 4), "key": key(), "scale": 0} | arguments))


@pytest.mark.parametrize("vocab", [4096, 1000, 64, 5])
@pytest.mark.parametrize("inference", [{}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 40, "top_p": 0.9}])
def test_every_implementation_draws_the_tokens_of_the_reference(draw, vocab, inference):
    generator = torch.Generator().manual_seed(vocab)
    cond, uncond = (4 * torch.randn(3, 8, vocab, generator=generator) for _ in range(2))
    arguments = (cond, key(2**40 + 1, 3, 2**31), 4, 0.7, uncond, 1.5)
    got, want = draw(*arguments, **inference), sample_tokens(*arguments, **inference, impl="reference")
    # In 24 draws, none within rounding (1e-6) of a border.
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[2], want[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("guided", [False, True])
def test_bias_is_added_to_the_logits_before_anything_else(draw, guided):
    generator = torch.Generator().manual_seed(3)
    cond, uncond = (4 * torch.randn(2, 8, 300, generator=generator) for _ in range(2))
    bias = torch.randn(300, generator=generator)
    inference = {"guidance": 1.5, "top_k": 50, "top_p": 0.9} if guided else {}
    got = draw(cond, key(3), 4, 0.7, uncond if guided else None, bias_V=bias, **inference)
    biased = (uncond + bias) if guided else None
    want = sample_tokens(cond + bias, key(3), 4, 0.7, biased, **inference, impl="reference")
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[2], want[2], rtol=0, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="the settings are tried with the kernel interpreted or on a GPU")
def test_tokens_and_logp_do_not_depend_on_the_number_of_segments_or_the_storage(monkeypatch):
    logits = (4 * torch.randn(1, 8, 4097, generator=torch.Generator().manual_seed(5))).bfloat16()
    whole = sample_tokens(logits, key(5), 1, 0.7, impl="triton_segments")
    monkeypatch.setattr(sampling_segments, "_SEGMENTS", 32)
    for given in (logits, logits.float()):
        parts = sample_tokens(given, key(5), 1, 0.7, impl="triton_segments")
        assert torch.equal(parts[0], whole[0])
        assert torch.equal(parts[1], whole[1])


@pytest.mark.parametrize("inference", [{}, {"top_k": 2000, "top_p": 0.95}], ids=["all", "filtered"])
def test_tokens_of_16384_codes_are_those_of_the_reference(draw, assert_as_exact, inference):
    logits = 4 * torch.randn(2, 8, 16384, generator=torch.Generator().manual_seed(8))
    got = draw(logits, key(6), 2, 0.7, **inference)
    plain, exact = (sample_tokens(x, key(6), 2, 0.7, **inference, impl="reference") for x in (logits, logits.double()))
    assert torch.equal(got[0], plain[0])
    assert_as_exact(*(dict(zip(("logp", "entropy"), of[1:], strict=True)) for of in (got, plain, exact)))


def test_sample_tokens_reads_strided_logits_and_nothing_beside_them(draw):
    whole = torch.full((6, 9, 100), math.nan)
    logits = torch.randn(3, 4, 70, generator=torch.Generator().manual_seed(9))
    whole[1:4, 2:6, 10:80] = logits
    for got, want in zip(draw(whole[1:4, 2:6, 10:80], key(), 0), draw(logits, key(), 0), strict=True):
        assert torch.equal(got, want)


def test_tied_logits_stay_or_go_together(draw):
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0]).expand(1, min(400, draw.rows // 6), 5)
    assert set(draw(logits, key(1), 0, top_k=2)[0].unique().tolist()) == {0, 1, 2, 3}
    probability = logits[0, 0].softmax(0)
    # The nucleus needs one of the three equal tokens, so it takes them all.
    top_p = float(probability[0] + 0.5 * probability[1])
    assert set(draw(logits, key(1), 0, top_p=top_p)[0].unique().tolist()) == {0, 1, 2, 3}


def test_sample_tokens_opcheck():
    from varfast.kernels.sampling import _sample_op

    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = (torch.randn(2, 3, 40, device=device), key().to(device), 1, 0.7, None, 0.0, 0, 0.0)
    for bias in (None, torch.randn(40, device=device)):
        torch.library.opcheck(_sample_op, (*arguments, bias))
        torch.library.opcheck(_sample_op, (*arguments, bias), {"segments": True})
    torch.library.opcheck(_sample_op, (*arguments, None, torch.tensor(3, device=device)))


@pytest.mark.parametrize("inference", [{}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 40, "top_p": 0.9}])
@pytest.mark.parametrize("vocab", [5, 64, 129])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter
def test_logits_that_are_no_distribution_draw_a_token_of_the_vocabulary_and_nan(draw, vocab, inference):
    logits = torch.randn(7, 2, vocab, generator=torch.Generator().manual_seed(1))
    logits[0, 0, 2] = math.nan
    logits[1, 0, 2] = -math.nan
    logits[2, 0, 2] = math.inf
    logits[3, 0] = -math.inf
    logits[4, 0] = math.nan
    logits[5, 0, 1:3] = torch.tensor([math.inf, -math.inf])
    tokens, logp, entropy = draw(logits, key(3), 1, 0.9, **inference)
    assert ((tokens >= 0) & (tokens < vocab)).all()
    wrong = torch.zeros(7, 2, dtype=torch.bool)
    wrong[:6, 0] = True
    assert torch.equal(logp.isnan(), wrong)
    assert torch.equal(entropy.isnan(), wrong)
    # The other rows are drawn as if nothing stood beside them.
    good = draw(logits.nan_to_num(0.0, 0.0, 0.0), key(3), 1, 0.9, **inference)
    assert torch.equal(tokens[~wrong], good[0][~wrong])
    assert torch.equal(logp[~wrong], good[1][~wrong])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_guidance_and_temperature_that_overflow_draw_a_token_of_the_vocabulary_and_nan(draw):
    huge = torch.full((1, 2, 33), 3e38)
    tokens, logp, _ = draw(huge, key(), 0, 1.0, uncond_logits_BlV=-huge, guidance=3.0)
    assert ((tokens >= 0) & (tokens < 33)).all()
    assert logp.isnan().all()
    tokens, logp, _ = draw(torch.randn(1, 2, 33), key(), 0, 1e-40)
    assert ((tokens >= 0) & (tokens < 33)).all()
    assert logp.isnan().all()
