"""Attention of one new token per image against a static key-value cache: a decoding step of a next-token model.

Axes: B image, H query head, G key and value head, r query heads of a key head (H / G), N place of the cache,
D head dim.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varfast.kernels import attention_triton, reference
from varfast.kernels.attention_tiles import HEAD_DIM
from varfast.kernels.decode_triton import MAX_HEAD_DIM, decode_op
from varfast.kernels.extension import NO_EXTENSION, cannot_run_cpp, refused_by_cpp
from varfast.kernels.position import check_place, check_position, host_positions
from varfast.kernels.selection import Implementation, cannot_run_triton, implementations, refused_dtype, run

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime


def _run_sdpa(q_BHD: Tensor, k_cache_BGND: Tensor, v_cache_BGND: Tensor, position: Tensor, scale: float) -> Tensor:
    """Attends only to the places up to `position`. The query heads that share a key head are passed to SDPA as if they
    were a sequence of queries."""
    q_BGrD = q_BHD.unflatten(1, (k_cache_BGND.shape[1], -1))
    parts = []
    for images, last in host_positions(position, len(q_BHD)):
        k, v = (cache[images, :, : last + 1] for cache in (k_cache_BGND, v_cache_BGND))
        parts.append(F.scaled_dot_product_attention(q_BGrD[images], k, v, scale=scale))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1, 2)


if NO_EXTENSION is None:

    @torch.library.register_fake("varfast::decode_attention_cpp")
    def _(q_BHD: Tensor, k_cache_BGND: Tensor, v_cache_BGND: Tensor, position_B: Tensor, scale: float) -> Tensor:
        return q_BHD.new_empty(q_BHD.shape)


def _run_cpp(q_BHD: Tensor, k_cache_BGND: Tensor, v_cache_BGND: Tensor, position: Tensor, scale: float) -> Tensor:
    # In float32 at one place for all images, PyTorch's SDPA is about as fast. With a place for each image, it would be
    # called once an image.
    if q_BHD.dtype == torch.float64 or (q_BHD.dtype == torch.float32 and position.ndim == 0):
        return _run_sdpa(q_BHD, k_cache_BGND, v_cache_BGND, position, scale)
    position_B = position.long().expand(len(q_BHD))
    out: Tensor = torch.ops.varfast.decode_attention_cpp(q_BHD, k_cache_BGND, v_cache_BGND, position_B, scale)
    return out


def alone(q_1GrD: Tensor, k_1GND: Tensor, v_1GND: Tensor, scale: float) -> Tensor:
    """Attention of one token of one image by its own call, so that its bits cannot depend on other images or tokens."""
    return F.scaled_dot_product_attention(q_1GrD.contiguous(), k_1GND.contiguous(), v_1GND.contiguous(), scale=scale)


def _run_alone(q_BHD: Tensor, k_cache_BGND: Tensor, v_cache_BGND: Tensor, position: Tensor, scale: float) -> Tensor:
    """Makes exactly the calls of causal_attention's "sdpa_invariant", so that both give the same bits."""
    q_BGrD = q_BHD.unflatten(1, (k_cache_BGND.shape[1], -1))
    images = []
    for image, last in enumerate(position.expand(len(q_BHD)).tolist()):
        k, v = (cache[image : image + 1, :, : last + 1] for cache in (k_cache_BGND, v_cache_BGND))
        images.append(alone(q_BGrD[image : image + 1], k, v, scale))
    return torch.cat(images).flatten(1, 2)


def _on_host(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "it reads the position on the host, which would wait for the device"


def _run_invariant(q_BHD: Tensor, k_cache_BGND: Tensor, v_cache_BGND: Tensor, position: Tensor, scale: float) -> Tensor:
    """By the kernel of cached_attention, to which the query heads that share a key head are passed as queries."""
    kv_heads = k_cache_BGND.shape[1]
    scale_G = torch.full((kv_heads,), scale, device=q_BHD.device)
    q_BGrD = q_BHD.unflatten(1, (kv_heads, -1))
    out = attention_triton.cached_attention_op(q_BGrD, k_cache_BGND, v_cache_BGND, scale_G, 1, True, position)
    return out.flatten(1, 2)


def _refuses(q_BHD: Tensor, *_: Any) -> str | None:
    if q_BHD.shape[-1] > MAX_HEAD_DIM:
        return f"a head dim up to {MAX_HEAD_DIM}, got {q_BHD.shape[-1]}"
    return refused_dtype(q_BHD)


def _refuses_invariant(q_BHD: Tensor, *_: Any) -> str | None:
    if q_BHD.shape[-1] != HEAD_DIM:
        return f"a head dim of {HEAD_DIM}, got {q_BHD.shape[-1]}"
    return refused_dtype(q_BHD)


implementations(
    "decode_attention",
    Implementation("triton", decode_op, cannot_run_triton, ("cuda",), _refuses),
    Implementation("cpp", _run_cpp, cannot_run_cpp, ("cpu",), refused_by_cpp),
    Implementation("sdpa", _run_sdpa, _on_host, ("cpu",)),
    # For strict mode: bitwise equal to causal_attention's implementation of the same name, for any batch.
    Implementation("triton_invariant", _run_invariant, cannot_run_triton, (), _refuses_invariant),
    Implementation("sdpa_invariant", _run_alone, _on_host, ()),
    Implementation("reference", reference.decode_attention),
)


def decode_attention(
    q_BHD: Tensor,
    k_cache_BGND: Tensor,
    v_cache_BGND: Tensor,
    position: Tensor,
    scale: float,
    impl: str = "auto",
) -> Tensor:
    """softmax(scale * q k^T) v over the places 0 ... position of a static cache.

    Args:
        q_BHD: (B, H, D) queries of the new tokens.
        k_cache_BGND, v_cache_BGND: (B, G, N, D). They already have the new tokens' key and value at `position`; later
            places are not read. Each key head serves H / G adjacent query heads.
        position: int32 or int64 on the device, in [0, N): () for all images, or (B,), one for each image, where prompts
            have unequal lengths. A captured CUDA graph reads its value at each replay. On a GPU the value is not
            checked, because that would wait for the device.
        scale: factor of the logits, 1 / sqrt(D) usually.
        impl: "auto", "triton" (float32 or 16 bits, D up to 256), "cpp" (CPU; the same as "sdpa" for float64, and for
            float32 with one place for all images), "sdpa" (CPU; a call for each image if the places differ) or
            "reference". "triton_invariant" (D = 64) and "sdpa_invariant" (CPU) are bitwise equal to causal_attention
            with the same impl, for any batch size.
    Returns: (B, H, D).
    Raises: ValueError for other shapes or dtypes, a position outside the cache (on a CPU), for an impl that is unknown
        or cannot run, or if a gradient is required: only "reference" has one.
    """
    q, k, v = q_BHD, k_cache_BGND, v_cache_BGND
    fits = q.ndim == 3 and k.ndim == 4 and k.shape == v.shape and (q.shape[0], q.shape[2]) == (k.shape[0], k.shape[3])
    if not fits or q.shape[1] % max(1, k.shape[1]):
        raise ValueError(
            f"q, k_cache, v_cache: got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, want (B, H, D) and twice "
            "(B, G, N, D), H a multiple of G"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k_cache, v_cache: got {q.dtype}, {k.dtype}, {v.dtype}, want one dtype")
    check_position(position, len(q), q.device)
    check_place(position, k.shape[2])
    if impl != "reference" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("decode_attention has no gradient; use torch.no_grad() or impl='reference'")
    out: Tensor = run("decode_attention", impl, q, k, v, position, scale)
    return out


def ahead_of_time() -> list[AheadOfTime]:
    """Few images, whose places are split between programs, and many; the heads of LlamaGen-L, 3B (head dim 100) and
    Janus-Pro-1B, whose rows have a place each, and grouped heads; also one place, head and channel.

    Rows of 100 bfloat16 numbers begin at multiples of 8 bytes, so 16-byte loads are impossible there.
    """
    from varfast.kernels import decode_triton
    from varfast.kernels.aot import recorded

    def call(
        dtype: torch.dtype, batch: int, heads: tuple[int, int, int], places: int, rows: tuple[int, ...] = ()
    ) -> None:
        num_heads, kv_heads, dim = heads
        q = torch.empty(batch, num_heads, dim, dtype=dtype)
        k, v = torch.empty(2, batch, kv_heads, places, dim, dtype=dtype).unbind()
        decode_attention(q, k, v, torch.zeros(rows, dtype=torch.int64), dim**-0.5, impl="triton")

    items = []
    all_heads: tuple[tuple[int, int, int], ...] = ((16, 16, 64), (32, 32, 100), (32, 8, 128))
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for heads in all_heads:
            narrow = (decode_triton._join_kernel, *((decode_triton._part_kernel,) if heads[2] == 100 else ()))
            for batch in (2, 64):
                what = f"decode_attention {name} {heads} B={batch}"
                main = dtype == torch.bfloat16
                items += recorded(what, partial(call, dtype, batch, heads, 576), also_blackwell=main, narrow=narrow)
    for batch in (2, 64):
        what = f"decode_attention bf16 (16, 16, 128) B={batch}, a place a row"
        called = partial(call, torch.bfloat16, batch, (16, 16, 128), 640, (batch,))
        items += recorded(what, called, also_blackwell=True, narrow=(decode_triton._join_kernel,))
    items += recorded("decode_attention one place", partial(call, torch.float32, 1, (1, 1, 1), 1), fast=False)
    items += recorded("decode_attention odd", partial(call, torch.float32, 3, (6, 2, 20), 70), fast=False)
    return items
