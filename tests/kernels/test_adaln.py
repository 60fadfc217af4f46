import numpy as np
import pytest
import torch

from varfast.kernels import gated_residual, layer_norm_modulate


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-12), (torch.bfloat16, 4e-2)]
)
def test_layer_norm_modulate_equals_float64(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    x = (3 + 2 * torch.randn(2, 5, 192, generator=generator)).to(dtype)
    scale, shift = torch.randn(2, 2, 192, generator=generator).to(dtype)
    got = layer_norm_modulate(x, scale, shift, 1e-6)
    wide, scale, shift = x.double().numpy(), scale.double().numpy()[:, None], shift.double().numpy()[:, None]
    normed = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.double().numpy(), normed * (1 + scale) + shift, rtol=0, atol=tolerance)


def test_layer_norm_modulate_gradcheck():
    x, scale, shift = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 6), (2, 6), (2, 6)))
    assert torch.autograd.gradcheck(lambda *a: layer_norm_modulate(*a, 1e-6), (x, scale, shift))


def test_gated_residual_gates_each_image_by_itself():
    x, branch = torch.ones(2, 2, 3), torch.full((2, 2, 3), 10.0)
    gate = torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.0, -1.0]])
    expected = [[1.0, 11.0, 21.0], [6.0, 1.0, -9.0]]
    assert gated_residual(x, branch, gate)[:, 1].tolist() == expected
