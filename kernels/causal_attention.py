"""Causal attention over a whole sequence: the teacher-forced pass of a next-token model.

FlashAttention already computes this, through PyTorch or its own packages, so this file adds no kernel. Our kernel of
block_causal_attention computes the same if every scale is one token and the head dim is 64. It is offered for
comparison, and for strict mode, which needs bitwise guarantees that no library gives.

Axes: B image, L token, H query head, G key and value head, D head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varfast.kernels import attention_flash, attention_triton, reference
from varfast.kernels.attention_tiles import HEAD_DIM
from varfast.kernels.decode_attention import alone
from varfast.kernels.selection import Implementation, cannot_run_triton, implementations, refused_dtype, run, say_once


def _expanded(q_BHLD: Tensor, *keys_BGLD: Tensor) -> tuple[Tensor, ...]:
    """Keys (or values) with the key heads repeated, so that every query head has its own."""
    times = q_BHLD.shape[1] // keys_BGLD[0].shape[1]
    return tuple(x.repeat_interleave(times, dim=1) if times > 1 else x for x in keys_BGLD)


def _say_without_flash(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Warn once if PyTorch cannot use FlashAttention for these 16-bit tensors on a GPU."""
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1])
    if not torch.backends.cuda.can_use_flash_attention(parameters):
        what = f"{q.dtype}, head dim {q.shape[-1]}, {q.shape[1]} query and {k.shape[1]} key heads"
        say_once(f"causal_attention: PyTorch has no FlashAttention for {what} here; a slower kernel of its own runs")


def _run_sdpa(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, scale: float) -> Tensor:
    if q_BHLD.device.type != "cuda":  # FlashAttention takes no grouped key heads there
        return reference.causal_attention(q_BHLD, k_BGLD, v_BGLD, scale)
    if q_BHLD.dtype.itemsize == 2:
        _say_without_flash(q_BHLD, k_BGLD, v_BGLD)
    grouped = q_BHLD.shape[1] != k_BGLD.shape[1]
    out = F.scaled_dot_product_attention(q_BHLD, k_BGLD, v_BGLD, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _run_triton(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, scale: float, invariant: bool = False) -> Tensor:
    """By the kernels of block_causal_attention, with scales of one token each."""
    k_BHLD, v_BHLD = _expanded(q_BHLD, k_BGLD, v_BGLD)
    scale_H = torch.full((q_BHLD.shape[1],), scale, device=q_BHLD.device)
    ends = tuple(range(1, q_BHLD.shape[2] + 1))
    return attention_triton.attention_op(q_BHLD, k_BHLD, v_BHLD, scale_H, ends, invariant)[0].transpose(1, 2)


def _refuses_triton(q_BHLD: Tensor, *_: Any) -> str | None:
    if q_BHLD.shape[-1] != HEAD_DIM:
        return f"a head dim of {HEAD_DIM}, got {q_BHLD.shape[-1]}"
    return refused_dtype(q_BHLD)


def _run_alone(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, scale: float) -> Tensor:
    """For every token of every image, make exactly the call that decode_attention's "sdpa_invariant" makes."""
    images = []
    for q_1HLD, k_1GLD, v_1GLD in zip(q_BHLD.split(1), k_BGLD.split(1), v_BGLD.split(1), strict=True):
        q_1GrLD = q_1HLD.unflatten(1, (k_1GLD.shape[1], -1))
        tokens = [
            alone(q_1GrLD[:, :, :, i], k_1GLD[:, :, : i + 1], v_1GLD[:, :, : i + 1], scale)
            for i in range(q_1HLD.shape[2])
        ]
        images.append(torch.stack(tokens, dim=1).flatten(2, 3))
    return torch.cat(images)


implementations(
    "causal_attention",
    Implementation("sdpa", _run_sdpa, auto_on=("cuda", "cpu")),
    attention_flash.causal("fa4"),
    attention_flash.causal("flash_attn"),
    Implementation("triton", _run_triton, cannot_run_triton, (), _refuses_triton),
    # For strict mode: bitwise equal to decode_attention's implementation of the same name, for any batch.
    Implementation(
        "triton_invariant", functools.partial(_run_triton, invariant=True), cannot_run_triton, (), _refuses_triton
    ),
    Implementation("sdpa_invariant", _run_alone, auto_on=()),
    Implementation("reference", reference.causal_attention),
)


def causal_attention(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, scale: float, impl: str = "auto") -> Tensor:
    """softmax(scale * q k^T) v, where each token sees itself and all tokens before it.

    A row that is shorter than the others of its batch is padded at its end, with finite numbers. Its own tokens come
    first and never see the padding.

    Args:
        q_BHLD: (B, H, L, D). Differentiable, as k and v are.
        k_BGLD, v_BGLD: (B, G, L, D), of the dtype of q; each key head serves H / G adjacent query heads.
        scale: factor of the logits, 1 / sqrt(D) usually.
        impl: "auto"; "sdpa": PyTorch's, which uses FlashAttention if that supports the tensors; "flash_attn" or "fa4"
            (CUDA, 16 bits, the packages flash-attn and flash-attn-4); "triton" (float32 or 16 bits, D = 64);
            "reference". "triton_invariant" (D = 64) and "sdpa_invariant" are bitwise equal to decode_attention with the
            same impl, for any batch size.
    Returns: (B, L, H, D), with the heads of a token adjacent, as the output projection reads them.
    Raises: ValueError for other shapes or dtypes, or for an impl that is unknown or cannot run.
    """
    q, k, v = q_BHLD, k_BGLD, v_BGLD
    fits = q.ndim == 4 == k.ndim and k.shape == v.shape and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
    if not fits or q.shape[1] % max(1, k.shape[1]):
        raise ValueError(
            f"q, k, v: got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, want (B, H, L, D) and twice "
            "(B, G, L, D), H a multiple of G"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: got {q.dtype}, {k.dtype}, {v.dtype}, want one dtype")
    out: Tensor = run("causal_attention", impl, q, k, v, scale)
    return out
