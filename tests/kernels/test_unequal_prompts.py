"""Prompts of unequal length in one batch, right-padded: prefill of all, then decoding with a place for each row.

Row r has its prompt at places 0 ... p_r - 1 and its j-th image token at place p_r + j. The truth is the row alone, all
of its places at once.
"""

import pytest
import torch

from varfast.kernels import causal_attention, decode_attention, decode_triton, selection, split_heads_rotary
from varfast.kernels import split_heads_rotary_to_cache as to_cache

HEADS, KV_HEADS, DIM = 2, 1, 64
PROMPTS, TOKENS = [5, 1, 4], 3
PLACES = max(PROMPTS) + TOKENS  # of the cache and of the rotary table
BITWISE = [
    ("sdpa_invariant", "cpu"),
    ("triton_invariant", "cpu"),
    pytest.param("triton_invariant", "cuda", marks=pytest.mark.gpu),
]
# (of all places, of one place, device)
PATHS = [
    pytest.param("reference", "reference", "cpu"),
    pytest.param("sdpa", "sdpa", "cpu"),
    pytest.param("sdpa", "cpp", "cpu"),
    pytest.param("triton", "triton", "cpu"),
    pytest.param("sdpa", "triton", "cuda", marks=pytest.mark.gpu),
]


def runs(impl, device):
    reason = selection._named("decode_attention", impl).cannot(torch.device(device))
    if reason is not None:
        pytest.skip(reason)


def rows(dtype, device):
    """The qkv layer's output of each row's own places, and a rotary table."""
    generator = torch.Generator().manual_seed(0)
    width = (HEADS + 2 * KV_HEADS) * DIM
    own = [torch.randn(1, p + TOKENS, width, generator=generator).to(device, dtype) for p in PROMPTS]
    angle = torch.rand(PLACES, DIM // 2, generator=generator) * 7.0
    return own, torch.stack([angle.cos(), angle.sin()], dim=-1).to(device)


def of_rotary(impl):
    """The implementation of the ops before attention that fits one of attention."""
    return "triton" if impl.startswith("triton") else "reference" if impl == "reference" else "auto"


def alone(own, rotary, impl):
    """Of each row (L, H, D)."""
    out = []
    for qkv in own:
        q, k, v = split_heads_rotary(qkv, rotary[: qkv.shape[1]], HEADS, KV_HEADS, impl=of_rotary(impl))
        out.append(causal_attention(q, k, v, DIM**-0.5, impl)[0])
    return out


def together(own, rotary, causal, decode):
    """Of each row (L, H, D), by a prefill of the longest prompt's places and TOKENS steps of one place a row."""
    device, dtype, length = own[0].device, own[0].dtype, max(PROMPTS)
    padded = torch.full((len(own), length, own[0].shape[2]), 1e4, device=device, dtype=dtype)
    for row, (qkv, prompt) in enumerate(zip(own, PROMPTS, strict=True)):
        padded[row, :prompt] = qkv[0, :prompt]
    q, k, v = split_heads_rotary(padded, rotary[:length], HEADS, KV_HEADS, impl=of_rotary(decode))
    prefill = causal_attention(q, k, v, DIM**-0.5, causal)
    caches = torch.full((2, len(own), KV_HEADS, PLACES, DIM), float("nan"), device=device, dtype=dtype)
    caches[0, :, :, :length], caches[1, :, :, :length] = k, v
    out = [[x] for x in prefill]
    place = torch.tensor(PROMPTS, device=device)
    for step in range(TOKENS):
        token = torch.stack([qkv[0, prompt + step] for qkv, prompt in zip(own, PROMPTS, strict=True)])
        q = to_cache(token, rotary, place, *caches, HEADS, impl=of_rotary(decode))
        heads = decode_attention(q, *caches, place, DIM**-0.5, decode)
        for parts, x in zip(out, heads.split(1), strict=True):
            parts.append(x)
        place += 1
    return [torch.cat([parts[0][:prompt], *parts[1:]]) for parts, prompt in zip(out, PROMPTS, strict=True)]


@pytest.mark.parametrize(("causal", "decode", "device"), PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_unequal_prompts_decoded_together_equal_each_row_alone(causal, decode, device, dtype, assert_as_exact):
    """What the padding and the places after a row's own hold is never seen."""
    runs(decode, device)
    own, rotary = rows(dtype, "cpu")
    exact = alone([qkv.double() for qkv in own], rotary, "reference")
    plain = alone(own, rotary, "reference")
    got = together([qkv.to(device) for qkv in own], rotary.to(device), causal, decode)
    for row in zip(got, plain, exact, strict=True):
        # Interpreted kernels truncate to bfloat16: one unit in the last place, not half of one.
        assert_as_exact(*({"out": x} for x in row), floor=3e-6 if dtype == torch.float32 else 4e-2)


@pytest.mark.parametrize(("impl", "device"), BITWISE)
@torch.no_grad()
def test_unequal_prompts_have_the_bits_of_each_row_alone(impl, device):
    """Strict mode needs that."""
    runs(impl, device)
    own, rotary = rows(torch.bfloat16, device)
    for got, want in zip(together(own, rotary, impl, impl), alone(own, rotary, impl), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("impl", "device"),
    [
        pytest.param("cpp", "cpu"),
        pytest.param("triton", "cpu"),
        pytest.param("triton_invariant", "cpu"),
        pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    ],
)
@torch.no_grad()
def test_a_place_for_each_row_gives_the_bits_of_one_place_for_all(impl, device, dtype, monkeypatch):
    """A row at place p of a batch, whatever the others' places are. The places have a stride of their own."""
    runs(impl, device)
    monkeypatch.setattr(decode_triton, "_PROGRAMS", 24)  # the places of a row are split between programs
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, (HEADS + 2 * KV_HEADS) * DIM, generator=generator).to(device, torch.bfloat16)
    filled = torch.randn(2, 3, KV_HEADS, 150, DIM, generator=generator).to(device, torch.bfloat16)
    angle = torch.rand(150, DIM // 2, generator=generator).to(device)
    rotary = torch.stack([angle.cos(), angle.sin()], dim=-1)

    def step(place):
        caches = filled.clone()
        q = to_cache(qkv, rotary, place, *caches, HEADS, impl=of_rotary(impl))
        return q, caches, decode_attention(q, *caches, place, DIM**-0.5, impl)

    place_B = torch.tensor([[70, 0], [3, 0], [149, 0]], dtype=dtype, device=device)[:, 0]
    got = step(place_B)
    for row in range(3):
        want = step(place_B[row])
        assert torch.equal(got[0][row], want[0][row])
        assert torch.equal(got[1][:, row], want[1][:, row])
        assert torch.equal(got[2][row], want[2][row])


@torch.no_grad()
def test_a_place_for_each_row_is_one_call_on_a_cpu(monkeypatch):
    """PyTorch's attention, called once a row, is slower."""
    runs("cpp", "cpu")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    q, cache = torch.randn(3, HEADS, DIM), torch.randn(3, KV_HEADS, 9, DIM)
    for dtype in (torch.float32, torch.bfloat16):
        decode_attention(q.to(dtype), cache.to(dtype), cache.to(dtype), torch.tensor([5, 0, 8]), 0.125)


@pytest.mark.gpu
@torch.no_grad()
def test_a_captured_step_replays_at_each_rows_next_place():
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, (HEADS + 2 * KV_HEADS) * DIM, generator=generator).to("cuda", torch.bfloat16)
    angle = torch.rand(PLACES, DIM // 2, generator=generator).cuda()
    rotary = torch.stack([angle.cos(), angle.sin()], dim=-1)

    def step(caches, place):
        q = to_cache(qkv, rotary, place, *caches, HEADS, impl="triton")
        out = decode_attention(q, *caches, place, DIM**-0.5, "triton")
        place += 1
        return out

    def start():
        return torch.zeros(2, 3, KV_HEADS, PLACES, DIM, device="cuda", dtype=torch.bfloat16)

    first = torch.tensor([5, 1, 3], device="cuda")
    caches, place = start(), first.clone()
    wanted = [step(caches, place) for _ in range(TOKENS)]
    caches, place = start(), first.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(caches, place)
    caches.zero_()
    place.copy_(first)
    for want in wanted:
        graph.replay()
        assert torch.equal(out, want)
