"""The Triton kernels of qkv.py (forward and backward), their launches, and their custom ops with fakes.

Axes: B image, L token over all scales, l token of one scale, H head, D head dim; C3 = 3 * H * D in the order q, k, v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels._triton import jit, tl
from varfast.kernels.attention_tiles import HEAD_DIM
from varfast.kernels.settings import setting

# A program processes 16 tokens of one head. In bfloat16, for each of q, k and v, these are 16 segments of 128 bytes:
# whole cache lines, and one 128-bit load for each of 128 threads. They are written as contiguous 2 KB if the tokens
# belong to one image. Programs of the same tokens have adjacent ids, so together they read whole rows of 3 C. The
# alternative, all heads of one token in a program, would write segments of 128 bytes at a distance of L * 128 bytes,
# and the 30 heads of VAR-d30 would fill only 15/16 of a tile. Tokens are numbered over all images, so programs are as
# full at l = 1 as at l = 256.
_RULE = {"TOKENS": 16, "num_warps": 4}
# A program of the backward pass processes TILES * 16 tokens. Writing and reading its partial sums of the bias's
# gradient is then 1.2 % of the op's bytes; with one tile it would be 4.7 %.
_BACKWARD_RULE = {"TOKENS": 16, "TILES": 4, "num_warps": 4}


@jit
def _split_kernel(
    qkv_ptr, bias_ptr, q_ptr, k_ptr, v_ptr, q_inverse_ptr, k_inverse_ptr, position_ptr,
    num_tokens, length, heads, k_image, k_head, k_row, v_image, v_head, v_row, eps, position_stride, cache_rows,
    BIAS: tl.constexpr, NORM: tl.constexpr, KEEP_INVERSE: tl.constexpr, POSITION: tl.constexpr, TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Each program processes TOKENS tokens of one head. k and v have separate strides: they may be rows of a cache.

    POSITION: the rows of an image begin at its position, read from the device; rows outside the cache are not written.
    """
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    index = (program // heads) * TOKENS + tl.arange(0, TOKENS)
    dim = tl.arange(0, HEAD_DIM)
    here = index < num_tokens
    inside = here[:, None] & (dim[None, :] < HEAD_DIM)  # the interpreter needs the mask in the full shape
    # Divide while the indices have 32 bits; only the offsets need 64.
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
    flat = (image * heads + head) * length + row  # index into q, which is contiguous, and into the inverse norms
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
    tl.store(q_ptr + q_at, q.to(q_ptr.dtype.element_ty), mask=inside)
    if POSITION:
        row += tl.load(position_ptr + image * position_stride, mask=here, other=0).to(tl.int64)
        inside &= ((row >= 0) & (row < cache_rows))[:, None]
    k_at = (image * k_image + head * k_head + row * k_row)[:, None] + dim[None, :]
    v_at = (image * v_image + head * v_head + row * v_row)[:, None] + dim[None, :]
    tl.store(k_ptr + k_at, k.to(k_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + v_at, v.to(v_ptr.dtype.element_ty), mask=inside)


@jit
def _through_norm(d, y, inverse, eps):
    """Gradient of x, given d = d y, for y = x / max(|x|, eps). Projects out the component of d along y, except where
    the norm was clamped to eps.

    y is read as it was stored, rounded. In 16 bits this adds an error of the size of the rounding of d y itself.
    Together the error is 1.0 to 1.5 times PyTorch's, in the root mean square over 4096 heads, for d y between
    orthogonal to y and nearly parallel to it, which is the worst case. If d y were not rounded itself, the ratio would
    exceed 2 from a cosine of 0.85 between d y and y on.
    """
    along = tl.sum(d * y, axis=1)
    along = tl.where(inverse == tl.div_rn(1.0, eps), 0.0, along)
    return (d - y * along[:, None]) * inverse[:, None]


@jit
def _split_backward_kernel(
    d_q_ptr, d_k_ptr, d_v_ptr, q_ptr, k_ptr, q_inverse_ptr, k_inverse_ptr, d_qkv_ptr, partial_ptr,
    num_tokens, length, heads, q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row, eps,
    BIAS: tl.constexpr, NORM: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The reverse of the forward kernel, on the same tiles; the strides are those of d q, d k and d v."""
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
    position: Tensor | None = None,
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
                q if position is None else position,
                batch * length,
                length,
                heads,
                *k.stride()[:3],
                *v.stride()[:3],
                reference.NORM_EPS,
                0 if position is None else position.expand(batch).stride(0),
                0 if position is None else k.shape[2],
                BIAS=bias_C3 is not None,
                NORM=l2_norm,
                KEEP_INVERSE=inverse is not None,
                POSITION=position is not None,
                HEAD_DIM=HEAD_DIM,
                **chosen,
            )


def _empty_heads(qkv_BLC3: Tensor, num_heads: int) -> Tensor:
    batch, length, width = qkv_BLC3.shape
    return qkv_BLC3.new_empty((batch, num_heads, length, width // (3 * num_heads)))


def outputs(
    qkv_BLC3: Tensor, bias_C3: Tensor | None, num_heads: int, l2_norm: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (_empty_heads(qkv_BLC3, num_heads) for _ in range(3))
    wide = torch.promote_types(q.dtype, torch.float32)
    q_inverse, k_inverse = (q.new_empty(q.shape[:3] if l2_norm else 0, dtype=wide) for _ in range(2))
    return q, k, v, q_inverse, k_inverse


@torch.library.custom_op("varfast::split_heads", mutates_args=())
def split_op(
    qkv_BLC3: Tensor, bias_C3: Tensor | None, num_heads: int, l2_norm: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (B, H, L, D); and 1 / max(norm, eps) of q and k, (B, H, L) float32, empty without normalisation."""
    q, k, v, *inverse = outputs(qkv_BLC3, bias_C3, num_heads, l2_norm)
    _launch_split(qkv_BLC3, bias_C3, l2_norm, q, k, v, (inverse[0], inverse[1]))
    return q, k, v, inverse[0], inverse[1]


split_op.register_fake(outputs)


@torch.library.custom_op("varfast::split_heads_into", mutates_args=("k_BHlD", "v_BHlD"))
def split_into_op(
    qkv_BlC3: Tensor,
    bias_C3: Tensor | None,
    num_heads: int,
    l2_norm: bool,
    k_BHlD: Tensor,
    v_BHlD: Tensor,
    position: Tensor | None = None,
) -> Tensor:
    """Returns q (B, H, l, D). Writes k and v to rows [0, l), or [position, position + l), of k_BHlD and v_BHlD."""
    q = _empty_heads(qkv_BlC3, num_heads)
    _launch_split(qkv_BlC3, bias_C3, l2_norm, q, k_BHlD, v_BHlD, None, position)
    return q


@split_into_op.register_fake
def fake_into(qkv_BlC3, bias_C3, num_heads, l2_norm, k_BHlD, v_BHlD, position=None):
    return _empty_heads(qkv_BlC3, num_heads)


@torch.library.custom_op("varfast::split_heads_backward", mutates_args=())
def split_backward_op(
    d_q_BHLD: Tensor,
    d_k_BHLD: Tensor,
    d_v_BHLD: Tensor,
    q_BHLD: Tensor | None,
    k_BHLD: Tensor | None,
    q_inverse_BHL: Tensor | None,
    k_inverse_BHL: Tensor | None,
    with_bias: bool,
) -> tuple[Tensor, Tensor]:
    """d qkv (B, L, 3 C) and, if with_bias, d bias (3 C,). q, k and the inverse norms are None without normalisation."""
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
                HEAD_DIM=HEAD_DIM,
                **chosen,
            )
        if with_bias:
            d_bias = partial.sum(dim=0)
    return d_qkv, d_bias


def _empty_product(d_q_BHLD: Tensor) -> Tensor:
    batch, heads, length, dim = d_q_BHLD.shape
    return d_q_BHLD.new_empty((batch, length, 3 * heads * dim))


@split_backward_op.register_fake
def fake_backward(d_q_BHLD, d_k_BHLD, d_v_BHLD, q_BHLD, k_BHLD, q_inverse_BHL, k_inverse_BHL, with_bias):
    d_qkv = _empty_product(d_q_BHLD)
    wide = torch.promote_types(d_qkv.dtype, torch.float32)
    return d_qkv, d_qkv.new_empty(d_qkv.shape[2] if with_bias else 0, dtype=wide)
