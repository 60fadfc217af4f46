"""Measure block shapes, warps and stages of every Triton kernel, offline: winners are pinned in kernels/settings.py.

    python bench/tune.py [--seconds 400] [--out tune.json] [--kernel attention_forward ...]

Every candidate is compared with the reference in float64 first (each_kernel.py: at most twice PyTorch's error), in
processes side by side, which fill Triton's cache too; then those that pass are timed in turns at the shapes of d16 and
d30, with a cold cache. Prints a table a kernel, best first, the pinned one marked, and what to write into PINNED, where
the gain is larger than the spread of the two.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import each_kernel
import harness
import torch

from varfast import kernels
from varfast.kernels import settings
from varfast.policies.var.config import VARConfig

Setting = dict[str, int]


@dataclass(frozen=True)
class Target:
    """A kernel at a size.

    Attributes:
        kernel, size: as kernels/settings.py knows them.
        case: of each_kernel.py, for the check.
        candidates: settings beside the pinned one.
        prepare: makes inputs at full size and returns the call that is timed.
        sizes: keywords of each_kernel.cases.
    """

    kernel: str
    size: Hashable
    case: str
    candidates: list[Setting]
    prepare: Callable[[], Callable[[], object]]
    sizes: dict[str, int]

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.size}"


@dataclass
class Found:
    """A candidate: whether it is right, and how long it takes."""

    setting: Setting
    pinned: bool = False
    wrong: str = ""
    ms: float = 0.0
    spread: float = 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Candidates


def product(**choices: tuple[int, ...]) -> list[Setting]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def tiles(*quadruples: tuple[int, int, int, int]) -> list[Setting]:
    """(BLOCK_M, BLOCK_N, num_warps, num_stages)"""
    return [dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), q, strict=True)) for q in quadruples]


FORWARD = tiles(
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 4, 4),
    (128, 128, 8, 2), (128, 128, 8, 3), (128, 32, 8, 3), (128, 32, 4, 4), (64, 64, 4, 2), (64, 64, 4, 3),
    (64, 64, 4, 4), (64, 128, 4, 2), (64, 128, 4, 3), (64, 32, 4, 4),
)  # fmt: skip
DQ = tiles(
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 4, 3), (64, 128, 4, 2),
    (64, 128, 8, 2), (128, 32, 8, 3), (128, 128, 8, 2),
)  # fmt: skip
# Of 128 queries at a time every shape spills (triton 3.6).
DKV = tiles(
    (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2), (32, 64, 4, 3), (32, 128, 8, 2), (32, 128, 8, 3),
    (64, 128, 8, 2), (64, 128, 8, 3),
)  # fmt: skip
# 8 warps fill a multiprocessor; 64 x 64 on 4 warps and 64 x 128 of another number of stages spill (triton 3.6).
FUSED = tiles((64, 128, 8, 2), (64, 64, 8, 2), (32, 128, 8, 2), (32, 128, 8, 3), (32, 64, 4, 2), (32, 64, 4, 3))
CACHED = {
    16: tiles((16, 32, 1, 2), (16, 64, 1, 2), (16, 128, 2, 2), (16, 128, 4, 2)),
    64: tiles((64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 64, 8, 3)),
    128: tiles((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
}


# 256 pixels, or 128 on 4 warps, spill (triton 3.6).
CONVOLUTION = [
    dict(zip(("BLOCK_M", "BLOCK_K", "num_warps", "num_stages"), four, strict=True))
    for four in ((128, 32, 8, 3), (128, 32, 8, 4), (128, 32, 8, 5), (128, 64, 8, 3), (128, 64, 8, 4), (64, 32, 4, 4))
]
PRODUCT = [
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": group, "num_warps": warps, "num_stages": stages}
    for m, n, k, warps, stages in (
        (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4), (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 3), (128, 128, 64, 4, 4), (128, 256, 32, 8, 4),
    )
    for group in (4, 8, 16)
]  # fmt: skip


def group_norm_tiles(channels: int) -> list[Setting]:
    widths = [w for w in (16, 32, 64, 128, 256) if channels % w == 0]
    shapes = [{"ROWS": numbers // w, "TILE": w} for w in widths for numbers in (4096, 8192)]
    return [shape | {"num_warps": warps} for shape in shapes for warps in (4, 8)]


# ---------------------------------------------------------------------------------------------------------------------
# What is timed, at the shapes of bench_kernels.py


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, device=harness.DEVICE).to(dtype).requires_grad_(grad)


def timed(function: Callable[[], Any], leaves: list[torch.Tensor], backward: bool) -> Callable[[], object]:
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                function()

        return forward
    outputs = function()
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
    upstream = [torch.randn_like(y) for y in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)


def sampling(impl: str, vocab: int, **inference: Any) -> Callable[[], object]:
    logits = randn(2**21 // vocab, 256, vocab, dtype=torch.float32)
    key = torch.tensor([0, 0, 0], device=harness.DEVICE)
    return lambda: kernels.sample_tokens(logits, key, 9, 0.7, impl=impl, **inference)


def log_softmax(backward: bool) -> Callable[[], object]:
    logits = randn(64, 680, 4096, dtype=torch.float32, grad=True)
    tokens = torch.randint(4096, (64, 680), device=harness.DEVICE)
    return timed(lambda: kernels.selective_log_softmax(logits, tokens, 0.7)[0], [logits], backward)


def split_heads(heads: int, backward: bool) -> Callable[[], object]:
    leaves = [randn(64, 680, 192 * heads, grad=True), randn(192 * heads, dtype=torch.float32, grad=True)]
    return timed(lambda: kernels.split_heads(leaves[0], heads, True, leaves[1]), leaves, backward)


def adaln(width: int, backward: bool) -> Callable[[], object]:
    leaves = [randn(64, 680, width, grad=True) for _ in range(2)] + [randn(64, width, grad=True) for _ in range(3)]
    bias = randn(width, dtype=torch.float32, grad=True)
    return timed(lambda: kernels.gated_residual_norm(*leaves, bias_C=bias), [*leaves, bias], backward)


def gelu(width: int, backward: bool) -> Callable[[], object]:
    leaves = [randn(21760, width, grad=True), randn(width, dtype=torch.float32, grad=True)]
    return timed(lambda: kernels.gelu_bias(*leaves), leaves, backward)


def group_norm(channels: int) -> Callable[[], object]:
    side = {160: 256, 320: 64, 640: 16}[channels]
    x = randn(64, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight, bias, input_bias = (randn(channels, dtype=torch.float32) for _ in range(3))
    return lambda: kernels.group_norm_silu(x, weight, bias, 32, input_bias_C=input_bias)


def convolution(channels: int, out_channels: int) -> Callable[[], object]:
    side = 256 if channels == out_channels == 160 else 128 if out_channels == 160 else 64
    x, residual = (
        randn(64, c, side, side).contiguous(memory_format=torch.channels_last) for c in (channels, out_channels)
    )
    weight = randn(out_channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    return lambda: kernels.conv3x3(x, weight, residual, impl="triton")


def adamw() -> Callable[[], object]:
    shapes = [(12288, 1024), (4096, 1024)] * 4
    lists = [[torch.zeros(s, device=harness.DEVICE) for s in shapes] for _ in range(4)]
    copies = [torch.zeros(s, device=harness.DEVICE, dtype=torch.bfloat16) for s in shapes]
    steps = [torch.zeros((), device=harness.DEVICE) for _ in shapes]
    tensors = kernels.AdamWTensors(*lists, steps, [0.0] * len(shapes), copies)
    one, zero = torch.ones((), device=harness.DEVICE), torch.zeros((), device=harness.DEVICE)
    return lambda: kernels.adamw_step(tensors, 1e-5, (0.9, 0.999), 1e-8, one, zero, impl="triton")


def linear(features: int, channels: int, gelu: bool) -> Callable[[], object]:
    x, weight, bias = randn(64 * 680, channels), randn(features, channels), randn(features)
    return lambda: kernels.invariant_linear(x, weight, bias, gelu)


def attention(backward: bool, impl: str = "auto") -> Callable[[], object]:
    leaves = [randn(64, 16, 680, 64, grad=True) for _ in range(3)]
    scale, ends = torch.full((16,), 0.125, device=harness.DEVICE), VARConfig().scale_ends
    return timed(lambda: kernels.block_causal_attention(*leaves, ends, scale, impl), leaves, backward)


def cached_attention(tokens: int, num_keys: int) -> Callable[[], object]:
    q, k, v = randn(64, 16, tokens, 64), randn(64, 16, 680, 64), randn(64, 16, 680, 64)
    scale = torch.full((16,), 0.125, device=harness.DEVICE)
    return lambda: kernels.cached_attention(q, k, v, num_keys, scale)


def rms_norm(width: int, backward: bool) -> Callable[[], object]:
    leaves = [randn(8192, width, grad=True), randn(8192, width, grad=True), randn(width, grad=True)]
    return timed(lambda: kernels.residual_rms_norm(*leaves, 1e-5), leaves, backward)


def swiglu(width: int, backward: bool) -> Callable[[], object]:
    leaves = [randn(8192, width, grad=True) for _ in range(2)]
    return timed(lambda: kernels.swiglu(*leaves), leaves, backward)


def rotary(dim: int) -> Callable[[], object]:
    qkv, table = randn(32, 256, 48 * dim), randn(256, dim // 2, 2, dtype=torch.float32)
    return lambda: kernels.split_heads_rotary(qkv, table, 16, 16)


def decoding(dim: int, batch: int, attend: bool) -> Callable[[], object]:
    """The last of 576 tokens of LlamaGen-XXL, or of as many heads of another dim."""
    q, qkv, table = randn(batch, 24, dim), randn(batch, 72 * dim), randn(576, dim // 2, 2, dtype=torch.float32)
    caches = [randn(batch, 24, 576, dim) for _ in range(2)]
    position = torch.tensor(575, device=harness.DEVICE)
    if attend:
        return lambda: kernels.decode_attention(q, *caches, position, dim**-0.5)
    return lambda: kernels.split_heads_rotary_to_cache(qkv, table, position, *caches, 24)


def next_token_targets() -> list[Target]:
    """The ops of next-token models."""
    found = []
    backward_rows = [
        {"TILE": tile, "ROWS": 16 * tile, "num_warps": warps, "STAGES": stages}
        for tile, warps, stages in itertools.product((1, 2, 4), (4, 8, 16), (1, 2, 3))
    ]
    rows_of = {"forward": product(num_warps=(1, 2, 4, 8)), "backward": backward_rows}
    tiles_of = product(ROWS=(4, 8, 16), COLUMNS=(256, 512), num_warps=(4, 8))
    for way, candidates in rows_of.items():
        back = way == "backward"
        prepare = functools.partial(swiglu, 2816, back)
        found.append(Target(f"swiglu_{way}", 2816, "swiglu", tiles_of, prepare, {"width": 2816}))
        for width in (1024, 1536, 3200):
            prepare = functools.partial(rms_norm, width, back)
            found.append(Target(f"rms_norm_{way}", width, "residual_rms_norm", candidates, prepare, {"width": width}))
    for dim in (64, 100, 128):
        for kernel, size, candidates, prepare in (
            ("split_heads_rotary", dim, product(TOKENS=(4, 8, 16), num_warps=(4, 8)), functools.partial(rotary, dim)),
            ("split_heads_rotary_to_cache", dim, product(TOKENS=(1, 2, 4, 8), num_warps=(1, 2, 4)),
             functools.partial(decoding, dim, 64, False)),
            ("decode_attention", (16, dim), product(BLOCK_N=(32, 64, 128), num_warps=(1, 2, 4), num_stages=(2, 3, 4)),
             functools.partial(decoding, dim, 64, True)),
        ):  # fmt: skip
            found.append(Target(kernel, size, kernel, candidates, prepare, {"head_dim": dim}))
    return found


def targets() -> list[Target]:
    """By what they may gain."""
    found = [
        *next_token_targets(),
        Target("attention_forward", 16, "block_causal_attention", FORWARD, lambda: attention(False), {}),
        Target("attention_dkv", 16, "block_causal_attention", DKV, lambda: attention(True), {}),
        Target("attention_dq", 16, "block_causal_attention", DQ, lambda: attention(True), {}),
        Target(
            "attention_fused", 16, "block_causal_attention, fused", FUSED, lambda: attention(True, "triton_fused"), {}
        ),
        Target("adamw", 0, "adamw_step", product(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8)), adamw, {}),
        Target(
            "sample_tokens",
            4096,
            "sample_tokens",
            product(num_warps=(2, 4, 8, 16)),
            lambda: sampling("triton", 4096),
            {},
        ),
        # One warp a row; 168 registers a thread of one, 96 of two (triton 3.6).
        *(
            Target(
                "sample_tokens_segments",
                size,
                "sample_tokens, segments",
                product(num_warps=warps),
                functools.partial(sampling, "triton_segments", vocab, **inference),
                {},
            )
            for size, vocab, warps, inference in (
                (4096, 4096, (1, 2, 4, 8), {}),
                (16384, 16384, (4, 8, 16), {}),
                ((4096, "filtered"), 4096, (2, 4, 8), {"top_k": 900, "top_p": 0.95}),
            )
        ),
    ]
    for width, heads in ((1024, 16), (1920, 30)):
        # Chains of at most 16 rows, and what keeps its registers: of 1920 channels two rows want 8 warps or 16.
        tiles_of = [(1, 16, 4), (1, 16, 8), (2, 16, 8), (2, 32, 4), (2, 32, 8), (2, 32, 16), (4, 64, 8), (4, 64, 16)]
        rows = [
            {"TILE": tile, "ROWS": rows, "num_warps": warps, "STAGES": stages}
            for tile, rows, warps in tiles_of
            for stages in (1, 2, 3, 4)
        ]
        found += [
            Target("adaln_forward", width, "gated_residual_norm", product(num_warps=(1, 2, 4, 8)),
                   lambda width=width: adaln(width, False), {"heads": heads}),
            Target("adaln_backward", width, "gated_residual_norm", rows,
                   lambda width=width: adaln(width, True), {"heads": heads}),
        ]  # fmt: skip
    for backward in (False, True):
        direction = "backward" if backward else "forward"
        found.append(
            Target(f"selective_log_softmax_{direction}", 4096, "selective_log_softmax",
                   product(num_warps=(2, 4, 8, 16)), lambda backward=backward: log_softmax(backward), {})
        )  # fmt: skip
    for features, channels, gelu in ((3072, 1024, False), (4096, 1024, True), (1024, 4096, False),
                                     (5760, 1920, False), (7680, 1920, True), (1920, 7680, False)):  # fmt: skip
        found.append(
            Target("invariant_linear", (16, features), "invariant_linear", PRODUCT,
                   lambda f=features, c=channels, g=gelu: linear(f, c, g), {"heads": min(features, channels) // 64})
        )  # fmt: skip
    for channels in (160, 320, 640):
        found.append(
            Target("group_norm_silu", channels, "group_norm_silu", group_norm_tiles(channels),
                   lambda channels=channels: group_norm(channels), {"channels": channels})
        )  # fmt: skip
    found += [
        Target("conv3x3", channels, "conv3x3", CONVOLUTION, lambda channels=channels: convolution(channels, 160),
               {"channels": channels})
        for channels in (160, 320)
    ]  # fmt: skip
    for heads, backward in itertools.product((16, 30), (False, True)):
        candidates = product(ROWS=(4, 8, 16), COLUMNS=(256, 512), num_warps=(4, 8))
        if backward:
            candidates = [s | {"TILES": t} for s in candidates for t in (4, 8, 16)]
        found.append(
            Target(f"gelu_bias_{'backward' if backward else 'forward'}", 256 * heads, "gelu_bias", candidates,
                   lambda heads=heads, backward=backward: gelu(256 * heads, backward), {"heads": heads})
        )  # fmt: skip
    for heads, backward in itertools.product((16, 30), (False, True)):
        candidates = product(TOKENS=(8, 16, 32), num_warps=(2, 4, 8))
        if backward:
            candidates = [s | {"TILES": t} for s in candidates for t in (1, 2, 4, 8)]
        found.append(
            Target(f"split_heads_{'backward' if backward else 'forward'}", heads, "split_heads", candidates,
                   lambda heads=heads, backward=backward: split_heads(heads, backward), {"heads": heads})
        )  # fmt: skip
    for block, tokens, num_keys in ((128, 256, 680), (64, 169, 424), (16, 16, 30)):
        found.append(
            Target(f"attention_cached_{block}", 16, "cached_attention", CACHED[block],
                   lambda tokens=tokens, num_keys=num_keys: cached_attention(tokens, num_keys), {})
        )  # fmt: skip
    return found


# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def launched_with(kernel: str, setting: Setting) -> Iterator[None]:
    """With a candidate; with nothing: as pinned."""
    if not setting:
        yield
        return
    with settings.trying(kernel, **setting):
        yield


def check(kernel: str, case: str, setting: Setting, sizes: dict[str, int], small: bool = False) -> str:
    """What is wrong with a candidate, or nothing."""
    dtype = torch.float32 if small else torch.bfloat16
    try:
        with launched_with(kernel, setting):
            wrong = each_kernel.compare(each_kernel.cases(small, dtype, 0, **sizes)[case], "triton")
    except Exception as error:  # noqa: BLE001 - a candidate may fail in any way, such as for want of shared memory
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:160] if str(error).strip() else ''}"
    return "; ".join(wrong)


def check_all(chosen: list[Target], seconds: float, workers: int) -> dict[tuple[str, int], str]:
    """What is wrong with each candidate, by the target's name and its index; those not checked in time are left out."""
    found: dict[tuple[str, int], str] = {}
    end = time.monotonic() + seconds
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    jobs = {
        pool.submit(check, t.kernel, t.case, setting, t.sizes): (t.name, i)
        for t in chosen
        for i, setting in enumerate(t.candidates)
    }
    try:
        for job in as_completed(jobs, timeout=max(1.0, end - time.monotonic())):
            error = job.exception()
            found[jobs[job]] = f"its process died: {error}" if error else job.result()
    except TimeoutError:
        print(f"{len(jobs) - len(found)} of {len(jobs)} candidates were not checked in {seconds:.0f} s: left out")
    for process in list((pool._processes or {}).values()):
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
    return found


def measure(target: Target, candidates: list[Setting], budget_s: float) -> list[Found]:
    """Times of the pinned setting and of candidates that were found right, best first."""
    call = target.prepare()

    def under(setting: Setting) -> Callable[[], object]:
        def run() -> None:
            with launched_with(target.kernel, setting):
                call()

        return run

    found, calls = [], {}
    for setting in [{}, *candidates]:
        one = Found(setting, pinned=not setting)
        found.append(one)
        try:
            under(setting)()
            harness.synchronize()
        except Exception as error:  # noqa: BLE001 - as in check, at another batch
            one.wrong = f"{type(error).__name__}: {error}"[:160]
        else:
            calls[str(setting)] = under(setting)
    for one, median in zip((f for f in found if not f.wrong), harness.time_interleaved(calls, budget_s).values(),
                          strict=True):  # fmt: skip
        one.ms, one.spread = median.ms, median.spread
    return sorted(found, key=lambda one: (bool(one.wrong), one.ms))


def table(target: Target, found: list[Found]) -> str:
    """Best first; the pinned one marked; and what to pin, where something is faster than noise."""
    lines = [f"{target.name}"]
    for one in found:
        time_ms = f"{one.ms:9.4f} ms +- {one.spread / 2:4.0%}" if not one.wrong else f"{'':20}"
        what = "pinned" if one.pinned else ", ".join(f"{k}={v}" for k, v in one.setting.items())
        lines.append(f"  {time_ms}  {what}  {one.wrong}".rstrip())
    right = [one for one in found if not one.wrong]
    pinned = next((one for one in right if one.pinned), None)
    if (
        pinned
        and not right[0].pinned
        and pinned.ms - right[0].ms > (pinned.spread * pinned.ms + right[0].spread * right[0].ms) / 2
    ):
        gain = pinned.ms / right[0].ms
        lines.append(f'  -> {gain:.2f}x: (HOPPER, "{target.kernel}", {target.size}): {json.dumps(right[0].setting)},')
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kernel", nargs="*", default=[])
    parser.add_argument("--workers", type=int, default=12)
    arguments = parser.parse_args()
    if not harness.CUDA:
        print("tuning needs a GPU")
        return 1
    begin = time.monotonic()
    chosen = [t for t in targets() if not arguments.kernel or t.kernel in arguments.kernel]
    wrong = check_all(chosen, 0.55 * arguments.seconds, arguments.workers)
    print(f"checked {len(wrong)} candidates in {time.monotonic() - begin:.0f} s", flush=True)
    content: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "targets": {}}
    for target in chosen:
        if time.monotonic() - begin > arguments.seconds - 10:
            print(f"no time left for {target.name} and what follows")
            break
        states = [(setting, wrong.get((target.name, i), "not checked")) for i, setting in enumerate(target.candidates)]
        found = measure(target, [setting for setting, state in states if not state], 0.05)
        found += [Found(setting, wrong=state) for setting, state in states if state]
        print(table(target, found), flush=True)
        content["targets"][target.name] = [asdict(one) for one in found]
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(content, indent=1) + "\n")
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
