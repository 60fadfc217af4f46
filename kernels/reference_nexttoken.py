"""The specification of the ops of next-token models. The general rules are in reference.py, of which this is a part.

Axes: B image, L token, C channel, F hidden channel of the MLP, H query head, G key and value head, D head dim,
P = D / 2 pairs of channels, N place of the cache, X = (H + 2 G) D column of the product of the qkv layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x_BLC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """As in Llama, the normalised row is rounded to the dtype of x before it is multiplied by the weight."""
    wide = at_least_float32(x_BLC)
    normed = (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x_BLC.dtype)
    return (at_least_float32(normed) * at_least_float32(weight_C)).to(x_BLC.dtype)


def residual_rms_norm(x_BLC: Tensor, branch_BLC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    new_BLC = x_BLC + branch_BLC
    return new_BLC, rms_norm(new_BLC, weight_C, eps)


def swiglu(gate_BLF: Tensor, up_BLF: Tensor) -> Tensor:
    return (F.silu(at_least_float32(gate_BLF)) * at_least_float32(up_BLF)).to(gate_BLF.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Heads


def _rotate(x: Tensor, rotary: Tensor | None, pairs: str) -> Tensor:
    """Rotate each pair of channels (a, b) to (a cos - b sin, b cos + a sin). rotary: (..., P, 2), broadcast over x."""
    if rotary is None:
        return x
    wide = at_least_float32(x)
    cos, sin = rotary.to(wide.dtype).unbind(-1)
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1) if pairs == "adjacent" else wide.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(turned, dim=-1).flatten(-2) if pairs == "adjacent" else torch.cat(turned, dim=-1)
    return out.to(x.dtype)


def _heads(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, ...]:
    """Split into q (..., H, D), k and v (..., G, D)."""
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    return heads.split((num_heads, num_kv_heads, num_kv_heads), dim=-2)


def split_heads_rotary(
    qkv_BLX: Tensor, rotary_LP2: Tensor | None, num_heads: int, num_kv_heads: int, pairs: str = "adjacent"
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in _heads(qkv_BLX, num_heads, num_kv_heads))
    return _rotate(q, rotary_LP2, pairs), _rotate(k, rotary_LP2, pairs), v


def split_heads_rotary_to_cache(
    qkv_BX: Tensor,
    rotary_NP2: Tensor | None,
    position: Tensor,
    k_cache_BGND: Tensor,
    v_cache_BGND: Tensor,
    num_heads: int,
    pairs: str = "adjacent",
) -> Tensor:
    q, k, v = _heads(qkv_BX, num_heads, k_cache_BGND.shape[1])
    place_B = position.long().expand(len(qkv_BX))
    if rotary_NP2 is not None:
        rotary_B1P2 = rotary_NP2[place_B].unsqueeze(1)
        q, k = _rotate(q, rotary_B1P2, pairs), _rotate(k, rotary_B1P2, pairs)
    image_B = torch.arange(len(qkv_BX), device=qkv_BX.device)
    k_cache_BGND[image_B, :, place_B] = k
    v_cache_BGND[image_B, :, place_B] = v
    return q


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def decode_attention(
    q_BHD: Tensor, k_cache_BGND: Tensor, v_cache_BGND: Tensor, position: Tensor, scale: float
) -> Tensor:
    """Computes every place and masks those after `position`, so that the host need not read it from the device."""
    seen_B11N = torch.arange(k_cache_BGND.shape[2], device=q_BHD.device) <= position.reshape(-1, 1, 1, 1)
    # Set masked places to 0: they may be uninitialised memory, and 0 * NaN would be NaN.
    k, v = (cache.masked_fill(~seen_B11N.mT, 0.0) for cache in (k_cache_BGND, v_cache_BGND))
    # The query heads that share a key head are passed to SDPA as if they were a sequence of queries.
    q_BGrD = q_BHD.unflatten(1, (k.shape[1], -1))
    return F.scaled_dot_product_attention(q_BGrD, k, v, attn_mask=seen_B11N, scale=scale).flatten(1, 2)


def causal_attention(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, scale: float) -> Tensor:
    times = q_BHLD.shape[1] // k_BGLD.shape[1]
    k, v = (x.repeat_interleave(times, dim=1) if times > 1 else x for x in (k_BGLD, v_BGLD))
    return F.scaled_dot_product_attention(q_BHLD, k, v, is_causal=True, scale=scale).transpose(1, 2)
