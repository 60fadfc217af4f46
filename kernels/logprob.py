"""Log-probability of given tokens: the teacher-forced counterpart of `sample_tokens`.

The logits are stored once, in the dtype that the head wrote, and their gradient can overwrite them. The alternative,
computing the logits tile by tile inside the head, would save 11 MB per image at 680 tokens and 4096 codes, but repeat
the head's product in the backward pass. By count, for 512 images on an H200, it saves 5 ms of memory traffic and costs
4 ms of arithmetic, which is too close to decide by count; it was not measured.

The backward pass reads the logits once and writes their gradient once, whether the log-probability, the entropy or
both are differentiated. The entropy adds 8 bytes per row (its value and its gradient) to the 8 bytes per logit.

Axes: B image, L token over all scales, V vocabulary, N = B * L rows.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels._triton import jit, tl
from varfast.kernels.selection import Implementation, cannot_run_triton, implementations, refused_dtype, run
from varfast.kernels.settings import setting

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime

# A row is held in registers, and 32 numbers per thread at 1024 threads is the limit.
_MAX_VOCAB = 32768


@jit
def _logp_kernel(
    logits_ptr,
    bias_ptr,
    tokens_ptr,
    logp_ptr,
    entropy_ptr,
    largest_ptr,
    log_total_ptr,
    row_stride,
    vocab,
    inv_temperature,
    inv_temperature_rest,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program processes one row in one pass."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * row_stride + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + column, mask=column < vocab, other=0.0)
    x = tl.where(x == -float("inf"), x, x * inv_temperature + x * inv_temperature_rest)
    token = tl.load(tokens_ptr + row)
    largest = tl.max(x, axis=0)
    shifted = x - largest
    weight = tl.exp(shifted)
    total = tl.sum(weight, axis=0)
    log_total = tl.log(total)
    expected = tl.sum(weight * tl.where(weight > 0.0, shifted, 0.0), axis=0) / total
    tl.store(logp_ptr + row, tl.sum(tl.where(column == token, shifted, 0.0), axis=0) - log_total)
    tl.store(entropy_ptr + row, log_total - expected)
    tl.store(largest_ptr + row, largest)
    tl.store(log_total_ptr + row, log_total)


@jit
def _logp_backward_kernel(
    grad_ptr, logits_ptr, bias_ptr, tokens_ptr, largest_ptr, log_total_ptr, out_ptr, d_bias_ptr,
    grad_entropy_ptr, entropy_ptr, row_stride, vocab, num_rows, inv_temperature, inv_temperature_rest,
    BIAS: tl.constexpr, ENTROPY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d logits = (grad * (one-hot - p) - grad_entropy * p * (log p + entropy)) / temperature, with p the softmax.

    The second term exists only with ENTROPY; otherwise grad_entropy_ptr and entropy_ptr are not read. Each row is read
    before it is written, so `out` may be the logits themselves. A program processes ROWS rows in order and, with a
    bias, also sums their gradients, so the order of the sum is fixed.
    """
    column = tl.arange(0, BLOCK)
    inside = column < vocab
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0)
        d_bias = tl.zeros((BLOCK,), tl.float32)
    for index in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + index
        here = inside & (row + column * 0 < num_rows)  # the interpreter needs the mask in the full shape
        x = tl.load(logits_ptr + row * row_stride + column, mask=here, other=-float("inf")).to(tl.float32)
        token = tl.load(tokens_ptr + row, mask=row < num_rows, other=0)
        factor = tl.load(grad_ptr + row, mask=row < num_rows, other=0.0) * inv_temperature
        if BIAS:
            x += bias
        x = tl.where(x == -float("inf"), x, x * inv_temperature + x * inv_temperature_rest)
        largest = tl.load(largest_ptr + row, mask=row < num_rows, other=0.0)
        log_total = tl.load(log_total_ptr + row, mask=row < num_rows, other=0.0)
        of_token = tl.where(column == token, factor, 0.0)
        log_p = x - largest - log_total
        p = tl.exp(log_p)
        gradient = of_token - factor * p
        if ENTROPY:
            entropy = tl.load(entropy_ptr + row, mask=row < num_rows, other=0.0)
            factor = tl.load(grad_entropy_ptr + row, mask=row < num_rows, other=0.0) * inv_temperature
            # Where p is 0, p log p counts as 0: log p may be -inf there.
            gradient -= factor * p * tl.where(p == 0.0, 0.0, log_p + entropy)
        tl.store(out_ptr + row * row_stride + column, gradient.to(out_ptr.dtype.element_ty), mask=here)
        if BIAS:
            d_bias += gradient
    if BIAS:
        tl.store(d_bias_ptr + tl.program_id(0).to(tl.int64) * vocab + column, d_bias, mask=inside)


def _launch_settings(direction: str, vocab: int, device: torch.device | None = None) -> dict[str, int]:
    """Each thread holds 16 numbers at 4096 codes, loaded 128 bits at a time."""
    block = max(128, 1 << (vocab - 1).bit_length())
    kernel = f"selective_log_softmax_{direction}"
    return {"BLOCK": block} | setting(kernel, vocab, device, num_warps=min(16, max(4, block // 512)))


# Rows of which a program of the backward pass sums the bias's gradient. The partial sums are 1/16 of the size of the
# logits' gradient, which a separate pass would have to read again as a whole.
_ROWS = 16


@torch.library.custom_op("varfast::token_logp", mutates_args=())
def _logp_triton(
    logits_BLV: Tensor, tokens_BL: Tensor, temperature: float, bias_V: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, largest logit, and log sum exp(logit - largest logit), (B, L) float32 each.

    The last two are not added up: the rounding of their sum would make the gradient less exact.
    """
    logp, entropy, largest, log_total = (logits_BLV.new_empty(tokens_BL.shape, dtype=torch.float32) for _ in range(4))
    if tokens_BL.numel():
        logits, vocab = logits_BLV.contiguous(), logits_BLV.shape[-1]
        with torch.cuda.device_of(logits):
            _logp_kernel[(tokens_BL.numel(),)](
                logits,
                logits if bias_V is None else bias_V.contiguous(),
                tokens_BL.contiguous(),
                logp,
                entropy,
                largest,
                log_total,
                vocab,
                vocab,
                *reference.split_float32(1.0 / temperature),
                BIAS=bias_V is not None,
                **_launch_settings("forward", vocab, logits.device),
            )
    return logp, entropy, largest, log_total


@_logp_triton.register_fake
def _(
    logits_BLV: Tensor, tokens_BL: Tensor, temperature: float, bias_V: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logp, entropy, largest, log_total = (logits_BLV.new_empty(tokens_BL.shape, dtype=torch.float32) for _ in range(4))
    return logp, entropy, largest, log_total


def _launch_backward(
    out: Tensor,
    gradients: tuple[Tensor | None, Tensor | None],
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    temperature: float,
    bias_V: Tensor | None,
) -> Tensor:
    """Write d logits to `out` and return d bias, (V,) float32, which is empty without a bias.

    Args:
        gradients: (B, L) of logp and of entropy; at most one is None.
        saved: logits (B, L, V); tokens; entropy, largest and log_total as the forward pass returned them.
    """
    logits, tokens_BL, entropy_BL, largest_BL, log_total_BL = saved
    grad_BL, grad_entropy_BL = gradients
    if grad_BL is None:
        assert grad_entropy_BL is not None
        grad_BL = torch.zeros_like(grad_entropy_BL, memory_format=torch.contiguous_format)
    grad_BL = grad_BL.contiguous()
    vocab, num_rows = logits.shape[-1], tokens_BL.numel()
    rows, partial_NV = 1, grad_BL.new_empty(0)
    if bias_V is not None:
        rows = _ROWS
        partial_NV = grad_BL.new_empty((-(-num_rows // rows), vocab), dtype=torch.float32)
    if num_rows:
        with torch.cuda.device_of(logits):
            _logp_backward_kernel[(-(-num_rows // rows),)](
                grad_BL,
                logits,
                logits if bias_V is None else bias_V.contiguous(),
                tokens_BL.contiguous(),
                largest_BL,
                log_total_BL,
                out,
                partial_NV,
                grad_BL if grad_entropy_BL is None else grad_entropy_BL.contiguous(),
                entropy_BL,
                vocab,
                vocab,
                num_rows,
                *reference.split_float32(1.0 / temperature),
                BIAS=bias_V is not None,
                ENTROPY=grad_entropy_BL is not None,
                ROWS=rows,
                **_launch_settings("backward", vocab, logits.device),
            )
    return partial_NV if bias_V is None else partial_NV.sum(dim=0)


@torch.library.custom_op("varfast::token_logp_backward", mutates_args=())
def _logp_backward_triton(
    grad_BL: Tensor | None,
    grad_entropy_BL: Tensor | None,
    logits_BLV: Tensor,
    tokens_BL: Tensor,
    entropy_BL: Tensor,
    largest_BL: Tensor,
    log_total_BL: Tensor,
    temperature: float,
    bias_V: Tensor | None,
) -> tuple[Tensor, Tensor]:
    logits = logits_BLV.contiguous()
    out = torch.empty_like(logits)
    saved = (logits, tokens_BL, entropy_BL, largest_BL, log_total_BL)
    return out, _launch_backward(out, (grad_BL, grad_entropy_BL), saved, temperature, bias_V)


@_logp_backward_triton.register_fake
def _(grad_BL, grad_entropy_BL, logits_BLV, tokens_BL, entropy_BL, largest_BL, log_total_BL, temperature, bias_V):
    d_bias = largest_BL.new_empty(0 if bias_V is None else bias_V.shape)
    return torch.empty_like(logits_BLV, memory_format=torch.contiguous_format), d_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_BLV, tokens_BL, ctx.temperature, bias_V = inputs
    ctx.save_for_backward(logits_BLV, tokens_BL, *output[1:], bias_V)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # an unused output's gradient is None, and its term is not computed


def _backward(
    ctx: Any, grad_BL: Tensor | None, grad_entropy_BL: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_BL is None and grad_entropy_BL is None:
        return None, None, None, None
    *saved, bias_V = ctx.saved_tensors
    d_logits, d_bias = _logp_backward_triton(grad_BL, grad_entropy_BL, *saved, ctx.temperature, bias_V)
    return d_logits, None, None, None if bias_V is None else d_bias


_logp_triton.register_autograd(_backward, setup_context=_setup_context)


class _InPlace(torch.autograd.Function):
    """Like the op, but its backward pass overwrites the logits with their gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits_BLV: Tensor, tokens_BL: Tensor, temperature: float, bias_V: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logp_BL, entropy_BL, largest_BL, log_total_BL = _logp_triton(logits_BLV, tokens_BL, temperature, bias_V)
        ctx.temperature = temperature
        ctx.logits = logits_BLV.detach()  # not save_for_backward: autograd would raise because it is overwritten
        ctx.save_for_backward(tokens_BL, entropy_BL, largest_BL, log_total_BL, bias_V)
        ctx.set_materialize_grads(False)
        return logp_BL, entropy_BL

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        tokens_BL, entropy_BL, largest_BL, log_total_BL, bias_V = ctx.saved_tensors
        grad_BL, grad_entropy_BL = gradients
        if grad_BL is None and grad_entropy_BL is None:
            return None, None, None, None
        logits, ctx.logits = ctx.logits, None
        if logits is None:
            raise RuntimeError(
                "this backward pass overwrote its logits; it cannot run twice (consume_logits=True). Differentiate "
                "log-probability and entropy in one backward pass"
            )
        saved = (logits, tokens_BL, entropy_BL, largest_BL, log_total_BL)
        d_bias = _launch_backward(logits, (grad_BL, grad_entropy_BL), saved, ctx.temperature, bias_V)
        return logits, None, None, None if bias_V is None else d_bias


def _refuses(logits_BLV: Tensor, *_: Any) -> str | None:
    if logits_BLV.shape[-1] > _MAX_VOCAB:
        return f"up to {_MAX_VOCAB} codes, got {logits_BLV.shape[-1]}"
    return refused_dtype(logits_BLV)


def _run_triton(
    logits_BLV: Tensor, tokens_BL: Tensor, temperature: float, consume_logits: bool, bias_V: Tensor | None
) -> tuple[Tensor, Tensor]:
    bias_V = None if bias_V is None else bias_V.float()
    if consume_logits and logits_BLV.is_contiguous():
        logp_BL, entropy_BL = _InPlace.apply(logits_BLV, tokens_BL, temperature, bias_V)
        return logp_BL, entropy_BL
    logp_BL, entropy_BL, _, _ = _logp_triton(logits_BLV, tokens_BL, temperature, bias_V)
    return logp_BL, entropy_BL


def _run_reference(
    logits_BLV: Tensor, tokens_BL: Tensor, temperature: float, consume_logits: bool, bias_V: Tensor | None
) -> tuple[Tensor, Tensor]:
    return reference.selective_log_softmax(logits_BLV, tokens_BL, temperature, bias_V)


implementations(
    "selective_log_softmax",
    Implementation("triton", _run_triton, cannot_run_triton, ("cuda",), _refuses),
    Implementation("reference", _run_reference),
)


def ahead_of_time() -> list[AheadOfTime]:
    """Forward and backward, separate and in place; vocabularies of VAR and of next-token models; odd shapes."""
    from varfast.kernels.aot import recorded

    def call(dtype: torch.dtype, length: int, vocab: int, biased: bool = False, entropic: bool = False) -> None:
        bias = torch.empty(vocab, requires_grad=True) if biased else None
        leaf = torch.empty(1, length, vocab, dtype=dtype, requires_grad=True)
        tokens = torch.zeros(1, length, dtype=torch.int64)
        logp, entropy = selective_log_softmax(leaf * 1, tokens, 0.7, bias_V=bias, impl="triton")
        (logp.sum() + entropy.sum() if entropic else logp.sum()).backward()

    items = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for vocab in (4096, 16384):
            what, main = f"selective_log_softmax {name} V={vocab}", vocab == 4096
            items += recorded(what, partial(call, dtype, 680, vocab))
            if main and dtype == torch.float32:  # as the head writes them
                items += recorded(f"{what}, bias", partial(call, dtype, 680, vocab, True), also_blackwell=True)
                with_entropy = partial(call, dtype, 680, vocab, True, True)
                items += recorded(f"{what}, bias, entropy", with_entropy, also_blackwell=True)
            items += recorded(f"{what}, entropy", partial(call, dtype, 680, vocab, False, True))
    for vocab in (1, 4097):
        items += recorded(
            f"selective_log_softmax one token V={vocab}", partial(call, torch.float32, 1, vocab), fast=False
        )
    return items


def selective_log_softmax(
    logits_BLV: Tensor,
    tokens_BL: Tensor,
    temperature: float = 1.0,
    consume_logits: bool = False,
    bias_V: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the given tokens, and the entropy of that distribution.

    Args:
        logits_BLV: (B, L, V) any floating dtype; arithmetic in float32 (float64 for float64).
        tokens_BL: (B, L) int64 in [0, V).
        temperature: > 0.
        consume_logits: the caller no longer needs the logits, so the backward pass may overwrite them with their
            gradient.
        bias_V: (V,) added to the logits in float32 as they are read, so that the head's product need not add it;
            differentiable.
        impl: "auto", "triton" or "reference".
    Returns: logp and entropy in nats, (B, L) each, both differentiable; float32 (float64 for float64). The backward
        pass computes the entropy's term only if a gradient of the entropy arrives. Logits of -inf have probability 0
        and add nothing to the entropy or to any gradient.
    Raises: ValueError for a temperature that is not positive, shapes that differ, an impl that is unknown or cannot
        run.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be > 0")
    if logits_BLV.shape[:-1] != tokens_BL.shape:
        raise ValueError(
            f"tokens are {tuple(tokens_BL.shape)}, logits {tuple(logits_BLV.shape)}: want (B, L), (B, L, V)"
        )
    if bias_V is not None and bias_V.shape != logits_BLV.shape[-1:]:
        raise ValueError(f"bias_V is {tuple(bias_V.shape)}, want ({logits_BLV.shape[-1]},): one a code")
    given = (logits_BLV, tokens_BL, temperature, consume_logits, bias_V)
    logp_BL, entropy_BL = run("selective_log_softmax", impl, *given)
    return logp_BL, entropy_BL
