"""cached_attention at positions on the device, and a decoding step that replays at the next one."""

import pytest
import torch

from varfast.kernels import block_causal_attention, cached_attention, split_heads_to_cache

HAS_CPP = True
MORE_TRITON = ("triton_invariant",)


def inputs(batch, heads, queries, rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, n, 64, generator=generator).to(dtype) for n in (queries, rows, rows))
    return q, k, v, torch.rand(heads, generator=generator).mul_(0.3)


def naive(q, k, v, num_keys_B, logit_scale):
    """float64, image by image, of the valid rows alone."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for image, num_keys in enumerate(num_keys_B):
        logits = logit_scale.double()[:, None, None] * q[image].double() @ k[image, :, :num_keys].double().mT
        out[image] = logits.softmax(-1) @ v[image, :, :num_keys].double()
    return out


@pytest.mark.parametrize("position", [torch.tensor(0), torch.tensor(95, dtype=torch.int32), torch.tensor([5, 64, 0])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 5])
@torch.no_grad()
def test_cached_attention_at_a_position_on_the_device(path, assert_as_exact, position, dtype, queries):
    """As with the sum of both as an integer, image by image; rows that are not valid hold NaN and are not read."""
    q, k, v, logit_scale = inputs(3, 2, queries, 100, dtype)
    num_keys_B = [queries + first for first in position.expand(3).tolist()]
    for image, num_keys in enumerate(num_keys_B):
        k[image, :, num_keys:] = v[image, :, num_keys:] = float("nan")
    there = [x.to(path.device) for x in (q, k, v)]
    scale = logit_scale.to(path.device)
    got = cached_attention(*there, queries, scale, path.impl, position=position.to(path.device))
    exact = naive(q, k, v, num_keys_B, logit_scale)
    same_dtype = cached_attention(q, k, v, queries, logit_scale, "reference", position=position)
    assert_as_exact({"out": got}, {"out": same_dtype}, {"out": exact}, floor=2e-6 if dtype == torch.float32 else 4e-3)
    if path.impl != "reference":  # whose masked call is another one of PyTorch's
        for image, num_keys in enumerate(num_keys_B):
            alone = cached_attention(*(x[image : image + 1] for x in there), num_keys, scale, path.impl)
            assert torch.equal(got[image], alone[0])


@torch.no_grad()
def test_positions_beyond_the_cache(path):
    q, k, v, logit_scale = (x.to(path.device) for x in inputs(2, 2, 1, 20))
    position = torch.tensor([3, 400], device=path.device)
    if path.impl == "cpp":
        with pytest.raises(ValueError, match="num_keys=401, but the cache holds 20"):
            cached_attention(q, k, v, 1, logit_scale, "cpp", position=position)
        return
    got = cached_attention(q, k, v, 1, logit_scale, path.impl, position=position)
    want = naive(*(x.cpu() for x in (q, k, v)), [4, 20], logit_scale.cpu())
    torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=2e-6)


def test_cached_attention_refuses_positions_that_it_cannot_read():
    q, k, v, logit_scale = inputs(2, 2, 1, 20)
    with pytest.raises(ValueError, match="position is \\(3,\\) of torch.int64: want int32 or int64"):
        cached_attention(q, k, v, 1, logit_scale, position=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="of torch.float32: want int32 or int64"):
        cached_attention(q, k, v, 1, logit_scale, position=torch.zeros(()))
    with pytest.raises(ValueError, match="impl='sdpa_invariant' of cached_attention takes positions .* host"):
        cached_attention(q, k, v, 1, logit_scale, "sdpa_invariant", position=torch.tensor(3))


def decode(path, qkv, position, caches, logit_scale):
    """One token: its keys and values into the caches, its output, and the next position."""
    impl = path.impl if path.impl != "triton_invariant" else "triton"
    q = split_heads_to_cache(qkv, 2, True, *caches, 0, impl=impl, position=position)
    out = cached_attention(q, *caches, 1, logit_scale, path.impl, position=position)
    position += 1
    return out


@torch.no_grad()
def test_tokens_decoded_at_device_positions_equal_causal_attention(path):
    qkv = torch.randn(2, 6, 3 * 2 * 64, generator=torch.Generator().manual_seed(1)).to(path.device)
    logit_scale = torch.tensor([0.9, 1.7], device=path.device)
    caches = [torch.full((2, 2, 9, 64), float("nan"), device=path.device) for _ in range(2)]
    position = torch.zeros((), dtype=torch.int64, device=path.device)
    out = torch.cat([decode(path, qkv[:, i : i + 1], position, caches, logit_scale) for i in range(6)], dim=2)
    assert int(position) == 6
    heads = qkv.view(2, 6, 3, 2, 64).permute(2, 0, 3, 1, 4)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in heads[:2])
    want = block_causal_attention(q, k, heads[2], tuple(range(1, 7)), logit_scale, "reference")
    torch.testing.assert_close(out, want, rtol=0, atol=2e-6)


@pytest.mark.gpu
@torch.no_grad()
def test_a_captured_step_replays_at_the_next_position():
    from types import SimpleNamespace

    path = SimpleNamespace(impl="triton")
    steps = torch.randn(5, 2, 1, 3 * 2 * 64, device="cuda")
    logit_scale = torch.tensor([0.9, 1.7], device="cuda")
    eager, captured = ([torch.zeros(2, 2, 9, 64, device="cuda") for _ in range(2)] for _ in range(2))
    position = torch.zeros((), dtype=torch.int64, device="cuda")
    wanted = [decode(path, qkv, position, eager, logit_scale) for qkv in steps]
    position.zero_()
    qkv = steps[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(path, qkv, position, captured, logit_scale)
    for step, want in zip(steps, wanted, strict=True):
        qkv.copy_(step)
        graph.replay()
        assert torch.equal(out, want)
    assert int(position) == 5
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
