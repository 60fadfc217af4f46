import pytest
import torch
import torch.nn.functional as F

from varfast.models import VQVAE, VQVAEConfig


@pytest.mark.parametrize("num_phi", [0, 1, 2, 4])
@torch.no_grad()
def test_encode_then_var_input_and_f_hat_agree_scale_by_scale(num_phi):
    torch.manual_seed(0)
    config = VQVAEConfig(vocab_size=16, code_width=4, patch_nums=(1, 2, 4), base_channels=32,
                         channel_multipliers=(1, 1), num_res_blocks=1, num_phi=num_phi)  # fmt: skip
    vqvae = VQVAE(config)
    tokens = vqvae.encode(torch.rand(3, 3, 8, 8) * 2 - 1)
    assert tokens.shape == (3, 21)
    f_hat = vqvae.f_hat(tokens)
    last = vqvae.quantize.contribution(tokens[:, 5:], 2)
    before_last = vqvae.var_input(tokens)[:, -16:].transpose(1, 2).reshape(3, 4, 4, 4)
    torch.testing.assert_close(f_hat - last, before_last)


def test_forward_is_straight_through():
    torch.manual_seed(0)
    config = VQVAEConfig(vocab_size=16, code_width=4, patch_nums=(1, 2), base_channels=32, channel_multipliers=(1,))
    vqvae = VQVAE(config)
    f = torch.randn(2, 4, 2, 2, requires_grad=True)
    f_hat, loss, tokens = vqvae.quantize(f)
    torch.testing.assert_close(f_hat, vqvae.f_hat(tokens))
    weight = torch.randn_like(f_hat)
    (gradient,) = torch.autograd.grad((f_hat * weight).sum(), f, retain_graph=True)
    torch.testing.assert_close(gradient, weight)
    loss.backward()
    assert vqvae.quantize.embedding.weight.grad.abs().sum() > 0
    assert f.grad.abs().sum() > 0


def test_nearest_is_the_euclidean_nearest():
    torch.manual_seed(0)
    vqvae = VQVAE(VQVAEConfig(vocab_size=50, code_width=4, patch_nums=(1,), base_channels=32, channel_multipliers=(1,)))
    rows = torch.randn(200, 4)
    expected = torch.cdist(rows.double(), vqvae.quantize.embedding.weight.double()).argmin(dim=1)
    assert torch.equal(vqvae.quantize.nearest(rows), expected)


def test_encode_refuses_images_of_another_size():
    vqvae = VQVAE(
        VQVAEConfig(vocab_size=4, code_width=4, patch_nums=(1, 2), base_channels=32, channel_multipliers=(1,))
    )
    with pytest.raises(ValueError, match=r"images are \(1, 3, 4, 4\), want \(B, 3, 2, 2\)"):
        vqvae.encode(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_contribution_upsamples_as_bicubic_interpolation(device):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "code_width": 8, "patch_nums": (1, 2, 3, 5, 8), "base_channels": 32}
    quantize = VQVAE(VQVAEConfig(channel_multipliers=(1,), phi_ratio=0.0, **sizes)).quantize.to(device)
    for scale, side in enumerate((1, 2, 3, 5, 8)):
        tokens = torch.randint(40, (6, side * side), device=device)
        codes = quantize.embedding(tokens).detach()
        maps = codes.transpose(1, 2).reshape(6, 8, side, side)
        exact = F.interpolate(maps.double(), size=(8, 8), mode="bicubic")
        got = quantize.contribution(tokens, scale)
        interpolated = F.interpolate(maps, size=(8, 8), mode="bicubic")
        limit = 2 * (interpolated - exact).abs().max() + 1e-7
        assert (got - exact).abs().max() <= limit
        # And the gradient, that of a sum with random weights.
        weight = torch.randn(6, 8, 8, 8, device=device, dtype=torch.float64)
        (wanted,) = torch.autograd.grad(
            (F.interpolate(wide := maps.double().requires_grad_(), size=(8, 8), mode="bicubic") * weight).sum(), wide
        )
        (gradient,) = torch.autograd.grad((got * weight).sum(), quantize.embedding.weight)
        of_codes = torch.zeros(40, 8, dtype=torch.float64, device=device)
        of_codes.index_add_(0, tokens.flatten(), wanted.flatten(2).transpose(1, 2).reshape(-1, 8))
        torch.testing.assert_close(gradient.double(), of_codes, rtol=1e-5, atol=1e-5)
