import numpy as np
import pytest
import torch

from varfast.kernels import block_causal_attention, qkv_triton, reference, split_heads, split_heads_to_cache

EPS = 1e-12
HAS_CPP = True


def product(batch, length, heads, dim=64, dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(0)
    return (size * torch.randn(batch, length, 3 * heads * dim, generator=generator)).to(dtype)


def upstream(batch, length, heads, dim=64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, heads, length, dim, generator=generator) for _ in range(3)]


def bias_of(x):
    """In float32 beside 16 bits, as the model has it."""
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(x.shape[-1], generator=generator, dtype=torch.float64)
    return bias.to(torch.promote_types(x.dtype, torch.float32))


def truth(x, heads, l2_norm, gradients, bias=None):
    """Heads, and the gradients of product and bias, in numpy float64, image by image and head by head."""
    x = x.detach().double().numpy() + (0.0 if bias is None else bias.double().numpy())
    batch, length, width = x.shape
    dim = width // 3 // heads
    out = np.zeros((3, batch, heads, length, dim))
    d_x = np.zeros_like(x)
    for part in range(3):
        for head in range(heads):
            columns = slice((part * heads + head) * dim, (part * heads + head + 1) * dim)
            segment, d = x[:, :, columns], gradients[part][:, head].detach().double().numpy()
            if l2_norm and part < 2:
                norm = np.sqrt((segment**2).sum(-1, keepdims=True))
                floored = np.maximum(norm, EPS)
                out[part, :, head] = segment / floored
                along = np.where(norm < EPS, 0.0, (segment * d).sum(-1, keepdims=True) / floored**2)
                d_x[:, :, columns] = (d - segment * along) / floored
            else:
                out[part, :, head] = segment
                d_x[:, :, columns] = d
    found = dict(zip("qkv", map(torch.from_numpy, out), strict=True)) | {"d qkv": torch.from_numpy(d_x)}
    return found if bias is None else found | {"d bias": torch.from_numpy(d_x.sum((0, 1)))}


def run(x, heads, l2_norm, gradients, impl, device="cpu", bias=None):
    leaf = x.detach().to(device, copy=True).requires_grad_()
    if bias is not None:
        bias = bias.to(device, copy=True).requires_grad_()
    outputs = split_heads(leaf, heads, l2_norm, bias, impl=impl)
    assert all(o.dtype == x.dtype for o in outputs)
    torch.autograd.backward(outputs, [g.to(device, x.dtype) for g in gradients])
    found = dict(zip("qkv", (o.detach() for o in outputs), strict=True)) | {"d qkv": leaf.grad}
    return found if bias is None else found | {"d bias": bias.grad}


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 9, 2), (1, 1, 1), (3, 17, 3), (5, 1, 30)])
def test_split_heads_and_its_gradient_are_as_exact_as_pytorch(path, assert_as_exact, shape, dtype, l2_norm):
    if (path.impl, dtype) in (("triton", torch.float64), ("cpp", torch.float16)):
        pytest.skip("refused")
    x, gradients = product(*shape, dtype=dtype), upstream(*shape)
    exact = truth(x, shape[-1], l2_norm, gradients)
    plain = run(x, shape[-1], l2_norm, gradients, "reference")
    got = run(x, shape[-1], l2_norm, gradients, path.impl, path.device)
    # Interpreted, a bfloat16 is truncated rather than rounded: one unit in the last place, not half of one.
    truncates = dtype == torch.bfloat16 and (path.impl, path.device) == ("triton", "cpu")
    assert_as_exact(got, plain, exact, floor=2e-2 if truncates else 1e-15 if dtype == torch.float64 else 1e-7)
    assert torch.equal(got["v"].cpu().double(), exact["v"])


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 9, 2), (1, 1, 1), (3, 47, 3)])
def test_split_heads_with_a_bias_is_as_exact_as_pytorch(path, assert_as_exact, shape, dtype, l2_norm):
    """Its gradient too, over more tokens than one program adds up."""
    if (path.impl, dtype) == ("triton", torch.float64):
        pytest.skip("refused")
    x, gradients = product(*shape, dtype=dtype), upstream(*shape)
    bias = bias_of(x)
    exact = truth(x, shape[-1], l2_norm, [g.to(dtype) for g in gradients], bias)
    plain = run(x, shape[-1], l2_norm, gradients, "reference", bias=bias)
    if dtype == torch.bfloat16:  # a linear layer of PyTorch sums the gradient of its product as it is stored
        plain["d bias"] = plain["d qkv"].double().sum((0, 1))
    got = run(x, shape[-1], l2_norm, gradients, path.impl, path.device, bias)
    truncates = dtype == torch.bfloat16 and (path.impl, path.device) == ("triton", "cpu")
    assert_as_exact(got, plain, exact, floor=3e-2 if truncates else 1e-15 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("l2_norm", [True, False])
def test_split_heads_to_cache_with_a_bias_is_split_heads_with_it(path, l2_norm):
    x = product(2, 4, 3)
    bias, x = bias_of(x).to(path.device), x.to(path.device)
    caches = [torch.zeros(2, 3, 9, 64, device=path.device) for _ in range(2)]
    q = split_heads_to_cache(x, 3, l2_norm, *caches, 2, bias, impl=path.impl)
    wanted = split_heads(x, 3, l2_norm, bias, impl=path.impl)
    assert all(torch.equal(a, b) for a, b in zip((q, *(c[:, :, 2:6] for c in caches)), wanted, strict=True))
    with pytest.raises(ValueError, match=r"bias is \(64,\): want \(576,\)"):
        split_heads(x, 3, l2_norm, bias[:64], impl=path.impl)


@pytest.mark.parametrize("cosine", [0.0, 0.8, 0.95, 0.99, 1.0])
def test_split_heads_gradient_along_the_heads_is_as_exact_as_pytorch(path, cosine):
    """Nearly all of it is lost in the projection, which takes q as it is stored: rounded, as the gradient is."""
    # Interpreted, bfloat16 is truncated, float16 rounded.
    x = product(2, 40, 2, dtype=torch.bfloat16 if path.impl == "cpp" else torch.float16)
    heads = truth(x, 2, True, upstream(2, 40, 2))
    gradients = upstream(2, 40, 2)
    for part, y in enumerate((heads["q"], heads["k"])):
        across = gradients[part].double()
        across = across - y * (across * y).sum(-1, keepdim=True)
        across = across / across.norm(dim=-1, keepdim=True)
        gradients[part] = cosine * y + (1 - cosine**2) ** 0.5 * across
    exact = truth(x, 2, True, gradients)["d qkv"]
    rms = []
    for impl, device in ((path.impl, path.device), ("reference", "cpu")):
        got = run(x, 2, True, gradients, impl, device)["d qkv"]
        rms.append(float((got.cpu().double() - exact)[..., :256].square().mean().sqrt()))
    assert rms[0] <= 2 * rms[1]


def test_split_heads_are_contiguous_for_attention(path):
    if path.impl == "reference":
        pytest.skip("the reference gives views")
    for l2_norm in (True, False):
        outputs = split_heads(product(2, 5, 2).to(path.device), 2, l2_norm, impl=path.impl)
        assert all(o.is_contiguous() and o.shape == (2, 2, 5, 64) for o in outputs)


def test_split_heads_of_zero_tiny_and_large_numbers(path, assert_as_exact):
    x, gradients = product(1, 6, 1), upstream(1, 6, 1)
    # Norms of 0, of 8e-14 and of 8e-12 (below eps and above), of 1, 8e17 and 8.
    size = torch.tensor([0.0, 1e-14, 1e-12, 0.125, 1e17, 1.0])
    x *= size[:, None]
    exact = truth(x, 1, True, gradients)
    plain = run(x, 1, True, gradients, "reference")
    got = run(x, 1, True, gradients, path.impl, path.device)
    assert_as_exact(*({name: r[name] for name in "qkv"} for r in (got, plain, exact)))
    for token in range(6):  # each by itself: the gradients differ by 1e30
        assert_as_exact(
            *({"d": r["d qkv"][:, token] / exact["d qkv"][:, token].abs().max()} for r in (got, plain, exact))
        )
    assert float(got["q"][:, :, 0].abs().max()) == 0.0
    assert float(got["q"][:, :, 1].norm()) < 0.2  # divided by eps, not by its norm


def test_split_heads_keeps_nan_in_its_own_head(path):
    x = product(1, 3, 2)
    x[0, 1, 70] = float("nan")  # second head of q
    outputs = split_heads(x.to(path.device), 2, True, impl=path.impl)
    assert outputs[0].cpu().isnan().nonzero()[:, :3].unique(dim=0).tolist() == [[0, 1, 1]]
    assert int(outputs[0].isnan().sum()) == 64
    assert not any(bool(o.isnan().any()) for o in outputs[1:])


def strided(gradient):
    """The same numbers with other strides: of attention (L before H), with a stride in D, expanded over images."""
    yield gradient.transpose(1, 2).contiguous().transpose(1, 2)
    yield torch.stack([gradient, gradient], dim=-1)[..., 0]
    yield gradient[:1].expand_as(gradient)


def test_split_heads_takes_gradients_of_any_strides(path):
    x, gradients = product(2, 5, 2), upstream(2, 5, 2)
    for views in zip(*map(strided, gradients), strict=True):
        leaf = x.detach().to(path.device, copy=True).requires_grad_()
        outputs = split_heads(leaf, 2, True, impl=path.impl)
        d_qkv = torch.autograd.grad(outputs, leaf, [v.to(path.device) for v in views])[0]
        wanted = truth(x, 2, True, [v.contiguous() for v in views])["d qkv"]
        torch.testing.assert_close(d_qkv.cpu().double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("used", [(0,), (1, 2), ()])
@pytest.mark.parametrize("l2_norm", [True, False])
def test_split_heads_gradient_when_not_all_is_used(path, used, l2_norm):
    x, gradients = product(2, 3, 1), upstream(2, 3, 1)
    leaf = x.to(path.device).requires_grad_()
    outputs = split_heads(leaf * 1.0, 1, l2_norm, impl=path.impl)
    loss = sum((outputs[i] * gradients[i].to(path.device)).sum() for i in used) + 0.0 * leaf.sum()
    loss.backward()
    given = [g if i in used else torch.zeros_like(g) for i, g in enumerate(gradients)]
    torch.testing.assert_close(leaf.grad.cpu().double(), truth(x, 1, l2_norm, given)["d qkv"], rtol=0, atol=1e-6)


def test_split_heads_under_attention_gives_the_gradients_of_pytorch(path):
    """As the model uses them: attention's gradients arrive in its own layout."""
    ends, scale = (1, 5, 14), torch.tensor([3.0, 8.0], device=path.device)
    x = product(2, 14, 2).to(path.device)
    found = []
    for impl in (path.impl, "reference"):
        leaf = x.clone().requires_grad_()
        out = block_causal_attention(*split_heads(leaf, 2, True, impl=impl), ends, scale, impl="reference")
        (out * out).sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def in_a_sea(shape, dtype, device):
    """A contiguous tensor of NaN, and the whole that it lies in."""
    margin, size = 4096, int(np.prod(shape))
    sea = torch.full((size + 2 * margin,), float("nan"), dtype=dtype, device=device)
    return sea[margin : margin + size].view(shape), sea


def test_split_heads_reads_and_writes_nothing_beside_its_tensors(path, monkeypatch):
    seas = []

    def empty(like, shape):
        inside, sea = in_a_sea(shape, like.dtype, like.device)
        seas.append((inside, sea))
        return inside

    monkeypatch.setattr(
        qkv_triton, "_empty_heads", lambda x, h: empty(x, (x.shape[0], h, x.shape[1], x.shape[2] // 3 // h))
    )
    monkeypatch.setattr(
        qkv_triton, "_empty_product", lambda d: empty(d, (d.shape[0], d.shape[2], 3 * d.shape[1] * d.shape[3]))
    )
    x, _ = in_a_sea((2, 5, 3 * 3 * 64), torch.float32, path.device)
    x.copy_(product(2, 5, 3))
    gradients = []
    for gradient in upstream(2, 5, 3):
        gradients.append(in_a_sea(gradient.shape, torch.float32, path.device)[0].copy_(gradient))
    leaf = x.requires_grad_()
    outputs = split_heads(leaf, 3, True, impl=path.impl)
    d_qkv = torch.autograd.grad(outputs, leaf, gradients)[0]
    exact = truth(leaf.cpu(), 3, True, [g.cpu() for g in gradients])
    for name, got in zip([*"qkv", "d qkv"], [*outputs, d_qkv], strict=True):
        torch.testing.assert_close(got.detach().cpu().double(), exact[name], rtol=0, atol=1e-6)
    assert len(seas) == (4 if path.impl == "triton" else 0)
    for inside, sea in seas:
        assert int(sea.isnan().sum()) == sea.numel() - inside.numel()


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (3, 6), (5, 9)])
def test_split_heads_to_cache_writes_its_rows_and_no_other(path, start, length, dtype, l2_norm):
    x = product(2, length, 3, dtype=dtype).to(path.device)
    seas = [in_a_sea((2, 3, 14, 64), dtype, path.device) for _ in range(2)]
    caches = [inside for inside, _ in seas]
    q = split_heads_to_cache(x, 3, l2_norm, *caches, start, impl=path.impl)
    wanted = split_heads(x, 3, l2_norm, impl=path.impl)
    assert torch.equal(q, wanted[0])
    for (cache, sea), rows in zip(seas, wanted[1:], strict=True):
        assert torch.equal(cache[:, :, start : start + length], rows)
        assert int(sea.isnan().sum()) == sea.numel() - rows.numel()


POSITIONS = [
    torch.tensor(4),
    torch.tensor(0, dtype=torch.int32),
    torch.tensor([0, 7]),
    torch.tensor([[9, 5], [2, 6]])[:, 1],
]


@pytest.mark.parametrize("position", POSITIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (2, 3)])
def test_split_heads_to_cache_at_a_position_on_the_device(path, position, dtype, start, length):
    """The same bits as with the sum of both as an integer, image by image, and no other row."""
    x, bias = product(2, length, 3, dtype=dtype).to(path.device), bias_of(product(2, length, 3)).to(path.device)
    seas = [in_a_sea((2, 3, 14, 64), dtype, path.device) for _ in range(2)]
    caches = [inside for inside, _ in seas]
    at = position.to(path.device) if position.ndim == 0 else position.to(path.device).expand(2)
    q = split_heads_to_cache(x, 3, True, *caches, start, bias, impl=path.impl, position=at)
    wanted = split_heads(x, 3, True, bias, impl=path.impl)
    assert torch.equal(q, wanted[0])
    for (cache, sea), rows in zip(seas, wanted[1:], strict=True):
        for image, first in enumerate(position.expand(2).tolist()):
            assert torch.equal(cache[image, :, start + first : start + first + length], rows[image])
        assert int(sea.isnan().sum()) == sea.numel() - rows.numel()


def test_split_heads_to_cache_outside_the_cache(path):
    x = product(2, 2, 2).to(path.device)
    seas = [in_a_sea((2, 2, 5, 64), torch.float32, path.device) for _ in range(2)]
    caches = [inside for inside, _ in seas]
    for outside in ([0, 4], [-1, 0]):
        position = torch.tensor(outside, device=path.device)
        if path.impl == "triton":  # the row that is inside is written, the other is not
            for _, sea in seas:
                sea.fill_(float("nan"))
            split_heads_to_cache(x, 2, True, *caches, 0, impl="triton", position=position)
            for _, sea in seas:
                assert int((~sea.isnan()).sum()) == 3 * 2 * 64
        else:
            with pytest.raises((ValueError, RuntimeError), match="outside the cache|out of bounds"):
                split_heads_to_cache(x, 2, True, *caches, 0, impl=path.impl, position=position)


def test_split_heads_to_cache_refuses_bad_positions(path):
    x = product(2, 3, 2).to(path.device)
    caches = [torch.zeros(2, 2, 5, 64, device=path.device) for _ in range(2)]
    for position in (torch.zeros(3, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"want int32 or int64, \(\) for all images or \(2,\), one an image"):
            split_heads_to_cache(x, 2, True, *caches, 0, impl=path.impl, position=position.to(path.device))
    elsewhere = torch.zeros((), dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="position is on meta"):
        split_heads_to_cache(x, 2, True, *caches, 0, impl=path.impl, position=elsewhere)


def test_split_heads_to_cache_takes_caches_of_any_strides(path):
    x = product(2, 3, 2).to(path.device)
    k_cache = torch.zeros(2, 8, 2, 64, device=path.device).transpose(1, 2)  # rows of all heads together
    v_cache = torch.zeros(2, 2, 9, 100, device=path.device)[..., :64]
    split_heads_to_cache(x, 2, True, k_cache, v_cache, 4, impl=path.impl)
    _, k, v = split_heads(x, 2, True, impl=path.impl)
    for cache, rows in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache[:, :, 4:7], rows)
        assert int(cache.count_nonzero()) == rows.numel()


def test_split_heads_of_nothing(path):
    for shape in ((0, 3, 384), (2, 0, 384)):
        leaf = torch.empty(shape, device=path.device, requires_grad=True)
        outputs = split_heads(leaf, 2, True, impl=path.impl)
        assert all(o.shape == (shape[0], 2, shape[1], 64) for o in outputs)
        sum(o.sum() for o in outputs).backward()
        assert leaf.grad.shape == shape
        caches = [torch.zeros(shape[0], 2, 5, 64, device=path.device) for _ in range(2)]
        with torch.no_grad():
            assert split_heads_to_cache(leaf, 2, True, *caches, 5 - shape[1], impl=path.impl).numel() == 0


def test_split_heads_is_bitwise_repeatable(path):
    x, gradients = product(2, 20, 2), upstream(2, 20, 2)
    runs = [run(x, 2, True, gradients, path.impl, path.device) for _ in range(3)]
    assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:] for name in runs[0])


def test_split_heads_does_not_depend_on_the_number_of_threads(path):
    if path.impl == "triton":
        pytest.skip("it has no such number")
    x, gradients, before = product(4, 100, 2), upstream(4, 100, 2), torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            runs.append(run(x, 2, True, gradients, path.impl))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("l2_norm", [True, False])
def test_split_heads_reference_gradcheck(l2_norm):
    x = torch.randn(2, 3, 3 * 2 * 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: split_heads(x, 2, l2_norm, impl="reference"), x)


@pytest.mark.parametrize("l2_norm", [True, False])
def test_split_heads_opcheck(path, l2_norm):
    if path.impl == "reference":
        pytest.skip("not an op")
    ops = torch.ops.varfast
    split, into, backward = qkv_triton.split_op, qkv_triton.split_into_op, qkv_triton.split_backward_op
    if path.impl == "cpp":
        split, into, backward = ops.split_heads_cpp, ops.split_heads_into_cpp, ops.split_heads_backward_cpp
    x = product(2, 3, 2).to(path.device)
    bias = bias_of(x.cpu()).to(path.device)
    torch.library.opcheck(split, (x.clone().requires_grad_(), None, 2, l2_norm))
    torch.library.opcheck(split, (x.clone().requires_grad_(), bias.clone().requires_grad_(), 2, l2_norm))
    caches = [torch.zeros(2, 2, 5, 64, device=path.device) for _ in range(2)]
    torch.library.opcheck(into, (x, bias, 2, l2_norm, *(c[:, :, 1:4] for c in caches)))
    if path.impl == "triton":
        torch.library.opcheck(into, (x, bias, 2, l2_norm, *caches, torch.tensor([0, 1], device=path.device)))
    q, k, _, *inverse = split(x, None, 2, l2_norm)
    saved = (q, k, *inverse) if l2_norm else (None,) * 4
    for with_bias in (False, True):
        torch.library.opcheck(backward, (*(g.to(path.device) for g in upstream(2, 3, 2)), *saved, with_bias))


def test_split_heads_refuses_bad_input(path):
    x = product(2, 3, 2).to(path.device)
    caches = [torch.zeros(2, 2, 5, 64, device=path.device) for _ in range(2)]
    with pytest.raises(ValueError, match=r"qkv is \(2, 3, 384\): want .* multiple of the 5 heads"):
        split_heads(x, 5, True, impl=path.impl)
    with pytest.raises(ValueError, match="num_heads=0"):
        split_heads(x, 0, True, impl=path.impl)
    for start in (-1, 3):
        with pytest.raises(ValueError, match=f"rows {start} to {start + 3} are outside k_cache, which has 5"):
            split_heads_to_cache(x, 2, True, *caches, start, impl=path.impl)
    with pytest.raises(ValueError, match=r"v_cache is \(2, 2, 5, 32\): want \(2, 2, L, 64\)"):
        split_heads_to_cache(x, 2, True, caches[0], caches[1][..., :32], 0, impl=path.impl)
    with pytest.raises(ValueError, match="k_cache is torch.float16, qkv torch.float32"):
        split_heads_to_cache(x, 2, True, caches[0].half(), caches[1], 0, impl=path.impl)
    with pytest.raises(ValueError, match="stride of 5 along its last axis"):
        split_heads_to_cache(x, 2, True, caches[0], torch.zeros(2, 2, 64, 5, device=path.device).mT, 0, impl=path.impl)
    with pytest.raises(ValueError, match="has no gradient"):
        split_heads_to_cache(x.requires_grad_(), 2, True, *caches, 0, impl=path.impl)
    assert not any(bool(cache.any()) for cache in caches)
    if path.impl != "reference":
        with pytest.raises(ValueError, match="takes a head dim of 64, VAR's, got 128"):
            split_heads(x, 1, True, impl=path.impl)
        with pytest.raises(ValueError, match="got torch.(float64|float16)"):
            split_heads(x.to(torch.float64 if path.impl == "triton" else torch.float16), 2, True, impl=path.impl)


def test_reference_splits_as_the_public_model_does():
    """Its lines: view, permute, F.normalize in float32."""
    x = product(2, 5, 3, dim=8)
    q, k, v = x.view(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = (torch.nn.functional.normalize(y, dim=-1) for y in (q, k))
    for got, want in zip(reference.split_heads(x, 3, True), (q, k, v), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_split_heads_to_cache_under_a_cuda_graph_reads_the_values_of_each_replay():
    x = product(2, 4, 16, dtype=torch.bfloat16).cuda()
    caches = [torch.zeros(2, 16, 9, 64, dtype=x.dtype, device="cuda") for _ in range(2)]
    split_heads_to_cache(x, 16, True, *caches, 3)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = split_heads_to_cache(x, 16, True, *caches, 3)
    x.mul_(-2.0)
    graph.replay()
    wanted = split_heads(x, 16, True, impl="reference")
    for got, want in zip((q, *(c[:, :, 3:7] for c in caches)), wanted, strict=True):
        torch.testing.assert_close(got, want)
