import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import log_softmax

from varfast.kernels import sample_tokens
from varfast.kernels.reference import philox4x32, uniform_Bl


def key(seed=0, step=0, first=0):
    return torch.tensor([seed, step, first])


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
def test_sample_tokens_frequencies_match_softmax_tails_included(temperature):
    # Probabilities from 0.3 down to 1e-6 at temperature 1.
    logits_V = torch.linspace(0, -12.5, 64)
    draws = 1_000_000
    tokens, _, _ = sample_tokens(logits_V.expand(1000, draws // 1000, 64), key(11), 0, temperature)
    observed = torch.bincount(tokens.flatten(), minlength=64).numpy()
    expected = np.exp(log_softmax(logits_V.double().numpy() / temperature)) * draws
    rare = expected < 5  # pooled, as the test asks for 5 a cell
    pooled = (np.append(observed[~rare], observed[rare].sum()), np.append(expected[~rare], expected[rare].sum()))
    assert stats.chisquare(*pooled).pvalue > 1e-3
    tail = expected < 100
    assert tail.sum() > 10
    assert stats.binomtest(int(observed[tail].sum()), draws, expected[tail].sum() / draws).pvalue > 1e-3


def test_sample_tokens_ties_are_drawn_equally():
    tokens, logp, entropy = sample_tokens(torch.zeros(100, 1000, 10), key(3), 0)
    assert stats.chisquare(torch.bincount(tokens.flatten(), minlength=10).numpy()).pvalue > 1e-3
    assert torch.allclose(logp, torch.tensor(-math.log(10)))
    assert torch.allclose(entropy, torch.tensor(math.log(10)))


def test_sample_tokens_never_draws_probability_zero():
    logits = torch.full((64, 512, 33), -math.inf)
    logits[..., 5::7] = torch.randn(64, 512, 4, generator=torch.Generator().manual_seed(0))
    tokens, logp, entropy = sample_tokens(logits, key(5), 2)
    assert set(tokens.unique().tolist()) == {5, 12, 19, 26}
    assert logp.isfinite().all()
    assert entropy.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sample_tokens_logp_and_entropy_equal_float64(dtype):
    logits = (5 * torch.randn(3, 7, 129, generator=torch.Generator().manual_seed(1))).to(dtype)
    tokens, logp, entropy = sample_tokens(logits, key(2), 0, 0.7)
    exact = log_softmax(logits.double().numpy() / 0.7, axis=-1)
    chosen = np.take_along_axis(exact, tokens.numpy()[..., None], -1)[..., 0]
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    np.testing.assert_allclose(logp.double().numpy(), chosen, rtol=0, atol=tolerance)
    np.testing.assert_allclose(entropy.double().numpy(), -(np.exp(exact) * exact).sum(-1), rtol=0, atol=tolerance)


def test_sample_tokens_do_not_depend_on_the_batch_split():
    logits = torch.randn(10, 9, 50, generator=torch.Generator().manual_seed(2))
    whole = sample_tokens(logits, key(4, 6), 1)
    for size in (1, 3, 5):
        parts = [sample_tokens(logits[i : i + size], key(4, 6, i), 1) for i in range(0, 10, size)]
        for together, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(together, torch.cat(pieces))


def test_sample_tokens_top_k_keeps_the_k_largest():
    logits = torch.randn(4, 500, 40, generator=torch.Generator().manual_seed(3))
    tokens, logp, _ = sample_tokens(logits, key(8), 0, top_k=3)
    largest = logits.topk(3, dim=-1)
    assert (tokens.unsqueeze(-1) == largest.indices).any(-1).all()
    among = (tokens.unsqueeze(-1) == largest.indices).float()
    torch.testing.assert_close(logp, (largest.values.log_softmax(-1) * among).sum(-1))


def test_sample_tokens_top_p_keeps_the_smallest_nucleus():
    prob = torch.tensor([0.04, 0.5, 0.16, 0.3])
    for top_p, kept in [(0.45, {1}), (0.75, {1, 3}), (0.85, {1, 2, 3}), (0.97, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3})]:
        tokens, logp, _ = sample_tokens(prob.log().expand(1, 2000, 4), key(9), 0, top_p=top_p)
        assert set(tokens.unique().tolist()) == kept
        total = prob[sorted(kept)].sum()
        torch.testing.assert_close(logp, (prob / total).log()[tokens])


def test_sample_tokens_guidance_mixes_before_temperature_and_filters():
    generator = torch.Generator().manual_seed(4)
    cond, uncond = torch.randn(2, 6, 20, generator=generator), torch.randn(2, 6, 20, generator=generator)
    mixed = 2.5 * cond - 1.5 * uncond
    guided = sample_tokens(cond, key(), 0, 0.9, uncond_logits_BlV=uncond, guidance=1.5, top_k=5, top_p=0.8)
    for got, want in zip(guided, sample_tokens(mixed, key(), 0, 0.9, top_k=5, top_p=0.8), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (1, 1, 1), (3, 5, 4097)])
def test_sample_tokens_odd_shapes(shape):
    tokens, logp, entropy = sample_tokens(torch.randn(shape), key(), 0)
    assert tokens.shape == logp.shape == entropy.shape == shape[:2]
    assert ((tokens >= 0) & (tokens < shape[2])).all()


def test_sample_tokens_extreme_logits():
    logits = torch.tensor([[[1e4, -1e4, 0.0], [3e38, 0.0, -3e38], [-1e30, -1e30, -1e30]]])
    tokens, logp, entropy = sample_tokens(logits, key(), 0)
    assert tokens[0, :2].tolist() == [0, 0]
    assert logp[0, :2].tolist() == [0.0, 0.0]
    assert entropy.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"key": torch.zeros(2, dtype=torch.int64)}, "key: got"),
        ({"impl": "cuda"}, "impl='cuda': sample_tokens has reference"),
    ],
)
def test_sample_tokens_refuses_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_tokens(**({"logits_BlV": torch.zeros(1, 1, 4), "key": key(), "scale": 0} | arguments))
