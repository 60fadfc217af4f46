"""The VAR transformer: next-scale prediction over the token maps of a multi-scale VQ-VAE.

Parameter names and shapes are those of the public checkpoints var_d16.pth ... var_d36.pth.
Nothing here depends on train() or eval(): there is no dropout, DropPath is an argument of forward, and label dropout is
the pre-training loop's business. A log-probability therefore always describes the policy that was sampled.

Axes: B image, L token over all scales, l token of one scale, V vocabulary, C channel, H head, D head dim.
Source: Tian et al., arXiv:2404.02905.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varfast import kernels
from varfast.perf.cost import Checkpointing
from varfast.policies.precision import BranchLinear, Head, Linear, MixedPrecision, bias_left
from varfast.policies.var.config import HEAD_DIM, VARConfig

MAX_LOGIT_SCALE = 100.0


class KVCache:
    """Static keys and values of all blocks, written in place, scale by scale.

    The last scale's keys are read only within their own block, so the blocks share the memory for them: block i is
    stored in front of block i - 1, and its last scale overwrites the first rows of block i - 1, which has run by then
    and is not read again. At a batch of 512 this saves 8.6 GB of 22.8 GB for d16, and 30 GB of 80 GB for d30.

    Args:
        config: sizes.
        batch: B.
    """

    def __init__(self, config: VARConfig, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self._depth, self._length = config.depth, config.num_tokens
        self._kept = config.num_tokens - config.patch_nums[-1] ** 2
        rows = config.depth * self._kept + self._length - self._kept
        self._k, self._v = torch.empty(2, batch, config.depth, rows, HEAD_DIM, dtype=dtype, device=device).unbind()

    def of_block(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a block, (B, H, L, D) views."""
        start = (self._depth - 1 - index) * self._kept
        return self._k[:, :, start : start + self._length], self._v[:, :, start : start + self._length]


class BlockConstants(NamedTuple):
    """What a block reads that is the same for all tokens: computed once per rollout, not once per scale.

    gate1 ... shift2: (B, C), of attention (1) and MLP (2). qkv_bias (3 C,) and logit_scale_H (H,): float32.
    """

    gate1: Tensor
    gate2: Tensor
    scale1: Tensor
    scale2: Tensor
    shift1: Tensor
    shift2: Tensor
    qkv_bias: Tensor
    logit_scale_H: Tensor


@dataclass(frozen=True)
class Constants:
    """BlockConstants of every block, and scale and shift (B, C) of the norm before the head."""

    blocks: list[BlockConstants]
    head: tuple[Tensor, Tensor]


# Attention in strict mode, by device: a row has the same bits when all scales are computed and when its own is.
STRICT_ATTENTION = {"cuda": "triton_invariant", "cpu": "sdpa_invariant"}


class SelfAttention(nn.Module):
    """Multi-head attention under the scale mask, with L2-normalised queries and keys where the config says so.

    Attributes:
        strict: as of Linear.
    """

    strict = False

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width, self.num_heads = config.width, config.depth
        if config.qk_l2_norm:
            self.scale_mul_1H11: nn.Parameter | None = nn.Parameter(
                torch.full((1, self.num_heads, 1, 1), math.log(4.0))
            )
        else:
            self.scale_mul_1H11 = None
        self.mat_qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = BranchLinear(width, width)

    def logit_scale_H(self) -> Tensor:
        if self.scale_mul_1H11 is None:
            # The public model multiplies by 0.25 beside the usual 1/sqrt(D).
            return torch.full((self.num_heads,), 0.25 / math.sqrt(HEAD_DIM), device=self.q_bias.device)
        return self.scale_mul_1H11.flatten().clamp_max(math.log(MAX_LOGIT_SCALE)).exp()

    def qkv_bias(self) -> Tensor:
        return torch.cat([self.q_bias, self.get_buffer("zero_k_bias"), self.v_bias])

    def forward(
        self,
        x_BLC: Tensor,
        qkv_bias: Tensor,
        logit_scale_H: Tensor,
        scale_ends: tuple[int, ...],
        cache: tuple[Tensor, Tensor, int] | None,
    ) -> Tensor:
        """All scales under the block-causal mask; or, with a cache, the one scale that follows those in it.

        Args:
            cache: k_BHLD, v_BHLD and the number of tokens in them.
        The bias of `proj` is left to the op that reads the result.
        """
        batch, length, width = x_BLC.shape
        qkv = self.mat_qkv(x_BLC)
        l2_norm = self.scale_mul_1H11 is not None
        impl = STRICT_ATTENTION[x_BLC.device.type] if self.strict else "auto"
        if cache is None:
            q, k, v = kernels.split_heads(qkv, self.num_heads, l2_norm, qkv_bias)
            out = kernels.block_causal_attention(q, k, v, scale_ends, logit_scale_H, impl)
        else:
            k_cache, v_cache, start = cache
            q = kernels.split_heads_to_cache(qkv, self.num_heads, l2_norm, k_cache, v_cache, start, qkv_bias)
            out = kernels.cached_attention(q, k_cache, v_cache, start + length, logit_scale_H, impl)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class FFN(nn.Module):
    """Two-layer MLP with tanh-approximated GELU."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        hidden = round(config.width * config.mlp_ratio)
        self.fc1 = BranchLinear(config.width, hidden)
        self.fc2 = BranchLinear(hidden, config.width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """The bias of `fc2` is left to the op that reads the result."""
        if isinstance(self.fc1, BranchLinear) and self.fc1.strict:
            return self.fc2(self.fc1.with_gelu(x_BLC))
        if type(self.fc1) is BranchLinear and self.fc1.keeps_copies:
            low_MC = self.fc1.low_precision("weight", x_BLC.dtype)
            hidden = kernels.linear_gelu(x_BLC, self.fc1.weight, self.fc1.bias, low_MC)
        else:  # with an adapter, whose product is added before GELU; or sharded, where the layer adds its bias itself
            product, bias_C = self.fc1(x_BLC), bias_left(self.fc1)
            hidden = kernels.gelu_bias(product, product.new_zeros(product.shape[-1]) if bias_C is None else bias_C)
        return self.fc2(hidden)


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

    def constants(self, cond: Tensor) -> BlockConstants:
        """From the class condition, in the condition's dtype."""
        six = self.ada_lin(cond) if self.ada_gss is None else self.ada_gss.to(cond.dtype) + cond
        gate1, gate2, scale1, scale2, shift1, shift2 = six.view(-1, 6, self.width).unbind(1)
        return BlockConstants(
            gate1, gate2, scale1, scale2, shift1, shift2, self.attn.qkv_bias(), self.attn.logit_scale_H()
        )

    def forward(
        self,
        x_BLC: Tensor,
        normed_BLC: Tensor,
        own: BlockConstants,
        following: BlockConstants | None,
        scale_ends: tuple[int, ...],
        cache: tuple[Tensor, Tensor, int] | None = None,
        recompute_attention: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One block. In: the residual stream and its normalised, modulated form. Out: both for the following block.

        After the last block (`following` is None) there is nothing to normalise for: the stream is returned twice.
        """
        arguments = (normed_BLC, own.qkv_bias, own.logit_scale_H, scale_ends, cache)
        branch = _recomputed(self.attn, *arguments) if recompute_attention else self.attn(*arguments)
        x_BLC, normed_BLC = kernels.gated_residual_norm(
            x_BLC, branch, own.gate1, own.scale2, own.shift2, self.eps, bias_left(self.attn.proj)
        )
        branch, bias_C = self.ffn(normed_BLC), bias_left(self.ffn.fc2)
        if following is None:
            x_BLC = kernels.gated_residual(x_BLC, branch, own.gate2, bias_C)
            return x_BLC, x_BLC
        return kernels.gated_residual_norm(
            x_BLC, branch, own.gate2, following.scale1, following.shift1, self.eps, bias_C
        )


def _recomputed(function: nn.Module, *arguments: Any) -> Any:
    """Call a module with activation checkpointing: the backward pass runs it again. Nothing in it is random."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _keep(gate_BC: Tensor, drop: float) -> Tensor:
    return torch.empty_like(gate_BC[:, :1]).bernoulli_(1.0 - drop) / (1.0 - drop)


class AdaLNBeforeHead(nn.Module):
    """LayerNorm before the classifier, modulated by the class."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(config.width, 2 * config.width))

    def constants(self, cond_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift, (B, C), in the dtype of the condition."""
        scale, shift = self.ada_lin(cond_BC).chunk(2, dim=-1)
        return scale, shift


def scale_buffers(patch_nums: Sequence[int]) -> dict[str, Tensor]:
    """lvl_1L: (1, L) int64, the scale of each token. attn_bias_for_masking: (1, 1, L, L) float32, 0 where a token sees
    another, of its own scale or a coarser one, and -inf elsewhere.
    """
    level_L = torch.cat([torch.full((side * side,), k) for k, side in enumerate(patch_nums)])
    mask_LL = torch.where(level_L.unsqueeze(1) >= level_L.unsqueeze(0), 0.0, -torch.inf)
    return {"lvl_1L": level_L.unsqueeze(0), "attn_bias_for_masking": mask_LL.unsqueeze(0).unsqueeze(0)}


class VAR(MixedPrecision):
    """Class-conditional next-scale autoregressive transformer.

    Args:
        config: sizes.
    """

    lora_targets: ClassVar = {
        "mat_qkv": r"blocks\.\d+\.attn\.mat_qkv",
        "proj": r"blocks\.\d+\.attn\.proj",
        "fc1": r"blocks\.\d+\.ffn\.fc1",
        "fc2": r"blocks\.\d+\.ffn\.fc2",
        "ada_lin": r"blocks\.\d+\.ada_lin\.1|shared_ada_lin\.1",
    }

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        width, num_tokens, first = config.width, config.num_tokens, config.patch_nums[0] ** 2
        self.pos_start = nn.Parameter(torch.empty(1, first, width))
        self.pos_1LC = nn.Parameter(torch.empty(1, num_tokens, width))
        self.word_embed = Linear(config.code_width, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.lvl_embed = nn.Embedding(len(config.patch_nums), width)
        if config.shared_adaln:
            self.shared_ada_lin: nn.Sequential | None = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        else:
            self.shared_ada_lin = None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = AdaLNBeforeHead(config)
        self.head = Head(width, config.vocab_size)
        # Both buffers are constants that are in the public checkpoints. The mask is not read: see scale_ends.
        for name, constant in scale_buffers(config.patch_nums).items():
            self.register_buffer(name, constant)

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
            # Gates start near 0, so every block starts near the identity.
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

    def constants(self, cond_BC: Tensor) -> Constants:
        """What every block computes from the condition, in the compute dtype; and the head's norm, in its own dtype."""
        cond = cond_BC.to(self.compute_dtype)
        if self.shared_ada_lin is not None:
            cond = self.shared_ada_lin(cond).view(-1, 1, 6, self.config.width)
        blocks = [block.constants(cond) for block in self.blocks]  # type: ignore[operator]
        return Constants(blocks, self.head_nm.constants(cond_BC))

    def logits(self, x_BLC: Tensor, constants: Constants) -> Tensor:
        """(B, L, V) float32 (float64 for float64) from the residual stream after the last block."""
        return self.head(kernels.layer_norm_modulate(x_BLC, *constants.head, self.config.norm_eps))

    def logits_and_bias(self, x_BLC: Tensor, constants: Constants) -> tuple[Tensor, Tensor | None]:
        """`logits`, and the bias (V,) if it is still to be added to them: see Head.logits_and_bias."""
        return self.head.logits_and_bias(kernels.layer_norm_modulate(x_BLC, *constants.head, self.config.norm_eps))

    def _run_blocks(
        self,
        x_BLC: Tensor,
        constants: Constants,
        cache: tuple[KVCache, int] | None = None,
        checkpointing: Checkpointing = "none",
    ) -> Tensor:
        blocks, ends = constants.blocks, self.config.scale_ends
        normed = kernels.layer_norm_modulate(x_BLC, blocks[0].scale1, blocks[0].shift1, self.config.norm_eps)
        for index, block in enumerate(self.blocks):
            following = blocks[index + 1] if index + 1 < len(blocks) else None
            if checkpointing == "full":
                x_BLC, normed = _recomputed(block, x_BLC, normed, blocks[index], following, ends)
            else:
                of_block = None if cache is None else (*cache[0].of_block(index), cache[1])
                again = checkpointing == "attention"
                x_BLC, normed = block(x_BLC, normed, blocks[index], following, ends, of_block, again)
        return x_BLC

    def forward(
        self,
        labels_B: Tensor,
        var_input_BLC: Tensor,
        drop_path: float = 0.0,
        checkpointing: Checkpointing = "none",
        bias_apart: bool = False,
    ) -> Any:
        """Teacher-forced logits of all scales at once.

        Args:
            labels_B: (B,) int64 in [0, num_classes].
            var_input_BLC: (B, L - first, code width), what VQVAE.var_input makes of the tokens.
            drop_path: rate of the last block, growing linearly from 0 at the first. Pre-training only.
            checkpointing: what the backward pass computes again instead of keeping it: "none"; the "attention" branches
                from their normalised input on; "full": the blocks.
            bias_apart: return `logits_and_bias`, for the ops that take the bias.
        Returns: (B, L, V) float32.
        """
        x_BlC, cond_BC = self.embed_start(labels_B)
        first = x_BlC.shape[1]
        later = self.word_embed(var_input_BLC.to(self.word_embed.weight.dtype)) + self.position()[:, first:]
        x_BLC = torch.cat([x_BlC, later.to(self.compute_dtype)], dim=1)
        constants = self.constants(cond_BC)
        if drop_path > 0.0:
            constants = _drop_branches(constants, drop_path)
        head = self.logits_and_bias if bias_apart else self.logits
        return head(self._run_blocks(x_BLC, constants, None, checkpointing), constants)

    def forward_scale(
        self, x_BlC: Tensor, constants: Constants, scale: int, cache: KVCache, bias_apart: bool = False
    ) -> Any:
        """Logits of one scale after the scales whose keys and values are in the cache; adds its own to the cache.

        Args:
            x_BlC: embedded input of the scale.
            constants: of the condition that came with the first scale.
            scale: its index.
            cache: of B images.
            bias_apart: return `logits_and_bias`, for the ops that take the bias.
        Returns: (B, l, V) float32.
        """
        start = self.config.scale_ends[scale] - x_BlC.shape[1]
        head = self.logits_and_bias if bias_apart else self.logits
        return head(self._run_blocks(x_BlC, constants, (cache, start)), constants)

    def float32_layers(self) -> Collection[nn.Module]:
        return (self.word_embed, self.head_nm.ada_lin[1])

    def large_modules(self) -> Iterator[nn.Module]:
        if self.shared_ada_lin is not None:
            yield self.shared_ada_lin
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        yield from (block.ada_lin for block in blocks if block.ada_gss is None)
        for block in blocks:
            yield from (block.attn.mat_qkv, block.attn.proj, block.ffn)


def _drop_branches(constants: Constants, rate_of_last: float) -> Constants:
    """DropPath: a gate of 0 drops the branch of an image."""
    depth = len(constants.blocks)
    rates = [rate_of_last * index / max(1, depth - 1) for index in range(depth)]
    blocks = [
        own._replace(gate1=own.gate1 * _keep(own.gate1, rate), gate2=own.gate2 * _keep(own.gate2, rate))
        for own, rate in zip(constants.blocks, rates, strict=True)
    ]
    return Constants(blocks, constants.head)
