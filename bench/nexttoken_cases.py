"""The ops of next-token models for each_kernel.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from varfast import kernels

Function = Callable[..., tuple[Tensor, ...]]


def functions(
    small: bool, randn: Callable[..., Tensor], device: torch.device, head_dim: int = 64, width: int = 1024
) -> list[tuple[str, Function, tuple[Tensor, ...]]]:
    """Name, function of impl and leaves, and leaves: grouped key heads; one token an image at places of its own."""
    batch, length, heads, kv_heads = (2, 9, 4, 2) if small else (3, 256, 16, 8)
    width = 64 if small else width
    rotary = randn(length, head_dim // 2, 2, of=torch.float32, grad=False)
    x, branch, gate, up = (randn(batch, length, width) for _ in range(4))
    weight = randn(width)
    qkv = randn(batch, length, (heads + 2 * kv_heads) * head_dim)
    q = randn(batch, heads, length, head_dim)
    k, v = (randn(batch, kv_heads, length, head_dim) for _ in range(2))
    position = torch.arange(batch, device=device) * 3 + 2
    scale = head_dim**-0.5

    def split(impl: str, qkv: Tensor) -> tuple[Tensor, ...]:
        return kernels.split_heads_rotary(qkv, rotary.to(_table_of(qkv)), heads, kv_heads, impl=impl)

    def split_halves(impl: str, qkv: Tensor) -> tuple[Tensor, ...]:
        return kernels.split_heads_rotary(qkv, rotary.to(_table_of(qkv)), heads, kv_heads, "halves", impl=impl)

    def to_cache(impl: str, qkv: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        caches = (k.clone(), v.clone())
        table = rotary.to(_table_of(qkv))
        q = kernels.split_heads_rotary_to_cache(qkv[:, 0], table, position, *caches, heads, impl=impl)
        return q, *caches

    def decode(impl: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (kernels.decode_attention(q[:, :, 0], k, v, position, scale, impl=impl),)

    cache = (k.detach(), v.detach())
    return [
        ("rms_norm", lambda impl, x, w: (kernels.rms_norm(x, w, 1e-5, impl=impl),), (x, weight)),
        ("residual_rms_norm", lambda impl, *a: kernels.residual_rms_norm(*a, 1e-5, impl=impl), (x, branch, weight)),
        ("swiglu", lambda impl, *a: (kernels.swiglu(*a, impl=impl),), (gate, up)),
        ("split_heads_rotary", split, (qkv,)),
        ("split_heads_rotary, halves", split_halves, (qkv,)),
        ("split_heads_rotary_to_cache", to_cache, (qkv.detach(), *cache)),
        ("decode_attention", decode, (q.detach(), *cache)),
        ("causal_attention", lambda impl, *a: (kernels.causal_attention(*a, scale, impl=impl),), (q, k, v)),
    ]


def _table_of(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
