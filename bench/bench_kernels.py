"""Every op against its peers and its ceiling.

    pytest bench/bench_kernels.py --benchmark-only

On a GPU at the shapes of d16 and d30, on a CPU at small ones. `auto` is timed; peers are eager PyTorch (the reference),
torch.compile of it, SDPA by each of its backends, FlexAttention as it is and autotuned, and Liger if it is installed.
A peer that does not run here is left out and named in the row's notes. Bytes and FLOPs are what the op needs at least:
each input read once, each output written once; only the pairs that the mask keeps.
"""

from __future__ import annotations

import functools
import importlib.util

import harness
import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from varfast import kernels
from varfast.kernels import attention
from varfast.kernels.selection import OPS
from varfast.models import VARConfig

CUDA, DEVICE = harness.CUDA, harness.DEVICE
STORAGE = torch.bfloat16 if CUDA else torch.float32
SCALES = VARConfig() if CUDA else VARConfig(patch_nums=(1, 2, 3, 4, 5, 6))
PAIRS = sum(side * side * end for side, end in zip(SCALES.patch_nums, SCALES.scale_ends, strict=True))


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def other_impls(op: str) -> list[str]:
    """Implementations that can run here, but for the one that auto picks and for the reference."""
    choice = kernels.selection.choose(op, DEVICE)
    runs = [i.name for i in OPS[op] if i.cannot(DEVICE) is None]
    return [name for name in runs if name not in (choice.impl, "reference")]


def forward_of(function, leaves):
    def forward():
        with torch.no_grad():
            function(*leaves)

    return forward


def backward_of(function, leaves):
    """The backward pass alone of a function of leaves that need gradients; forward runs once, at the first call."""

    @functools.cache
    def forward():
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = tuple(o for o in outputs if o.requires_grad)
        return outputs, [torch.randn_like(o) for o in outputs]

    def backward():
        outputs, upstream = forward()
        torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)

    return backward


def compiled(function):
    """The peer torch.compile, for these shapes alone: a recompile would be dynamic, and the ninth would run eagerly."""
    if not CUDA:
        return {}
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # the backward pass is timed with retain_graph
    return {"torch.compile": torch.compile(function, dynamic=False)}


def run(benchmark, record, op, shape, direction, functions, leaves, flop, io_bytes):
    of = forward_of if direction == "forward" else backward_of
    calls = {name: of(function, leaves) for name, function in functions.items()}
    row = harness.Row(op, shape, direction, 0.0, flop=flop, io_bytes=io_bytes)
    harness.measure(benchmark, record, row, calls)


# (rows, features, channels, GELU): of the update of 64 images, and of a rollout's first and last scale at 128.
PRODUCTS = [(300, 256, 64, False), (300, 256, 64, True)]
if CUDA:
    PRODUCTS = [(43520, 3072, 1024, False), (43520, 4096, 1024, True), (43520, 1024, 4096, False),
                (43520, 5760, 1920, False), (43520, 7680, 1920, True), (43520, 1920, 7680, False),
                (128, 3072, 1024, False), (32768, 3072, 1024, False)]  # fmt: skip


@pytest.mark.parametrize(("rows", "features", "channels", "gelu"), PRODUCTS)
def test_invariant_linear(benchmark, record, rows, features, channels, gelu):
    """The product of strict mode beside the library's, which adds in another order for other numbers of rows."""
    x, weight, bias = randn(rows, channels).to(STORAGE), randn(features, channels).to(STORAGE), randn(features)
    in_dtype = bias.to(STORAGE)

    def by_library(x, weight):
        out = F.linear(x, weight, in_dtype)
        return F.gelu(out, approximate="tanh") if gelu else out

    functions = {"ours": lambda x, weight: kernels.invariant_linear(x, weight, in_dtype, gelu), "library": by_library}
    if gelu:  # on a GPU: GELU in the epilogue of cuBLASLt
        functions["_addmm_activation"] = lambda x, w: torch._addmm_activation(in_dtype, x, w.T, use_gelu=True)
    shape = f"{rows} x {channels} -> {features}{', GELU' if gelu else ''}"
    io_bytes = x.element_size() * (rows * (channels + features) + features * (channels + 1))
    flop = 2.0 * rows * features * channels
    run(benchmark, record, "invariant_linear", shape, "forward", functions, [x, weight], flop, io_bytes)


@pytest.mark.parametrize(
    ("batch", "vocab"), [(16, 4096), (64, 4096), (512, 4096), (64, 16384)] if CUDA else [(2, 4096)]
)
def test_sample_tokens(benchmark, record, batch, vocab):
    side = 16
    logits = randn(batch, side * side, vocab) * 4
    key = torch.tensor([0, 0, 0], device=DEVICE)
    given = torch.zeros(batch, side * side, dtype=torch.int64, device=DEVICE)

    def eager(x):
        logp = (x / 0.7).log_softmax(dim=-1)
        token = torch.multinomial(logp.exp().flatten(0, 1), 1).view(x.shape[:2])
        return token, logp.gather(-1, token.unsqueeze(-1)), -(logp.exp() * logp).sum(dim=-1)

    calls = {
        "ours": lambda: kernels.sample_tokens(logits, key, 9, 0.7),
        # Max, exponential and sums of the same rows: what is left of ours is the counts and the draw.
        "log-prob alone": lambda: kernels.selective_log_softmax(logits, given, 0.7),
        "eager": lambda: eager(logits),
    }
    if CUDA:
        calls["segments"] = lambda: kernels.sample_tokens(logits, key, 9, 0.7, impl="triton_segments")
    calls |= {name: lambda f=f: f(logits) for name, f in compiled(eager).items()}
    tokens = batch * side * side  # read 4 V, write 8 + 4 + 4
    row = harness.Row("sample_tokens", f"{tokens} x {vocab} fp32", "forward", 0.0, io_bytes=tokens * (4 * vocab + 16))
    harness.measure(benchmark, record, row, calls)


def by_liger(batch, length, tokens, direction):
    """Its log-probabilities, which skip the last position of a sequence and have no gradient of their own; the gradient
    is that of its whole loss of logits, of which the loss itself is a small part."""
    from liger_kernel.ops.grpo_loss import GrpoLossFunction, fused_selective_log_softmax

    logits = randn(batch, length + 1, 4096) * 4
    if direction == "forward":
        return lambda x: fused_selective_log_softmax(logits, tokens, 0.7)
    advantages = randn(batch)

    class LossOfItsOwnLogits(torch.autograd.Function):
        """So that it is timed as the others are: gradient of x asked for, that of its own logits computed."""

        @staticmethod
        def forward(ctx, x):
            ctx.shape = x.shape
            with torch.enable_grad():
                ctx.logits = logits.detach().requires_grad_()
                ctx.loss = GrpoLossFunction.apply(
                    ctx.logits, None, None, tokens, advantages, None, 0.7, 0.0, 0.2, 0.2, False
                )[0]
            return ctx.loss.detach().clone()

        @staticmethod
        def backward(ctx, upstream):
            (gradient,) = torch.autograd.grad(ctx.loss, ctx.logits, upstream, retain_graph=True)
            return gradient[:, :-1]

    return LossOfItsOwnLogits.apply


@pytest.mark.parametrize("direction", ["forward", "backward", "backward with entropy"])
def test_selective_log_softmax(benchmark, record, direction):
    """By gradients of logp alone, or of logp and entropy: the same arrays are read and written."""
    batch, length = (64, 680) if CUDA else (2, 91)
    logits = (randn(batch, length, 4096) * 4).requires_grad_()
    tokens = torch.randint(4096, (batch, length), device=DEVICE)
    outputs = 2 if direction == "backward with entropy" else 1

    def by(impl):
        return lambda x: kernels.selective_log_softmax(x, tokens, 0.7, impl=impl)[:outputs]

    def library(x):
        logp = (x / 0.7).log_softmax(-1)
        return (logp.gather(-1, tokens[..., None])[..., 0], -(logp.exp() * logp).sum(-1))[:outputs]

    functions = {"ours": by("auto"), "eager": by("reference")} | compiled(library)
    if CUDA and outputs == 1 and importlib.util.find_spec("liger_kernel"):
        functions["liger"] = by_liger(batch, length, tokens, direction)
    passes = 1 if direction == "forward" else 2
    args = ("selective_log_softmax", f"{batch * length} x 4096 fp32", direction, functions, [logits])
    run(benchmark, record, *args, 0.0, batch * length * 4096 * 4 * passes)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("heads", [16, 30] if CUDA else [2])
def test_split_heads(benchmark, record, heads, direction):
    batch, length = (64, 680) if CUDA else (32, 30)
    qkv = randn(batch, length, 3 * heads * 64, dtype=STORAGE).requires_grad_()
    bias = randn(3 * heads * 64).requires_grad_()

    def by(impl):  # contiguous, as attention's kernels read them best
        return lambda x, bias: tuple(y.contiguous() for y in kernels.split_heads(x, heads, True, bias, impl=impl))

    functions = {"ours": by("auto"), "eager": by("reference")} | compiled(by("reference"))
    # Forward reads and writes q, k, v; backward reads their gradients and q, k, and writes three again.
    tensors = 6 if direction == "forward" else 8
    io_bytes = batch * heads * length * 64 * qkv.element_size() * tensors
    shape = f"{batch * length} x {3 * heads * 64} {str(STORAGE)[6:]}"
    run(benchmark, record, "split_heads", shape, direction, functions, [qkv, bias], 0.0, io_bytes)


BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")


def by_backend(function, name):
    """SDPA held to one backend; one that does not take these inputs raises, and is left out."""

    def call(*arguments):
        with sdpa_kernel(getattr(SDPBackend, name)):
            return function(*arguments)

    return call


def tuned_flex(ends, scale):
    """FlexAttention with block shapes, warps and stages of both directions autotuned."""
    tuned = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")

    def call(q, k, v):
        q = q * scale.to(q.dtype)[:, None, None]
        return tuned(q, k, v, block_mask=attention._flex_mask(ends, q.device), scale=1.0)

    return call


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("heads", [16, 30] if CUDA else [2])
def test_block_causal_attention(benchmark, record, heads, direction):
    batch, ends = (64 if CUDA else 2), SCALES.scale_ends
    q, k, v = (randn(batch, heads, ends[-1], 64, dtype=STORAGE).requires_grad_() for _ in range(3))
    scale = torch.full((heads,), 0.125, device=DEVICE)

    def by(impl):
        return lambda q, k, v: kernels.block_causal_attention(q, k, v, ends, scale, impl=impl)

    functions = {"ours": by("auto"), "eager": by("reference")}
    functions |= {name: by(name) for name in other_impls("block_causal_attention")}
    if CUDA:
        functions |= {f"sdpa {name}, dense mask": by_backend(by("reference"), name) for name in BACKENDS}
        if heads == 16:  # its autotuning takes a minute
            functions["flex, tuned"] = tuned_flex(ends, scale)
    # Two products forward, five backward, of the pairs that the mask keeps.
    flop = (4 if direction == "forward" else 10) * batch * heads * PAIRS * 64
    shape = f"B{batch} H{heads} L{ends[-1]} D64"
    args = ("block_causal_attention", shape, direction, functions, [q, k, v])
    run(benchmark, record, *args, flop, 0.0)


@pytest.mark.parametrize("scale", range(len(SCALES.patch_nums)))
def test_cached_attention(benchmark, record, scale):
    batch, heads = (64, 16) if CUDA else (2, 2)
    tokens, end = SCALES.patch_nums[scale] ** 2, SCALES.scale_ends[scale]
    q = randn(batch, heads, tokens, 64, dtype=STORAGE)
    k, v = (randn(batch, heads, SCALES.num_tokens, 64, dtype=STORAGE) for _ in range(2))
    logit_scale = torch.full((heads,), 0.125, device=DEVICE)

    def by(impl):
        return lambda: kernels.cached_attention(q, k, v, end, logit_scale, impl=impl)

    calls = {"ours": by("auto"), "eager": by("reference")}
    calls |= {name: by(name) for name in other_impls("cached_attention")}
    if CUDA:
        calls |= {f"sdpa {name}": by_backend(by("reference"), name) for name in BACKENDS}
    io_bytes = q.element_size() * batch * heads * 64 * (2 * tokens + 2 * end)
    row = harness.Row(
        "cached_attention", f"B{batch} H{heads} q{tokens} kv{end}", "forward", 0.0,
        flop=4 * batch * heads * tokens * end * 64, io_bytes=io_bytes,
    )  # fmt: skip
    harness.measure(benchmark, record, row, calls)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("width", [1024, 1920] if CUDA else [128])
@pytest.mark.parametrize("op", ["layer_norm_modulate", "gated_residual", "gated_residual_norm"])
def test_adaln(benchmark, record, op, width, direction):
    batch, length = (64, 680) if CUDA else (8, 91)
    x, branch = (randn(batch, length, width, dtype=STORAGE).requires_grad_() for _ in range(2))
    gate, scale, shift = (randn(batch, width, dtype=STORAGE).requires_grad_() for _ in range(3))
    bias = randn(width).requires_grad_()
    leaves = {
        "layer_norm_modulate": [x, scale, shift],
        "gated_residual": [x, branch, gate, bias],
        "gated_residual_norm": [x, branch, gate, scale, shift, bias],
    }[op]

    def by(impl):
        if op == "gated_residual_norm":
            return lambda *a: kernels.gated_residual_norm(*a[:-1], bias_C=a[-1], impl=impl)
        return lambda *a: getattr(kernels, op)(*a, impl=impl)

    functions = {"ours": by("auto"), "eager": by("reference")} | compiled(by("reference"))
    # Large tensors read and written, forward and backward.
    tensors = {"layer_norm_modulate": (2, 3), "gated_residual": (3, 4), "gated_residual_norm": (4, 6)}[op]
    io_bytes = batch * length * width * x.element_size() * tensors[direction == "backward"]
    args = (op, f"{batch * length} x {width} {str(STORAGE)[6:]}", direction, functions, leaves)
    run(benchmark, record, *args, 0.0, io_bytes)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("width", [4096, 7680] if CUDA else [512])
def test_gelu_bias(benchmark, record, width, direction):
    rows = 32 * 680 if CUDA else 8 * 91
    x, bias = randn(rows, width, dtype=STORAGE).requires_grad_(), randn(width).requires_grad_()

    def by(impl):
        return lambda x, bias: kernels.gelu_bias(x, bias, impl=impl)

    functions = {"ours": by("auto"), "eager": by("reference")} | compiled(by("reference"))
    # Forward reads and writes one tensor; backward reads two and writes one, and sums the bias's gradient on the way.
    io_bytes = rows * width * x.element_size() * (2 if direction == "forward" else 3)
    shape = f"{rows} x {width} {str(STORAGE)[6:]}"
    run(benchmark, record, "gelu_bias", shape, direction, functions, [x, bias], 0.0, io_bytes)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("width", [1024, 1920] if CUDA else [128])
def test_linear_gelu(benchmark, record, width, direction):
    """Beside cuBLASLt's epilogue (forward alone) and quack-kernels."""
    rows = 32 * 680 if CUDA else 8 * 91
    x, weight = randn(rows, width, dtype=STORAGE), randn(4 * width, width) / width**0.5
    bias, low = randn(4 * width), weight.to(STORAGE)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def by(impl):
        return lambda x, weight, bias: kernels.linear_gelu(x, weight, bias, low, impl=impl)

    functions = {"ours": by("auto"), "eager": by("reference")}
    functions |= {
        name: by(name) for name in other_impls("linear_gelu") if (name, direction) != ("epilogue", "backward")
    }
    flop = 2 * rows * width * 4 * width * (1 if direction == "forward" else 2)
    shape = f"{rows} x {width} -> {4 * width} {str(STORAGE)[6:]}"
    run(benchmark, record, "linear_gelu", shape, direction, functions, leaves, flop, 0.0)


@pytest.mark.parametrize(("channels", "side"), [(160, 256), (320, 64), (640, 16)] if CUDA else [(160, 64)])
def test_group_norm_silu(benchmark, record, channels, side):
    batch = 64 if CUDA else 2
    x = randn(batch, channels, side, side, dtype=STORAGE).contiguous(memory_format=torch.channels_last)
    weight, bias, input_bias = randn(3, channels)

    def eager(x, weight, bias, input_bias):
        x = x + input_bias.to(x.dtype)[:, None, None]  # which a convolution with a bias does on a GPU
        return F.silu(F.group_norm(x, 32, weight.to(x.dtype), bias.to(x.dtype), 1e-6))

    def ours(x, weight, bias, input_bias):
        return kernels.group_norm_silu(x, weight, bias, 32, input_bias_C=input_bias)

    functions = {"ours": ours, "eager": eager} | compiled(eager)
    # Read once, written once; the statistics need a second read where the image does not stay in the L2 cache.
    shape = f"B{batch} C{channels} {side}x{side} {str(STORAGE)[6:]}"
    leaves = [x, weight, bias, input_bias]
    run(benchmark, record, "group_norm_silu", shape, "forward", functions, leaves, 0.0, 2 * x.nbytes)


@pytest.mark.parametrize(
    ("channels", "out_channels", "side"),
    [(160, 160, 256), (320, 160, 128), (320, 320, 64)] if CUDA else [(32, 32, 128)],
)
def test_conv3x3(benchmark, record, channels, out_channels, side):
    """With the sum and the statistics of what comes after; "convolution" is cuDNN's alone."""
    batch = 64 if CUDA else 2
    x = randn(batch, channels, side, side, dtype=STORAGE).contiguous(memory_format=torch.channels_last)
    residual = randn(batch, out_channels, side, side, dtype=STORAGE).contiguous(memory_format=torch.channels_last)
    weight = randn(out_channels, channels, 3, 3, dtype=STORAGE).contiguous(memory_format=torch.channels_last)

    def by(impl):
        return lambda: kernels.conv3x3(x, weight, residual, impl=impl)

    calls = {"ours": by("auto")} | {name: by(name) for name in other_impls("conv3x3")}
    calls |= {"convolution": lambda: F.conv2d(x, weight, padding=1)}
    flop = 2.0 * 9 * channels * out_channels * batch * side * side
    row = harness.Row(
        "conv3x3", f"B{batch} {channels} to {out_channels}, {side}x{side} {str(STORAGE)[6:]}", "forward", 0.0,
        flop=flop, io_bytes=x.nbytes + 2 * residual.nbytes,
    )  # fmt: skip
    harness.measure(benchmark, record, row, {name: torch.no_grad()(call) for name, call in calls.items()})


@pytest.mark.parametrize(("channels", "side"), [(160, 256), (640, 16)] if CUDA else [(160, 64)])
def test_channel_moments(benchmark, record, channels, side):
    batch = 64 if CUDA else 2
    x, residual = (
        randn(batch, channels, side, side, dtype=STORAGE).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    calls = {"ours": lambda: kernels.channel_moments(x, residual), "the sum alone": lambda: x.add_(residual)}
    # Two images are read, one is written.
    shape = f"B{batch} C{channels} {side}x{side} {str(STORAGE)[6:]}"
    row = harness.Row("channel_moments", shape, "forward", 0.0, io_bytes=3 * x.nbytes)
    harness.measure(benchmark, record, row, calls)


@pytest.mark.parametrize("heads", [16, 30] if CUDA else [2])
def test_adamw_step(benchmark, record, heads):
    """Of all matrices of four blocks, with their 16-bit copies. The rest of a model, biases and norms, is under 1 %."""
    width = 64 * heads
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width), (6 * width, width)] * 4

    def lists(**how):
        return [torch.zeros(shape, device=DEVICE, **how) for shape in shapes]

    copies = lists(dtype=torch.bfloat16)
    steps = [torch.zeros((), device=DEVICE) for _ in shapes]
    gradients = [randn(*shape) for shape in shapes]
    tensors = kernels.AdamWTensors(lists(), gradients, lists(), lists(), steps, [0.0] * len(shapes), copies)
    one, zero = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    numbers = sum(x.numel() for x in copies)

    def by(impl):
        return lambda: kernels.adamw_step(tensors, 1e-5, (0.9, 0.999), 1e-8, one, zero, impl=impl)

    calls = {"ours": by("auto")} | {name: by(name) for name in other_impls("adamw_step")}
    # Weight, gradient and two moments read, weight and moments written: 4 bytes each; the copy written: 2.
    row = harness.Row("adamw_step", f"{numbers / 1e6:.0f} M numbers", "both", 0.0, io_bytes=30 * numbers)
    harness.measure(benchmark, record, row, calls)


@pytest.mark.parametrize(("per_token", "ratio"), [(False, "token"), (True, "token"), (False, "sequence")])
def test_grpo_token_loss(benchmark, record, per_token, ratio):
    batch, length = 512, 680
    logp = randn(batch, length).requires_grad_()
    old, ref = (logp.detach() + 0.1 * randn(batch, length) for _ in range(2))
    advantages = randn(batch, length) if per_token else randn(batch)

    def by(function):
        def both():
            loss = function(logp, old, ref, advantages)
            return torch.autograd.grad(loss, logp)

        return both

    def eager(*a):
        return kernels.grpo_token_loss(*a, 0.2, 0.2, ratio=ratio, impl="reference")[0]

    calls = {"ours": by(lambda *a: kernels.grpo_token_loss(*a, 0.2, 0.2, ratio=ratio)[0]), "eager": by(eager)}
    calls |= {name: by(f) for name, f in compiled(eager).items()}
    # Forward reads three numbers a token, and its advantage where each has its own; backward writes one. A ratio an
    # image needs two of the three before: they fit into the L2 cache, but by count they are read again.
    shape = f"{batch * length} tokens{', an advantage each' if per_token else ''}"
    shape += ", a ratio an image" if ratio == "sequence" else ""
    numbers = 4 + per_token + 2 * (ratio == "sequence")
    row = harness.Row("grpo_token_loss", shape, "both", 0.0, io_bytes=batch * length * 4 * numbers)
    harness.measure(benchmark, record, row, calls)


@pytest.mark.parametrize("batch", [64, 512])
def test_dpo_loss(benchmark, record, batch):
    """Of Janus-Pro's 576 tokens. Two launches are most of its time; the eager peer makes about thirty, both ways."""
    length = 576
    logp = randn(batch, length).requires_grad_()
    ref = logp.detach() + 0.1 * randn(batch, length)

    def by(function):
        return lambda: torch.autograd.grad(function(logp, ref), logp)

    def eager(*a):
        return kernels.dpo_loss(*a, beta=0.1, impl="reference")[0]

    calls = {"ours": by(lambda *a: kernels.dpo_loss(*a, beta=0.1)[0]), "eager": by(eager)}
    calls |= {name: by(f) for name, f in compiled(eager).items()}
    # Two numbers a token are read; the gradient is one number an image.
    row = harness.Row("dpo_loss", f"{batch * length} tokens", "both", 0.0, io_bytes=batch * (8 * length + 4))
    harness.measure(benchmark, record, row, calls)
