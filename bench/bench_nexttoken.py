"""The ops of next-token models against their peers and their ceilings, as bench_kernels.py does for VAR's.

    pytest bench/bench_nexttoken.py --benchmark-only

On a GPU at the shapes of LlamaGen-L, XXL and 3B and of Janus-Pro-7B, on a CPU at small ones. Of a decoding step the
batch decides: 1, 16, 64 and 256 images, 256 or 576 places, at the last of them.
"""

import pytest
import torch
import torch.nn.functional as F
from bench_kernels import BACKENDS, CUDA, DEVICE, STORAGE, by_backend, compiled, other_impls, randn, run

from varfast import kernels

TOKENS = 32 * 256 if CUDA else 8 * 64
# Query heads, key heads, head dim, places.
SIZES = {"L": (16, 16, 64, 256), "XXL": (24, 24, 64, 576), "3B": (32, 32, 100, 576), "Janus-7B": (32, 32, 128, 576)}
SIZES = SIZES if CUDA else {"small": (4, 2, 64, 64)}
BATCHES = (1, 16, 64, 256) if CUDA else (2,)


def forward_row(benchmark, record, op, shape, calls, io_bytes, flop=0.0):
    """A row of calls that take nothing."""
    functions = {name: lambda _, call=call: call() for name, call in calls.items()}
    run(benchmark, record, op, shape, "forward", functions, [None], flop, io_bytes)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("width", [1024, 1536, 3200] if CUDA else [128])
@pytest.mark.parametrize("op", ["rms_norm", "residual_rms_norm"])
def test_rms_norm(benchmark, record, op, width, direction):
    x, branch = (randn(TOKENS, width, dtype=STORAGE).requires_grad_() for _ in range(2))
    weight = randn(width).to(STORAGE).requires_grad_()
    leaves = [x, weight] if op == "rms_norm" else [x, branch, weight]

    def by(impl):
        return lambda *a: getattr(kernels, op)(*a, 1e-5, impl=impl)

    def library(*a):
        stream = a[0] if op == "rms_norm" else a[0] + a[1]
        normed = F.rms_norm(stream, (width,), a[-1], 1e-5)
        return normed if op == "rms_norm" else (stream, normed)

    functions = {"ours": by("auto"), "eager": by("reference"), "F.rms_norm": library} | compiled(by("reference"))
    # Large tensors read and written, forward and backward.
    tensors = {"rms_norm": (2, 3), "residual_rms_norm": (4, 4)}[op][direction == "backward"]
    io_bytes = TOKENS * width * x.element_size() * tensors
    run(benchmark, record, op, f"{TOKENS} x {width} {str(STORAGE)[6:]}", direction, functions, leaves, 0.0, io_bytes)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("width", [2816, 4096, 8704] if CUDA else [256])
def test_swiglu(benchmark, record, width, direction):
    leaves = [randn(TOKENS, width, dtype=STORAGE).requires_grad_() for _ in range(2)]

    def by(impl):
        return lambda gate, up: kernels.swiglu(gate, up, impl=impl)

    functions = {"ours": by("auto"), "eager": by("reference"), "as published": lambda gate, up: F.silu(gate) * up}
    functions |= compiled(by("reference"))
    tensors = 3 if direction == "forward" else 5
    io_bytes = TOKENS * width * STORAGE.itemsize * tensors
    run(benchmark, record, "swiglu", f"{TOKENS} x {width}", direction, functions, leaves, 0.0, io_bytes)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("size", SIZES)
def test_split_heads_rotary(benchmark, record, size, direction):
    heads, kv_heads, dim, places = SIZES[size]
    batch = TOKENS // places
    qkv = randn(batch, places, (heads + 2 * kv_heads) * dim, dtype=STORAGE).requires_grad_()
    rotary = randn(places, dim // 2, 2)

    def by(impl):
        return lambda x: kernels.split_heads_rotary(x, rotary, heads, kv_heads, impl=impl)

    functions = {"ours": by("auto"), "eager": by("reference")} | compiled(by("reference"))
    io_bytes = 2 * qkv.numel() * STORAGE.itemsize + rotary.numel() * 4
    shape = f"{size} B{batch} L{places} H{heads}/{kv_heads} D{dim}"
    run(benchmark, record, "split_heads_rotary", shape, direction, functions, [qkv], 0.0, io_bytes)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("size", SIZES)
def test_split_heads_rotary_to_cache(benchmark, record, size, batch):
    heads, kv_heads, dim, places = SIZES[size]
    qkv, rotary = randn(batch, (heads + 2 * kv_heads) * dim, dtype=STORAGE), randn(places, dim // 2, 2)
    caches = [randn(batch, kv_heads, places, dim, dtype=STORAGE) for _ in range(2)]
    position = torch.tensor(places - 1, device=DEVICE)

    def by(impl):
        return lambda: kernels.split_heads_rotary_to_cache(qkv, rotary, position, *caches, heads, impl=impl)

    io_bytes = 2 * qkv.numel() * STORAGE.itemsize + dim * 4
    shape = f"{size} B{batch} H{heads}/{kv_heads} D{dim}"
    calls = {"ours": by("auto"), "eager": by("reference")}
    forward_row(benchmark, record, "split_heads_rotary_to_cache", shape, calls, io_bytes)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("size", SIZES)
def test_decode_attention(benchmark, record, size, batch):
    """Beside SDPA on the places alone, whose number the host must know: no captured step could call it so."""
    heads, kv_heads, dim, places = SIZES[size]
    q = randn(batch, heads, dim, dtype=STORAGE)
    k, v = (randn(batch, kv_heads, places, dim, dtype=STORAGE) for _ in range(2))
    position, scale = torch.tensor(places - 1, device=DEVICE), dim**-0.5

    def by(impl, position=position):
        return lambda: kernels.decode_attention(q, k, v, position, scale, impl=impl)

    def sdpa():
        F.scaled_dot_product_attention(q.unflatten(1, (kv_heads, -1)), k, v, scale=scale)

    calls = {"ours": by("auto"), "eager": by("reference"), "sdpa": sdpa}
    calls["a place a row"] = by("auto", position.repeat(batch))  # as prompts of unequal length need
    calls |= {name: by(name) for name in other_impls("decode_attention") if dim == 64 or name == "sdpa"}
    if CUDA:
        calls |= {f"sdpa {name}": by_backend(sdpa, name) for name in BACKENDS}
    shape = f"{size} B{batch} H{heads}/{kv_heads} D{dim} kv{places}"
    io_bytes = (k.numel() + v.numel() + 2 * q.numel()) * STORAGE.itemsize
    forward_row(benchmark, record, "decode_attention", shape, calls, io_bytes, 4.0 * batch * heads * places * dim)


@pytest.mark.parametrize("queries", [1, 16])
def test_cached_attention_at_a_position(benchmark, record, queries):
    """The op of VAR with its position on the device, beside the same number of keys given by the host."""
    batch, heads, places = (64, 16, 680) if CUDA else (2, 4, 64)
    q = randn(batch, heads, queries, 64, dtype=STORAGE)
    k, v = (randn(batch, heads, places, 64, dtype=STORAGE) for _ in range(2))
    scale, position = torch.full((heads,), 0.125, device=DEVICE), torch.tensor(places - queries, device=DEVICE)
    calls = {
        "ours": lambda: kernels.cached_attention(q, k, v, queries, scale, position=position),
        "by the host": lambda: kernels.cached_attention(q, k, v, places, scale),
        "eager": lambda: kernels.cached_attention(q, k, v, queries, scale, "reference", position),
    }
    io_bytes = (k.numel() + v.numel() + 2 * q.numel()) * STORAGE.itemsize
    shape = f"B{batch} H{heads} q{queries} kv{places}, position"
    forward_row(
        benchmark, record, "cached_attention", shape, calls, io_bytes, 4.0 * batch * heads * queries * places * 64
    )


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("size", SIZES)
def test_causal_attention(benchmark, record, size, direction):
    heads, kv_heads, dim, places = SIZES[size]
    batch = TOKENS // places
    leaves = [randn(batch, n, places, dim, dtype=STORAGE).requires_grad_() for n in (heads, kv_heads, kv_heads)]

    def by(impl):
        return lambda *a: kernels.causal_attention(*a, dim**-0.5, impl=impl)

    functions = {"ours": by("auto"), "eager": by("reference")}
    triton = ("triton", "triton_invariant")  # of a head dim of 64
    others = [name for name in other_impls("causal_attention") if name not in triton or dim == 64]
    functions |= {name: by(name) for name in others if name != "sdpa_invariant"}
    if CUDA:
        functions |= {f"sdpa {name}": by_backend(by("auto"), name) for name in BACKENDS}
    # Two products forward, five backward, of the pairs that the mask keeps.
    flop = (4 if direction == "forward" else 10) * batch * heads * dim * places * (places + 1) / 2
    shape = f"{size} B{batch} L{places} H{heads}/{kv_heads} D{dim}"
    run(benchmark, record, "causal_attention", shape, direction, functions, leaves, flop, 0.0)


@pytest.mark.parametrize("batch", BATCHES)
def test_sample_tokens_at_a_step(benchmark, record, batch):
    """One token an image of 16384."""
    logits, key = randn(batch, 1, 16384) * 4, torch.tensor([0, 0, 0], device=DEVICE)

    def eager():
        logp = logits.log_softmax(dim=-1)
        token = torch.multinomial(logp.exp()[:, 0], 1)
        return token, logp[:, 0].gather(-1, token)

    def by(impl):
        return lambda: kernels.sample_tokens(logits, key, 9, 1.0, impl=impl)

    calls = {"ours": by("auto"), "eager": eager} | {name: by(name) for name in other_impls("sample_tokens")}
    forward_row(benchmark, record, "sample_tokens", f"{batch} x 16384 fp32, a step", calls, batch * (4 * 16384 + 16))
