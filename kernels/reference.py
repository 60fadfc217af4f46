"""The specification of every op, in ordinary PyTorch operations: any device, any floating dtype, no tuning.

Each kernel of `varfast.kernels` computes one of these functions, and its tests compare it with this file. The ops of
next-token models are in reference_nexttoken.py.
Arithmetic is at least float32 whatever the storage dtype; float64 inputs are computed in float64.

Axes: B image, l token of one scale, L token over all scales, V vocabulary, C channel, H head, D head dim;
of images BCHW: H and W sides; of preferences P: pair, two adjacent images.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from varfast.kernels.reference_nexttoken import at_least_float32
from varfast.kernels.reference_nexttoken import causal_attention as causal_attention
from varfast.kernels.reference_nexttoken import decode_attention as decode_attention
from varfast.kernels.reference_nexttoken import residual_rms_norm as residual_rms_norm
from varfast.kernels.reference_nexttoken import rms_norm as rms_norm
from varfast.kernels.reference_nexttoken import split_heads_rotary as split_heads_rotary
from varfast.kernels.reference_nexttoken import split_heads_rotary_to_cache as split_heads_rotary_to_cache
from varfast.kernels.reference_nexttoken import swiglu as swiglu

if TYPE_CHECKING:
    from varfast.kernels.adamw import AdamWTensors

# ---------------------------------------------------------------------------------------------------------------------
# Counter-based random numbers

_MASK32 = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: 4 random 32-bit words for each 128-bit counter and 64-bit key.

    Args:
        counter: four int64 tensors with values in [0, 2^32), broadcastable to one shape.
        key: two int64 tensors with values in [0, 2^32), broadcastable to the same shape.
    Returns: four int64 tensors with values in [0, 2^32).
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_index in range(10):
        if round_index:
            k0, k1 = (k0 + _PHILOX_WEYL[0]) & _MASK32, (k1 + _PHILOX_WEYL[1]) & _MASK32
        # The 64-bit products may overflow int64. Only their bits are used, and these equal those of uint64 products.
        product0, product1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _MASK32, product0 & _MASK32
        high1, low1 = (product1 >> 32) & _MASK32, product1 & _MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def uniform_Bl(key: Tensor, scale: int, num_images: int, num_tokens: int, first_token: Tensor | None = None) -> Tensor:
    """One uniform number in the open interval (0, 1) for each token of a scale, float64 with 52 random bits.

    A token's number depends only on (seed, step, scale, sample index, position), so it is the same for every batch
    split and block size, and on every process.

    Args:
        key: (3,) int64: seed, step, index of the first image among the samples of this step. A tensor on the device,
            so that a captured CUDA graph reads new values at each replay.
        scale: index of the scale, 0 for the coarsest.
        num_images, num_tokens: B and l.
        first_token: () int64 on the device, place in the scale of the first of the l tokens; None: 0.
    Returns: (B, l) float64.
    """
    seed, step, first_sample = key.unbind()
    sample_B1 = (first_sample + torch.arange(num_images, device=key.device)).unsqueeze(1)
    position_1l = torch.arange(num_tokens, device=key.device).unsqueeze(0)
    if first_token is not None:
        position_1l = position_1l + first_token
    word0, word1, _, _ = philox4x32(
        (position_1l, sample_B1 & _MASK32, torch.full_like(seed, scale), step & _MASK32),
        (seed & _MASK32, (seed >> 32) & _MASK32),
    )
    # 26 bits of each word; adding 0.5 excludes 0 and 1.
    return (((word0 >> 6) << 26) + (word1 >> 6)).double().add(0.5) * 2.0**-52


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and log-probabilities


def split_float32(value: float) -> tuple[float, float]:
    """Split a float64 into the nearest float32 and the remainder. Kernels multiply by both and add the products, which
    is more exact than one float32 factor."""
    nearest = torch.tensor(value, dtype=torch.float32).item()
    return nearest, value - nearest


def _with_bias(logits: Tensor, bias_V: Tensor | None) -> Tensor:
    logits = at_least_float32(logits)
    return logits if bias_V is None else logits + bias_V.to(logits.dtype)


def filter_logits(logits_BlV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set the logits outside the `top_k` largest to -inf, then those outside the `top_p` nucleus.

    The nucleus drops the least probable tokens as long as their probabilities sum to at most 1 - top_p; the most
    probable token always stays. Equal logits are kept or dropped together, so the result does not depend on the order
    of a sort. top_k = 0, and top_p = 0 or 1, switch a filter off.
    """
    if 0 < top_k < logits_BlV.shape[-1]:
        kth_largest = logits_BlV.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits_BlV = logits_BlV.masked_fill(logits_BlV < kth_largest, -math.inf)
    if 0.0 < top_p < 1.0:
        ascending = logits_BlV.sort(dim=-1).values
        kept = ascending.double().softmax(dim=-1).cumsum(dim=-1) > 1.0 - top_p
        kept[..., -1:] = True
        smallest_kept = ascending.masked_fill(~kept, math.inf).amin(dim=-1, keepdim=True)
        logits_BlV = logits_BlV.masked_fill(logits_BlV < smallest_kept, -math.inf)
    return logits_BlV


def sample_tokens(
    logits_BlV: Tensor,
    key: Tensor,
    scale: int,
    temperature: float,
    uncond_logits_BlV: Tensor | None,
    guidance: float,
    top_k: int,
    top_p: float,
    bias_V: Tensor | None = None,
    first_token: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """For a row with NaN or +inf, or with nothing but -inf, the token is some number in [0, V), and logp and entropy
    are NaN."""
    logits = _with_bias(logits_BlV, bias_V)
    if uncond_logits_BlV is not None:
        logits = (1.0 + guidance) * logits - guidance * _with_bias(uncond_logits_BlV, bias_V)
    logits = filter_logits(logits / temperature, top_k, top_p)
    logp_BlV = logits.log_softmax(dim=-1)
    prob_BlV = logp_BlV.double().exp()
    cdf_BlV = prob_BlV.cumsum(dim=-1)
    uniform_Bl1 = uniform_Bl(key, scale, logits.shape[0], logits.shape[1], first_token).unsqueeze(-1)
    target_Bl1 = uniform_Bl1 * cdf_BlV[..., -1:]
    # Sample the first token whose cumulative probability exceeds the target; its own probability is positive. If the
    # product above was rounded up to the whole sum, there is no such token: take the one that completes the sum.
    token_Bl1 = torch.searchsorted(cdf_BlV, target_Bl1, right=True)
    token_Bl1 = torch.minimum(token_Bl1, torch.searchsorted(cdf_BlV, cdf_BlV[..., -1:].contiguous()))
    # Logits that do not form a distribution make all of the row's log-probabilities NaN, so nothing exceeds the target.
    # The index past the end would cause a device assert in the next lookup.
    token_Bl1 = token_Bl1.clamp_max(logits.shape[-1] - 1)
    entropy_Bl = -(prob_BlV.to(logits.dtype) * logp_BlV.masked_fill(prob_BlV == 0, 0.0)).sum(dim=-1)
    return token_Bl1.squeeze(-1), logp_BlV.gather(-1, token_Bl1).squeeze(-1), entropy_Bl


def selective_log_softmax(
    logits_BLV: Tensor, tokens_BL: Tensor, temperature: float, bias_V: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    logp_BLV = (_with_bias(logits_BLV, bias_V) / temperature).log_softmax(dim=-1)
    prob_BLV = logp_BLV.exp()
    # Where p is 0, p log p and its gradient are 0, but computing 0 * -inf would give NaN.
    entropy_BL = -(prob_BLV * logp_BLV.masked_fill(prob_BLV == 0, 0.0)).sum(dim=-1)
    return logp_BLV.gather(-1, tokens_BL.unsqueeze(-1)).squeeze(-1), entropy_BL


# ---------------------------------------------------------------------------------------------------------------------
# Linear layer


def invariant_linear(
    x: Tensor,
    weight_FC: Tensor,
    bias_F: Tensor | None,
    gelu: bool,
    float32_out: bool,
    original_FC: Tensor | None = None,
) -> Tensor:
    """PyTorch's ordinary product, whose bits may depend on the number of rows."""
    if original_FC is not None:
        weight_FC = original_FC.to(weight_FC.dtype)
    dtype = torch.promote_types(x.dtype, torch.float32) if float32_out else x.dtype
    out = F.linear(x.to(dtype), weight_FC.to(dtype), None if bias_F is None else bias_F.to(dtype))
    return F.gelu(out, approximate="tanh") if gelu else out


# ---------------------------------------------------------------------------------------------------------------------
# Heads

NORM_EPS = 1e-12


def _l2_normalize(x: Tensor) -> Tensor:
    return F.normalize(at_least_float32(x), dim=-1, eps=NORM_EPS).to(x.dtype)


def split_heads(
    qkv_BLC3: Tensor, num_heads: int, l2_norm: bool, bias_C3: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = qkv_BLC3.shape
    dtype = qkv_BLC3.dtype
    wide = qkv_BLC3 if bias_C3 is None else at_least_float32(qkv_BLC3) + at_least_float32(bias_C3)
    heads_3BHLD = wide.reshape(batch, length, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    q, k, v = heads_3BHLD.unbind()
    if l2_norm:
        q, k = _l2_normalize(q), _l2_normalize(k)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def split_heads_to_cache(
    qkv_BlC3: Tensor,
    num_heads: int,
    l2_norm: bool,
    k_cache_BHLD: Tensor,
    v_cache_BHLD: Tensor,
    start: int,
    bias_C3: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    q, k, v = split_heads(qkv_BlC3, num_heads, l2_norm, bias_C3)
    if position is not None:
        row_Bl = position.long().reshape(-1, 1) + torch.arange(start, start + k.shape[2], device=k.device)
        index_BHlD = row_Bl[:, None, :, None].expand(k.shape)
        k_cache_BHLD.scatter_(2, index_BHlD, k)
        v_cache_BHLD.scatter_(2, index_BHlD, v)
        return q
    k_cache_BHLD[:, :, start : start + k.shape[2]] = k
    v_cache_BHLD[:, :, start : start + v.shape[2]] = v
    return q


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@lru_cache(maxsize=32)
def block_causal_mask(scale_ends: tuple[int, ...], device: torch.device) -> Tensor:
    """(L, L) bool, True where the query (row) may see the key (column): same scale or an earlier one.

    Scales of 1, 2 and 3 tokens::

        1 0 0 0 0 0
        1 1 1 0 0 0
        1 1 1 0 0 0
        1 1 1 1 1 1
        1 1 1 1 1 1
        1 1 1 1 1 1
    """
    ends = torch.tensor(scale_ends, device=device)
    position_L = torch.arange(scale_ends[-1], device=device)
    visible_L = ends[torch.searchsorted(ends, position_L, right=True)]
    return position_L.unsqueeze(0) < visible_L.unsqueeze(1)


def scaled(q_BHLD: Tensor, logit_scale_H: Tensor) -> Tensor:
    """Queries times the factor of their head's logits."""
    return q_BHLD * logit_scale_H.to(q_BHLD.dtype)[:, None, None]


def block_causal_attention(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, scale_ends: tuple[int, ...], logit_scale_H: Tensor
) -> Tensor:
    mask_LL = block_causal_mask(scale_ends, q_BHLD.device)
    q_BHLD = scaled(q_BHLD, logit_scale_H)
    return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=mask_LL, scale=1.0)


def cached_attention(
    q_BHlD: Tensor,
    k_cache_BHLD: Tensor,
    v_cache_BHLD: Tensor,
    num_keys: int,
    logit_scale_H: Tensor,
    position: Tensor | None = None,
) -> Tensor:
    q = scaled(q_BHlD, logit_scale_H)
    if position is not None:
        row_L = torch.arange(k_cache_BHLD.shape[2], device=q_BHlD.device)
        valid_B11L = row_L < (position.reshape(-1, 1, 1, 1) + num_keys)
        # Set rows that are not valid yet to 0: they may be uninitialised memory, and 0 * NaN would be NaN.
        k, v = (cache.masked_fill(~valid_B11L.mT, 0.0) for cache in (k_cache_BHLD, v_cache_BHLD))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=valid_B11L, scale=1.0)
    return F.scaled_dot_product_attention(q, k_cache_BHLD[:, :, :num_keys], v_cache_BHLD[:, :, :num_keys], scale=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Adaptive LayerNorm


def layer_norm_modulate(x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(at_least_float32(x_BLC), x_BLC.shape[-1:], eps=eps)
    scale, shift = at_least_float32(scale_BC).unsqueeze(1), at_least_float32(shift_BC).unsqueeze(1)
    return (normed * (1.0 + scale) + shift).to(x_BLC.dtype)


def gated_residual(x_BLC: Tensor, branch_BLC: Tensor, gate_BC: Tensor, bias_C: Tensor | None = None) -> Tensor:
    branch = at_least_float32(branch_BLC)
    if bias_C is not None:
        branch = branch + at_least_float32(bias_C)
    wide = branch * at_least_float32(gate_BC).unsqueeze(1)
    return (at_least_float32(x_BLC) + wide).to(x_BLC.dtype)


def gated_residual_norm(
    x_BLC: Tensor,
    branch_BLC: Tensor,
    gate_BC: Tensor,
    scale_BC: Tensor,
    shift_BC: Tensor,
    eps: float,
    bias_C: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    new_BLC = gated_residual(x_BLC, branch_BLC, gate_BC, bias_C)
    return new_BLC, layer_norm_modulate(new_BLC, scale_BC, shift_BC, eps)


# ---------------------------------------------------------------------------------------------------------------------
# MLP


def gelu_bias(x_BLC: Tensor, bias_C: Tensor) -> Tensor:
    return F.gelu(at_least_float32(x_BLC) + at_least_float32(bias_C), approximate="tanh").to(x_BLC.dtype)


def linear_gelu(x_BLC: Tensor, weight_MC: Tensor, low_MC: Tensor, bias_M: Tensor) -> Tensor:
    return gelu_bias(F.linear(x_BLC, weight_MC.to(x_BLC.dtype)), bias_M)


# ---------------------------------------------------------------------------------------------------------------------
# GroupNorm


def memory_format(x_BCHW: Tensor) -> torch.memory_format:
    """channels_last if the channels are innermost in memory, else contiguous."""
    innermost = x_BCHW.stride(1) == 1 and not x_BCHW.is_contiguous()
    return torch.channels_last if innermost else torch.contiguous_format


def group_norm_silu(
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    input_bias_C: Tensor | None,
    moments: object = None,
) -> Tensor:
    """`moments` is ignored: it only saves other implementations a pass over x."""
    wide = at_least_float32(x_BCHW)
    if input_bias_C is not None:
        wide = wide + input_bias_C.to(wide.dtype)[:, None, None]
    out = F.group_norm(wide, num_groups, weight_C.to(wide.dtype), bias_C.to(wide.dtype), eps)
    out = F.silu(out) if silu else out
    return out.to(x_BCHW.dtype).contiguous(memory_format=memory_format(x_BCHW))


def conv3x3(x_BCHW: Tensor, weight_OCHW: Tensor, residual_BOHW: Tensor | None) -> tuple[Tensor, None]:
    out = F.conv2d(x_BCHW, weight_OCHW, padding=1)
    return (out if residual_BOHW is None else out.add_(residual_BOHW)), None


def channel_moments(x_BCHW: Tensor, residual_BCHW: Tensor | None) -> tuple[Tensor, None]:
    return (x_BCHW if residual_BCHW is None else x_BCHW.add_(residual_BCHW)), None


# ---------------------------------------------------------------------------------------------------------------------
# GRPO loss


_K3_SERIES = tuple(1.0 / math.factorial(n) for n in range(2, 10))


def k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """exp(q) - q - 1 with q = logp_ref - logp: the k3 estimate of KL(policy || reference), never negative.

    Computed as expm1(q) - q for |q| >= 0.1, and as a power series for smaller |q|. In float32 the difference has a
    relative error of 1e-6 at 0.1 and of 1e-2 at 1e-5, and |q| is about 1e-5 early in training
    (tests/kernels/test_grpo_loss.py).
    """
    q = logp_ref - logp
    small = q.abs() < 0.1
    q_small = torch.where(small, q, 0.0)  # keeps the branch that is not selected, and its gradient, finite
    series = torch.zeros_like(q)
    for coefficient in reversed(_K3_SERIES):
        series = series * q_small + coefficient
    return torch.where(small, q_small * q_small * series, torch.expm1(q) - q)


def grpo_token_loss(
    logp_BL: Tensor,
    logp_old_BL: Tensor,
    logp_ref_BL: Tensor | None,
    advantages_BL: Tensor,
    clip_eps: float,
    kl_beta: float,
    sequence_ratio: bool = False,
    unbiased_kl: bool = False,
) -> tuple[Tensor, Tensor]:
    logp_BL = at_least_float32(logp_BL)
    advantages_BL = advantages_BL.to(logp_BL.dtype)
    log_ratio_BL = logp_BL - logp_old_BL.to(logp_BL.dtype)
    ratio_BL = token_ratio_BL = log_ratio_BL.exp()
    if sequence_ratio:  # value of the image's ratio, gradient as of the token's
        ratio_BL = (log_ratio_BL.detach().mean(dim=1, keepdim=True) + (logp_BL - logp_BL.detach())).exp()
    clipped_BL = ratio_BL.clamp(1.0 - clip_eps, 1.0 + clip_eps)
    surrogate_BL = torch.minimum(ratio_BL * advantages_BL, clipped_BL * advantages_BL)
    kl_BL = torch.zeros_like(logp_BL) if logp_ref_BL is None else k3(logp_BL, logp_ref_BL.to(logp_BL.dtype))
    unbiased_BL = token_ratio_BL * kl_BL if unbiased_kl and logp_ref_BL is not None else kl_BL
    loss = (kl_beta * unbiased_BL - surrogate_BL).mean(dim=1).mean()
    with torch.no_grad():
        is_clipped_BL = ((ratio_BL > 1.0 + clip_eps) & (advantages_BL > 0)) | (
            (ratio_BL < 1.0 - clip_eps) & (advantages_BL < 0)
        )
        gap_BL = (token_ratio_BL - 1.0).abs()
        stats = torch.stack(
            [kl_BL.mean(), is_clipped_BL.to(loss.dtype).mean(), ratio_BL.mean(), gap_BL.mean(), gap_BL.max()]
        )
    return loss, stats


# ---------------------------------------------------------------------------------------------------------------------
# DPO loss


def dpo_loss(
    logp_BL: Tensor, logp_ref_BL: Tensor, beta: float, label_smoothing: float, loss_type: str
) -> tuple[Tensor, Tensor]:
    """In float64 whatever the dtype: a row's sum has few numbers that matter, and its error would be that of the
    gradient of all its tokens."""
    wide_BL = logp_BL.double()
    of_row = torch.mean if loss_type == "ipo" else torch.sum
    logp_B, reward_B = of_row(wide_BL, dim=1).detach(), beta * of_row(wide_BL - logp_ref_BL.double(), dim=1)
    margin_P = reward_B[0::2] - reward_B[1::2]
    if loss_type == "sigmoid":
        loss_P = F.softplus(-margin_P)
        if label_smoothing:  # softplus(z) = softplus(-z) + z
            loss_P = loss_P + label_smoothing * margin_P
    elif loss_type == "hinge":
        loss_P = F.relu(1.0 - margin_P)
    else:
        loss_P = (margin_P / beta - 1.0 / (2.0 * beta)).square()
    with torch.no_grad():
        is_right_P = (margin_P > 0.0).double()
        found = (reward_B[0::2], reward_B[1::2], margin_P, is_right_P, logp_B[0::2], logp_B[1::2])
        stats = torch.stack([x.mean() for x in found])
    dtype = torch.promote_types(logp_BL.dtype, torch.float32)
    return loss_P.mean().to(dtype), stats.to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


def adamw_step(
    tensors: AdamWTensors, lr: float, betas: tuple[float, float], eps: float, clip: Tensor, skip: Tensor
) -> None:
    """AdamW with decoupled weight decay, in place, in the dtype of the parameters. See kernels/adamw.py."""
    if bool(skip != 0):
        return
    lists = (tensors.parameters, tensors.gradients, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps)
    for p, gradient, m, v, step, decay, low in zip(*lists, tensors.weight_decays, tensors.copies, strict=True):
        step += 1
        g = gradient / clip
        m.mul_(betas[0]).add_(g, alpha=1.0 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1.0 - betas[1])
        m_hat = m / (1.0 - betas[0] ** float(step))
        v_hat = v / (1.0 - betas[1] ** float(step))
        p.sub_(lr * decay * p + lr * m_hat / (v_hat.sqrt() + eps))
        if low is not None:
            low.copy_(p)
