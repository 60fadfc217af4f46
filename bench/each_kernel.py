"""Every kernel once, by itself: for compute-sanitizer, and to be compared with its specification on fresh numbers.

    python bench/each_kernel.py --once                        # small shapes, forward and backward, nothing compared
    python bench/each_kernel.py --fresh --repeat 20           # VAR's shapes; new random numbers at every call
    compute-sanitizer --tool memcheck python bench/each_kernel.py --once

Compared are outputs and gradients with the reference in float64: an error of at most twice that of the reference in the
same dtype. --repeat runs all again and wants the same bits. A line an op; exit code 1 if one fails.

Axes: B image, L token over all scales, V vocabulary, C channel, H head, D head dim.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import harness
import nexttoken_cases
import torch
from torch import Tensor

from varfast import kernels
from varfast.kernels.selection import cannot_run_triton
from varfast.policies.var.config import VARConfig

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """An op at a shape.

    Attributes:
        name: of the op.
        function: takes impl and the leaves, returns what is compared.
        leaves: floating inputs; those that need gradients are differentiated.
        floor: an error that passes whatever the reference's is.
        floors: the same of single results.
    """

    name: str
    function: Function
    leaves: tuple[Tensor, ...]
    floor: float = 1e-6
    floors: Mapping[str, float] = field(default_factory=dict)


def cases(
    small: bool, dtype: torch.dtype, seed: int, heads: int = 16, channels: int = 160, **of_next_token: int
) -> dict[str, Case]:
    """Every op with inputs drawn from `seed`; small ones have sizes of their own.

    of_next_token: sizes of nexttoken_cases.functions.
    """
    device = harness.DEVICE
    generator = torch.Generator(device=device).manual_seed(seed)
    sizes = VARConfig(patch_nums=(1, 2, 3, 4, 5)) if small else VARConfig()
    batch, heads, ends = (2, 2, sizes.scale_ends) if small else (3, heads, sizes.scale_ends)
    length, width, vocab = ends[-1], 64 * heads, 200 if small else 4096

    def randn(*shape: int, of: torch.dtype = dtype, grad: bool = True, times: float = 1.0) -> Tensor:
        x = times * torch.randn(shape, generator=generator, device=device)
        return x.to(of).requires_grad_(grad)

    def whole(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return x if isinstance(x, tuple) else (x,)

    def by(op: Callable[..., Tensor | tuple[Tensor, ...]], *more: object) -> Function:
        return lambda impl, *leaves: whole(op(*leaves, *more, impl=impl))

    x, branch = (randn(batch, length, width) for _ in range(2))
    gate, scale, shift = (randn(batch, width) for _ in range(3))
    tokens = torch.randint(vocab, (batch, length), generator=generator, device=device)
    logits = randn(batch, length, vocab, of=torch.float32, times=4.0)
    q, k, v = (randn(batch, heads, length, 64) for _ in range(3))
    logit_scale = torch.rand(heads, generator=generator, device=device).mul_(0.2).requires_grad_()
    logp = randn(batch, length, of=torch.float32)
    old, ref = (logp.detach() + randn(batch, length, of=torch.float32, grad=False, times=0.1) for _ in range(2))
    advantages = randn(batch, of=torch.float32, grad=False)
    channels, side = (64, 9) if small else (channels, 64)
    image = randn(2, channels, side, side, grad=False).contiguous(memory_format=torch.channels_last)
    vectors = tuple(randn(channels, of=torch.float32, grad=False) for _ in range(3))
    wide_image = randn(2, channels, 4, 128, grad=False).contiguous(memory_format=torch.channels_last)
    filters = randn(channels, channels, 3, 3, grad=False, times=(9 * channels) ** -0.5)
    filters = filters.contiguous(memory_format=torch.channels_last)
    key = torch.tensor([seed % 2**40, 3, 7], device=device)
    token_advantages = randn(length, batch, of=torch.float32, grad=False)
    pairs = randn(6, length, of=torch.float32)
    pairs_ref = pairs.detach() + randn(6, length, of=torch.float32, grad=False, times=0.1)

    def sampled(impl: str, x: Tensor) -> tuple[Tensor, ...]:
        found, logp, entropy = kernels.sample_tokens(x, key, 4, 0.7, impl=impl)
        return logp, entropy, found.to(logp.dtype)

    def sampled_by_segments(impl: str, x: Tensor) -> tuple[Tensor, ...]:
        return sampled("reference" if impl == "reference" else "triton_segments", x)

    def token_logp(impl: str, x: Tensor) -> tuple[Tensor, ...]:
        """As the policy's update: no gradient of the entropy."""
        found, entropy = kernels.selective_log_softmax(x, tokens, 0.7, impl=impl)
        return found, entropy.detach()

    def loss(impl: str, logp: Tensor) -> tuple[Tensor, ...]:
        others = (old.to(logp.dtype), ref.to(logp.dtype), advantages.to(logp.dtype))
        return kernels.grpo_token_loss(logp, *others, impl=impl)

    def loss_of_tokens(impl: str, logp: Tensor) -> tuple[Tensor, ...]:
        """Each token has its own advantage, stored transposed."""
        others = (old.to(logp.dtype), ref.to(logp.dtype), token_advantages.t().to(logp.dtype))
        return kernels.grpo_token_loss(logp, *others, impl=impl)

    def loss_of_images(impl: str, logp: Tensor) -> tuple[Tensor, ...]:
        """One ratio an image, and the unbiased gradient of the KL."""
        others = (old.to(logp.dtype), ref.to(logp.dtype), advantages.to(logp.dtype))
        return kernels.grpo_token_loss(logp, *others, ratio="sequence", kl_gradient="unbiased", impl=impl)

    def loss_of_pairs(impl: str, logp: Tensor) -> tuple[Tensor, ...]:
        return kernels.dpo_loss(logp, pairs_ref.to(logp.dtype), beta=0.1, label_smoothing=0.1, impl=impl)

    def cached(impl: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        scale = logit_scale.detach().to(torch.promote_types(q.dtype, torch.float32))
        starts = zip((0, *ends), ends, strict=False)
        parts = [kernels.cached_attention(q[:, :, a:b], k, v, b, scale, impl=impl) for a, b in starts]
        return (torch.cat(parts, dim=2),)

    def decoded(impl: str, qkv: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """One token an image, each at a position of its own that is on the device."""
        scale = logit_scale.detach().to(torch.promote_types(q.dtype, torch.float32))
        position = torch.arange(batch, device=device) * 5 + 2
        caches = (k.clone(), v.clone())
        query = kernels.split_heads_to_cache(qkv[:, :1], heads, True, *caches, 0, impl=impl, position=position)
        return kernels.cached_attention(query, *caches, 1, scale, impl=impl, position=position), *caches

    def to_cache(impl: str, qkv: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        caches = [qkv.new_zeros(batch, heads, length + 3, 64) for _ in range(2)]
        return (kernels.split_heads_to_cache(qkv, heads, True, *caches, 2, bias, impl=impl), *caches)

    def norm(impl: str, image: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        weight, bias, input_bias = vectors
        return (kernels.group_norm_silu(image, weight, bias, 32, input_bias_C=input_bias, impl=impl),)

    def residual_norm(impl: str, *leaves: Tensor) -> tuple[Tensor, ...]:
        return kernels.gated_residual_norm(*leaves[:-1], bias_C=leaves[-1], impl=impl)

    def attention(impl: str, q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return (kernels.block_causal_attention(q, k, v, ends, scale, impl=impl),)

    def one_backward_kernel(impl: str, *leaves: Tensor) -> tuple[Tensor, ...]:
        return attention("reference" if impl == "reference" else "triton_fused", *leaves)

    def convolution(impl: str, image: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return kernels.conv3x3(image, weight, residual.clone(), impl=impl)[:1]

    def convolution_norm(impl: str, image: Tensor, residual: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        """The statistics count by what GroupNorm makes of them."""
        weight, bias, input_bias = vectors
        added, moments = kernels.channel_moments(image.clone(), residual, impl=impl)
        normed = kernels.group_norm_silu(added, weight, bias, 32, input_bias_C=input_bias, moments=moments, impl=impl)
        return added, normed

    def linear(impl: str, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (kernels.invariant_linear(x, weight, bias, gelu=True, impl=impl),)

    def optimizer_step(impl: str, *leaves: Tensor) -> tuple[Tensor, ...]:
        parameter, gradient, exp_avg, exp_avg_sq = (x.detach().clone() for x in leaves)
        copy = torch.empty_like(parameter, dtype=torch.bfloat16)
        lists = [[x] for x in (parameter, gradient, exp_avg, exp_avg_sq.square(), torch.full((), 7.0, device=device))]
        one, zero = torch.ones((), device=device), torch.zeros((), device=device)
        impl = "triton" if impl == "auto" and cannot_run_triton(device) is None else impl
        tensors = kernels.AdamWTensors(*lists, [0.01], [copy])
        kernels.adamw_step(tensors, 1e-3, (0.9, 0.999), 1e-8, 3.0 * one, zero, impl=impl)
        return parameter, lists[2][0], lists[3][0]

    detached = tuple(y.detach() for y in (q, k, v))
    qkv = randn(batch, length, 3 * width)
    bias, bias_3 = randn(width, of=torch.float32), randn(3 * width, of=torch.float32)
    hidden, hidden_bias = randn(batch, length, 4 * width), randn(4 * width, of=torch.float32)
    # Float32, as the model has it, but of numbers that 16 bits hold: the product reads it in the dtype of x.
    weight = randn(4 * width, width, grad=False, times=width**-0.5).float().requires_grad_()
    found = [
        Case("sample_tokens", sampled, (logits.detach(),), floor=2e-5),
        Case("selective_log_softmax", token_logp, (logits,)),
        Case("selective_log_softmax, entropy", by(kernels.selective_log_softmax, tokens, 0.7), (logits,)),
        # The bias's gradient is the sum of that of the product, made from q and k as they are stored: 2^-9 each.
        Case("split_heads", lambda impl, x, b: kernels.split_heads(x, heads, True, b, impl=impl), (qkv, bias_3),
             floors={"gradient 1": 2e-3 if dtype != torch.float32 else 1e-6}),
        Case("split_heads_to_cache", to_cache, (qkv.detach(), bias_3.detach())),
        # One of a thousand rounded otherwise is one unit in the last place: of 4 in bfloat16 0.016.
        Case("block_causal_attention", attention, (q, k, v, logit_scale)),
        Case("cached_attention", cached, detached),
        Case("cached_attention, position", decoded, (qkv.detach(), *detached[1:])),
        Case("layer_norm_modulate", by(kernels.layer_norm_modulate), (x, scale, shift)),
        Case("gated_residual", by(kernels.gated_residual), (x, branch, gate, bias)),
        Case("gated_residual_norm", residual_norm, (x, branch, gate, scale, shift, bias)),
        Case("gelu_bias", by(kernels.gelu_bias), (hidden, hidden_bias)),
        Case("linear_gelu", by(kernels.linear_gelu), (x, weight, hidden_bias)),
        Case("group_norm_silu", norm, (image, *vectors)),
        Case("conv3x3", convolution, (wide_image, filters, wide_image)),
        Case("channel_moments", convolution_norm, (image, image, *vectors)),
        Case("invariant_linear", linear,
             (x, randn(4 * width, width, times=width**-0.5), randn(4 * width))),
        Case("adamw_step", optimizer_step, tuple(randn(width, 4 * width + 3, of=torch.float32, grad=False)
                                                 for _ in range(4))),
        Case("grpo_token_loss", loss, (logp,), floor=2e-6),
        Case("grpo_token_loss, by token", loss_of_tokens, (logp,), floor=2e-6),
        Case("grpo_token_loss, by image", loss_of_images, (logp,), floor=2e-6),
        Case("dpo_loss", loss_of_pairs, (pairs,)),
    ]  # fmt: skip
    found += [Case(*three) for three in nexttoken_cases.functions(small, randn, device, **of_next_token)]
    if cannot_run_triton(device) is None:
        found.append(Case("sample_tokens, segments", sampled_by_segments, (logits.detach(),), floor=2e-5))
        found.append(Case("block_causal_attention, fused", one_backward_kernel, (q, k, v, logit_scale)))
    return {case.name: case for case in found}


def results(case: Case, impl: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and gradients; in another dtype where one is given."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_(x.requires_grad) for x in case.leaves]
    outputs = case.function(impl, *leaves)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    differentiated = [x for x in leaves if x.requires_grad]
    with_gradient = [y for y in outputs if y.requires_grad]
    if differentiated and with_gradient:
        generator = torch.Generator(device=leaves[0].device).manual_seed(1)
        upstream = [
            torch.randn(y.shape, generator=generator, device=y.device, dtype=torch.float32).to(case.leaves[0].dtype)
            .to(y.dtype) for y in with_gradient
        ]  # fmt: skip
        gradients = torch.autograd.grad(with_gradient, differentiated, upstream)
        found |= {f"gradient {i}": g for i, g in enumerate(gradients)}
    return found


def error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||, NaN counting as infinite."""
    difference = (got.double() - exact).nan_to_num(nan=float("inf"))
    return float(difference.norm() / exact.norm().clamp_min(1e-30))


def compare(case: Case, impl: str = "auto") -> list[str]:
    """What is less exact than twice the reference in the same dtype; of 1000 tokens at most one may differ."""
    exact, plain, ours = (
        results(case, "reference", torch.float64),
        results(case, "reference"),
        results(case, impl),
    )
    wrong = []
    for name in exact:
        if case.name.startswith("sample_tokens") and name == "output 2":
            same = float((ours[name].double() == plain[name].double()).double().mean())
            if same < 0.999:
                wrong.append(f"tokens: {same:.4f} equal to the reference's")
            continue
        if case.name.startswith("sample_tokens") and name == "output 0":
            # The log-probability of each own token: compared where float64 drew the same one.
            same = ours["output 2"].double() == exact["output 2"]
            errors = [error(x[name][same], exact[name][same]) for x in (ours, ours)]
            limit = case.floor
        else:
            errors = [error(x[name], exact[name]) for x in (ours, plain)]
            limit = 2 * errors[1] + case.floors.get(name, case.floor)
        if not errors[0] <= limit:
            wrong.append(f"{name}: relative error {errors[0]:.2e}, limit {limit:.2e}")
    return wrong


def repeated(case: Case, times: int) -> list[str]:
    """What is not the same, bit by bit, at every run."""
    first = results(case, "auto")
    wrong = set()
    for _ in range(times - 1):
        again = results(case, "auto")
        wrong |= {name for name in first if not torch.equal(first[name], again[name])}
    return [f"{name} differs between runs" for name in sorted(wrong)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--repeat", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    seed = secrets.randbits(40) if arguments.fresh else 0
    record = harness.Record(arguments.record)
    failed = 0
    dtypes = (torch.bfloat16, torch.float32) if harness.CUDA else (torch.float32,)
    print(f"seed {seed}, {harness.DEVICE}", flush=True)
    for dtype in dtypes:
        for name, case in cases(arguments.once or arguments.small, dtype, seed).items():
            try:
                wrong = check(case, arguments.once, arguments.repeat)
            except Exception:  # noqa: BLE001 - one kernel that does not run must not hide the others
                traceback.print_exc()
                wrong = ["did not run; see above"]
            failed += bool(wrong)
            line = "; ".join(wrong) or "ok"
            print(f"{name:28} {str(dtype)[6:]:10} {line}", flush=True)
            record.note("checks", f"{name} {str(dtype)[6:]}", line)
    if not arguments.once:
        record.note("checks", "kernels", {"seed": seed, "repeat": arguments.repeat, "failed": failed})
    return 1 if failed else 0


def check(case: Case, once: bool, repeat: int) -> list[str]:
    if once:
        results(case, "auto")
        harness.synchronize()
        return []
    return compare(case) + (repeated(case, repeat) if repeat else [])


if __name__ == "__main__":
    sys.exit(main())
