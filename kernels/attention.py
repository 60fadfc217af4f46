"""Attention under VAR's scale mask: a token sees all tokens of its own scale and of every earlier one.

The Triton kernels are in attention_triton.py. This file has the other implementations and the public functions.

Axes: B image, H head, L token over all scales, l token of one scale, D head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varfast.kernels import attention_flash, attention_triton, reference
from varfast.kernels.attention_tiles import HEAD_DIM, visible_keys
from varfast.kernels.attention_triton import ahead_of_time
from varfast.kernels.extension import NO_EXTENSION, cannot_run_cpp, refused_by_cpp
from varfast.kernels.position import check_position, host_positions, on_host_only
from varfast.kernels.selection import Implementation, cannot_run_triton, implementations, refused_dtype, run

__all__ = ["ahead_of_time", "block_causal_attention", "cached_attention"]


def _refuse_gradient(impl: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(f"impl={impl!r} of cached_attention has no gradient; use torch.no_grad() or impl='reference'")


# ---------------------------------------------------------------------------------------------------------------------
# Triton


def _refuses(q_BHLD: Tensor, *_: Any) -> str | None:
    if q_BHLD.shape[-1] != HEAD_DIM:
        return f"a head dim of {HEAD_DIM}, VAR's, got {q_BHLD.shape[-1]}"
    return refused_dtype(q_BHLD)


def _run_triton(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    scale_ends: tuple[int, ...],
    logit_scale_H: Tensor,
    invariant: bool = False,
    fused_backward: bool = False,
) -> Tensor:
    return attention_triton.attention_op(
        q_BHLD, k_BHLD, v_BHLD, logit_scale_H.float(), scale_ends, invariant, fused_backward
    )[0]


def _run_triton_cached(
    q_BHlD: Tensor,
    k_cache_BHLD: Tensor,
    v_cache_BHLD: Tensor,
    num_keys: int,
    logit_scale_H: Tensor,
    position: Tensor | None = None,
    invariant: bool = False,
) -> Tensor:
    _refuse_gradient("triton", q_BHlD, k_cache_BHLD, v_cache_BHLD, logit_scale_H)
    return attention_triton.cached_attention_op(
        q_BHlD, k_cache_BHLD, v_cache_BHLD, logit_scale_H.float(), num_keys, invariant, position
    )


# ---------------------------------------------------------------------------------------------------------------------
# C++, on a CPU


@functools.lru_cache(maxsize=32)
def _ends_of(scale_ends: tuple[int, ...]) -> Tensor:
    return torch.tensor(scale_ends)


if NO_EXTENSION is None:

    @torch.library.register_fake("varfast::attention_cpp")
    def _(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, logit_scale_H: Tensor, ends_S: Tensor) -> Any:
        return q_BHLD.new_empty(q_BHLD.shape), q_BHLD.new_empty(q_BHLD.shape[:3], dtype=torch.float32)

    @torch.library.register_fake("varfast::attention_backward_cpp")
    def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, scale: Tensor, ends: Tensor):
        d_q, d_k, d_v = (q.new_empty(q.shape) for _ in range(3))
        return d_q, d_k, d_v, q.new_empty(q.shape[:2], dtype=torch.float32)

    @torch.library.register_fake("varfast::cached_attention_cpp")
    def _(q_BHlD: Tensor, k_cache_BHLD: Tensor, v_cache_BHLD: Tensor, logit_scale_H: Tensor, num_keys: int) -> Tensor:
        return q_BHlD.new_empty(q_BHlD.shape)

    def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, logit_scale_H, ends_S = inputs
        ctx.save_for_backward(q, k, v, *output, logit_scale_H, ends_S)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def _backward(ctx: Any, d_out_BHLD: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if d_out_BHLD is None:
            return None, None, None, None, None
        d_q, d_k, d_v, d_scale_BH = torch.ops.varfast.attention_backward_cpp(d_out_BHLD, *ctx.saved_tensors)
        return d_q, d_k, d_v, d_scale_BH.sum(dim=0), None

    torch.library.register_autograd("varfast::attention_cpp", _backward, setup_context=_setup_context)


def _run_cpp(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, scale_ends: tuple[int, ...], logit_scale_H: Tensor
) -> Tensor:
    if q_BHLD.dtype == torch.float64:  # used only as a reference in tests
        return reference.block_causal_attention(q_BHLD, k_BHLD, v_BHLD, scale_ends, logit_scale_H)
    out_BHLD, _ = torch.ops.varfast.attention_cpp(q_BHLD, k_BHLD, v_BHLD, logit_scale_H.float(), _ends_of(scale_ends))
    return out_BHLD


def _run_cpp_cached(
    q_BHlD: Tensor,
    k_cache_BHLD: Tensor,
    v_cache_BHLD: Tensor,
    num_keys: int,
    logit_scale_H: Tensor,
    position: Tensor | None = None,
) -> Tensor:
    if q_BHlD.dtype == torch.float64:  # used only as a reference in tests
        return reference.cached_attention(q_BHlD, k_cache_BHLD, v_cache_BHLD, num_keys, logit_scale_H, position)
    _refuse_gradient("cpp", q_BHlD, k_cache_BHLD, v_cache_BHLD, logit_scale_H)
    parts = []
    for images, before in host_positions(position, len(q_BHlD)):
        _check_num_keys(before + num_keys, k_cache_BHLD)
        q, k, v = (x[images] for x in (q_BHlD, k_cache_BHLD, v_cache_BHLD))
        parts.append(torch.ops.varfast.cached_attention_cpp(q, k, v, logit_scale_H.float(), before + num_keys))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _refuses_cpp(q_BHLD: Tensor, *_: Any) -> str | None:
    if q_BHLD.shape[-1] != HEAD_DIM:
        return f"a head dim of {HEAD_DIM}, VAR's, got {q_BHLD.shape[-1]}"
    return refused_by_cpp(q_BHLD)


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch


def _run_by_scale(attend: Callable[[Tensor, Tensor, Tensor], Tensor], *given: Any) -> Tensor:
    return torch.cat(attention_flash.scale_by_scale(attend, *given), dim=2)


def _sdpa(q_BHlD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_BHlD, k_BHLD, v_BHLD, scale=1.0)


def _alone(q_BHlD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
    """One call for each image, so that the library's choice of kernel cannot depend on the batch size."""
    images = []
    for q, k, v in zip(q_BHlD.split(1), k_BHLD.split(1), v_BHLD.split(1), strict=True):
        images.append(_sdpa(q.contiguous(), k.contiguous(), v.contiguous()))
    return torch.cat(images)


def _run_alone_cached(
    q_BHlD: Tensor, k_cache_BHLD: Tensor, v_cache_BHLD: Tensor, num_keys: int, logit_scale_H: Tensor
) -> Tensor:
    return _alone(reference.scaled(q_BHlD, logit_scale_H), k_cache_BHLD[:, :, :num_keys], v_cache_BHLD[:, :, :num_keys])


@functools.lru_cache(maxsize=32)
def _flex_mask(scale_ends: tuple[int, ...], device: torch.device, block_size: tuple[int, int] = (128, 128)) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    visible_L = torch.tensor(visible_keys(scale_ends), device=device)
    length = scale_ends[-1]
    return create_block_mask(lambda b, h, i, j: j < visible_L[i], None, None, length, length, device, block_size)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _run_flex(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    scale_ends: tuple[int, ...],
    logit_scale_H: Tensor,
    backend: str | None = None,
) -> Tensor:
    device = q_BHLD.device
    options: dict[str, Any] = {}
    block_size = (128, 128)
    if backend is not None:
        options["kernel_options"] = {"BACKEND": backend}
        if torch.cuda.get_device_capability(device)[0] >= 10:
            block_size = (256, 128)  # on Blackwell a program of flash-attn-4 holds two tiles of 128 queries
    mask = _flex_mask(scale_ends, device, block_size)
    q_BHLD = reference.scaled(q_BHLD, logit_scale_H)
    return _compiled_flex()(q_BHLD, k_BHLD, v_BHLD, block_mask=mask, scale=1.0, **options)


def _cannot_run_flex(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "FlexAttention has no backward pass on the CPU"


# ---------------------------------------------------------------------------------------------------------------------

implementations(
    "block_causal_attention",
    Implementation("triton", _run_triton, cannot_run_triton, ("cuda",), _refuses),
    Implementation("cpp", _run_cpp, cannot_run_cpp, ("cpu",), _refuses_cpp),
    # One backward kernel instead of two. Not the default: it has not run on a GPU yet, while the two kernels were
    # measured (0.951 ms on an H100).
    Implementation(
        "triton_fused", functools.partial(_run_triton, fused_backward=True), cannot_run_triton, (), _refuses
    ),
    Implementation("flex", _run_flex, _cannot_run_flex, auto_on=()),
    attention_flash.flex_flash(functools.partial(_run_flex, backend="FLASH")),
    attention_flash.block_causal("fa4"),
    attention_flash.block_causal("flash_attn"),
    Implementation("sdpa", functools.partial(_run_by_scale, _sdpa), auto_on=()),
    # For strict mode: bitwise equal to cached_attention's implementation of the same name, for any batch.
    Implementation("triton_invariant", functools.partial(_run_triton, invariant=True), cannot_run_triton, (), _refuses),
    Implementation("sdpa_invariant", functools.partial(_run_by_scale, _alone), auto_on=()),
    Implementation("reference", reference.block_causal_attention),
)
implementations(
    "cached_attention",
    Implementation("triton", _run_triton_cached, cannot_run_triton, ("cuda",), _refuses),
    Implementation("cpp", _run_cpp_cached, cannot_run_cpp, ("cpu",), _refuses_cpp),
    attention_flash.cached("fa4"),
    attention_flash.cached("flash_attn"),
    Implementation(
        "triton_invariant", functools.partial(_run_triton_cached, invariant=True), cannot_run_triton, (), _refuses
    ),
    Implementation("sdpa_invariant", _run_alone_cached, auto_on=(), refuses=on_host_only(5, lambda *_: None)),
    Implementation("reference", reference.cached_attention),
)


def _check_num_keys(num_keys: int, k_cache_BHLD: Tensor) -> None:
    if num_keys > k_cache_BHLD.shape[2]:
        raise ValueError(f"num_keys={num_keys}, but the cache holds {k_cache_BHLD.shape[2]} tokens")
    if num_keys < 1:
        raise ValueError(f"num_keys={num_keys}: there must be a key to attend to")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, logit_scale_H: Tensor) -> None:
    same = q.shape[:2] == k.shape[:2] and q.shape[3:] == k.shape[3:] and k.shape == v.shape
    if q.ndim != 4 or not same:
        raise ValueError(f"q, k, v: got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, want (B, H, L, D)")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: got {q.dtype}, {k.dtype}, {v.dtype}, want one dtype")
    if logit_scale_H.shape != q.shape[1:2]:
        raise ValueError(f"logit_scale_H: got {tuple(logit_scale_H.shape)}, want ({q.shape[1]},): one a head")


def block_causal_attention(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    scale_ends: tuple[int, ...],
    logit_scale_H: Tensor,
    impl: str = "auto",
) -> Tensor:
    """softmax(logit_scale * q k^T + mask) v over all scales at once; the ends of the scales define the mask.

    With scale_ends (1, 3, 6), that is scales of 1, 2 and 3 tokens, query i (row) sees key j (column) where 1::

        1 0 0 0 0 0
        1 1 1 0 0 0
        1 1 1 0 0 0
        1 1 1 1 1 1
        1 1 1 1 1 1
        1 1 1 1 1 1

    Args:
        q_BHLD, k_BHLD, v_BHLD: (B, H, L, D), one dtype, any strides. If the model L2-normalises q and k, the caller
            does so. No further factor 1/sqrt(D) is applied.
        scale_ends: cumulative number of tokens after each scale; the last is L.
        logit_scale_H: (H,) factor of each head's logits, differentiable.
        impl: "auto", "triton" (D = 64, float32 or 16 bits), "triton_fused" (the same, with one backward kernel), "cpp"
            (CPU, D = 64; float64 by PyTorch), "flex" (CUDA), "flash_attn" or "fa4" (CUDA, 16 bits, the packages
            flash-attn and flash-attn-4), "flex_flash" (FlexAttention with flash-attn-4), "sdpa" (one call for each
            scale, no mask), or "reference". "triton_invariant" and "sdpa_invariant" are bitwise equal to
            cached_attention with the same impl, for any batch size.
    Returns: (B, H, L, D).
    Raises: ValueError if scale_ends does not increase up to L, for other shapes or dtypes, or for an impl that is
        unknown or cannot run.
    """
    if scale_ends[-1] != q_BHLD.shape[2]:
        raise ValueError(f"scale_ends={scale_ends} ends at {scale_ends[-1]}, but q has {q_BHLD.shape[2]} tokens")
    if any(end <= start for start, end in zip((0, *scale_ends), scale_ends, strict=False)):
        raise ValueError(f"scale_ends={scale_ends}: every scale must end after the one before it")
    _check_shapes(q_BHLD, k_BHLD, v_BHLD, logit_scale_H)
    if k_BHLD.shape != q_BHLD.shape:
        raise ValueError(f"k has {k_BHLD.shape[2]} tokens, q {q_BHLD.shape[2]}: want as many")
    return run("block_causal_attention", impl, q_BHLD, k_BHLD, v_BHLD, scale_ends, logit_scale_H)


def cached_attention(
    q_BHlD: Tensor,
    k_cache_BHLD: Tensor,
    v_cache_BHLD: Tensor,
    num_keys: int,
    logit_scale_H: Tensor,
    impl: str = "auto",
    position: Tensor | None = None,
) -> Tensor:
    """softmax(logit_scale * q k^T) v for new tokens, such as one scale's, against a static key-value cache.

    Args:
        q_BHlD: (B, H, l, D) queries of the new tokens. They see every valid key, so there is no mask.
        k_cache_BHLD, v_cache_BHLD: (B, H, L, D) buffers. Their first `num_keys` rows are valid and already include the
            new tokens' keys and values. The other rows are not read.
        num_keys: number of valid rows, in [1, L].
        logit_scale_H: (H,) factor of each head's logits.
        impl: "auto", "triton" (D = 64, no gradient), "cpp" (CPU, D = 64, no gradient; float64 by PyTorch), "flash_attn"
            or "fa4" (CUDA, 16 bits), "triton_invariant", "sdpa_invariant" (see block_causal_attention) or "reference".
        position: int32 or int64 on the device, () or (B,), >= 0, added to `num_keys`. A captured CUDA graph reads its
            value at each replay. "flash_attn", "fa4" and "sdpa_invariant" do not take it. On a GPU the value is not
            checked, because that would wait for the device; beyond the cache, "triton" reads the whole cache.
    Returns: (B, H, l, D).
    Raises: ValueError if num_keys is not within the cache, for other shapes or dtypes, for an impl that is unknown or
        cannot run, or if a gradient is required with impl "triton".
    """
    _check_num_keys(num_keys, k_cache_BHLD)
    _check_shapes(q_BHlD, k_cache_BHLD, v_cache_BHLD, logit_scale_H)
    check_position(position, len(q_BHlD), q_BHlD.device)
    given = (q_BHlD, k_cache_BHLD, v_cache_BHLD, num_keys, logit_scale_H)
    return run("cached_attention", impl, *given, *(() if position is None else (position,)))
