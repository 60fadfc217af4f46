"""The tokenizers' decoder against the plain one, and its upsampling against other ways to compute it.

    pytest bench/bench_decode.py --benchmark-only
    VARFAST_BENCH_LARGE=1 pytest bench/bench_decode.py --benchmark-only    # on a CPU: 3 minutes

VAR's VQ-VAE, LlamaGen's VQ-16 and VQ-8, taming's VQGAN. On a GPU the public models at 256 px, 64 images; on a CPU
models of the digits' size, 512 images, or the public ones, 4 images. FLOPs are counted while ours runs.
"""

from __future__ import annotations

import copy
import os

import harness
import pytest
import torch
import torch.nn.functional as F
from bench_kernels import compiled
from torch.utils.flop_counter import FlopCounterMode

from varfast.models import VQVAE, VQVAEConfig
from varfast.policies.convolutional import Upsample
from varfast.policies.decoder import FastDecoder, _Upsample
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.nexttoken.tokenizer_config import TOKENIZERS

CUDA, DEVICE = harness.CUDA, harness.DEVICE
LARGE = CUDA or os.environ.get("VARFAST_BENCH_LARGE") == "1"
DIGITS = {"base_channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1, "patch_nums": (1, 2, 3, 4)}
BATCH = 64 if CUDA else 4 if LARGE else 512


class Decoding(torch.nn.Module):
    """The eager decoder of any tokenizer."""

    def __init__(self, tokenizer):
        super().__init__()
        self.post_quant_conv, self.decoder = tokenizer.post_quant_conv, tokenizer.decoder

    def forward(self, latent):
        return self.decoder(self.post_quant_conv(latent))


def of_name(name: str) -> tuple[torch.nn.Module, int]:
    """A tokenizer, and the side of its latents."""
    if name == "var":
        config = VQVAEConfig() if LARGE else VQVAEConfig(vocab_size=64, code_width=16, **DIGITS)
        return VQVAE(config), config.patch_nums[-1]
    config = TOKENIZERS[name]
    if LARGE:
        return Tokenizer(config), 256 // config.downsampling
    sizes = {key: value for key, value in DIGITS.items() if key != "patch_nums"}
    return Tokenizer(config.model_copy(update={"latent_width": 32, **sizes})), 4


@pytest.fixture(scope="module", params=["var", *TOKENIZERS])
def tokenizer(request):
    """Random weights: times do not depend on their values."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # as in varfast.policies.var.policy
    model, side = of_name(request.param)
    return request.param, model.to(DEVICE).requires_grad_(False), side


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@torch.no_grad()
def test_decode(benchmark, record, tokenizer, dtype):
    name, model, side = tokenizer
    latent = torch.randn(BATCH, model.config.code_width, side, side, device=DEVICE)
    fast, eager = FastDecoder(model, dtype), Decoding(model)
    plain = copy.deepcopy(eager).to(dtype).to(memory_format=torch.channels_last)
    in_dtype = latent.to(dtype).contiguous(memory_format=torch.channels_last)
    calls = {
        "ours": lambda: fast(latent),
        "eager, channels_last": lambda: plain(in_dtype),
    }
    if dtype == torch.float32:
        calls["eager"] = lambda: eager(latent)
    calls |= {how: lambda f=f: f(in_dtype) for how, f in compiled(plain).items()}
    with FlopCounterMode(display=False) as counter:
        fast(latent[:1])
    # The ceiling of a CPU is that of a float32 product: no share of it for bfloat16.
    flop = BATCH * counter.get_total_flops() if CUDA or dtype == torch.float32 else 0.0
    shape = f"{name} B{BATCH} {side * model.config.downsampling}px {str(dtype)[6:]}"
    harness.measure(benchmark, record, harness.Row("decode", shape, "forward", 0.0, flop=flop), calls)


@pytest.mark.parametrize(("channels", "side"), [(160, 128), (320, 64), (640, 16)] if CUDA else [(160, 32)])
@torch.no_grad()
def test_upsample(benchmark, record, channels, side):
    dtype, batch = torch.bfloat16, 64 if CUDA else 4
    x = torch.randn(batch, channels, side, side, device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last)
    module = Upsample(channels).to(DEVICE)
    weight = module.conv.weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
    ours = _Upsample(module, torch.zeros(channels, device=DEVICE, dtype=torch.float64), dtype)

    # One 2x2 convolution to the four pixels that a pixel becomes, each read from its own window, then interleaved.
    taps = torch.cat([ours.weight[:, :, i][..., j].transpose(0, 1) for i in ([3, 1], [2, 0]) for j in ([3, 1], [2, 0])])
    taps = taps.contiguous(memory_format=torch.channels_last)

    def phases():
        four = F.conv2d(x, taps, padding=1).unflatten(1, (2, 2, channels))
        out = x.new_empty(batch, 2 * side, 2 * side, channels).permute(0, 3, 1, 2)
        for i in range(2):
            for j in range(2):
                out[:, :, i::2, j::2] = four[:, i, j, :, i : i + side, j : j + side]
        return out

    def plain():
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)

    torch.testing.assert_close(phases(), plain(), rtol=0.05, atol=0.05)
    calls = {"ours": lambda: ours((x, None)), "interpolate, 3x3": plain, "2x2 phases": phases}
    calls |= compiled(plain)
    flop = 2 * batch * (2 * side) ** 2 * 4 * channels**2 if CUDA else 0.0
    shape = f"B{batch} C{channels} {side} to {2 * side} bfloat16"
    harness.measure(benchmark, record, harness.Row("upsample", shape, "forward", 0.0, flop=flop), calls)
