"""The rollout of a next-token model, token by token, against other loops over the same weights and the bandwidth.

    pytest bench/bench_decode_loop.py --benchmark-only
    VARFAST_BENCH_LARGE=1 pytest bench/bench_decode_loop.py --benchmark-only     on a CPU: LlamaGen-B too, 4 images

    VARFAST_BENCH_LLAMAGEN   a checkout of github.com/FoundationVision/LlamaGen, whose loop is then timed too

On a GPU LlamaGen B, L and XXL at 256 px with 1, 16, 64 and 256 images; on a CPU a small one. Random weights: times do
not depend on their values. Peers draw from the same distribution, without guidance:

- eager: ours without a CUDA graph;
- plain: every op in plain PyTorch in the same dtype, eagerly, tokens drawn by softmax and multinomial;
- torch.compile: one step of plain under torch.compile(mode="reduce-overhead"), which captures it. It compiles for
  minutes: VARFAST_BENCH_PEER_S=300;
- public: generate() of the public code, weights and all in our compute dtype.

A step reads all weights, and of each image the keys and values so far. Bytes and FLOPs: varfast.roofline.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys

import harness
import pytest
import torch
import torch.nn.functional as F
from bench_step import PLAIN, ceilings_of

from varfast import kernels
from varfast.perf.cost import Count
from varfast.perf.devices import compute_dtype
from varfast.policies.llamagen.config import PRESETS, GPTConfig
from varfast.policies.llamagen.policy import LlamaGenPolicy
from varfast.policies.llamagen.transformer import LlamaGen
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig
from varfast.policies.nexttoken.transformer import KVCache

CUDA, DEVICE = harness.CUDA, harness.DEVICE
SIZES = PRESETS | {"tiny": GPTConfig(depth=4, width=256, num_heads=4, vocab_size=1024, side=8)}
RUNS = [("tiny", 16)] + ([("B", 4)] if os.environ.get("VARFAST_BENCH_LARGE") == "1" else [])
if CUDA:
    RUNS = [(name, images) for name in ("B", "L", "XXL") for images in (1, 16, 64, 256)]
DTYPE = compute_dtype("auto", DEVICE)


def plain_decode_attention(q_BHD, k_cache_BGND, v_cache_BGND, position, scale, impl="auto"):
    seen_N = torch.arange(k_cache_BGND.shape[2], device=q_BHD.device) <= position
    q_BH1D = q_BHD.unsqueeze(2)
    out = F.scaled_dot_product_attention(
        q_BH1D, k_cache_BGND, v_cache_BGND, attn_mask=seen_N.view(1, 1, 1, -1), scale=scale, enable_gqa=True
    )
    return out.squeeze(2)


@functools.lru_cache(maxsize=1)  # one model at a time on the device
def policy_of(name):
    tokenizer = TokenizerConfig(vocab_size=SIZES[name].vocab_size, base_channels=32)  # is not timed
    with DEVICE:
        parts = LlamaGen(SIZES[name]).init_weights(0), Tokenizer(tokenizer)
    return LlamaGenPolicy(*parts, DEVICE, DTYPE)


def plain_loop(model, compiles=None):
    """Sample with every op in plain PyTorch: as `generate` of the public code, on a static cache.

    model: a frozen copy, whose weights are in the compute dtype. compiles: arguments of torch.compile for a step.
    """
    cache = None

    def step(tokens_B, place):
        x_BC = model.embed_tokens(tokens_B)
        probabilities_BV = model.step(x_BC, place, cache).softmax(dim=-1)
        return torch.multinomial(probabilities_BV, 1).squeeze(1)

    run = torch.compile(step, fullgraph=True, dynamic=False, **compiles) if compiles else step

    @torch.no_grad()
    def loop(labels_B):
        nonlocal cache
        if cache is None:
            cache = KVCache(model.config, len(labels_B), model.compute_dtype, DEVICE)
            cache.k_SBGMD.zero_()  # PyTorch's attention multiplies what it does not see by 0
            cache.v_SBGMD.zero_()
            for kept in (cache.k_SBGMD, cache.v_SBGMD):
                torch._dynamo.mark_static_address(kept)
        with pytest.MonkeyPatch.context() as patch:
            for op, function in (PLAIN | {"decode_attention": plain_decode_attention}).items():
                patch.setattr(kernels, op, function)
            place = torch.zeros((), dtype=torch.int64, device=DEVICE)
            logits_BV = model.step(model.embed_prompt(labels_B), place, cache)
            drawn = [torch.multinomial(logits_BV.softmax(dim=-1), 1).squeeze(1)]
            for _ in range(1, model.config.num_tokens):
                place = place + 1
                drawn.append(run(drawn[-1], place).clone())
        return torch.stack(drawn, dim=1)

    return loop


def public_loop(model, checkout):
    """generate() of the public code with our weights."""
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    gpt, generate = (importlib.import_module(f"autoregressive.models.{name}") for name in ("gpt", "generate"))
    sizes = model.config
    public = gpt.Transformer(
        gpt.ModelArgs(
            dim=sizes.width, n_layer=sizes.depth, n_head=sizes.num_heads, vocab_size=sizes.vocab_size,
            num_classes=sizes.num_classes, block_size=sizes.num_tokens, cls_token_num=1, model_type="c2i",
        )
    )  # fmt: skip
    public.load_state_dict(model.state_dict())
    public = public.to(DEVICE, model.compute_dtype).eval()
    return lambda labels_B: generate.generate(public, labels_B, sizes.num_tokens, temperature=1.0, top_k=0, top_p=1.0)


@pytest.mark.parametrize(("name", "images"), RUNS)
def test_rollout(benchmark, record, name, images):
    ours = policy_of(name)
    model, labels_B = ours.transformer, torch.arange(images, device=DEVICE)
    eager = LlamaGenPolicy(model, ours.tokenizer, DEVICE, DTYPE, fast=False)
    calls = {"ours": lambda: ours.sample(labels_B, seed=0)}
    frozen = model.frozen_copy()
    positions = model.positions(DEVICE)
    frozen.positions = lambda device: positions  # torch.compile does not follow how the table is made
    loops = {"plain": plain_loop(frozen)}
    if CUDA:
        calls["eager"] = lambda: eager.sample(labels_B, seed=0)
        loops["torch.compile"] = plain_loop(frozen, {"mode": "reduce-overhead"})
    if "VARFAST_BENCH_LLAMAGEN" in os.environ:
        made = []  # where the harness leaves out what cannot be made

        def public(labels_B):
            if not made:
                made.append(public_loop(model, os.environ["VARFAST_BENCH_LLAMAGEN"]))
            return made[0](labels_B)

        loops["public"] = public
    calls |= {who: functools.partial(loop, labels_B) for who, loop in loops.items()}
    cost = ours.cost(DTYPE)
    count = cost.rollout * images + Count(0.0, cost.weights.read_bytes * cost.rollout_passes)
    shape = f"{name}, {images} images of {cost.num_tokens} tokens"
    row = harness.Row("next-token rollout", shape, "forward", 0.0)
    row.flop, row.io_bytes, row.model, row.images = count.flop, count.io_bytes, f"llamagen-{name}", images
    row.notes.append(
        f"{cost.num_tokens} steps in {DTYPE}: {cost.weights.read_bytes / 1e9:.3g} GB of weights each; "
        f"{(count.io_bytes / cost.rollout_passes - cost.weights.read_bytes) / 1e9:.3g} GB of cache and activations"
    )
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):  # the second call captures, the third replays
            calls["ours"]()
        row.peak_bytes = torch.cuda.max_memory_allocated()
    harness.measure(benchmark, record, row, calls, ceilings_of(getattr(torch, DTYPE)))
    if row.ms:
        tokens_per_s = images * cost.num_tokens / row.ms * 1e3
        print(f"    {tokens_per_s:.0f} tokens/s, {row.io_bytes / row.ms / 1e9:.3g} TB/s", flush=True)
        benchmark.extra_info |= {"tokens_per_s": round(tokens_per_s)}
