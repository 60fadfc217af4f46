"""decode_attention and causal_attention. The truth is a softmax in float64, image by image."""

import functools
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from varfast.kernels import attention_flash, causal_attention, decode_attention, decode_triton, selection

# (query heads, key heads, head dim): LlamaGen, 3B's head dim, grouped, more query heads of a key head than a tile has.
HEADS = [(4, 4, 64), (2, 2, 100), (8, 2, 16), (40, 2, 32), (1, 1, 1)]
HAS_CPP = True


def inputs(batch, heads, places, dtype=torch.float32, queries=None):
    generator = torch.Generator().manual_seed(0)
    num_heads, kv_heads, dim = heads
    shape = (batch, num_heads, dim) if queries is None else (batch, num_heads, queries, dim)
    q = torch.randn(shape, generator=generator)
    k, v = (torch.randn(batch, kv_heads, places, dim, generator=generator) for _ in range(2))
    return [x.to(dtype) for x in (q, k, v)]


def truth(q_BHD, k_BGND, v_BGND, last_B, scale):
    """Of the places 0 ... last alone."""
    out = torch.empty(q_BHD.shape, dtype=torch.float64)
    times = q_BHD.shape[1] // k_BGND.shape[1]
    for image, last in enumerate(last_B):
        k, v = (x[image, :, : last + 1].double().repeat_interleave(times, dim=0) for x in (k_BGND, v_BGND))
        weights = (scale * k @ q_BHD[image].double()[:, :, None]).softmax(dim=1)
        out[image] = (weights * v).sum(dim=1)
    return out


@pytest.fixture
def few_programs(monkeypatch):
    """So that places are dealt out to at most three programs, tiles in turn."""
    monkeypatch.setattr(decode_triton, "_PROGRAMS", 24)


@pytest.mark.parametrize(
    "position", [torch.tensor(0), torch.tensor(149, dtype=torch.int32), torch.tensor([5, 64, 149])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@torch.no_grad()
def test_decode_attention_is_as_exact_as_pytorch(path, assert_as_exact, few_programs, heads, dtype, position):
    """What is behind the position holds NaN and is not read; the caches have strides of their own."""
    q, k, v = inputs(3, heads, 150, dtype)
    scale = heads[2] ** -0.5
    last_B = position.expand(3).tolist()
    exact = truth(q, k, v, last_B, scale)
    for image, last in enumerate(last_B):
        k[image, :, last + 1 :] = v[image, :, last + 1 :] = float("nan")
    plain = decode_attention(q, k, v, position, scale, "reference")
    margins = torch.full((2, 3, 153, heads[1], heads[2] + 3), float("nan"), dtype=dtype, device=path.device)
    caches = margins[:, :, 1:151, :, : heads[2]].transpose(2, 3)
    caches.copy_(torch.stack([k, v]))
    got = decode_attention(q.to(path.device), *caches, position.to(path.device), scale, path.impl)
    assert got.dtype == dtype
    assert_as_exact({"out": got}, {"out": plain}, {"out": exact}, floor=2e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("impl", ["sdpa", "sdpa_invariant"])
@pytest.mark.parametrize("position", [torch.tensor(0), torch.tensor([5, 64, 99])])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@torch.no_grad()
def test_decode_attention_by_pytorch_on_the_host(impl, heads, position):
    q, k, v = inputs(3, heads, 100)
    want = truth(q, k, v, position.expand(3).tolist(), 0.3)
    torch.testing.assert_close(decode_attention(q, k, v, position, 0.3, impl).double(), want, rtol=0, atol=2e-6)


@torch.no_grad()
def test_decode_attention_of_large_logits_keeps_the_largest(path, few_programs):
    """Their exponentials overflow but for the subtraction of the largest, of each split and of all."""
    q, k, v = inputs(1, (2, 1, 16), 140)
    q *= 300.0
    got = decode_attention(
        *(x.to(path.device) for x in (q, k, v)), torch.tensor(139, device=path.device), 1.0, path.impl
    )
    torch.testing.assert_close(got.double().cpu(), truth(q, k, v, [139], 1.0), rtol=0, atol=1e-5)


@torch.no_grad()
def test_decode_attention_is_bitwise_repeatable(path, few_programs):
    q, k, v = (x.to(path.device) for x in inputs(3, (4, 2, 64), 150))
    position = torch.tensor([149, 70, 3], device=path.device)
    runs = [decode_attention(q, k, v, position, 0.125, path.impl) for _ in range(3)]
    assert all(torch.equal(runs[0], other) for other in runs[1:])


@torch.no_grad()
def test_decode_attention_beyond_the_cache(path):
    q, k, v = (x.to(path.device) for x in inputs(2, (2, 2, 16), 20))
    position = torch.tensor([3, 20], device=path.device)
    if path.device == "cpu":
        with pytest.raises(ValueError, match=r"position is \[3, 20\]: want places of the cache, 0 to 19"):
            decode_attention(q, k, v, position, 0.25, path.impl)
        return
    got = decode_attention(q, k, v, position, 0.25, path.impl)
    torch.testing.assert_close(got.double().cpu(), truth(q.cpu(), k.cpu(), v.cpu(), [3, 19], 0.25), rtol=0, atol=2e-6)


@torch.no_grad()
def test_decode_attention_of_no_image(path):
    q, k, v = (x.to(path.device) for x in inputs(0, (2, 2, 16), 20))
    assert decode_attention(q, k, v, torch.tensor(3, device=path.device), 0.25, path.impl).shape == (0, 2, 16)


def test_decode_attention_opcheck(path):
    if path.impl == "reference":
        pytest.skip("not an op of PyTorch's library")
    op = torch.ops.varfast.decode_attention_cpp if path.impl == "cpp" else decode_triton.decode_op
    q, k, v = (x.to(path.device) for x in inputs(2, (4, 2, 16), 20))
    torch.library.opcheck(op, (q, k, v, torch.tensor([7, 3], device=path.device), 0.25))


def test_decode_attention_refuses_what_does_not_fit():
    q, k, v = inputs(2, (4, 2, 16), 20)
    position = torch.tensor(3)
    with pytest.raises(ValueError, match=r"got \(2, 4, 16\), \(2, 2, 20, 16\), \(2, 2, 19, 16\), want"):
        decode_attention(q, k, v[:, :, 1:], position, 0.25)
    with pytest.raises(ValueError, match="H a multiple of G"):
        decode_attention(q[:, :3], k, v, position, 0.25)
    with pytest.raises(ValueError, match="want one dtype"):
        decode_attention(q.bfloat16(), k, v, position, 0.25)
    with pytest.raises(ValueError, match="position is \\(3,\\) of torch.int64: want int32 or int64"):
        decode_attention(q, k, v, torch.zeros(3, dtype=torch.int64), 0.25)
    with pytest.raises(ValueError, match="decode_attention has no gradient"):
        decode_attention(q.requires_grad_(), k, v, position, 0.25)
    reason = selection._named("decode_attention", "sdpa").cannot(torch.device("cuda"))
    assert reason == "it reads the position on the host, which would wait for the device"


@pytest.mark.gpu
@torch.no_grad()
def test_a_captured_step_replays_at_the_next_position():
    q, k, v = (x.cuda() for x in inputs(2, (4, 2, 64), 40, torch.bfloat16))
    position = torch.zeros((), dtype=torch.int64, device="cuda")
    wanted = [decode_attention(q, k, v, position + i, 0.125, "triton") for i in range(40)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, position, 0.125, "triton")
        position += 1
    for want in wanted:
        graph.replay()
        assert torch.equal(out, want)


# ---------------------------------------------------------------------------------------------------------------------
# causal_attention


CAUSAL = [
    pytest.param("sdpa", "cpu"),
    pytest.param("reference", "cpu"),
    pytest.param("sdpa_invariant", "cpu"),
    pytest.param("triton", "cpu"),
    pytest.param("triton_invariant", "cpu"),
    *(pytest.param(impl, "cuda", marks=pytest.mark.gpu) for impl in ("sdpa", "triton", "triton_invariant")),
]


def runs(impl, device):
    if impl.startswith("triton") and device == "cpu" and not selection.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1; the kernel runs on the GPU here")


def causal_run(function, q, k, v, upstream):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    out.backward(upstream.to(out))
    return dict(zip(("out", "d q", "d k", "d v"), (out.detach(), *(x.grad for x in leaves)), strict=True))


def causal_truth(scale, q, k, v):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return ((scale * q @ k.mT).masked_fill(hidden, float("-inf")).softmax(dim=-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(("impl", "device"), CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 2, 64), (4, 2, 64), (4, 2, 100)], ids=str)
def test_causal_attention_and_every_gradient_are_as_exact_as_pytorch(impl, device, dtype, heads, assert_as_exact):
    runs(impl, device)
    if impl.startswith("triton") and heads[2] != 64:
        pytest.skip("refused")
    q, k, v = inputs(2, heads, 19, dtype, queries=19)
    upstream = torch.randn(2, 19, heads[0], heads[2], generator=torch.Generator().manual_seed(1)).to(dtype)
    scale = heads[2] ** -0.5
    exact = causal_run(functools.partial(causal_truth, scale), *(x.double() for x in (q, k, v)), upstream)
    plain = causal_run(lambda q, k, v: causal_attention(q, k, v, scale, "reference"), q, k, v, upstream)
    there = [x.to(device) for x in (q, k, v, upstream)]
    got = causal_run(lambda q, k, v: causal_attention(q, k, v, scale, impl), *there)
    # Tensor cores and the interpreter round the weights to bfloat16 before they multiply the values.
    assert_as_exact(got, plain, exact, floor=2e-6 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize(("impl", "device"), CAUSAL)
@pytest.mark.parametrize("heads", [(2, 2, 64), (4, 2, 64)], ids=str)
@torch.no_grad()
def test_invariant_tokens_have_the_same_bits_decoded_alone_and_together(impl, device, heads):
    """Of three images, each alone and decoded token by token."""
    if not impl.endswith("_invariant"):
        pytest.skip("no such promise")
    runs(impl, device)
    q, k, v = (x.to(device) for x in inputs(3, heads, 21, torch.bfloat16, queries=21))
    together = causal_attention(q, k, v, 0.125, impl)
    for image in range(3):
        mine = slice(image, image + 1)
        assert torch.equal(causal_attention(q[mine], k[mine], v[mine], 0.125, impl), together[mine])
    cache = [F.pad(x, (0, 0, 0, 9), value=float("nan")) for x in (k, v)]
    for place in range(21):
        position = torch.tensor(place, device=device)
        assert torch.equal(decode_attention(q[:, :, place], *cache, position, 0.125, impl), together[:, place])


@pytest.mark.parametrize(("impl", "result"), [("flash_attn", "{}"), ("fa4", "({}, None)")])
def test_causal_attention_calls_the_flash_packages_as_they_document(impl, result, monkeypatch):
    asked = []

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, deterministic=False):
        asked.append((softmax_scale, causal, deterministic))
        out = causal_truth(softmax_scale, *(x.transpose(1, 2) for x in (q, k, v)))
        return out if impl == "flash_attn" else (out, None)

    module = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, attention_flash._MODULES[impl], module)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    attention_flash._function.cache_clear()
    q, k, v = inputs(2, (4, 2, 16), 9, queries=9)
    try:
        got = selection._named("causal_attention", impl).run(q, k, v, 0.25)
    finally:
        attention_flash._function.cache_clear()
    torch.testing.assert_close(got, causal_truth(0.25, q, k, v))
    assert asked == [(0.25, True, True)]


def test_causal_attention_refuses_what_does_not_fit():
    q, k, v = inputs(2, (4, 2, 16), 9, queries=9)
    with pytest.raises(ValueError, match="H a multiple of G"):
        causal_attention(q[:, :3], k, v, 0.25)
    with pytest.raises(ValueError, match=r"got \(2, 4, 8, 16\), \(2, 2, 9, 16\)"):
        causal_attention(q[:, :, :8], k, v, 0.25)
    with pytest.raises(ValueError, match="want one dtype"):
        causal_attention(q.bfloat16(), k, v, 0.25)
