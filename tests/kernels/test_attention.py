import numpy as np
import pytest
import torch

from varfast.kernels import block_causal_attention, cached_attention


def scale_ends(sides):
    return tuple(np.cumsum([side * side for side in sides]).tolist())


def inputs(batch, heads, length, dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, length, dim, generator=generator, dtype=torch.float64).to(dtype)
    return q, k, v, torch.linspace(0.5, 3.0, heads).to(dtype)


def naive(q, k, v, ends, logit_scale):
    """Query by query, in numpy float64."""
    q, k, v, logit_scale = (x.detach().double().numpy() for x in (q, k, v, logit_scale))
    out = np.zeros_like(q)
    for i in range(q.shape[2]):
        visible = next(end for end in ends if i < end)
        logits = np.einsum("bhd,bhjd->bhj", q[:, :, i], k[:, :, :visible]) * logit_scale[None, :, None]
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        out[:, :, i] = np.einsum("bhj,bhjd->bhd", weight, v[:, :, :visible])
    return out


@pytest.mark.parametrize("sides", [(1,), (1, 2), (1, 2, 3, 5), (2, 3), (1, 3, 7)])
def test_block_causal_attention_equals_naive_float64(sides):
    ends = scale_ends(sides)
    q, k, v, logit_scale = inputs(2, 3, ends[-1], 8)
    out = block_causal_attention(q, k, v, ends, logit_scale)
    exact = naive(q, k, v, ends, logit_scale)
    mask = torch.from_numpy(
        np.array([[j < next(e for e in ends if i < e) for j in range(ends[-1])] for i in range(ends[-1])])
    )
    logits = (logit_scale[:, None, None] * (q @ k.mT)).masked_fill(~mask, -torch.inf)
    plain = logits.softmax(dim=-1) @ v
    assert np.abs(out.numpy() - exact).max() <= 2 * np.abs(plain.numpy() - exact).max() + 1e-7


def test_block_causal_attention_gradcheck_with_logit_scale():
    ends = scale_ends((1, 2))
    tensors = [x.requires_grad_() for x in inputs(1, 2, 5, 4, torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v, s: block_causal_attention(q, k, v, ends, s), tensors)


def test_block_causal_attention_does_not_see_later_scales():
    ends = scale_ends((1, 2, 3))
    q, k, v, logit_scale = inputs(1, 2, 14, 8)
    before = block_causal_attention(q, k, v, ends, logit_scale)
    k[:, :, 5:], v[:, :, 5:] = 1e4, -1e4
    after = block_causal_attention(q, k, v, ends, logit_scale)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5:], after[:, :, 5:])


def test_cached_attention_equals_block_causal_and_ignores_what_is_not_valid():
    ends = scale_ends((1, 2, 3))
    q, k, v, logit_scale = inputs(2, 3, 14, 8)
    whole = block_causal_attention(q, k, v, ends, logit_scale)
    start = 0
    for end in ends:
        k_cache, v_cache = k.clone(), v.clone()
        k_cache[:, :, end:] = v_cache[:, :, end:] = float("nan")
        out = cached_attention(q[:, :, start:end], k_cache, v_cache, end, logit_scale)
        torch.testing.assert_close(out, whole[:, :, start:end], rtol=0, atol=2e-6)
        start = end


def test_attention_refuses_bad_input():
    q, k, v, logit_scale = inputs(1, 1, 5, 4)
    with pytest.raises(ValueError, match="ends at 14, but q has 5"):
        block_causal_attention(q, k, v, (1, 5, 14), logit_scale)
    with pytest.raises(ValueError, match="num_keys=6, but the cache holds 5"):
        cached_attention(q, k, v, 6, logit_scale)
