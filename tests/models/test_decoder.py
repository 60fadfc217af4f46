import copy
import math
import os

import pytest
import torch
from torch._subclasses import FakeTensorMode

from varfast import kernels
from varfast.kernels.settings import trying
from varfast.models import VQVAE
from varfast.policies import decoder
from varfast.policies.decoder import FastDecoder
from varfast.types import InputError

CONFIGS = [
    {"base_channels": 32, "channel_multipliers": (1,), "num_res_blocks": 1, "patch_nums": (1, 2, 3)},
    {"base_channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1, "patch_nums": (1, 2, 3, 4)},
    {"base_channels": 32, "channel_multipliers": (2, 1, 3), "num_res_blocks": 2, "patch_nums": (1,), "code_width": 5},
    {"base_channels": 96, "channel_multipliers": (1, 1), "num_res_blocks": 1, "patch_nums": (1, 5)},
]


def f_hat_of(vqvae: VQVAE, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(side * side for side in vqvae.config.patch_nums)
    tokens = torch.randint(vqvae.config.vocab_size, (batch, num_tokens), generator=generator)
    return vqvae.f_hat(tokens)


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c["channel_multipliers"]))
@torch.no_grad()
def test_fast_decoder_is_as_exact_as_the_plain_one(make_vqvae, config):
    vqvae = make_vqvae(**config)
    f_hat = f_hat_of(vqvae, 3)
    exact = copy.deepcopy(vqvae).double().decode_f_hat(f_hat.double())
    in_float32 = FastDecoder(vqvae, torch.float32)(f_hat)
    assert in_float32.shape == exact.shape
    assert float((in_float32 - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    plain = copy.deepcopy(vqvae).bfloat16().decode_f_hat(f_hat.bfloat16())
    in_bfloat16 = FastDecoder(vqvae)(f_hat)
    assert in_bfloat16.dtype == torch.bfloat16
    assert rms(in_bfloat16 - exact) <= 2 * rms(plain - exact)


@torch.no_grad()
def test_bfloat16_images_are_those_of_float32_to_the_eye(make_vqvae):
    # The public model with a fifth of its channels and a quarter of its side.
    vqvae = make_vqvae(base_channels=32, code_width=32, patch_nums=(1, 2, 4))
    f_hat = f_hat_of(vqvae, 1)
    truth = vqvae.decode_f_hat(f_hat).clamp(-1, 1)
    got = FastDecoder(vqvae)(f_hat).clamp(-1, 1)
    assert 20 * math.log10(2 / rms(got - truth)) > 40  # dB; the peak is 2


@torch.no_grad()
def test_channels_of_zeros_leave_the_image_as_it_is(make_vqvae):
    conv = make_vqvae(**CONFIGS[0]).decoder.conv_out
    x = torch.randn(2, 32, 5, 6)
    padded = decoder._Conv(conv, torch.float32, with_bias=True, channels=64)(x)
    assert padded.shape[1] == 64
    torch.testing.assert_close(padded[:, :3], conv(x))
    assert not padded[:, 3:].any()


@torch.no_grad()
def test_decoding_in_parts_gives_the_same_images(make_vqvae, monkeypatch):
    vqvae = make_vqvae(**CONFIGS[1])
    f_hat = f_hat_of(vqvae, 5)
    fast = FastDecoder(vqvae, torch.float32)
    whole = fast(f_hat)
    sizes = []
    conv_out = fast._conv_out
    fast._conv_out = lambda x: (sizes.append(len(x)), conv_out(x))[1]
    # At the high resolution an image has 32 * 8 * 8 numbers; two fit.
    monkeypatch.setattr(decoder, "_CPU_BYTES", 2 * 32 * 8 * 8 * 4)
    torch.testing.assert_close(fast(f_hat), whole, rtol=0, atol=1e-5)
    assert max(sizes) <= 2
    assert sum(sizes) == 5


def test_fast_decoder_leaves_what_it_is_given_as_it_is(make_vqvae):
    vqvae = make_vqvae(**CONFIGS[1])
    before = copy.deepcopy(vqvae.state_dict())
    f_hat = f_hat_of(vqvae, 2)
    assert f_hat.requires_grad
    for given in (f_hat, f_hat.bfloat16().contiguous(memory_format=torch.channels_last)):
        kept = given.clone()
        assert not FastDecoder(vqvae)(given).requires_grad
        assert torch.equal(given, kept)
    after = vqvae.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in vqvae.parameters())


def test_fast_decoder_depends_on_no_data(make_vqvae):
    # Fake tensors have no values: a branch on one, or a copy to the host, raises.
    vqvae = make_vqvae(**CONFIGS[1])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert FastDecoder(vqvae)(torch.empty(2, 8, 4, 4)).shape == (2, 3, 8, 8)


def test_fast_decoder_refuses_other_dtypes(make_vqvae):
    with pytest.raises(InputError, match=r"dtype is torch.float16; the decoder runs in torch.bfloat16 or"):
        FastDecoder(make_vqvae(**CONFIGS[0]), torch.float16)


@pytest.mark.parametrize("convolution", ["triton", "reference"])
@torch.no_grad()
def test_fast_decoder_by_the_gpu_kernels_is_as_exact_as_the_eager_one(make_vqvae, convolution):
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels run on the GPU here, in the test below")
    vqvae = make_vqvae(base_channels=32, channel_multipliers=(1,), num_res_blocks=1, patch_nums=(1, 4))
    f_hat = f_hat_of(vqvae, 1)
    exact = copy.deepcopy(vqvae).double().decode_f_hat(f_hat.double())
    try:
        # Statistics and residual sums by the kernels of a GPU, which the CPU's own path does without.
        kernels.configure({"conv3x3": convolution, "channel_moments": "triton", "group_norm_silu": "triton"})
        with trying("conv3x3", BLOCK_M=16, BLOCK_K=32):
            got = FastDecoder(vqvae, torch.float32)(f_hat)
    finally:
        kernels.configure({})
    assert float((got - exact).abs().max()) < 1e-5 * float(exact.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_fast_decoder_in_a_cuda_graph_is_as_exact_as_the_plain_one(make_vqvae, monkeypatch, dtype):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vqvae = make_vqvae(base_channels=160, code_width=32, patch_nums=(1, 2, 4))
    f_hat = f_hat_of(vqvae, 4).cuda()
    fast, static = FastDecoder(vqvae.cuda(), dtype), torch.zeros_like(f_hat)
    fast(static)  # cuDNN and Triton make themselves ready before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fast(static)
    static.copy_(f_hat)
    graph.replay()
    exact = copy.deepcopy(vqvae).double().decode_f_hat(f_hat.double())
    plain = copy.deepcopy(vqvae).to(dtype).decode_f_hat(f_hat.to(dtype))
    assert rms(out - exact) <= 2 * rms(plain - exact) + 1e-6
