import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from varfast.kernels import selective_log_softmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_selective_log_softmax_equals_float64(dtype, temperature):
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(2, 5, 4097, generator=generator)).to(dtype)
    tokens = torch.randint(4097, (2, 5), generator=generator)
    logp, entropy = selective_log_softmax(logits, tokens, temperature)
    exact = log_softmax(logits.double().numpy() / temperature, axis=-1)
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 1e-5}
    np.testing.assert_allclose(logp, np.take_along_axis(exact, tokens.numpy()[..., None], -1)[..., 0], **tolerance)
    np.testing.assert_allclose(entropy, -(np.exp(exact) * exact).sum(-1), **tolerance)


def test_selective_log_softmax_gradcheck():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(5, (2, 3))
    assert torch.autograd.gradcheck(lambda x: selective_log_softmax(x, tokens, 0.7)[0], logits)


def test_selective_log_softmax_refuses_bad_input():
    with pytest.raises(ValueError, match="want \\(B, L\\)"):
        selective_log_softmax(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="temperature=-1"):
        selective_log_softmax(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), -1)
