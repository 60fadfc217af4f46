"""From the product of the qkv layer to heads: split, L2-normalise queries and keys, lay out for attention; one kernel.

Reads and writes each number once: 12 bytes a channel and token in bfloat16, where PyTorch's dozen kernels pass over
float32 copies. The backward pass reads the normalised q and k, which attention keeps for its own, and the inverse
norms: the product itself need not be kept.

Axes: B image, L token over all scales, l token of one scale, C channel = H * D, H head, D head dim; C3 = 3 * C in the
order q, k, v.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels._triton import jit, tl
from varfast.kernels.extension import NO_EXTENSION, cannot_run_cpp, refused_by_cpp
from varfast.kernels.selection import Implementation, cannot_run_triton, implementations, refused_dtype, run
from varfast.kernels.settings import setting

if TYPE_CHECKING:
    from varfast.kernels.aot import AheadOfTime

_HEAD_DIM = 64
# A program takes 16 tokens of one head. In bfloat16, of each of q, k and v: 16 segments of 128 bytes, whole cache
# lines, one 128-bit load for each of 128 threads; written as runs of 2 KB where the tokens are of one image. The
# programs of the same tokens follow each other, so what the device reads at a time is whole rows of 3 C. The other way
# round, all heads of one token a program, would write segments of 128 bytes, L * 128 bytes apart, and the 30 heads of
# d30 would fill 15/16 of a tile. Tokens are counted over all images: at l = 1 a program is as full as at l = 256.
_RULE = {"TOKENS": 16, "num_warps": 4}
# Of the backward pass, TILES times 16 tokens a program: its partial sums of the bias's gradient, written and read, are
# 1.2 % of the bytes of the op; with one tile they would be 4.7 %.
_BACKWARD_RULE = {"TOKENS": 16, "TILES": 4, "num_warps": 4}


@jit
def _split_kernel(
    qkv_ptr,
    bias_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    q_inverse_ptr,
    k_inverse_ptr,
    num_tokens,
    length,
    heads,
    k_image,
    k_head,
    k_row,
    v_image,
    v_head,
    v_row,
    eps,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    KEEP_INVERSE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """TOKENS tokens of one head a program. k and v have strides of their own: they may be rows of a cache."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    index = (program // heads) * TOKENS + tl.arange(0, TOKENS)
    dim = tl.arange(0, HEAD_DIM)
    here = index < num_tokens
    inside = here[:, None] & (dim[None, :] < HEAD_DIM)  # the interpreter wants a mask of one shape
    # Divided while they have 32 bits; offsets need 64.
    token, image, row = index.to(tl.int64), (index // length).to(tl.int64), (index % length).to(tl.int64)
    source = qkv_ptr + (token * (3 * heads * HEAD_DIM) + head * HEAD_DIM)[:, None] + dim[None, :]
    q = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(source + heads * HEAD_DIM, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(source + 2 * heads * HEAD_DIM, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        bias = bias_ptr + head * HEAD_DIM + dim
        q += tl.load(bias).to(tl.float32)[None, :]
        k += tl.load(bias + heads * HEAD_DIM).to(tl.float32)[None, :]
        v += tl.load(bias + 2 * heads * HEAD_DIM).to(tl.float32)[None, :]
    flat = (image * heads + head) * length + row  # of q, which is contiguous, and of the inverse norms
    if NORM:
        q_norm = tl.sqrt_rn(tl.sum(q * q, axis=1))
        k_norm = tl.sqrt_rn(tl.sum(k * k, axis=1))
        q_inverse = tl.div_rn(1.0, tl.where(q_norm < eps, eps, q_norm))  # not maximum: NaN stays NaN
        k_inverse = tl.div_rn(1.0, tl.where(k_norm < eps, eps, k_norm))
        q = q * q_inverse[:, None]
        k = k * k_inverse[:, None]
        if KEEP_INVERSE:
            tl.store(q_inverse_ptr + flat, q_inverse, mask=here)
            tl.store(k_inverse_ptr + flat, k_inverse, mask=here)
    q_at = (flat * HEAD_DIM)[:, None] + dim[None, :]
    k_at = (image * k_image + head * k_head + row * k_row)[:, None] + dim[None, :]
    v_at = (image * v_image + head * v_head + row * v_row)[:, None] + dim[None, :]
    tl.store(q_ptr + q_at, q.to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(k_ptr + k_at, k.to(k_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + v_at, v.to(v_ptr.dtype.element_ty), mask=inside)


@jit
def _through_norm(d, y, inverse, eps):
    """d x of y = x / max(|x|, eps), given d y: the part of it along y is lost, but where the norm was raised to eps.

    y comes as it was stored. In 16 bits that adds an error the size of the rounding of d y itself: together 1.0 to 1.5
    times PyTorch's, in the root mean square over 4096 heads, from right angles to d y nearly parallel to y, which is
    the worst. Of a d y without rounding it would be more than twice from a cosine of 0.85 on.
    """
    along = tl.sum(d * y, axis=1)
    along = tl.where(inverse == tl.div_rn(1.0, eps), 0.0, along)
    return (d - y * along[:, None]) * inverse[:, None]


@jit
def _split_backward_kernel(
    d_q_ptr,
    d_k_ptr,
    d_v_ptr,
    q_ptr,
    k_ptr,
    q_inverse_ptr,
    k_inverse_ptr,
    d_qkv_ptr,
    partial_ptr,
    num_tokens,
    length,
    heads,
    q_image,
    q_head,
    q_row,
    k_image,
    k_head,
    k_row,
    v_image,
    v_head,
    v_row,
    eps,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """The tiles of the forward kernel, the other way; strides are those of the gradients."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    dim = tl.arange(0, HEAD_DIM)
    q_sum = tl.zeros((TOKENS, HEAD_DIM), tl.float32)
    k_sum = tl.zeros((TOKENS, HEAD_DIM), tl.float32)
    v_sum = tl.zeros((TOKENS, HEAD_DIM), tl.float32)
    dtype = d_qkv_ptr.dtype.element_ty
    for tile in range(TILES):
        index = ((program // heads) * TILES + tile) * TOKENS + tl.arange(0, TOKENS)
        here = index < num_tokens
        inside = here[:, None] & (dim[None, :] < HEAD_DIM)
        token, image, row = index.to(tl.int64), (index // length).to(tl.int64), (index % length).to(tl.int64)
        q_at = (image * q_image + head * q_head + row * q_row)[:, None] + dim[None, :]
        k_at = (image * k_image + head * k_head + row * k_row)[:, None] + dim[None, :]
        v_at = (image * v_image + head * v_head + row * v_row)[:, None] + dim[None, :]
        d_q = tl.load(d_q_ptr + q_at, mask=inside, other=0.0).to(tl.float32)
        d_k = tl.load(d_k_ptr + k_at, mask=inside, other=0.0).to(tl.float32)
        d_v = tl.load(d_v_ptr + v_at, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            flat = (image * heads + head) * length + row
            at = (flat * HEAD_DIM)[:, None] + dim[None, :]
            q = tl.load(q_ptr + at, mask=inside, other=0.0).to(tl.float32)
            k = tl.load(k_ptr + at, mask=inside, other=0.0).to(tl.float32)
            d_q = _through_norm(d_q, q, tl.load(q_inverse_ptr + flat, mask=here, other=0.0), eps)
            d_k = _through_norm(d_k, k, tl.load(k_inverse_ptr + flat, mask=here, other=0.0), eps)
        target = d_qkv_ptr + (token * (3 * heads * HEAD_DIM) + head * HEAD_DIM)[:, None] + dim[None, :]
        tl.store(target, d_q.to(dtype), mask=inside)
        tl.store(target + heads * HEAD_DIM, d_k.to(dtype), mask=inside)
        tl.store(target + 2 * heads * HEAD_DIM, d_v.to(dtype), mask=inside)
        if BIAS:
            q_sum += d_q
            k_sum += d_k
            v_sum += d_v
    if BIAS:
        partial = partial_ptr + ((program // heads).to(tl.int64) * 3 * heads + head) * HEAD_DIM + dim
        tl.store(partial, tl.sum(q_sum, axis=0))
        tl.store(partial + heads * HEAD_DIM, tl.sum(k_sum, axis=0))
        tl.store(partial + 2 * heads * HEAD_DIM, tl.sum(v_sum, axis=0))


def _programs(batch: int, length: int, heads: int, tokens: int) -> tuple[int]:
    return (-(-batch * length // tokens) * heads,)


def _launch_split(
    qkv_BLC3: Tensor,
    bias_C3: Tensor | None,
    l2_norm: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inverse: tuple[Tensor, Tensor] | None,
) -> None:
    batch, heads, length, _ = q.shape
    if q.numel():
        chosen = setting("split_heads_forward", heads, q.device, **_RULE)
        with torch.cuda.device_of(q):
            _split_kernel[_programs(batch, length, heads, chosen["TOKENS"])](
                qkv_BLC3.contiguous(),
                q if bias_C3 is None else bias_C3.contiguous(),
                q,
                k,
                v,
                *(inverse or (q, q)),
                batch * length,
                length,
                heads,
                *k.stride()[:3],
                *v.stride()[:3],
                reference.NORM_EPS,
                BIAS=bias_C3 is not None,
                NORM=l2_norm,
                KEEP_INVERSE=inverse is not None,
                HEAD_DIM=_HEAD_DIM,
                **chosen,
            )


def _empty_heads(qkv_BLC3: Tensor, num_heads: int) -> Tensor:
    batch, length, width = qkv_BLC3.shape
    return qkv_BLC3.new_empty((batch, num_heads, length, width // (3 * num_heads)))


def _outputs(
    qkv_BLC3: Tensor, bias_C3: Tensor | None, num_heads: int, l2_norm: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (_empty_heads(qkv_BLC3, num_heads) for _ in range(3))
    wide = torch.promote_types(q.dtype, torch.float32)
    q_inverse, k_inverse = (q.new_empty(q.shape[:3] if l2_norm else 0, dtype=wide) for _ in range(2))
    return q, k, v, q_inverse, k_inverse


@torch.library.custom_op("varfast::split_heads", mutates_args=())
def _split_op(
    qkv_BLC3: Tensor, bias_C3: Tensor | None, num_heads: int, l2_norm: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (B, H, L, D), and 1 / max(norm, eps) of q and k, (B, H, L) float32; empty without normalisation."""
    q, k, v, *inverse = _outputs(qkv_BLC3, bias_C3, num_heads, l2_norm)
    _launch_split(qkv_BLC3, bias_C3, l2_norm, q, k, v, (inverse[0], inverse[1]))
    return q, k, v, inverse[0], inverse[1]


_split_op.register_fake(_outputs)


@torch.library.custom_op("varfast::split_heads_into", mutates_args=("k_BHlD", "v_BHlD"))
def _split_into_op(
    qkv_BlC3: Tensor, bias_C3: Tensor | None, num_heads: int, l2_norm: bool, k_BHlD: Tensor, v_BHlD: Tensor
) -> Tensor:
    """q (B, H, l, D); k and v are written where they belong."""
    q = _empty_heads(qkv_BlC3, num_heads)
    _launch_split(qkv_BlC3, bias_C3, l2_norm, q, k_BHlD, v_BHlD, None)
    return q


@_split_into_op.register_fake
def _fake_into(qkv_BlC3, bias_C3, num_heads, l2_norm, k_BHlD, v_BHlD):
    return _empty_heads(qkv_BlC3, num_heads)


@torch.library.custom_op("varfast::split_heads_backward", mutates_args=())
def _split_backward_op(
    d_q_BHLD: Tensor,
    d_k_BHLD: Tensor,
    d_v_BHLD: Tensor,
    q_BHLD: Tensor | None,
    k_BHLD: Tensor | None,
    q_inverse_BHL: Tensor | None,
    k_inverse_BHL: Tensor | None,
    with_bias: bool,
) -> tuple[Tensor, Tensor]:
    """d qkv (B, L, 3 C) and, if asked for, d bias (3 C,); the last four are None without normalisation."""
    d_q, d_k, d_v = (x if x.stride(-1) == 1 else x.contiguous() for x in (d_q_BHLD, d_k_BHLD, d_v_BHLD))
    d_qkv = _empty_product(d_q)
    batch, heads, length, dim = d_q.shape
    d_bias = d_q.new_zeros(3 * heads * dim if with_bias else 0, dtype=torch.float32)
    if d_q.numel():
        # Contiguous: a saved-tensor hook may have changed their layout.
        saved = (q_BHLD, k_BHLD, q_inverse_BHL, k_inverse_BHL)
        kept = [d_q if x is None else x.contiguous() for x in saved]
        chosen = setting("split_heads_backward", heads, d_q.device, **_BACKWARD_RULE)
        programs = _programs(batch, length, heads, chosen["TOKENS"] * chosen["TILES"])
        partial = d_bias.new_empty((programs[0] // heads, 3 * heads * dim) if with_bias else 0)
        with torch.cuda.device_of(d_q):
            _split_backward_kernel[programs](
                d_q,
                d_k,
                d_v,
                *kept,
                d_qkv,
                partial,
                batch * length,
                length,
                heads,
                *d_q.stride()[:3],
                *d_k.stride()[:3],
                *d_v.stride()[:3],
                reference.NORM_EPS,
                BIAS=with_bias,
                NORM=q_BHLD is not None,
                HEAD_DIM=_HEAD_DIM,
                **chosen,
            )
        if with_bias:
            d_bias = partial.sum(dim=0)
    return d_qkv, d_bias


def _empty_product(d_q_BHLD: Tensor) -> Tensor:
    batch, heads, length, dim = d_q_BHLD.shape
    return d_q_BHLD.new_empty((batch, length, 3 * heads * dim))


@_split_backward_op.register_fake
def _fake_backward(d_q_BHLD, d_k_BHLD, d_v_BHLD, q_BHLD, k_BHLD, q_inverse_BHL, k_inverse_BHL, with_bias):
    d_qkv = _empty_product(d_q_BHLD)
    wide = torch.promote_types(d_qkv.dtype, torch.float32)
    return d_qkv, d_qkv.new_empty(d_qkv.shape[2] if with_bias else 0, dtype=wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _, q_inverse, k_inverse = output
    _, bias_C3, _, ctx.l2_norm = inputs
    ctx.bias_dtype = None if bias_C3 is None else bias_C3.dtype
    ctx.save_for_backward(*((q, k, q_inverse, k_inverse) if ctx.l2_norm else ()))
    ctx.mark_non_differentiable(q_inverse, k_inverse)
    ctx.set_materialize_grads(False)  # no zeros for the inverse norms
    ctx.shape = q.shape


def _backward(op: Any, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
    given = next((d for d in gradients[:3] if d is not None), None)
    if given is None:
        return None, None, None, None
    d_heads = (given.new_zeros(ctx.shape) if d is None else d for d in gradients[:3])
    with_bias = ctx.bias_dtype is not None
    d_qkv, d_bias = op(*d_heads, *(ctx.saved_tensors if ctx.l2_norm else (None,) * 4), with_bias)
    return d_qkv, d_bias.to(ctx.bias_dtype) if with_bias else None, None, None


_split_op.register_autograd(functools.partial(_backward, _split_backward_op), setup_context=_setup_context)

# The same ops in C++, csrc/split_heads_cpu.cpp, in float64 too.
if NO_EXTENSION is None:
    torch.library.register_fake("varfast::split_heads_cpp", _outputs)
    torch.library.register_fake("varfast::split_heads_into_cpp", _fake_into)
    torch.library.register_fake("varfast::split_heads_backward_cpp", _fake_backward)
    torch.library.register_autograd(
        "varfast::split_heads_cpp",
        functools.partial(_backward, torch.ops.varfast.split_heads_backward_cpp),
        setup_context=_setup_context,
    )


def _refused_head_dim(qkv_BLC3: Tensor, num_heads: int) -> str | None:
    dim = qkv_BLC3.shape[-1] // 3 // num_heads
    return None if dim == _HEAD_DIM else f"a head dim of {_HEAD_DIM}, VAR's, got {dim}"


def _refuses(qkv_BLC3: Tensor, num_heads: int, *_: Any) -> str | None:
    return _refused_head_dim(qkv_BLC3, num_heads) or refused_dtype(qkv_BLC3)


def _refuses_cpp(qkv_BLC3: Tensor, num_heads: int, *_: Any) -> str | None:
    return _refused_head_dim(qkv_BLC3, num_heads) or refused_by_cpp(qkv_BLC3)


def _split_triton(
    qkv_BLC3: Tensor, num_heads: int, l2_norm: bool, bias_C3: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _, _ = _split_op(qkv_BLC3, bias_C3, num_heads, l2_norm)
    return q, k, v


def _split_to_cache_triton(
    qkv_BlC3: Tensor,
    num_heads: int,
    l2_norm: bool,
    k_cache_BHLD: Tensor,
    v_cache_BHLD: Tensor,
    start: int,
    bias_C3: Tensor | None,
) -> Tensor:
    rows = slice(start, start + qkv_BlC3.shape[1])
    return _split_into_op(qkv_BlC3, bias_C3, num_heads, l2_norm, k_cache_BHLD[:, :, rows], v_cache_BHLD[:, :, rows])


def _wide_bias(qkv: Tensor, bias_C3: Tensor | None) -> Tensor | None:
    return None if bias_C3 is None else bias_C3.to(torch.promote_types(qkv.dtype, torch.float32))


def _split_cpp(
    qkv_BLC3: Tensor, num_heads: int, l2_norm: bool, bias_C3: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _, _ = torch.ops.varfast.split_heads_cpp(qkv_BLC3, _wide_bias(qkv_BLC3, bias_C3), num_heads, l2_norm)
    return q, k, v


def _split_to_cache_cpp(
    qkv_BlC3: Tensor,
    num_heads: int,
    l2_norm: bool,
    k_cache_BHLD: Tensor,
    v_cache_BHLD: Tensor,
    start: int,
    bias_C3: Tensor | None,
) -> Tensor:
    rows = slice(start, start + qkv_BlC3.shape[1])
    bias = _wide_bias(qkv_BlC3, bias_C3)
    return torch.ops.varfast.split_heads_into_cpp(
        qkv_BlC3, bias, num_heads, l2_norm, k_cache_BHLD[:, :, rows], v_cache_BHLD[:, :, rows]
    )


implementations(
    "split_heads",
    Implementation("triton", _split_triton, cannot_run_triton, ("cuda",), _refuses),
    Implementation("cpp", _split_cpp, cannot_run_cpp, ("cpu",), _refuses_cpp),
    Implementation("reference", reference.split_heads),
)
implementations(
    "split_heads_to_cache",
    Implementation("triton", _split_to_cache_triton, cannot_run_triton, ("cuda",), _refuses),
    Implementation("cpp", _split_to_cache_cpp, cannot_run_cpp, ("cpu",), _refuses_cpp),
    Implementation("reference", reference.split_heads_to_cache),
)


def ahead_of_time() -> list[AheadOfTime]:
    """Both directions, and the one into a cache, with the heads of d16 and d30; one image, token and head."""
    from varfast.kernels.aot import recorded

    def call(dtype: torch.dtype, length: int, heads: int, cached: bool, l2_norm: bool) -> None:
        product = torch.empty(1, length, 3 * heads * _HEAD_DIM, dtype=dtype)
        bias = torch.empty(product.shape[-1], requires_grad=not cached)
        if cached:
            k, v = torch.empty(2, 1, heads, length + 37, _HEAD_DIM, dtype=dtype).unbind()
            split_heads_to_cache(product, heads, l2_norm, k, v, 37, bias, impl="triton")
        else:
            q, k, v = split_heads(product.requires_grad_(), heads, l2_norm, bias, impl="triton")
            (q.sum() + k.sum() + v.sum()).backward()

    items = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for heads in (16, 30):
            for cached in (False, True):
                what = f"split_heads{' to cache' if cached else ''} {name} H={heads}"
                main = dtype == torch.bfloat16 and heads == 16
                items += recorded(what, partial(call, dtype, 680, heads, cached, True), also_blackwell=main)
    for cached in (False, True):
        for l2_norm in (False, True):
            what = f"split_heads{' to cache' if cached else ''} one token, one head"
            items += recorded(what, partial(call, torch.float32, 1, 1, cached, l2_norm), fast=False)
    return items


def _check_product(qkv_BLC3: Tensor, num_heads: int, bias_C3: Tensor | None) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}: there must be a head")
    if qkv_BLC3.ndim != 3 or qkv_BLC3.shape[-1] % (3 * num_heads):
        raise ValueError(f"qkv is {tuple(qkv_BLC3.shape)}: want (B, L, 3 * C), C a multiple of the {num_heads} heads")
    if bias_C3 is not None and bias_C3.shape != qkv_BLC3.shape[-1:]:
        raise ValueError(f"bias is {tuple(bias_C3.shape)}: want ({qkv_BLC3.shape[-1]},), one a column of the product")


def split_heads(
    qkv_BLC3: Tensor, num_heads: int, l2_norm: bool, bias_C3: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of each head from the product of the qkv layer; queries and keys of length 1 if asked.

    Normalised is x / max(|x|, 1e-12) along D, in at least float32, rounded once.

    Args:
        qkv_BLC3: (B, L, 3 * H * D): q, k, v, and in each the heads one after the other. Differentiable.
        num_heads: H.
        l2_norm: normalise q and k.
        bias_C3: (3 * H * D,), that of the product, added in at least float32. Differentiable; its gradient is summed
            where that of the product is made.
        impl: "auto"; "triton" (float32 or 16 bits) and "cpp" (float32, float64, bfloat16), both D = 64; "reference".
    Returns: q, k and v, (B, H, L, D) each in the dtype of qkv, contiguous but from "reference".
    Raises: ValueError for a shape that does not divide into heads, or for an impl that is unknown or cannot run.
    """
    _check_product(qkv_BLC3, num_heads, bias_C3)
    q_BHLD, k_BHLD, v_BHLD = run("split_heads", impl, qkv_BLC3, num_heads, l2_norm, bias_C3)
    return q_BHLD, k_BHLD, v_BHLD


def split_heads_to_cache(
    qkv_BlC3: Tensor,
    num_heads: int,
    l2_norm: bool,
    k_cache_BHLD: Tensor,
    v_cache_BHLD: Tensor,
    start: int,
    bias_C3: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """split_heads of the tokens of one scale; keys and values go into rows start ... start + l of a static cache.

    Args:
        qkv_BlC3: (B, l, 3 * H * D).
        num_heads: H.
        l2_norm: normalise q and k.
        k_cache_BHLD, v_cache_BHLD: (B, H, L, D) of the dtype of qkv, unit stride in D; written in place.
        start: tokens before this scale.
        bias_C3: (3 * H * D,) or None.
        impl: "auto"; "triton" (float32 or 16 bits) and "cpp" (float32, float64, bfloat16), both D = 64; "reference".
    Returns: q, (B, H, l, D).
    Raises: ValueError for shapes or dtypes that do not fit, rows outside the cache, an impl that is unknown or cannot
        run, or if a gradient is wanted: there is none.
    """
    _check_product(qkv_BlC3, num_heads, bias_C3)
    batch, length, width = qkv_BlC3.shape
    dim = width // (3 * num_heads)
    caches = (k_cache_BHLD, v_cache_BHLD)
    for name, cache in zip(("k_cache", "v_cache"), caches, strict=True):
        if cache.ndim != 4 or (*cache.shape[:2], cache.shape[3]) != (batch, num_heads, dim):
            raise ValueError(
                f"{name} is {tuple(cache.shape)}: want ({batch}, {num_heads}, L, {dim}) for {num_heads} heads of "
                f"qkv {tuple(qkv_BlC3.shape)}"
            )
        if cache.dtype != qkv_BlC3.dtype:
            raise ValueError(f"{name} is {cache.dtype}, qkv {qkv_BlC3.dtype}: want one dtype")
        if cache.stride(-1) != 1:
            raise ValueError(f"{name} has a stride of {cache.stride(-1)} along its last axis: want 1")
        if not 0 <= start <= cache.shape[2] - length:
            raise ValueError(f"rows {start} to {start + length} are outside {name}, which has {cache.shape[2]}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (qkv_BlC3, *caches)):
        raise ValueError("split_heads_to_cache has no gradient; use torch.no_grad(), or split_heads")
    q_BHlD: Tensor = run(
        "split_heads_to_cache", impl, qkv_BlC3, num_heads, l2_norm, k_cache_BHLD, v_cache_BHLD, start, bias_C3
    )
    return q_BHlD
