"""Attention of one new token an image against a static key-value cache: a step of a next-token model.

Axes: B image, H query head, G key and value head, r query heads of a key head (H / G), N place of the cache,
D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.position import check_place, check_position, host_positions
from varfast.kernels.selection import Implementation, implementations, run


def _run_sdpa(q_BHD: Tensor, k_cache_BGND: Tensor, v_cache_BGND: Tensor, position: Tensor, scale: float) -> Tensor:
    """The places up to `position` alone. The query heads of a key head stand where SDPA has a sequence of queries."""
    q_BGrD = q_BHD.unflatten(1, (k_cache_BGND.shape[1], -1))
    parts = []
    for images, last in host_positions(position, len(q_BHD)):
        k, v = (cache[images, :, : last + 1] for cache in (k_cache_BGND, v_cache_BGND))
        parts.append(F.scaled_dot_product_attention(q_BGrD[images], k, v, scale=scale))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1, 2)


def _cannot_run_sdpa(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "it reads the position on the host, which would wait for the device"


implementations(
    "decode_attention",
    Implementation("sdpa", _run_sdpa, _cannot_run_sdpa, ("cpu",)),
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
        k_cache_BGND, v_cache_BGND: (B, G, N, D), the new tokens' own key and value at `position`. What is behind it is
            not read. Each key head serves H / G adjacent query heads.
        position: int32 or int64 on the device, () or (B,), in [0, N): a captured CUDA graph reads its value at each
            replay. On a GPU the value is not checked, which would wait for it.
        scale: factor of the logits, 1 / sqrt(D) usually.
        impl: "auto", "sdpa" (CPU) or "reference".
    Returns: (B, H, D).
    Raises: ValueError for other shapes or dtypes, a position outside the cache (on a CPU), or for an impl that is
        unknown or cannot run.
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
    out: Tensor = run("decode_attention", impl, q, k, v, position, scale)
    return out
