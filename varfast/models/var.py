"""The VAR transformer: next-scale prediction over the token maps of a multi-scale VQ-VAE.

Parameter names and shapes are those of the public checkpoints var_d16.pth ... var_d36.pth.
Nothing here depends on train() or eval(): there is no dropout, DropPath is an argument of forward, and label dropout is
the pre-training loop's business. A log-probability therefore always describes the policy that was sampled.

Axes: B image, L token over all scales, l token of one scale, V vocabulary, C channel, H head, D head dim.
Source: Tian et al., arXiv:2404.02905.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varfast import kernels
from varfast.config import HEAD_DIM, VARConfig

MAX_LOGIT_SCALE = 100.0


class Linear(nn.Linear):
    """The one place of the model's precision: weights stay as they are stored, the product is in the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


@dataclass
class KVCache:
    """Static keys and values of all blocks: written in place, scale by scale.

    Attributes:
        k, v: (depth, B, H, L, D).
    """

    k: Tensor
    v: Tensor

    @classmethod
    def empty(cls, config: VARConfig, batch: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        shape = (config.depth, batch, config.depth, config.num_tokens, HEAD_DIM)
        return cls(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))


class SelfAttention(nn.Module):
    """Multi-head attention under the scale mask, with L2-normalised queries and keys where the config says so."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width, self.num_heads = config.width, config.depth
        if config.qk_l2_norm:
            self.scale_mul_1H11: nn.Parameter | None = nn.Parameter(
                torch.full((1, self.num_heads, 1, 1), math.log(4.0))
            )
        else:
            self.scale_mul_1H11 = None
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = Linear(width, width)

    def logit_scale_H(self) -> Tensor:
        if self.scale_mul_1H11 is None:
            # 0.25 beside 1/sqrt(D): so in the public model.
            return torch.full((self.num_heads,), 0.25 / math.sqrt(HEAD_DIM), device=self.q_bias.device)
        return self.scale_mul_1H11.flatten().clamp_max(math.log(MAX_LOGIT_SCALE)).exp()

    def forward(self, x_BLC: Tensor, scale_ends: tuple[int, ...], cache: tuple[Tensor, Tensor, int] | None) -> Tensor:
        """All scales under the mask; or, with a cache (k_BHLD, v_BHLD, tokens before), one scale after the others."""
        batch, length, width = x_BLC.shape
        bias = torch.cat([self.q_bias, self.get_buffer("zero_k_bias"), self.v_bias]).to(x_BLC.dtype)
        qkv = F.linear(x_BLC, self.mat_qkv.weight.to(x_BLC.dtype), bias)
        l2_norm = self.scale_mul_1H11 is not None
        if cache is None:
            q, k, v = kernels.split_heads(qkv, self.num_heads, l2_norm)
            out = kernels.block_causal_attention(q, k, v, scale_ends, self.logit_scale_H())
        else:
            k_cache, v_cache, start = cache
            q = kernels.split_heads_to_cache(qkv, self.num_heads, l2_norm, k_cache, v_cache, start)
            out = kernels.cached_attention(q, k_cache, v_cache, start + length, self.logit_scale_H())
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class FFN(nn.Module):
    """Two-layer MLP with tanh-approximated GELU."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        hidden = round(config.width * config.mlp_ratio)
        self.fc1 = Linear(config.width, hidden)
        self.fc2 = Linear(hidden, config.width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLC), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each normalised, modulated and gated by the class (adaLN)."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.width, self.eps = config.width, config.norm_eps
        self.attn = SelfAttention(config)
        self.ffn = FFN(config)
        if config.shared_adaln:
            self.ada_gss: nn.Parameter | None = nn.Parameter(torch.randn(1, 1, 6, self.width) / self.width**0.5)
        else:
            self.ada_gss = None
            self.ada_lin = nn.Sequential(nn.SiLU(), Linear(self.width, 6 * self.width))

    def modulation(self, cond: Tensor) -> tuple[Tensor, ...]:
        """gate, gate, scale, scale, shift, shift (of attention and MLP), (B, C) each, from the condition."""
        six = self.ada_lin(cond) if self.ada_gss is None else self.ada_gss.to(cond.dtype) + cond
        return six.view(-1, 6, self.width).unbind(1)

    def forward(
        self,
        x_BLC: Tensor,
        cond: Tensor,
        scale_ends: tuple[int, ...],
        cache: tuple[Tensor, Tensor, int] | None = None,
        drop_path: float = 0.0,
    ) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulation(cond)
        if drop_path > 0.0:  # a gate of 0 drops the branch of an image
            gate1, gate2 = (gate * _keep(gate, drop_path) for gate in (gate1, gate2))
        branch = self.attn(kernels.layer_norm_modulate(x_BLC, scale1, shift1, self.eps), scale_ends, cache)
        x_BLC, normed = kernels.gated_residual_norm(x_BLC, branch, gate1, scale2, shift2, self.eps)
        return kernels.gated_residual(x_BLC, self.ffn(normed), gate2)


def _keep(gate_BC: Tensor, drop: float) -> Tensor:
    return torch.empty_like(gate_BC[:, :1]).bernoulli_(1.0 - drop) / (1.0 - drop)


class AdaLNBeforeHead(nn.Module):
    """LayerNorm before the classifier, modulated by the class."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(config.width, 2 * config.width))

    def forward(self, x_BLC: Tensor, cond_BC: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond_BC).chunk(2, dim=-1)
        return kernels.layer_norm_modulate(x_BLC, scale, shift, self.eps)


class VAR(nn.Module):
    """Class-conditional next-scale autoregressive transformer.

    Args:
        config: sizes.
    Attributes:
        compute_dtype: dtype of the activations between embedding and head; weights stay as they are stored, and the
            head runs in float32: bf16 logits put a floor of 1e-4 under k3.
    """

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        width, num_tokens, first = config.width, config.num_tokens, config.patch_nums[0] ** 2
        self.pos_start = nn.Parameter(torch.empty(1, first, width))
        self.pos_1LC = nn.Parameter(torch.empty(1, num_tokens, width))
        self.word_embed = nn.Linear(config.code_width, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.lvl_embed = nn.Embedding(len(config.patch_nums), width)
        if config.shared_adaln:
            self.shared_ada_lin: nn.Sequential | None = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        else:
            self.shared_ada_lin = None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = AdaLNBeforeHead(config)
        self.head = nn.Linear(width, config.vocab_size)
        # Both buffers are constants that the public checkpoints carry. The mask is not used: see scale_ends.
        level_L = torch.cat([torch.full((side * side,), k) for k, side in enumerate(config.patch_nums)])
        self.register_buffer("lvl_1L", level_L.unsqueeze(0))
        mask_LL = torch.where(level_L.unsqueeze(1) >= level_L.unsqueeze(0), 0.0, -torch.inf)
        self.register_buffer("attn_bias_for_masking", mask_LL.reshape(1, 1, num_tokens, num_tokens))

    @torch.no_grad()
    def init_weights(self, seed: int) -> VAR:
        """Random weights as the public training starts from: a function of `seed` and the sizes alone."""
        rng = torch.Generator(device=self.pos_1LC.device).manual_seed(seed)
        std = math.sqrt(1.0 / self.config.width / 3.0)
        for name, parameter in self.named_parameters():
            if name.endswith("scale_mul_1H11"):
                parameter.fill_(math.log(4.0))
            elif name.endswith("ada_gss"):
                parameter.normal_(std=self.config.width**-0.5, generator=rng)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                nn.init.trunc_normal_(parameter, std=std, a=-2.0, b=2.0, generator=rng)
        self.head.weight.mul_(0.02)
        last_of_head = self.head_nm.ada_lin[1]
        last_of_head.weight.mul_(0.5)  # type: ignore[operator]
        width = self.config.width
        for block in self.blocks:
            assert isinstance(block, Block)
            for branch_out in (block.attn.proj, block.ffn.fc2):
                branch_out.weight.div_(math.sqrt(2 * self.config.depth))
            # Gates start near 0, so that every block starts near the identity.
            if block.ada_gss is None:
                weight = block.ada_lin[1].get_parameter("weight")
                weight[2 * width :].mul_(0.5)
                weight[: 2 * width].mul_(1e-5)
            else:
                block.ada_gss[:, :, 2:].mul_(0.5)
                block.ada_gss[:, :, :2].mul_(1e-5)
        return self

    def embed_start(self, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Input of the first scale (B, l, C), and the class condition (B, C) of all blocks and of the head.

        Args:
            labels_B: (B,) int64 in [0, num_classes]; num_classes stands for 'no label'.
        """
        cond_BC = self.class_emb(labels_B)
        x_BlC = cond_BC.unsqueeze(1) + self.pos_start + self.position(0)
        return x_BlC.to(self.compute_dtype), cond_BC

    def embed_scale(self, input_BlC: Tensor, scale: int) -> Tensor:
        """Input (B, l, C) of a later scale from the codes summed so far, (B, l, code width)."""
        return (self.word_embed(input_BlC.to(self.word_embed.weight.dtype)) + self.position(scale)).to(
            self.compute_dtype
        )

    def position(self, scale: int | None = None) -> Tensor:
        """Position plus level embedding of one scale, or of all: (1, l, C)."""
        ends = self.config.scale_ends
        span = slice(None) if scale is None else slice(ends[scale] - self.config.patch_nums[scale] ** 2, ends[scale])
        return self.lvl_embed(self.get_buffer("lvl_1L")[:, span]) + self.pos_1LC[:, span]

    def block_condition(self, cond_BC: Tensor) -> Tensor:
        """What the blocks are modulated by: the class condition, through the shared projection where there is one."""
        cond = cond_BC.to(self.compute_dtype)
        if self.shared_ada_lin is None:
            return cond
        return self.shared_ada_lin(cond).view(-1, 1, 6, self.config.width)

    def logits(self, x_BLC: Tensor, cond_BC: Tensor) -> Tensor:
        """(B, L, V) in the dtype of the head's weights."""
        return self.head(self.head_nm(x_BLC.to(self.head.weight.dtype), cond_BC))

    def forward(self, labels_B: Tensor, var_input_BLC: Tensor, drop_path: float = 0.0) -> Tensor:
        """Teacher-forced logits of all scales at once.

        Args:
            labels_B: (B,) int64 in [0, num_classes].
            var_input_BLC: (B, L - first, code width), what VQVAE.var_input makes of the tokens.
            drop_path: rate of the last block, growing linearly from 0 at the first. Pre-training only.
        Returns: (B, L, V) float32.
        """
        x_BlC, cond_BC = self.embed_start(labels_B)
        first = x_BlC.shape[1]
        later = self.word_embed(var_input_BLC.to(self.word_embed.weight.dtype)) + self.position()[:, first:]
        x_BLC = torch.cat([x_BlC, later.to(self.compute_dtype)], dim=1)
        cond = self.block_condition(cond_BC)
        for index, block in enumerate(self.blocks):
            rate = drop_path * index / max(1, self.config.depth - 1)
            x_BLC = block(x_BLC, cond, self.config.scale_ends, drop_path=rate)
        return self.logits(x_BLC, cond_BC)

    def forward_scale(self, x_BlC: Tensor, cond: Tensor, cond_BC: Tensor, scale: int, cache: KVCache) -> Tensor:
        """Logits of one scale after the scales whose keys and values are in the cache; adds its own to the cache.

        Args:
            x_BlC: embedded input of the scale.
            cond, cond_BC: from block_condition and embed_start.
            scale: its index.
            cache: of B images.
        Returns: (B, l, V) float32.
        """
        start = self.config.scale_ends[scale] - x_BlC.shape[1]
        for index, block in enumerate(self.blocks):
            x_BlC = block(x_BlC, cond, self.config.scale_ends, cache=(cache.k[index], cache.v[index], start))
        return self.logits(x_BlC, cond_BC)
