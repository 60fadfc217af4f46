"""split_heads_rotary, alone and into a cache. The truth is complex multiplication in float64."""

import pytest
import torch

from varfast.kernels import split_heads_rotary, split_heads_rotary_to_cache

# (query heads, key heads, head dim): LlamaGen, 3B's head dim, grouped, one group of three, one of each.
HEADS = [(4, 4, 64), (2, 2, 100), (8, 2, 16), (3, 1, 12), (1, 1, 2)]
HAS_CPP = True
PAIRS = ["adjacent", "halves"]


def table(places, dim, first_is_zero=True):
    """Of angles; the first row is LlamaGen's class token's: cosine and sine are 0."""
    angle = torch.rand(places, dim // 2, generator=torch.Generator().manual_seed(1)) * 7.0
    rotary = torch.stack([angle.cos(), angle.sin()], dim=-1)
    if first_is_zero:
        rotary[0] = 0.0
    return rotary


def inputs(batch, length, heads, dtype):
    generator = torch.Generator().manual_seed(0)
    width = (heads[0] + 2 * heads[1]) * heads[2]
    qkv = torch.randn(batch, length, width, generator=generator).to(dtype)
    upstream = [
        torch.randn(batch, n, length, heads[2], generator=generator).to(dtype) for n in (heads[0], heads[1], heads[1])
    ]
    return qkv, table(length, heads[2]), upstream


def turned(x_BLHD, rotary_LP2, pairs):
    dim = x_BLHD.shape[-1]
    x = x_BLHD.double()
    even, odd = (x[..., 0::2], x[..., 1::2]) if pairs == "adjacent" else (x[..., : dim // 2], x[..., dim // 2 :])
    product = torch.complex(even, odd) * torch.view_as_complex(rotary_LP2.double().contiguous())[:, None]
    out = torch.empty_like(x)
    if pairs == "adjacent":
        out[..., 0::2], out[..., 1::2] = product.real, product.imag
    else:
        out[..., : dim // 2], out[..., dim // 2 :] = product.real, product.imag
    return out


def truth(qkv, rotary, heads, pairs):
    num_heads, kv_heads, dim = heads
    all_heads = qkv.double().view(*qkv.shape[:2], -1, dim)
    q, k, v = all_heads.split((num_heads, kv_heads, kv_heads), dim=2)
    if rotary is not None:
        q, k = turned(q, rotary, pairs), turned(k, rotary, pairs)
    return [x.transpose(1, 2) for x in (q, k, v)]


def run(qkv, rotary, heads, pairs, upstream, how):
    leaf = qkv.detach().clone().requires_grad_()
    out = how(leaf, rotary, heads, pairs)
    torch.autograd.backward(out, [u.to(o) for u, o in zip(upstream, out, strict=True)])
    return dict(zip("qkv", (o.detach() for o in out), strict=True)) | {"d qkv": leaf.grad}


def ours(impl):
    return lambda qkv, rotary, heads, pairs: split_heads_rotary(qkv, rotary, heads[0], heads[1], pairs, impl=impl)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_split_heads_rotary_and_its_gradient_are_as_exact_as_pytorch(path, assert_as_exact, heads, dtype, pairs):
    if (path.impl, dtype) == ("triton", torch.float64):
        pytest.skip("refused")
    qkv, rotary, upstream = inputs(2, 7, heads, dtype)
    exact = run(qkv.double(), rotary, heads, pairs, upstream, truth)
    plain = run(qkv, rotary, heads, pairs, upstream, ours("reference"))
    there = (qkv.to(path.device), rotary.to(path.device), heads, pairs, [u.to(path.device) for u in upstream])
    got = run(*there, ours(path.impl))
    # Interpreted, a bfloat16 is truncated rather than rounded: one unit in the last place, not half of one.
    truncates = dtype == torch.bfloat16 and (path.impl, path.device) == ("triton", "cpu")
    assert_as_exact(got, plain, exact, floor=4e-2 if truncates else 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("pairs", PAIRS)
def test_split_heads_rotary_without_a_table_turns_nothing(path, pairs):
    heads = (3, 1, 12)
    qkv, _, upstream = (
        x.to(path.device) if isinstance(x, torch.Tensor) else x for x in inputs(2, 5, heads, torch.float32)
    )
    got = run(qkv, None, heads, pairs, [u.to(path.device) for u in upstream], ours(path.impl))
    for name, want in zip("qkv", truth(qkv, None, heads, pairs), strict=True):
        assert torch.equal(got[name].double(), want)


def test_split_heads_rotary_of_the_class_token_is_zero(path):
    qkv, rotary, _ = inputs(2, 3, (4, 2, 16), torch.float32)
    q, k, v = split_heads_rotary(qkv.to(path.device), rotary.to(path.device), 4, 2, impl=path.impl)
    assert not q[:, :, 0].any()
    assert not k[:, :, 0].any()
    assert v[:, :, 0].all()


def test_split_heads_rotary_reads_nothing_beside_its_inputs(path):
    """And a product that is no whole tensor."""
    heads = (2, 2, 12)
    qkv, rotary, upstream = inputs(2, 5, heads, torch.float32)
    sea = torch.full((2, 7, 120), float("nan"))
    sea[:, 1:6, 10:82] = qkv
    wide = torch.full((7, 6, 2), float("nan"))
    wide[1:6] = rotary
    given = (sea.to(path.device)[:, 1:6, 10:82], wide.to(path.device)[1:6])
    got = run(*given, heads, "adjacent", [u.to(path.device) for u in upstream], ours(path.impl))
    exact = run(qkv.double(), rotary, heads, "adjacent", upstream, truth)
    for name in exact:
        torch.testing.assert_close(got[name].double().cpu(), exact[name], rtol=0, atol=2e-6)


def test_split_heads_rotary_takes_gradients_of_any_strides_and_of_one_output(path):
    heads = (4, 2, 16)
    qkv, rotary, _ = inputs(2, 6, heads, torch.float32)

    def gradient(impl, device):
        leaf = qkv.to(device, copy=True).requires_grad_()
        q, k, _ = split_heads_rotary(leaf, rotary.to(device), *heads[:2], impl=impl)
        (q[:, :, 1::2].sum() + (k.mT * torch.arange(6, device=device)).sum()).backward()
        return leaf.grad.cpu()

    torch.testing.assert_close(gradient(path.impl, path.device), gradient("reference", "cpu"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("position", [torch.tensor(0), torch.tensor(8, dtype=torch.int32), torch.tensor([3, 8, 0])])
@pytest.mark.parametrize("heads", HEADS[:4], ids=str)
@torch.no_grad()
def test_one_token_into_the_cache_is_that_token_of_the_sequence(path, heads, position, pairs):
    """The rest of the cache, which has strides of its own, stays as it was."""
    num_heads, kv_heads, dim = heads
    qkv, rotary, _ = (
        x.to(path.device) if isinstance(x, torch.Tensor) else x for x in inputs(3, 9, heads, torch.float32)
    )
    sea = torch.full((2, 3, 10, kv_heads, dim), float("nan"), device=path.device)
    k_cache, v_cache = sea[:, :, :9].transpose(2, 3).unbind()
    place_B = position.expand(3).to(path.device)
    image_B = torch.arange(3, device=path.device)
    want_q, want_k, want_v = truth(qkv, rotary, heads, pairs)
    token = qkv[image_B, place_B]
    q = split_heads_rotary_to_cache(
        token, rotary, position.to(path.device), k_cache, v_cache, num_heads, pairs, impl=path.impl
    )
    torch.testing.assert_close(q.double(), want_q[image_B, :, place_B], rtol=0, atol=2e-6)
    for cache, want in ((k_cache, want_k), (v_cache, want_v)):
        torch.testing.assert_close(cache[image_B, :, place_B].double(), want[image_B, :, place_B], rtol=0, atol=2e-6)
    written = torch.zeros(3, 10, dtype=torch.bool, device=path.device)
    written[image_B, place_B] = True
    assert sea.isnan().all(dim=(0, 3, 4)).equal(~written)


@pytest.mark.parametrize("pairs", PAIRS)
@torch.no_grad()
def test_one_token_into_the_cache_has_the_bits_that_it_has_among_others(path, pairs):
    """Strict mode needs that."""
    heads = (4, 2, 100)
    qkv, rotary, _ = inputs(2, 6, heads, torch.bfloat16)
    qkv, rotary = qkv.to(path.device), rotary.to(path.device)
    q, k, v = split_heads_rotary(qkv, rotary, *heads[:2], pairs, impl=path.impl)
    caches = torch.zeros(2, 2, heads[1], 6, heads[2], dtype=torch.bfloat16, device=path.device).unbind()
    for place in range(6):
        position = torch.tensor(place, device=path.device)
        one = split_heads_rotary_to_cache(qkv[:, place], rotary, position, *caches, heads[0], pairs, impl=path.impl)
        assert torch.equal(one, q[:, :, place])
    assert torch.equal(caches[0], k)
    assert torch.equal(caches[1], v)


@torch.no_grad()
def test_positions_beyond_the_cache(path):
    qkv, rotary, _ = inputs(2, 4, (2, 2, 16), torch.float32)
    position = torch.tensor([1, 4], device=path.device)
    k_cache, v_cache = torch.zeros(2, 2, 2, 4, 16, device=path.device).unbind()
    given = (qkv[:, 0].to(path.device), rotary.to(path.device), position, k_cache, v_cache, 2)
    if path.device == "cpu":
        with pytest.raises(ValueError, match=r"position is \[1, 4\]: want places of the cache, 0 to 3"):
            split_heads_rotary_to_cache(*given, impl=path.impl)
        return
    split_heads_rotary_to_cache(*given, impl="triton")
    torch.cuda.synchronize()
    assert k_cache[0, :, 1].any()
    assert not k_cache[1].any()


def test_split_heads_rotary_of_nothing(path):
    qkv = torch.empty(0, 3, 48, device=path.device, requires_grad=True)
    q, k, v = split_heads_rotary(qkv, table(3, 8).to(path.device), 2, 2, impl=path.impl)
    (q.sum() + k.sum() + v.sum()).backward()
    assert qkv.grad.shape == qkv.shape


def test_split_heads_rotary_opcheck(path):
    if path.impl == "reference":
        pytest.skip("not an op of PyTorch's library")
    from varfast.kernels.rotary_triton import backward_op, split_into_op, split_op

    qkv, rotary, upstream = inputs(2, 5, (4, 2, 8), torch.float32)
    qkv, rotary, *upstream = (x.to(path.device) for x in (qkv, rotary, *upstream))
    caches = torch.zeros(2, 2, 2, 5, 8, device=path.device).unbind()
    leaf, position = qkv.clone().requires_grad_(), torch.tensor(3, device=path.device)
    if path.impl == "cpp":
        ops = torch.ops.varfast
        torch.library.opcheck(ops.rotary_cpp, (leaf, rotary, 4, 2, True))
        torch.library.opcheck(ops.rotary_backward_cpp, (*upstream, rotary, False))
        torch.library.opcheck(ops.rotary_into_cpp, (qkv[:, 0], rotary, position.expand(2), 4, False, *caches))
        return
    torch.library.opcheck(split_op, (leaf, rotary, 4, 2, "halves"))
    torch.library.opcheck(backward_op, (*upstream, rotary, "adjacent"))
    torch.library.opcheck(split_into_op, (qkv[:, 0], rotary, position, *caches, 4, "adjacent"))


def test_split_heads_rotary_refuses_what_does_not_fit():
    qkv, rotary = torch.zeros(2, 5, 64), torch.zeros(5, 4, 2)
    with pytest.raises(ValueError, match="3 query heads and 2 key heads: want a multiple"):
        split_heads_rotary(qkv, None, 3, 2)
    with pytest.raises(ValueError, match=r"qkv has 64 columns: want a multiple of 6 \+ 2 \* 3"):
        split_heads_rotary(qkv, None, 6, 3)
    with pytest.raises(ValueError, match=r"rotary is \(4, 4, 2\) .*: want \(5, 4, 2\) floats"):
        split_heads_rotary(qkv, rotary[1:], 4, 2)
    with pytest.raises(ValueError, match="pairs='odd': want one of adjacent, halves"):
        split_heads_rotary(qkv, rotary, 4, 2, "odd")
    with pytest.raises(ValueError, match="it is a table of constants"):
        split_heads_rotary(qkv, rotary.requires_grad_(), 4, 2)
    caches = torch.zeros(2, 2, 2, 5, 8)
    token, position = torch.zeros(2, 64), torch.tensor(0)
    with pytest.raises(ValueError, match=r"v_cache is \(2, 2, 4, 8\) .*: want \(2, 2, 5, 8\)"):
        split_heads_rotary_to_cache(token, None, position, caches[0], caches[1, :, :, :4], 4)
    with pytest.raises(ValueError, match="has no gradient"):
        split_heads_rotary_to_cache(token.requires_grad_(), None, position, *caches, 4)
    with pytest.raises(ValueError, match="k_cache has a stride of 5 along its last axis"):
        split_heads_rotary_to_cache(token.detach(), None, position, *torch.zeros(2, 2, 2, 8, 5).mT, 4)
