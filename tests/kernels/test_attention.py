import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from varfast.kernels import (
    attention,
    attention_backward,
    attention_flash,
    attention_tiles,
    attention_triton,
    block_causal_attention,
    cached_attention,
    selection,
)
from varfast.kernels.extension import NO_EXTENSION

VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
VAR_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@pytest.fixture(scope="module")
def device():
    """Where Triton runs: on the GPU, or interpreted."""
    if torch.cuda.is_available():
        yield "cuda"
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        # Triton 3.6 takes a loop's bounds with int(array of one number), which numpy 2.5 refuses.
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def dot(self, a, b, acc, *_):
        # q k^T and k q^T in one order of summation, as on a GPU. Of logits of 1000, BLAS gives them 1e-4 apart.
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang_tensor", patched)
        context.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield "cpu"


@pytest.fixture(params=["float32", "bfloat16"])
def cpp_dtype(request):
    """Of the C++ kernels, which are skipped where the extension is not built: test_csrc.py fails where it could be."""
    if NO_EXTENSION:
        pytest.skip(NO_EXTENSION)
    return getattr(torch, request.param)


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


def plain(q, k, v, ends, logit_scale):
    """Products, mask and softmax, in the dtype of q."""
    end_L = torch.tensor([next(end for end in ends if i < end) for i in range(ends[-1])], device=q.device)
    mask = torch.arange(ends[-1], device=q.device) < end_L[:, None]
    logits = (logit_scale.to(q.dtype)[:, None, None] * q) @ k.mT
    return logits.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ v


def var_inputs(batch, heads, ends, dtype, device="cpu", seed=0, size=1.0, logit_scale=None):
    """As the model calls it: strided views of one (B, L, 3, H, D), q and k of length `size`, in a sea of NaN."""
    length = ends[-1]
    generator = torch.Generator().manual_seed(seed)
    sea = torch.full((batch + 2, length + 130, 3, heads, 64), float("nan"))
    values = torch.randn(batch, length, 3, heads, 64, generator=generator)
    values[:, :, :2] = size * F.normalize(values[:, :, :2], dim=-1)
    sea[1:-1, 65:-65] = values
    q, k, v = sea.to(device, dtype)[1:-1, 65:-65].permute(2, 0, 3, 1, 4)
    grad = torch.randn(batch, length, heads, 64, generator=generator).to(device, dtype).transpose(1, 2)
    if logit_scale is None:
        scale_H = torch.linspace(1.0, 8.0, heads, device=device)
    else:
        scale_H = torch.full((heads,), logit_scale, device=device)
    return q, k, v, scale_H, grad


def forward_and_gradients(function, q, k, v, logit_scale, grad):
    leaves = [x.detach().requires_grad_() for x in (q, k, v, logit_scale)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_no_worse_than_pytorch(impl, q, k, v, logit_scale, grad, ends):
    """Error against float64 at most twice that of plain PyTorch of the same dtype, and 8 roundings of float32.

    d logit_scale is one number a head, on which PyTorch's error may be 0 by luck: a rounding of what it sums passes.
    """
    double = [x.double() for x in (q, k, v, logit_scale)]
    exact = forward_and_gradients(lambda q, k, v, s: plain(q, k, v, ends, s), *double, grad.double())
    peer = forward_and_gradients(lambda q, k, v, s: plain(q, k, v, ends, s), q, k, v, logit_scale, grad)
    ours = forward_and_gradients(
        lambda q, k, v, s: block_causal_attention(q, k, v, ends, s, impl), q, k, v, logit_scale, grad
    )
    for name, e, p, o in zip(("out", "dq", "dk", "dv", "d logit_scale"), exact, peer, ours, strict=True):
        assert o.dtype == (torch.float32 if name == "d logit_scale" else q.dtype)
        assert o.shape == e.shape
        error, allowed = (o - e).abs().max(), 2 * (p - e).abs().max()
        size, rounding = max(1.0, float(e.abs().max())), 8 * 1.2e-7
        if name == "d logit_scale":
            summed = (q * exact[1]).abs().sum(dim=(0, 2, 3)) / logit_scale.abs().clamp_min(1e-3)
            size, rounding = max(1.0, float(summed.max())), max(rounding, torch.finfo(q.dtype).eps)
        assert error <= allowed + rounding * size, f"{name}: error {error:.2g}, allowed {allowed:.2g}, size {size:.2g}"


@pytest.mark.parametrize("sides", [(1,), (1, 2), (1, 2, 3, 5), (2, 3), (1, 3, 7)])
@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_block_causal_attention_equals_naive_float64(impl, sides):
    ends = scale_ends(sides)
    q, k, v, logit_scale = inputs(2, 3, ends[-1], 8)
    out = block_causal_attention(q, k, v, ends, logit_scale, impl)
    exact = naive(q, k, v, ends, logit_scale)
    peer = plain(q, k, v, ends, logit_scale)
    assert np.abs(out.numpy() - exact).max() <= 2 * np.abs(peer.numpy() - exact).max() + 1e-7


def test_plain_equals_naive_float64():
    ends = scale_ends((1, 2, 3))
    q, k, v, logit_scale = inputs(2, 3, ends[-1], 8, torch.float64)
    np.testing.assert_allclose(plain(q, k, v, ends, logit_scale), naive(q, k, v, ends, logit_scale), atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_block_causal_attention_gradcheck_with_logit_scale(impl):
    ends = scale_ends((1, 2))
    tensors = [x.requires_grad_() for x in inputs(1, 2, 5, 4, torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v, s: block_causal_attention(q, k, v, ends, s, impl), tensors)


SHAPES = [
    pytest.param(1, 1, (1,), id="one token"),
    pytest.param(1, 3, (1, 2), id="5"),
    pytest.param(2, 3, (1, 2, 3, 5), id="39"),
    pytest.param(1, 1, (2, 3), id="13"),
    pytest.param(2, 1, (1, 3, 7), id="59"),
    pytest.param(1, 2, (9, 10), id="181"),
    pytest.param(1, 1, VAR_256, id="680"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "heads", "sides"), SHAPES)
def test_triton_forward_and_gradients_no_worse_than_pytorch(device, batch, heads, sides, dtype):
    ends = scale_ends(sides)
    assert_no_worse_than_pytorch("triton", *var_inputs(batch, heads, ends, dtype, device), ends)


# The largest logit scale that VAR allows; logits of +-900; a scale that turns them round, and one that flattens them.
@pytest.mark.parametrize(("logit_scale", "size"), [(100.0, 1.0), (1.0, 30.0), (-5.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_at_extreme_logits_no_worse_than_pytorch(device, logit_scale, size, dtype):
    ends = scale_ends((1, 2, 3, 5))
    assert_no_worse_than_pytorch(
        "triton", *var_inputs(1, 8, ends, dtype, device, size=size, logit_scale=logit_scale), ends
    )


# Tiles of 128 keys in 16 bits, 32 in float32: some are not full, and several are added to one row of d q.
@pytest.mark.parametrize(
    ("batch", "heads", "sides", "dtype", "extreme"),
    [
        pytest.param(1, 1, (1,), torch.float32, {}, id="one token"),
        pytest.param(2, 3, (1, 2, 3, 5), torch.float16, {}, id="six heads, two programs"),
        pytest.param(1, 2, (9, 10), torch.bfloat16, {}, id="three tiles of keys"),
        pytest.param(1, 1, (9, 10), torch.float32, {}, id="three tiles of keys, float32"),
        pytest.param(1, 2, (1, 3, 7), torch.float32, {"logit_scale": 1.0, "size": 30.0}, id="logits of 900"),
        pytest.param(1, 2, (1, 3, 7), torch.bfloat16, {"logit_scale": -5.0, "size": 1.0}, id="turned round"),
    ],
)
def test_triton_fused_no_worse_than_pytorch(device, batch, heads, sides, dtype, extreme):
    ends = scale_ends(sides)
    assert_no_worse_than_pytorch("triton_fused", *var_inputs(batch, heads, ends, dtype, device, **extreme), ends)


def test_triton_fused_where_keys_that_are_not_there_would_have_infinite_weights(device):
    # All logits -900: beside them the 0 of a key past the end of a tile is exp(900).
    ends = scale_ends((1, 3, 7))
    q, k, v, logit_scale, grad = var_inputs(1, 1, ends, torch.float32, device, logit_scale=1.0)
    direction = F.normalize(q[:, :, :1], dim=-1)
    q, k = q + 30 * direction, k - 30 * direction
    assert_no_worse_than_pytorch("triton_fused", q, k, v, logit_scale, grad, ends)


def test_triton_fused_takes_any_strides_and_is_repeatable_in_every_bit(device):
    ends = scale_ends((1, 2, 3, 8))
    q, k, v, logit_scale, grad = var_inputs(2, 2, ends, torch.float32, device)

    def run(*tensors):
        return forward_and_gradients(
            lambda q, k, v, s: block_causal_attention(q, k, v, ends, s, "triton_fused"), *tensors
        )

    first = run(q, k, v, logit_scale, grad)
    strided = [x.mT.contiguous().mT for x in (q, k, v, grad)]  # D is not the fastest axis
    for again in (run(q, k, v, logit_scale, grad), run(*strided[:3], logit_scale, strided[3])):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    two_kernels = forward_and_gradients(
        lambda q, k, v, s: block_causal_attention(q, k, v, ends, s, "triton"), q, k, v, logit_scale, grad
    )
    assert torch.equal(first[0], two_kernels[0])  # one forward pass
    assert not torch.equal(first[1], two_kernels[1])  # and not the same backward pass: it is another kernel


def test_triton_takes_any_strides(device):
    ends = scale_ends((1, 2, 3))
    q, k, v, logit_scale, grad = var_inputs(2, 2, ends, torch.float32, device)
    strided = forward_and_gradients(
        lambda q, k, v, s: block_causal_attention(q, k, v, ends, s, "triton"), q, k, v, logit_scale, grad
    )
    by_column = [x.mT.contiguous().mT for x in (q, k, v)]  # D is not the fastest axis
    for layout in ([x.contiguous() for x in (q, k, v)], by_column):
        again = forward_and_gradients(
            lambda q, k, v, s: block_causal_attention(q, k, v, ends, s, "triton"),
            *layout,
            logit_scale,
            grad.mT.contiguous().mT,
        )
        assert all(torch.equal(a, b) for a, b in zip(strided, again, strict=True))
    ones = torch.ones((), device=device).expand_as(grad)  # the gradient of a sum has strides of 0
    forward_and_gradients(
        lambda q, k, v, s: block_causal_attention(q, k, v, ends, s, "triton"), q, k, v, logit_scale, ones
    )


def test_triton_output_is_a_view_of_what_the_projection_reads(device):
    q, k, v, logit_scale, _ = var_inputs(2, 3, (1, 5), torch.float32, device)
    for out in (
        block_causal_attention(q, k, v, (1, 5), logit_scale, "triton"),
        cached_attention(q, k, v, 5, logit_scale, "triton"),
    ):
        assert out.transpose(1, 2).is_contiguous()


def test_triton_writes_nothing_past_its_outputs(device, monkeypatch):
    seas = []

    def in_a_sea(shape, like, dtype):
        sea = torch.full((shape[0] + 2, *shape[1:]), 7.0, dtype=dtype, device=like.device)
        seas.append(sea)
        return sea[1:-1]

    def empty_BHLD(like):
        batch, heads, length, dim = like.shape
        return in_a_sea((batch, length, heads, dim), like, like.dtype).transpose(1, 2)

    for module in (attention_triton, attention_backward):
        monkeypatch.setattr(module, "empty_BHLD", empty_BHLD)
    monkeypatch.setattr(attention_triton, "empty_rows", lambda like: in_a_sea(like.shape[:3], like, torch.float32))
    ends = scale_ends((1, 2, 3, 5, 6))
    q, k, v, logit_scale, grad = var_inputs(1, 1, ends, torch.float32, device)
    out, top, share = attention_triton.attention_op._init_fn(q, k, v, logit_scale, ends)
    attention_backward.backward_op._init_fn(grad, q, k, v, logit_scale, out, top, share, ends)
    attention_backward.backward_op._init_fn(grad, q, k, v, logit_scale, out, top, share, ends, True)
    attention_triton.cached_attention_op._init_fn(q[:, :, :9], k, v, logit_scale, 14)
    assert len(seas) == 10
    for sea in seas:
        assert bool((sea[0] == 7.0).all())
        assert bool((sea[-1] == 7.0).all())
        assert bool((sea[1:-1] != 7.0).all())


def test_triton_takes_an_empty_batch(device):
    ends = scale_ends((1, 2))
    q, k, v, logit_scale, grad = var_inputs(0, 2, ends, torch.float32, device)
    out, dq, dk, dv, d_scale = forward_and_gradients(
        lambda q, k, v, s: block_causal_attention(q, k, v, ends, s, "triton"), q, k, v, logit_scale, grad
    )
    assert out.shape == dq.shape == dk.shape == dv.shape == (0, 2, 5, 64)
    assert torch.equal(d_scale, torch.zeros(2, device=device))
    assert cached_attention(q, k, v, 5, logit_scale, "triton").shape == (0, 2, 5, 64)


def test_triton_is_repeatable_in_every_bit(device):
    ends = scale_ends((1, 2, 3, 5, 8))
    tensors = var_inputs(2, 2, ends, torch.bfloat16, device)
    first, second = (
        forward_and_gradients(lambda q, k, v, s: block_causal_attention(q, k, v, ends, s, "triton"), *tensors)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_triton_gradient_of_logit_scale_in_its_own_dtype(device):
    q, k, v, logit_scale, grad = var_inputs(1, 2, (1, 5), torch.bfloat16, device)
    scale = logit_scale.to(torch.bfloat16).requires_grad_()
    block_causal_attention(q, k, v, (1, 5), scale, "triton").backward(grad)
    assert scale.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_ops_pass_opcheck(device, dtype):
    ends = [1, 5]
    q, k, v, logit_scale, grad = var_inputs(2, 2, ends, dtype, device)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, logit_scale)]
    torch.library.opcheck(attention_triton.attention_op, (*leaves, ends))
    out, top, share = attention_triton.attention_op(q, k, v, logit_scale, ends)
    torch.library.opcheck(attention_backward.backward_op, (grad, q, k, v, logit_scale, out, top, share, ends))
    torch.library.opcheck(attention_backward.backward_op, (grad, q, k, v, logit_scale, out, top, share, ends, True))
    torch.library.opcheck(attention_triton.cached_attention_op, (q, k, v, logit_scale, 3))


def test_query_and_key_tiles_cover_each_row_once_and_see_what_the_mask_says():
    for sides in ((1,), (2, 3), (1, 2, 3, 5), (9, 10), VAR_256):
        ends = scale_ends(sides)
        visible = attention_tiles.visible_keys(ends)
        assert visible == [next(end for end in ends if i < end) for i in range(ends[-1])]
        for tiles, block in (
            (attention_tiles.query_tiles(ends, 128, 64), 128),
            (attention_tiles.key_tiles(ends, 64, 32), 64),
        ):
            assert sorted(i for start, end, *_ in tiles for i in range(start, end)) == list(range(ends[-1]))
            assert all(0 < end - start <= block for start, end, *_ in tiles)
        for start, end, full, keys in attention_tiles.query_tiles(ends, 128, 64):
            assert full % 64 == 0
            assert full <= min(visible[start:end])
            assert keys == max(visible[start:end])
        for start, end, first, full in attention_tiles.key_tiles(ends, 64, 32):
            assert (full - first) % 32 == 0
            assert all(seen <= start for seen in visible[:first])
            assert all(seen >= end for seen in visible[full:])


@pytest.mark.parametrize(
    ("sides", "block_m", "share"),
    [(VAR_256, 128, 0.727), (VAR_512, 128, 0.675), (VAR_256, 64, 0.683), (VAR_512, 64, 0.658)],
)
def test_query_tiles_visit_little_more_than_the_mask_keeps(sides, block_m, share):
    ends = scale_ends(sides)
    blocks = sum(-(-keys // 64) for *_, keys in attention_tiles.query_tiles(ends, block_m, 64))
    assert sum(attention_tiles.visible_keys(ends)) <= blocks * block_m * 64 <= share * ends[-1] ** 2


def test_short_tiles_of_keys_are_masked_for_all_queries_where_asked():
    for sides in ((1,), (2, 3), (9, 10), VAR_256):
        ends = scale_ends(sides)
        visible = attention_tiles.visible_keys(ends)
        tiles = attention_tiles.key_tiles(ends, 128, 64, True)
        assert sorted(i for start, end, *_ in tiles for i in range(start, end)) == list(range(ends[-1]))
        for start, end, first, full in tiles:
            assert all(seen <= start for seen in visible[:first])
            assert full >= ends[-1] if end - start < 128 else all(seen >= end for seen in visible[full:])


def assert_cached_no_worse_than_pytorch(impl, q, k, v, logit_scale, _, sides):
    """At every scale, with NaN in the cache where nothing is written yet."""
    ends = scale_ends(sides)
    exact = plain(*(x.double() for x in (q, k, v)), ends, logit_scale.double())
    peer = plain(q, k, v, ends, logit_scale)
    k_cache, v_cache = torch.full_like(k, float("nan")), torch.full_like(v, float("nan"))
    start = 0
    for end in ends:
        now = slice(start, end)
        k_cache[:, :, now], v_cache[:, :, now] = k[:, :, now], v[:, :, now]
        out = cached_attention(q[:, :, now], k_cache, v_cache, end, logit_scale, impl)
        error = (out - exact[:, :, now]).abs().max()
        assert error <= 2 * (peer - exact)[:, :, now].abs().max() + 8 * 1.2e-7 * exact.abs().max()
        start = end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "heads", "sides"), [(2, 3, (1, 2, 3, 5, 8)), (1, 1, VAR_256)])
@torch.no_grad()
def test_triton_cached_attention_no_worse_than_pytorch_at_every_scale(device, batch, heads, sides, dtype):
    tensors = var_inputs(batch, heads, scale_ends(sides), dtype, device)
    assert_cached_no_worse_than_pytorch("triton", *tensors, sides)


def test_triton_refuses_what_it_cannot_run(device):
    q, k, v, logit_scale = (x.to(device) for x in inputs(1, 1, 5, 32))
    with pytest.raises(ValueError, match=r"impl='triton' of block_causal_attention takes a head dim of 64.*got 32"):
        block_causal_attention(q, k, v, (1, 5), logit_scale, "triton")
    with pytest.raises(ValueError, match=r"impl='triton' of cached_attention takes a head dim of 64.*got 32"):
        cached_attention(q, k, v, 5, logit_scale, "triton")
    q, k, v, logit_scale = (x.to(device) for x in inputs(1, 1, 5, 64))
    with pytest.raises(ValueError, match="takes float32, bfloat16 or float16, got torch.float64"):
        block_causal_attention(q.double(), k.double(), v.double(), (1, 5), logit_scale, "triton")
    with pytest.raises(ValueError, match="has no gradient"):
        cached_attention(q.requires_grad_(), k, v, 5, logit_scale, "triton")


@pytest.mark.parametrize(("batch", "heads", "sides"), SHAPES)
def test_cpp_forward_and_gradients_no_worse_than_pytorch(cpp_dtype, batch, heads, sides):
    ends = scale_ends(sides)
    assert_no_worse_than_pytorch("cpp", *var_inputs(batch, heads, ends, cpp_dtype), ends)


@pytest.mark.parametrize(("logit_scale", "size"), [(100.0, 1.0), (1.0, 30.0), (-5.0, 1.0), (0.0, 1.0)])
def test_cpp_at_extreme_logits_no_worse_than_pytorch(cpp_dtype, logit_scale, size):
    ends = scale_ends((1, 2, 3, 5))
    tensors = var_inputs(1, 8, ends, cpp_dtype, size=size, logit_scale=logit_scale)
    assert_no_worse_than_pytorch("cpp", *tensors, ends)


def test_cpp_takes_any_strides_and_any_number_of_threads(cpp_dtype):
    ends = scale_ends((1, 2, 3, 8))
    tensors = var_inputs(3, 2, ends, cpp_dtype)

    def run(q, k, v, logit_scale, grad):
        return forward_and_gradients(
            lambda q, k, v, s: block_causal_attention(q, k, v, ends, s, "cpp"), q, k, v, logit_scale, grad
        )

    q, k, v, logit_scale, grad = tensors
    strided, threads = run(*tensors), torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        by_column = run(*(x.mT.contiguous().mT for x in (q, k, v)), logit_scale, grad.mT.contiguous().mT)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(strided, by_column, strict=True))
    run(q, k, v, logit_scale, torch.ones((), dtype=cpp_dtype).expand_as(grad))  # the gradient of a sum: strides of 0


def test_cpp_keeps_what_is_not_a_number(cpp_dtype):
    """In the rows that saw it, and in no others: a loss that is not finite must not look finite."""
    ends = scale_ends((1, 2, 3))
    q, k, v, logit_scale, grad = var_inputs(1, 1, ends, cpp_dtype)
    k[0, 0, 7, 5] = torch.nan
    out, dq, *_ = forward_and_gradients(
        lambda q, k, v, s: block_causal_attention(q, k, v, ends, s, "cpp"), q, k, v, logit_scale, grad
    )
    for rows in (out, dq, cached_attention(q, k, v, 14, logit_scale, "cpp")[:, :, 5:]):
        assert rows[:, :, -9:].isnan().all()
    assert out[:, :, :5].isfinite().all()


def test_cpp_ops_pass_opcheck_and_take_an_empty_batch(cpp_dtype):
    ops, ends = torch.ops.varfast, torch.tensor([1, 5])
    q, k, v, logit_scale, grad = var_inputs(2, 2, (1, 5), cpp_dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, logit_scale)]
    torch.library.opcheck(ops.attention_cpp.default, (*leaves, ends))
    out, log_sum = ops.attention_cpp(q, k, v, logit_scale, ends)
    torch.library.opcheck(ops.attention_backward_cpp.default, (grad, q, k, v, out, log_sum, logit_scale, ends))
    torch.library.opcheck(ops.cached_attention_cpp.default, (q, k, v, logit_scale, 3))
    q, k, v, logit_scale, grad = var_inputs(0, 2, (1, 5), cpp_dtype)
    found = forward_and_gradients(
        lambda q, k, v, s: block_causal_attention(q, k, v, (1, 5), s, "cpp"), q, k, v, logit_scale, grad
    )
    assert [tuple(x.shape) for x in found] == [(0, 2, 5, 64)] * 4 + [(2,)]


@pytest.mark.parametrize(("batch", "heads", "sides"), [(2, 3, (1, 2, 3, 5, 8)), (1, 1, VAR_256)])
@torch.no_grad()
def test_cpp_cached_attention_no_worse_than_pytorch_at_every_scale(cpp_dtype, batch, heads, sides):
    assert_cached_no_worse_than_pytorch("cpp", *var_inputs(batch, heads, scale_ends(sides), cpp_dtype), sides)


def test_cpp_refuses_what_it_cannot_run(cpp_dtype):
    q, k, v, logit_scale = inputs(1, 1, 5, 32, cpp_dtype)
    with pytest.raises(ValueError, match=r"impl='cpp' of block_causal_attention takes a head dim of 64.*got 32"):
        block_causal_attention(q, k, v, (1, 5), logit_scale, "cpp")
    q, k, v, logit_scale = inputs(1, 1, 5, 64, cpp_dtype)
    with pytest.raises(ValueError, match="takes float32, float64 or bfloat16, got torch.float16"):
        cached_attention(q.half(), k.half(), v.half(), 5, logit_scale, "cpp")
    with pytest.raises(ValueError, match="has no gradient"):
        cached_attention(q.requires_grad_(), k, v, 5, logit_scale, "cpp")


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


def test_sdpa_forward_and_gradients_no_worse_than_pytorch():
    ends = scale_ends((1, 2, 3, 5))
    for dtype in (torch.float32, torch.bfloat16):
        assert_no_worse_than_pytorch("sdpa", *var_inputs(2, 3, ends, dtype), ends)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_forward_and_gradients_no_worse_than_pytorch(dtype):
    for sides in ((1, 2, 3, 5), VAR_256):
        ends = scale_ends(sides)
        assert_no_worse_than_pytorch("flex", *var_inputs(2, 3, ends, dtype, "cuda"), ends)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_mask_is_the_scale_mask(monkeypatch):
    # Uncompiled it is plain PyTorch, which runs on the CPU.
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention.flex_attention)
    ends = scale_ends((1, 2, 3, 5))
    q, k, v, logit_scale, _ = var_inputs(2, 3, ends, torch.float32)
    out = attention._run_flex(q, k, v, ends, logit_scale)
    torch.testing.assert_close(out, plain(q, k, v, ends, logit_scale), rtol=0, atol=1e-5)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Make stand-ins of modules of flash_attn, by their source; none that is installed is seen."""
    cached = (attention_flash._function, attention_flash._cannot, attention_flash._cannot_flex_flash)

    def forget():
        for function in cached:
            function.cache_clear()
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "flash_attn"}

    def make(**sources):
        for name, source in sources.items():
            file = tmp_path / name.replace("__", "/") / "__init__.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        forget()

    installed = forget()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    yield make
    forget()
    sys.modules.update(installed)


CUDA = torch.device("cuda")  # named alone: the stand-ins compute on the CPU
EMPTY = "flash_attn_func = len"


def cannot(op, impl, device=CUDA):
    return selection._named(op, impl).cannot(device)


@pytest.mark.parametrize("op", ["block_causal_attention", "cached_attention"])
def test_flash_packages_are_found_by_their_function(packages, op, monkeypatch):
    packages(flash_attn__cute=EMPTY)  # flash-attn-4 alone: flash_attn is a namespace
    assert cannot(op, "fa4") is None
    reason = cannot(op, "flash_attn")
    assert "flash_attn has no flash_attn_func (flash-attn-4 alone" in reason
    assert reason.endswith("install the package flash-attn")
    with pytest.raises(ValueError, match="flash-attn needs a CUDA device"):
        selection.select(op, "flash_attn", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (12, 0))
    packages()
    assert "no backward pass of a fixed order" in cannot(op, "fa4")
    packages(flash_attn=EMPTY)  # flash-attn beside it
    assert cannot(op, "flash_attn") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    packages()
    assert "needs compute capability 8.0 or later, got 7.5" in cannot(op, "flash_attn")


def test_flash_packages_that_do_not_import_say_what_is_missing(packages):
    packages(flash_attn=EMPTY)
    assert cannot("block_causal_attention", "flash_attn") is None
    for impl in ("fa4", "flex_flash"):  # as if flash-attn-4 were not there
        assert "No module named 'flash_attn.cute'" in cannot("block_causal_attention", impl)
        assert "install the package flash-attn-4" in cannot("block_causal_attention", impl)
    packages(flash_attn__cute="import a_dependency_of_it")
    assert "No module named 'a_dependency_of_it'" in cannot("block_causal_attention", "fa4")


def test_flex_flash_needs_a_torch_that_has_the_backend(packages, monkeypatch):
    from torch.nn.attention import flex_attention

    packages(flash_attn__cute=EMPTY)
    assert cannot("block_causal_attention", "flex_flash") is None
    monkeypatch.setattr(flex_attention, "FlexKernelOptions", type("FlexKernelOptions", (), {"__annotations__": {}}))
    packages()
    assert "has no backends to choose from" in cannot("block_causal_attention", "flex_flash")


def test_a_flash_package_without_a_gpu_is_a_reason_and_not_an_error(packages, monkeypatch):
    packages(flash_attn=EMPTY, flash_attn__cute=EMPTY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for impl in ("flash_attn", "fa4", "flex_flash"):
        assert "this machine has none" in cannot("block_causal_attention", impl)
    assert all(choice.impl for choice in selection.choices(CUDA))


@pytest.mark.parametrize(("impl", "result"), [("flash_attn", "{}"), ("fa4", "({}, None)")])
def test_flash_packages_are_called_as_they_document(packages, impl, result):
    returned = result.format("out.transpose(1, 2).to(q.dtype)")
    source = f"""
import torch.nn.functional as F
def flash_attn_func(q, k, v, softmax_scale=None, causal=False, deterministic=False):
    assert deterministic and not causal
    q_, k_, v_ = (x.transpose(1, 2).float() for x in (q, k, v))  # (B, L, H, D)
    out = F.scaled_dot_product_attention(q_, k_, v_, scale=softmax_scale)
    return {returned}
"""
    packages(**{{"flash_attn": "flash_attn", "fa4": "flash_attn__cute"}[impl]: source})
    ends = scale_ends((1, 2, 3, 5))
    q, k, v, logit_scale, grad = var_inputs(2, 3, ends, torch.bfloat16)
    whole, last = (selection._named(op, impl) for op in ("block_causal_attention", "cached_attention"))
    ours = forward_and_gradients(lambda q, k, v, s: whole.run(q, k, v, ends, s), q, k, v, logit_scale, grad)
    double = [x.double() for x in (q, k, v, logit_scale)]
    exact = forward_and_gradients(lambda q, k, v, s: plain(q, k, v, ends, s), *double, grad.double())
    for o, e in zip(ours, exact, strict=True):
        torch.testing.assert_close(o.double(), e, rtol=2e-2, atol=5e-2)
    out = last.run(q[:, :, 14:], k, v, 39, logit_scale)
    torch.testing.assert_close(out.double(), exact[0][:, :, 14:], rtol=0, atol=2e-2)
    refusal = whole.refuses(q.float(), k.float(), v.float(), ends, logit_scale)
    assert refusal == "bfloat16 or float16, got torch.float32"


@pytest.mark.parametrize(("capability", "blocks"), [((9, 0), (128, 128)), ((10, 0), (256, 128))])
def test_flex_flash_asks_flex_attention_for_the_backend(monkeypatch, capability, blocks):
    asked = {}

    def flex_attention(q, k, v, block_mask, scale, kernel_options):
        asked.update(kernel_options, blocks=block_mask.BLOCK_SIZE, scale=scale)
        return q

    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    q, k, v, logit_scale, _ = var_inputs(1, 2, (1, 5), torch.bfloat16)
    selection._named("block_causal_attention", "flex_flash").run(q, k, v, (1, 5), logit_scale)
    assert asked == {"BACKEND": "FLASH", "blocks": blocks, "scale": 1.0}


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "triton_fused", "flex", "flash_attn", "fa4", "flex_flash"])
def test_block_causal_attention_at_full_size_on_the_gpu(impl):
    reason = selection._named("block_causal_attention", impl).cannot(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    for sides in (VAR_256, VAR_512):
        ends = scale_ends(sides)
        assert_no_worse_than_pytorch(impl, *var_inputs(4, 16, ends, torch.bfloat16, "cuda"), ends)


@pytest.mark.gpu
def test_triton_under_a_cuda_graph_reads_the_values_of_each_replay():
    ends = scale_ends(VAR_256)
    q, k, v, logit_scale, _ = var_inputs(2, 16, ends, torch.bfloat16, "cuda")
    with torch.no_grad():
        block_causal_attention(q, k, v, ends, logit_scale, "triton")  # the tables are made outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = block_causal_attention(q, k, v, ends, logit_scale, "triton")
        q.neg_()
        graph.replay()
        torch.testing.assert_close(out, block_causal_attention(q, k, v, ends, logit_scale, "triton"), rtol=0, atol=0)


def test_attention_refuses_bad_input():
    q, k, v, logit_scale = inputs(1, 1, 5, 4)
    with pytest.raises(ValueError, match="ends at 14, but q has 5"):
        block_causal_attention(q, k, v, (1, 5, 14), logit_scale)
    with pytest.raises(ValueError, match="every scale must end after the one before"):
        block_causal_attention(q, k, v, (3, 1, 5), logit_scale)
    with pytest.raises(ValueError, match="k has 4 tokens, q 5"):
        block_causal_attention(q, k[:, :, :4], v[:, :, :4], (1, 5), logit_scale)
    with pytest.raises(ValueError, match="want one dtype"):
        block_causal_attention(q, k, v.double(), (1, 5), logit_scale)
    with pytest.raises(ValueError, match=r"want \(1,\): one a head"):
        block_causal_attention(q, k, v, (1, 5), torch.ones(2))
    with pytest.raises(ValueError, match="num_keys=6, but the cache holds 5"):
        cached_attention(q, k, v, 6, logit_scale)
    with pytest.raises(ValueError, match="num_keys=0: there must be a key"):
        cached_attention(q, k, v, 0, logit_scale)
    with pytest.raises(ValueError, match=r"q, k, v: got .*, want \(B, H, L, D\)"):
        cached_attention(q, k[..., :2], v[..., :2], 5, logit_scale)
