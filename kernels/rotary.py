"""Turns the qkv layer's output into heads and applies rotary position embeddings to queries and keys, in one kernel.

The kernel is in rotary_triton.py. This file has the choice of an implementation and the public functions.

Axes: B image, L token, H query head, G key and value head, D head dim, P = D / 2 pairs of channels, N place of the
cache, X = (H + 2 G) D column of the product, in the order q, k, v.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.extension import NO_EXTENSION, cannot_run_cpp, refused_by_cpp
from varfast.kernels.position import check_place, check_position
from varfast.kernels.rotary_triton import (
    backward,
    empty_heads,
    empty_product,
    empty_q,
    setup_context,
    split_into_op,
    split_op,
)
from varfast.kernels.selection import Implementation, cannot_run_triton, implementations, refused_dtype, run

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime

PAIRS = ("adjacent", "halves")


# The same ops in C++ (csrc/rotary_cpu.cpp).
if NO_EXTENSION is None:

    @torch.library.register_fake("varfast::rotary_cpp")
    def _(qkv_BLX: Tensor, rotary_LP2: Tensor | None, num_heads: int, num_kv_heads: int, halves: bool) -> Any:
        return empty_heads(qkv_BLX, num_heads, num_kv_heads)

    @torch.library.register_fake("varfast::rotary_backward_cpp")
    def _(d_q_BHLD: Tensor, d_k_BGLD: Tensor, d_v_BGLD: Tensor, rotary_LP2: Tensor | None, halves: bool) -> Tensor:
        return empty_product(d_q_BHLD, d_k_BGLD)

    @torch.library.register_fake("varfast::rotary_into_cpp")
    def _(
        qkv_BX: Tensor, rotary: Any, position_B: Tensor, num_heads: int, halves: bool, k: Tensor, v: Tensor
    ) -> Tensor:
        return empty_q(qkv_BX, k, num_heads)

    torch.library.register_autograd(
        "varfast::rotary_cpp", partial(backward, torch.ops.varfast.rotary_backward_cpp), setup_context=setup_context
    )


def _split_cpp(
    qkv_BLX: Tensor, rotary_LP2: Tensor | None, num_heads: int, num_kv_heads: int, pairs: str
) -> tuple[Tensor, Tensor, Tensor]:
    if qkv_BLX.dtype == torch.float64:  # used only as a reference in tests
        return reference.split_heads_rotary(qkv_BLX, rotary_LP2, num_heads, num_kv_heads, pairs)
    q, k, v = torch.ops.varfast.rotary_cpp(qkv_BLX, rotary_LP2, num_heads, num_kv_heads, pairs == "halves")
    return q, k, v


def _to_cache_cpp(
    qkv_BX: Tensor,
    rotary_NP2: Tensor | None,
    position: Tensor,
    k_cache_BGND: Tensor,
    v_cache_BGND: Tensor,
    num_heads: int,
    pairs: str,
) -> Tensor:
    caches = (k_cache_BGND, v_cache_BGND)
    if qkv_BX.dtype == torch.float64:
        return reference.split_heads_rotary_to_cache(qkv_BX, rotary_NP2, position, *caches, num_heads, pairs)
    position_B = position.long().expand(len(qkv_BX))
    q: Tensor = torch.ops.varfast.rotary_into_cpp(qkv_BX, rotary_NP2, position_B, num_heads, pairs == "halves", *caches)
    return q


def _refuses_cpp(qkv: Tensor, rotary: Tensor | None, *_: Any) -> str | None:
    return refused_by_cpp(qkv) or (None if qkv.dtype == torch.float64 else _refuses_table(rotary))


def _refuses(qkv: Tensor, rotary: Tensor | None, *_: Any) -> str | None:
    return _refuses_table(rotary) or refused_dtype(qkv)


def _refuses_table(rotary: Tensor | None) -> str | None:
    return None if rotary is None or rotary.dtype == torch.float32 else f"a table in float32, got {rotary.dtype}"


implementations(
    "split_heads_rotary",
    Implementation("triton", split_op, cannot_run_triton, ("cuda",), _refuses),
    Implementation("cpp", _split_cpp, cannot_run_cpp, ("cpu",), _refuses_cpp),
    Implementation("reference", reference.split_heads_rotary),
)
implementations(
    "split_heads_rotary_to_cache",
    Implementation("triton", split_into_op, cannot_run_triton, ("cuda",), _refuses),
    Implementation("cpp", _to_cache_cpp, cannot_run_cpp, ("cpu",), _refuses_cpp),
    Implementation("reference", reference.split_heads_rotary_to_cache),
)


def _check_product(width: int, num_heads: int, num_kv_heads: int) -> int:
    """The head dim of a qkv layer's output with `width` columns."""
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads and {num_kv_heads} key heads: want a multiple, at least 1")
    if width % (num_heads + 2 * num_kv_heads):
        raise ValueError(
            f"qkv has {width} columns: want a multiple of {num_heads} + 2 * {num_kv_heads}, the heads of q, k and v"
        )
    return width // (num_heads + 2 * num_kv_heads)


def _check_rotary(rotary: Tensor | None, places: int, head_dim: int, pairs: str) -> None:
    if pairs not in PAIRS:
        raise ValueError(f"pairs={pairs!r}: want one of {', '.join(PAIRS)}")
    if rotary is None:
        return
    if head_dim % 2 or rotary.shape != (places, head_dim // 2, 2) or not rotary.is_floating_point():
        raise ValueError(
            f"rotary is {tuple(rotary.shape)} of {rotary.dtype}: want ({places}, {head_dim // 2}, 2) floats, cosine "
            f"and sine of each pair of the {head_dim} channels at each place"
        )
    if rotary.requires_grad and torch.is_grad_enabled():
        raise ValueError("rotary needs a gradient, and has none: it is a table of constants")


def split_heads_rotary(
    qkv_BLX: Tensor,
    rotary_LP2: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    pairs: str = "adjacent",
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of each head; each pair (a, b) of q and k becomes (a cos - b sin, b cos + a sin).

    Args:
        qkv_BLX: (B, L, (H + 2 G) D): q, then k, then v, each with its heads one after the other. Differentiable.
        rotary_LP2: (L, D / 2, 2) cosine and sine, usually float32; None: no rotary embedding. It need not be a
            rotation: both are 0 for LlamaGen's class token.
        num_heads, num_kv_heads: H and G; each key head serves H / G adjacent query heads.
        pairs: "adjacent": channels (0, 1), (2, 3) ... (LlamaGen); "halves": (0, D / 2), (1, D / 2 + 1) ... (Llama).
        impl: "auto", "triton" (float32 or 16 bits, the table float32), "cpp" (CPU; the same) or "reference".
    Returns: q (B, H, L, D), k and v (B, G, L, D) in the dtype of qkv, rotated in at least float32 and rounded once;
        contiguous except from "reference".
    Raises: ValueError for a shape that does not divide into heads, a table of another size, or an impl that is unknown
        or cannot run.
    """
    if qkv_BLX.ndim != 3:
        raise ValueError(f"qkv is {tuple(qkv_BLX.shape)}: want (B, L, (H + 2 G) D)")
    dim = _check_product(qkv_BLX.shape[-1], num_heads, num_kv_heads)
    _check_rotary(rotary_LP2, qkv_BLX.shape[1], dim, pairs)
    q, k, v = run("split_heads_rotary", impl, qkv_BLX, rotary_LP2, num_heads, num_kv_heads, pairs)
    return q, k, v


def split_heads_rotary_to_cache(
    qkv_BX: Tensor,
    rotary_NP2: Tensor | None,
    position: Tensor,
    k_cache_BGND: Tensor,
    v_cache_BGND: Tensor,
    num_heads: int,
    pairs: str = "adjacent",
    impl: str = "auto",
) -> Tensor:
    """split_heads_rotary of one token per image; writes its key and value to place `position` of a static cache.

    Args:
        qkv_BX: (B, (H + 2 G) D).
        rotary_NP2: (N, D / 2, 2), a row for each place of the cache, or None.
        position: int32 or int64 on the device, in [0, N): () for all images, or (B,), one for each image, where prompts
            have unequal lengths. A captured CUDA graph reads its value at each replay. On a GPU the value is not
            checked, because that would wait for the device.
        k_cache_BGND, v_cache_BGND: (B, G, N, D) of the dtype of qkv, unit stride in D; written in place.
        num_heads, pairs, impl: as in split_heads_rotary.
    Returns: q (B, H, D).
    Raises: ValueError for shapes or dtypes that do not fit, an impl that is unknown or cannot run, or if a gradient is
        required: there is none.
    """
    if qkv_BX.ndim != 2 or k_cache_BGND.ndim != 4:
        raise ValueError(
            f"qkv is {tuple(qkv_BX.shape)}, k_cache {tuple(k_cache_BGND.shape)}: want (B, (H + 2 G) D), (B, G, N, D)"
        )
    batch, kv_heads, places = k_cache_BGND.shape[:3]
    dim = _check_product(qkv_BX.shape[-1], num_heads, kv_heads)
    for name, cache in (("k_cache", k_cache_BGND), ("v_cache", v_cache_BGND)):
        if cache.shape != (len(qkv_BX), kv_heads, places, dim) or cache.dtype != qkv_BX.dtype:
            raise ValueError(
                f"{name} is {tuple(cache.shape)} of {cache.dtype}: want ({len(qkv_BX)}, {kv_heads}, {places}, {dim}) "
                f"of {qkv_BX.dtype}, which fits qkv {tuple(qkv_BX.shape)} and the other cache"
            )
        if cache.stride(-1) != 1:
            raise ValueError(f"{name} has a stride of {cache.stride(-1)} along its last axis: want 1")
    _check_rotary(rotary_NP2, places, dim, pairs)
    check_position(position, batch, qkv_BX.device)
    check_place(position, places)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (qkv_BX, k_cache_BGND, v_cache_BGND)):
        raise ValueError("split_heads_rotary_to_cache has no gradient; use torch.no_grad(), or split_heads_rotary")
    given = (qkv_BX, rotary_NP2, position, k_cache_BGND, v_cache_BGND, num_heads, pairs)
    q_BHD: Tensor = run("split_heads_rotary_to_cache", impl, *given)
    return q_BHD


def ahead_of_time() -> list[AheadOfTime]:
    """Forward, backward, and into a cache, with the heads of LlamaGen-L, 3B (head dim 100) and Janus-Pro-1B, whose
    rows have a place each; also one token, head and pair.

    Rows of 100 bfloat16 numbers begin at multiples of 8 bytes, so 16-byte loads are impossible there.
    """
    from varfast.kernels import rotary_triton
    from varfast.kernels.aot import recorded

    def call(
        dtype: torch.dtype,
        heads: tuple[int, int, int],
        length: int,
        pairs: str,
        cached: bool,
        rows: tuple[int, ...] = (),
    ) -> None:
        num_heads, kv_heads, dim = heads
        rotary = torch.empty(length, dim // 2, 2)
        if cached:
            k, v = torch.empty(2, 1, kv_heads, length, dim, dtype=dtype).unbind()
            position = torch.zeros(rows, dtype=torch.int64)
            qkv = torch.empty(1, (num_heads + 2 * kv_heads) * dim, dtype=dtype)
            split_heads_rotary_to_cache(qkv, rotary, position, k, v, num_heads, pairs, impl="triton")
        else:
            qkv = torch.empty(1, length, (num_heads + 2 * kv_heads) * dim, dtype=dtype, requires_grad=True)
            q, k, v = split_heads_rotary(qkv, rotary, num_heads, kv_heads, pairs, impl="triton")
            (q.sum() + k.sum() + v.sum()).backward()

    items = []
    narrow = (rotary_triton._rotary_kernel,)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for heads, pairs in (((16, 16, 64), "adjacent"), ((32, 32, 100), "adjacent"), ((32, 8, 128), "halves")):
            for cached in (False, True):
                what = f"split_heads_rotary{' to cache' if cached else ''} {name} {heads} {pairs}"
                items += recorded(
                    what,
                    partial(call, dtype, heads, 256, pairs, cached),
                    also_blackwell=dtype == torch.bfloat16,
                    narrow=narrow if heads[2] == 100 else (),
                )
    called = partial(call, torch.bfloat16, (16, 16, 128), 256, "halves", True, (1,))
    what = "split_heads_rotary to cache bf16 (16, 16, 128) halves, a place a row"
    items += recorded(what, called, also_blackwell=True)
    for cached in (False, True):
        for pairs in PAIRS:
            what = f"split_heads_rotary{' to cache' if cached else ''} one token, one head, {pairs}"
            items += recorded(what, partial(call, torch.float32, (1, 1, 2), 1, pairs, cached), fast=False)
    return items
