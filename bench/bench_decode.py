"""The VQ-VAE's decoder against the plain one, and its upsampling against other ways to compute it.

    pytest bench/bench_decode.py --benchmark-only
    VARFAST_BENCH_LARGE=1 pytest bench/bench_decode.py --benchmark-only    # on a CPU: 3 minutes

On a GPU the public model at 256 px, 64 images; on a CPU the digits', 512 images, or the public one, 4 images. FLOPs are
counted while ours runs.
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

CUDA, DEVICE = harness.CUDA, harness.DEVICE
LARGE = CUDA or os.environ.get("VARFAST_BENCH_LARGE") == "1"
DIGITS = {"base_channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1, "patch_nums": (1, 2, 3, 4)}
BATCH = 64 if CUDA else 4 if LARGE else 512


@pytest.fixture(scope="module")
def vqvae():
    """Random weights: times do not depend on their values."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # as in varfast.policies.var.policy
    config = VQVAEConfig() if LARGE else VQVAEConfig(vocab_size=64, code_width=16, **DIGITS)
    return VQVAE(config).to(DEVICE).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@torch.no_grad()
def test_decode(benchmark, record, vqvae, dtype):
    config = vqvae.config
    f_hat = torch.randn(BATCH, config.code_width, config.patch_nums[-1], config.patch_nums[-1], device=DEVICE)
    fast = FastDecoder(vqvae, dtype)
    plain = copy.deepcopy(vqvae).to(dtype).to(memory_format=torch.channels_last)
    in_dtype = f_hat.to(dtype).contiguous(memory_format=torch.channels_last)
    calls = {
        "ours": lambda: fast(f_hat),
        "eager, channels_last": lambda: plain.decode_f_hat(in_dtype),
    }
    if dtype == torch.float32:
        calls["eager"] = lambda: vqvae.decode_f_hat(f_hat)
    calls |= {name: lambda f=f: f(in_dtype) for name, f in compiled(plain.decode_f_hat).items()}
    with FlopCounterMode(display=False) as counter:
        fast(f_hat[:1])
    # The ceiling of a CPU is that of a float32 product: no share of it for bfloat16.
    flop = BATCH * counter.get_total_flops() if CUDA or dtype == torch.float32 else 0.0
    shape = f"B{BATCH} {config.image_size}px {str(dtype)[6:]}"
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
