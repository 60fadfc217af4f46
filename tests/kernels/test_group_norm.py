from types import SimpleNamespace

import numpy as np
import pytest
import torch

from varfast.kernels import group_norm_silu
from varfast.kernels.group_norm import _tile
from varfast.kernels.selection import choose

EPS = 1e-6
# (B, C, H, W) and groups. The widths of the public model, its fewest pixels, chunks that do not come out even, widths
# that no tile of a power of two divides, one pixel.
SHAPES = [
    ((1, 160, 5, 11), 32),
    ((1, 320, 3, 3), 32),
    ((1, 640, 2, 35), 32),
    ((2, 32, 33, 17), 8),
    ((2, 24, 6, 50), 4),
    ((1, 7, 40, 37), 1),
    ((2, 64, 1, 1), 4),
]


@pytest.fixture(
    params=[
        ("reference", "cpu"),
        ("cpp", "cpu"),
        ("triton", "cpu"),
        pytest.param(("triton", "cuda"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)
def where(request):
    """An implementation and its device; test_csrc.py fails where the extension is missing but need not be."""
    impl, device = request.param
    if impl not in choose("group_norm_silu", torch.device(device)).available:
        pytest.skip("the extension is not built, or the kernel runs on the GPU here")
    return SimpleNamespace(impl=impl, device=device)


@pytest.fixture
def kernel(where):
    """The same, without the reference."""
    if where.impl == "reference":
        pytest.skip("of the kernels")
    return where


def inputs(shape, dtype=torch.float32, offset=0.5):
    generator = torch.Generator().manual_seed(0)
    x = (offset + 2 * torch.randn(shape, generator=generator)).to(dtype)
    weight, bias, input_bias = torch.randn(3, shape[1], generator=generator)
    return x.contiguous(memory_format=torch.channels_last), 1 + 0.5 * weight, bias, input_bias


def run(where, x, weight, bias, groups, silu=True, input_bias=None):
    x, weight, bias, input_bias = (t if t is None else t.to(where.device) for t in (x, weight, bias, input_bias))
    return group_norm_silu(x, weight, bias, groups, EPS, silu, input_bias, impl=where.impl).cpu()


REFERENCE = SimpleNamespace(impl="reference", device="cpu")


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_group_norm_silu_is_as_exact_as_pytorch(where, assert_as_exact, shape, groups, dtype, silu):
    x, weight, bias, input_bias = inputs(shape, dtype)
    added = input_bias if silu else None
    exact = run(
        REFERENCE, x.double(), weight.double(), bias.double(), groups, silu, input_bias.double() if silu else None
    )
    plain = run(REFERENCE, x, weight, bias, groups, silu, added)
    got = run(where, x, weight, bias, groups, silu, added)
    assert got.dtype == dtype
    # Interpreted, a bfloat16 is truncated rather than rounded: one unit in the last place, not half of one.
    floor = 1e-6 if dtype == torch.float32 else 3e-2 * (where == SimpleNamespace(impl="triton", device="cpu"))
    assert_as_exact({"out": got}, {"out": plain}, {"out": exact}, floor=floor)


@pytest.mark.parametrize("silu", [True, False])
def test_reference_group_norm_silu_equals_numpy(silu):
    x, weight, bias, input_bias = (t.double() for t in inputs((2, 6, 3, 4)))
    grouped = (x + input_bias[:, None, None]).numpy().reshape(2, 3, 2, 3, 4)
    mean, variance = grouped.mean(axis=(2, 3, 4), keepdims=True), grouped.var(axis=(2, 3, 4), keepdims=True)
    normed = ((grouped - mean) / np.sqrt(variance + EPS)).reshape(2, 6, 3, 4)
    want = normed * weight.numpy()[:, None, None] + bias.numpy()[:, None, None]
    want = want / (1 + np.exp(-want)) if silu else want
    np.testing.assert_allclose(run(REFERENCE, x, weight, bias, 3, silu, input_bias).numpy(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", [0.0, 1e4])
def test_group_norm_of_a_large_offset_keeps_its_digits(where, assert_as_exact, first):
    # 1e4 over 2: sums of squares would have lost every digit. And a first pixel that is unlike the rest.
    x, weight, bias, input_bias = inputs((1, 32, 30, 30), offset=1e4)
    x[:, :, 0, 0] += first
    exact = run(REFERENCE, x.double(), weight.double(), bias.double(), 8, False, input_bias.double())
    plain = run(REFERENCE, x, weight, bias, 8, False, input_bias)
    got = run(where, x, weight, bias, 8, False, input_bias)
    assert_as_exact({"out": got}, {"out": plain}, {"out": exact}, floor=1e-3)  # 1e4 has 5e-4 of rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_over_its_range(where, dtype):
    # Weights of 0 leave the bias, through SiLU.
    bias = torch.cat([torch.linspace(-110, 110, 1000), torch.linspace(-3, 3, 1000), torch.tensor([0.0, -1e6, 1e6])])
    bias = torch.cat([bias, bias.new_zeros(2016 - len(bias))])
    x = torch.randn(1, 2016, 1, 2).to(dtype)
    want = torch.nn.functional.silu(bias.double())
    got = run(where, x, torch.zeros(2016), bias, 32)[0, :, 0, 0].double()
    relative = {torch.float32: 5e-7, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(got, want, rtol=relative, atol=1e-30)


def test_group_norm_silu_passes_on_what_is_not_a_number(where):
    x, weight, bias, _ = inputs((2, 32, 4, 5))
    x[0, 9, 1, 2] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        got = run(where, x.to(dtype), weight, bias, 8)
        assert got[0, 8:12].isnan().all()
        assert not got[0, :8].isnan().any()
        assert not got[0, 12:].isnan().any()
        assert not got[1].isnan().any()


def test_group_norm_silu_keeps_the_memory_format(where):
    x, weight, bias, _ = inputs((2, 32, 4, 6))
    want = run(where, x, weight, bias, 8)
    assert want.is_contiguous(memory_format=torch.channels_last)
    nchw = run(where, x.contiguous(), weight, bias, 8)
    assert nchw.is_contiguous()
    torch.testing.assert_close(nchw, want, rtol=0, atol=1e-6)
    inner = torch.zeros(2, 6, 8, 32).permute(0, 3, 1, 2)
    inner[:, :, 1:5, 1:7] = x
    cut = run(where, inner[:, :, 1:5, 1:7], weight, bias, 8)
    assert cut.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(cut, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_group_norm_silu_reads_nothing_beside_its_inputs(where, shape, groups):
    def within_nan(tensor):
        whole = torch.full((tensor.numel() + 2 * 4096,), float("nan"))
        whole[4096:-4096] = tensor.flatten()
        return whole[4096:-4096].view(tensor.shape)

    x, *vectors = inputs(shape)
    padded = within_nan(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    weight, bias, input_bias = (within_nan(v) for v in vectors)
    got = run(where, padded, weight, bias, groups, True, input_bias)
    want = run(REFERENCE, x, *vectors[:2], groups, True, vectors[2])
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_group_norm_silu_of_an_image_does_not_depend_on_its_batch_or_the_run(kernel):
    x, weight, bias, input_bias = inputs((3, 64, 20, 21))
    all_at_once = run(kernel, x, weight, bias, 32, True, input_bias)
    for _ in range(2):
        alone = torch.cat([run(kernel, image, weight, bias, 32, True, input_bias) for image in x.split(1)])
        assert torch.equal(alone, all_at_once)


def test_cpp_group_norm_silu_does_not_depend_on_the_number_of_threads(kernel):
    if kernel.impl != "cpp":
        pytest.skip("of the CPU")
    x, weight, bias, _ = inputs((3, 64, 30, 31))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(kernel, x, weight, bias, 32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_cpp_bfloat16_is_float32_rounded_to_nearest_even(kernel):
    if kernel.impl != "cpp":
        pytest.skip("interpreted Triton truncates")
    x, weight, bias, _ = inputs((2, 96, 30, 31), torch.bfloat16)
    assert torch.equal(run(kernel, x, weight, bias, 32), run(kernel, x.float(), weight, bias, 32).bfloat16())


def test_group_norm_silu_of_no_image(where):
    got = run(where, torch.empty(0, 8, 3, 3), torch.ones(8), torch.ones(8), 4)
    assert got.shape == (0, 8, 3, 3)


def test_group_norm_silu_refuses_what_it_does_not_take(where):
    x, weight, bias, _ = inputs((2, 8, 3, 3))
    with pytest.raises(ValueError, match=r"num_groups=3 does not divide 8 channels"):
        run(where, x, weight, bias, 3)
    with pytest.raises(ValueError, match=r"weight_C is \(7,\), want \(8,\)"):
        run(where, x, weight[1:], bias, 4)
    with pytest.raises(ValueError, match=r"input_bias_C is \(1,\), want \(8,\)"):
        run(where, x, weight, bias, 4, input_bias=bias[:1])
    for wrong in (x[0], x[:, :, :0]):
        with pytest.raises(ValueError, match=r"want \(B, C, H, W\) with a pixel"):
            run(where, wrong, weight, bias, 4)


def test_group_norm_silu_kernels_refuse_gradients_and_float64(kernel):
    x, weight, bias, _ = inputs((2, 8, 3, 3))
    with pytest.raises(ValueError, match="has no gradient; use torch.no_grad"):
        run(kernel, x, weight.requires_grad_(), bias, 4)
    with torch.no_grad():
        run(kernel, x, weight, bias, 4)
    with pytest.raises(ValueError, match="got torch.float64; use impl='reference'"):
        run(kernel, x.double(), weight.detach(), bias, 4)


def test_reference_group_norm_silu_gradcheck():
    x, vectors = torch.randn(2, 4, 2, 3), torch.randn(3, 4)
    leaves = [t.double().requires_grad_() for t in (x, *vectors)]
    assert torch.autograd.gradcheck(lambda x, w, b, i: group_norm_silu(x, w, b, 2, EPS, True, i, "reference"), leaves)


def test_group_norm_silu_opcheck(kernel):
    from varfast.kernels.group_norm import _channel_moments, _group_norm

    op = _group_norm if kernel.impl == "triton" else torch.ops.varfast.group_norm_silu_cpu.default
    for dtype in (torch.float32, torch.bfloat16):
        x, vectors = torch.randn(2, 6, 8).to(dtype), torch.randn(3, 8)
        x, *vectors = (t.to(kernel.device) for t in (x, *vectors))
        moments = (torch.zeros(2, 1, 8), torch.ones(2, 1, 8)) if kernel.impl == "triton" else ()
        moments = (*(t.to(kernel.device) for t in moments), 6) if moments else ()
        torch.library.opcheck(op, (x, *vectors, 4, EPS, True, *moments))
        if kernel.impl == "triton":
            torch.library.opcheck(_channel_moments, (x, x.clone(), 6))


@pytest.mark.parametrize(
    ("channels", "tile"), [(160, 32), (320, 64), (640, 128), (32, 32), (512, 128), (24, 32), (7, 8), (200, 128)]
)
def test_tile_divides_the_channels_where_it_can(channels, tile):
    rows, found = _tile(channels)
    assert found == tile
    assert rows * tile == 8192
