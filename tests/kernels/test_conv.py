import os

import pytest
import torch
import torch.nn.functional as F

from varfast.kernels import channel_moments, conv3x3, group_norm_silu
from varfast.kernels.conv import _conv3x3, _output_block
from varfast.kernels.settings import trying

# (B, C, H, W), O, and the pixels of a tile: whole lines, parts of a line and several lines; 160 channels are 128 + 32.
SHAPES = [((2, 32, 3, 16), 32, 16), ((1, 64, 2, 32), 160, 16), ((2, 32, 8, 4), 64, 16), ((1, 32, 4, 8), 320, 32)]


@pytest.fixture(params=["reference-cpu", "triton-cpu", pytest.param("library-cuda", marks=pytest.mark.gpu),
                        pytest.param("triton-cuda", marks=pytest.mark.gpu)])  # fmt: skip
def where(request):
    """Implementation and device."""
    impl, device = request.param.split("-")
    if (impl, device) == ("triton", "cpu") and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernel runs on the GPU here")
    return impl, device


def on_a_gpu(where, shape):
    """Four times as wide: tiles there have 64 pixels or more."""
    return (*shape[:3], 4 * shape[3]) if where[1] == "cuda" else shape


def inputs(shape, out_channels, dtype):
    generator = torch.Generator().manual_seed(1)
    batch, channels, height, width = shape
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(out_channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    residual = torch.randn(batch, out_channels, height, width, generator=generator)
    return [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight, residual)]


def run(where, *tensors, block=16):
    impl, device = where
    with trying(
        "conv3x3", BLOCK_M=block, BLOCK_K=32 if device == "cpu" else 64 if tensors[0].shape[1] % 64 == 0 else 32
    ):
        out, moments = conv3x3(*(t if t is None else t.to(device) for t in tensors), impl=impl)
    return out.cpu(), moments


def dtypes(where):
    """On a GPU the kernel takes 16 bits alone."""
    return [torch.bfloat16, torch.float16] if where[1] == "cuda" else [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize(("shape", "out_channels", "block"), SHAPES)
def test_conv3x3_is_as_exact_as_pytorch(where, assert_as_exact, shape, out_channels, block, with_residual):
    shape = on_a_gpu(where, shape)
    for dtype in dtypes(where):
        x, weight, residual = inputs(shape, out_channels, dtype)
        residual = residual if with_residual else None
        exact = F.conv2d(x.double(), weight.double(), padding=1) + (0 if residual is None else residual.double())
        eager = F.conv2d(x, weight, padding=1)
        eager = eager if residual is None else eager + residual
        got, _ = run(where, x.clone(), weight, residual, block=block if where[1] == "cpu" else 64)
        assert got.dtype == dtype
        # Interpreted, a bfloat16 is truncated rather than rounded.
        floor = 2e-2 if dtype == torch.bfloat16 and where == ("triton", "cpu") else 1e-6
        assert_as_exact({"out": got}, {"out": eager}, {"out": exact}, floor=floor)


@pytest.mark.parametrize(("shape", "out_channels", "block"), SHAPES)
def test_conv3x3_leaves_the_moments_of_what_it_stores(where, shape, out_channels, block):
    if where[0] == "reference":
        pytest.skip("it has none")
    dtype = torch.float32 if where[1] == "cpu" else torch.bfloat16
    shape = on_a_gpu(where, shape)
    x, weight, residual = inputs(shape, out_channels, dtype)
    got, moments = run(where, x, weight, residual, block=block if where[1] == "cpu" else 64)
    of_all = joined(moments, shape[2] * shape[3])
    pixels = got.double().flatten(2)
    torch.testing.assert_close(of_all[0], pixels.mean(dim=2), rtol=0, atol=1e-5)
    torch.testing.assert_close(of_all[1], pixels.var(dim=2, correction=0), rtol=1e-4, atol=1e-6)


def joined(moments, pixels):
    """Mean and variance of each channel over all pixels, float64."""
    mean, squares = (t.double().cpu() for t in moments[:2])
    rows = torch.full((mean.shape[1],), float(moments.rows), dtype=torch.float64)
    rows[-1] = pixels - moments.rows * (len(rows) - 1)
    rows = rows[None, :, None]
    average = (mean * rows).sum(dim=1) / pixels
    return average, (squares + (mean - average[:, None]) ** 2 * rows).sum(dim=1) / pixels


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", [(2, 32, 33, 17), (1, 160, 5, 11), (1, 24, 1, 1)])
def test_channel_moments_adds_and_measures(where, shape, with_residual):
    if where[0] == "library":
        pytest.skip("it has no implementation of that name")
    impl, device = where
    generator = torch.Generator().manual_seed(2)
    x, residual = (
        (3 + torch.randn(shape, generator=generator)).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    want = x.double() + residual.double() if with_residual else x.double()
    given = residual.to(device) if with_residual else None
    got, moments = channel_moments(x.clone().to(device), given, impl=impl)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-6, atol=0)
    if impl == "reference":
        assert moments is None
        return
    mean, variance = joined(moments, shape[2] * shape[3])
    torch.testing.assert_close(mean, want.flatten(2).mean(dim=2), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, want.flatten(2).var(dim=2, correction=0), rtol=1e-5, atol=1e-7)


def test_group_norm_silu_reads_the_moments_that_it_is_given(where):
    if where[0] != "triton":
        pytest.skip("of the kernel")
    impl, device = where
    x, _, residual = (t.to(device) for t in inputs((2, 64, 8, 16), 64, torch.float32))
    vectors = [t.to(device) for t in torch.randn(3, 64)]
    added, moments = channel_moments(x.clone(), residual, impl=impl)
    got = group_norm_silu(added, *vectors[:2], 32, input_bias_C=vectors[2], moments=moments, impl=impl)
    want = group_norm_silu((x + residual).double(), *(v.double() for v in vectors[:2]), 32,
                           input_bias_C=vectors[2].double(), impl="reference")  # fmt: skip
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)
    # Other moments, another result: they are read, not computed again.
    doubled = moments._replace(mean_BNC=moments.mean_BNC + 1.0)
    other = group_norm_silu(added, *vectors[:2], 32, input_bias_C=vectors[2], moments=doubled, impl=impl)
    assert (other - got).abs().max() > 0.1


def test_conv3x3_reads_nothing_beside_its_inputs(where):
    def within_nan(tensor):
        whole = torch.full((tensor.numel() + 2 * 4096,), float("nan"), dtype=tensor.dtype, device=tensor.device)
        whole[4096:-4096] = tensor.permute(0, 2, 3, 1).flatten()
        batch, channels, height, width = tensor.shape
        return whole[4096:-4096].view(batch, height, width, channels).permute(0, 3, 1, 2)

    dtype = dtypes(where)[0]
    block = 64 if where[1] == "cuda" else 16
    tensors = inputs(on_a_gpu(where, (2, 32, 3, 16)), 32, dtype)
    want, _ = run(where, *(t.to(where[1]) for t in tensors), block=block)
    got, _ = run(where, *(within_nan(t.to(where[1])) for t in tensors), block=block)
    assert torch.equal(got, want)


def test_conv3x3_of_an_image_does_not_depend_on_its_batch(where):
    if where[0] != "triton":
        pytest.skip("a library promises no such thing")
    block = 64 if where[1] == "cuda" else 16
    tensors = inputs(on_a_gpu(where, (3, 32, 4, 16)), 32, dtypes(where)[0])
    at_once, _ = run(where, *(t.clone() for t in tensors), block=block)
    x, weight, residual = tensors
    alone = [run(where, x[i : i + 1].clone(), weight, residual[i : i + 1], block=block)[0] for i in range(3)]
    assert torch.equal(torch.cat(alone), at_once)


def test_conv3x3_refuses_what_it_does_not_take(where):
    x, weight, residual = inputs((2, 32, 3, 16), 32, torch.float32)
    with pytest.raises(ValueError, match=r"want \(B, C, H, W\), \(O, C, 3, 3\)"):
        conv3x3(x, weight[:, :16], impl=where[0])
    with pytest.raises(ValueError, match=r"residual is .* as the output"):
        conv3x3(x, weight, residual[:, :16], impl=where[0])
    with pytest.raises(ValueError, match="want one dtype"):
        conv3x3(x, weight, residual.double(), impl=where[0])
    if where == ("triton", "cpu"):
        with pytest.raises(ValueError, match="tiles of 128 pixels fill, got 3 x 16"):
            conv3x3(x, weight, impl="triton")
        with pytest.raises(ValueError, match="multiples of 32 channels"):
            conv3x3(x[:, :24], weight[:, :24], impl="triton")


@pytest.mark.parametrize(("channels", "blocks"), [(160, (128, 32)), (640, (128, 32)), (128, (128, 0)), (96, (32, 0))])
def test_output_block_divides_the_channels(channels, blocks):
    assert _output_block(channels) == blocks
    assert channels % sum(blocks) == 0


def test_conv3x3_opcheck(where):
    if where[0] != "triton":
        pytest.skip("of the kernel")
    block = 64 if where[1] == "cuda" else 16
    dtype = torch.float32 if where[1] == "cpu" else torch.bfloat16
    rows = [t.permute(0, 2, 3, 1).contiguous().to(where[1]) for t in inputs((2, 32, 4, 64), 32, dtype)]
    with trying("conv3x3", BLOCK_M=block, BLOCK_K=32):
        torch.library.opcheck(_conv3x3, (rows[0], rows[1].flatten(1), rows[2], block))
