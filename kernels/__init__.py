"""The ops of varfast that have, or will have, their own kernels. Imported as `varfast.kernels`.

Each op has one file. Each public function takes `impl=`, which picks an implementation. `reference.py` specifies all
ops. This package imports torch, triton and the compiled extension, never the rest of varfast.
"""

from varfast.kernels.adaln import gated_residual, gated_residual_norm, layer_norm_modulate
from varfast.kernels.adamw import AdamWTensors, adamw_step
from varfast.kernels.attention import block_causal_attention, cached_attention
from varfast.kernels.causal_attention import causal_attention
from varfast.kernels.conv import conv3x3
from varfast.kernels.decode_attention import decode_attention
from varfast.kernels.dpo_loss import DPO_STATS, dpo_loss
from varfast.kernels.gelu import gelu_bias, linear_gelu
from varfast.kernels.group_norm import ChannelMoments, channel_moments, group_norm_silu
from varfast.kernels.grpo_loss import GRPO_STATS, grpo_token_loss
from varfast.kernels.logprob import selective_log_softmax
from varfast.kernels.matmul import invariant_linear
from varfast.kernels.qkv import split_heads, split_heads_to_cache
from varfast.kernels.rms_norm import residual_rms_norm, rms_norm
from varfast.kernels.rotary import split_heads_rotary, split_heads_rotary_to_cache
from varfast.kernels.sampling import sample_tokens
from varfast.kernels.selection import OPS, Choice, Implementation, check_implementation, choices, configure
from varfast.kernels.swiglu import swiglu

__all__ = [
    "DPO_STATS",
    "GRPO_STATS",
    "OPS",
    "AdamWTensors",
    "ChannelMoments",
    "Choice",
    "Implementation",
    "adamw_step",
    "block_causal_attention",
    "cached_attention",
    "causal_attention",
    "channel_moments",
    "check_implementation",
    "choices",
    "configure",
    "conv3x3",
    "decode_attention",
    "dpo_loss",
    "gated_residual",
    "gated_residual_norm",
    "gelu_bias",
    "group_norm_silu",
    "grpo_token_loss",
    "invariant_linear",
    "layer_norm_modulate",
    "linear_gelu",
    "residual_rms_norm",
    "rms_norm",
    "sample_tokens",
    "selective_log_softmax",
    "split_heads",
    "split_heads_rotary",
    "split_heads_rotary_to_cache",
    "split_heads_to_cache",
    "swiglu",
]
