"""The VAR transformer: next-scale prediction over the token maps of a multi-scale VQ-VAE.

Parameter names and shapes are those of the public checkpoints var_d16.pth ... var_d36.pth.
Nothing here depends on train() or eval(): there is no dropout, DropPath is an argument of forward, and label dropout is
the pre-training loop's business. A log-probability therefore always describes the policy that was sampled.

Axes: B image, L token over all scales, l token of one scale, V vocabulary, C channel, H head, D head dim.
Source: Tian et al., arXiv:2404.02905.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from varfast import kernels
from varfast.distributed import whole
from varfast.kernels.linear import LowPrecisionLinear, weight_gradient
from varfast.policies.var.config import HEAD_DIM, VARConfig

MAX_LOGIT_SCALE = 100.0


_Copied = Literal["weight", "bias"]
_optimizer_steps = 0  # of all optimizers of this process: fused ones write weights without telling autograd


def _count_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


class Linear(nn.Linear):
    """The one place of the model's precision: weights stay as they are stored, the product is in the input's dtype.

    Where the two differ, a copy of weight and bias in the input's dtype is kept and read, by rollout, update and
    reference alike, and written anew when the weights have changed: after a step of any torch.optim.Optimizer, after
    any in-place operation of PyTorch, after the tensor was replaced. What changes weights in another way (a kernel of
    its own, a replayed CUDA graph) must call VAR.refresh_copies() afterwards. The gradient of the weight goes from the
    product into the weight's own dtype, not through a 16-bit tensor.

    Attributes:
        strict: a row's bits do not depend on the other rows: see varfast/policies/strict.py.
        keeps_copies: False casts at each use: FSDP exchanges the weights behind PyTorch's back.
    """

    strict = False
    _low_weight: Tensor | None
    _low_bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.keeps_copies = True
        # Buffers, so that they move with the module; not persistent, so that checkpoints do not have them.
        self.register_buffer("_low_weight", None, persistent=False)
        self.register_buffer("_low_bias", None, persistent=False)
        self._copied: dict[str, tuple[Any, ...]] = {}

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, with_bias=True)

    def product(self, input: Tensor, with_bias: bool = False) -> Tensor:
        dtype = input.dtype
        bias: Tensor | None = self.bias if with_bias else None
        if self.strict:
            return self.strict_product(input, None if bias is None else bias.to(dtype))
        if self.keeps_copies and self.weight.dtype != dtype:
            low_bias = None if bias is None else self.low_precision("bias", dtype)
            return LowPrecisionLinear.apply(input, self.weight, self.low_precision("weight", dtype), bias, low_bias)
        return F.linear(input, self.weight.to(dtype), None if bias is None else bias.to(dtype))

    def strict_product(
        self, input: Tensor, bias: Tensor | None, gelu: bool = False, float32_out: bool = False
    ) -> Tensor:
        """The product of strict mode, from the copy of the weight where there is one."""
        if self.keeps_copies and self.weight.dtype != input.dtype:
            low_MC = self.low_precision("weight", input.dtype)
            return kernels.invariant_linear(input, low_MC, bias, gelu, float32_out, self.weight)
        return kernels.invariant_linear(input, self.weight.to(input.dtype), bias, gelu, float32_out)

    def low_precision(self, name: _Copied, dtype: torch.dtype) -> Tensor:
        """The copy of a parameter in `dtype`, up to date."""
        parameter: Tensor = getattr(self, name)  # torch.func.functional_call puts tensors where parameters were
        copied = self._buffers[f"_low_{name}"]
        if parameter.dtype == dtype:
            return parameter.detach()
        if copied is None or copied.dtype != dtype or copied.device != parameter.device:
            copied = self._buffers[f"_low_{name}"] = parameter.detach().to(dtype, copy=True)
            self.mark_copied(name)
        elif not self._is_copied(name):
            copied.copy_(parameter.detach())
            self.mark_copied(name)
        return copied

    def mark_copied(self, name: _Copied) -> None:
        """The copy of a parameter is what the parameter is now."""
        parameter: Tensor = getattr(self, name)
        self._copied[name] = (weakref.ref(parameter), parameter._version, parameter.data_ptr(), _optimizer_steps)

    def _is_copied(self, name: _Copied) -> bool:
        if name not in self._copied:
            return False
        parameter: Tensor = getattr(self, name)
        of, *state = self._copied[name]
        return of() is parameter and state == [parameter._version, parameter.data_ptr(), _optimizer_steps]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: they have parameters of their own, of which nothing has been copied yet."""
        return self.__dict__ | {"_copied": {}}

    def drop_copies(self) -> None:
        """Cast at each use from here on."""
        self.keeps_copies = False
        self._low_weight = self._low_bias = None


class BranchLinear(Linear):
    """A Linear whose bias is added by the op that reads its product: there the bias's gradient costs no extra pass.

    Sharded (keeps_copies False) it adds the bias itself: outside of its forward the bias is spread over processes.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, with_bias=not self.keeps_copies)

    def with_gelu(self, input: Tensor) -> Tensor:
        """Strict forward with its bias, through tanh GELU in the product's own kernel."""
        return self.strict_product(input, self.get_parameter("bias").to(input.dtype), gelu=True)

    @property
    def bias_left(self) -> Tensor | None:
        """What is still to be added to the result of forward."""
        return self.bias if self.keeps_copies else None


def _bias_left(module: nn.Module) -> Tensor | None:
    """Of a BranchLinear, or of the one beneath an adapter."""
    layer = module if isinstance(module, BranchLinear) else module.base_layer
    assert isinstance(layer, BranchLinear)
    return layer.bias_left


class _ProductInFloat32(torch.autograd.Function):
    """x @ low^T of 16-bit operands with sum and result in float32; the gradient is rounded to 16 bits first.

    `low` is the copy of the float32 weight that has the gradient, or the 16-bit weight itself.
    """

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_VC: Tensor, low_VC: Tensor) -> Tensor:
        ctx.save_for_backward(x_NC, low_VC)
        ctx.dtype = weight_VC.dtype
        return _float32_out(x_NC, low_VC.T)

    @staticmethod
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_NC, low_VC = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        grad_NV = grad_NV.to(x_NC.dtype)
        d_weight = weight_gradient(grad_NV, x_NC, ctx.dtype) if wants_weight else None
        return grad_NV @ low_VC if wants_x else None, d_weight, None


def _float32_out(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)  # the tensor cores' own accumulators: no float32 product
    return a.float() @ b.float()  # CPUs have no such product; 16-bit logits would cost far more than it


class Head(Linear):
    """Logits in float32 from activations of any dtype: operands in that dtype, sums in float32.

    bf16 logits would put a floor of 1e-4 under k3. bf16 operands add 2 % to the error that the log-probabilities of a
    bf16 transformer of 16 blocks have in any case, 7 to 9 % after 4 blocks (tests/models/test_var.py).

    Attributes:
        strict: as of Linear.
    """

    strict = False

    def forward(self, input: Tensor) -> Tensor:
        if self.strict:
            return self.strict_product(input, self.bias, float32_out=True)
        if input.dtype not in (torch.bfloat16, torch.float16):
            return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))
        # Before it is given its shape: an addition in place on a view would copy the gradient of all logits twice.
        return self._without_bias(input).add_(self.bias.float()).unflatten(0, input.shape[:-1])

    def logits_and_bias(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and the float32 bias that they still lack, for the op that reads them; None where it is in them.

        On a GPU a product of 16-bit operands that writes float32 adds no bias, and a pass of its own would read and
        write 11 MB of logits an image.
        """
        if self.strict or input.device.type != "cuda" or input.dtype not in (torch.bfloat16, torch.float16):
            return self(input), None
        return self._without_bias(input).unflatten(0, input.shape[:-1]), self.bias.float()

    def _without_bias(self, input: Tensor) -> Tensor:
        """(N, V) of the N rows of the input."""
        if self.keeps_copies and self.weight.dtype != input.dtype:
            low_VC = self.low_precision("weight", input.dtype)
        else:
            low_VC = self.weight.detach().to(input.dtype)
        logits_NV: Tensor = _ProductInFloat32.apply(input.flatten(0, -2), self.weight, low_VC)
        return logits_NV


class KVCache:
    """Static keys and values of all blocks: written in place, scale by scale.

    What the last scale adds is read by its own block alone, so all blocks share the room for it: a block's rows stand
    before those of the block below, which that block needs no more when the rows of the last scale overwrite them. With
    a batch of 512 that saves 8.6 GB of 22.8 for d16, and 30 of 80 GB for d30.

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
    """What a block needs that is the same for all tokens: computed once a rollout, not once a scale.

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


# Attention of strict mode, by device: a row's bits among all scales are those of its scale alone.
STRICT_ATTENTION = {"cuda": "triton_invariant", "cpu": "sdpa_invariant"}

Checkpointing = Literal["none", "attention", "full"]


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
            # 0.25 beside 1/sqrt(D): so in the public model.
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
        """All scales under the mask; or, with a cache (k_BHLD, v_BHLD, tokens before), one scale after the others.

        The bias of `proj` is left to the op that reads the result.
        """
        batch, length, width = x_BLC.shape
        qkv = self.mat_qkv(x_BLC)
        l2_norm = self.scale_mul_1H11 is not None
        impl = {"impl": STRICT_ATTENTION[x_BLC.device.type]} if self.strict else {}
        if cache is None:
            q, k, v = kernels.split_heads(qkv, self.num_heads, l2_norm, qkv_bias)
            out = kernels.block_causal_attention(q, k, v, scale_ends, logit_scale_H, **impl)
        else:
            k_cache, v_cache, start = cache
            q = kernels.split_heads_to_cache(qkv, self.num_heads, l2_norm, k_cache, v_cache, start, qkv_bias)
            out = kernels.cached_attention(q, k_cache, v_cache, start + length, logit_scale_H, **impl)
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
        else:  # an adapter's part of the product comes before GELU; a sharded layer adds its bias itself
            product, bias_C = self.fc1(x_BLC), _bias_left(self.fc1)
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
        """Residual stream and its normalised, modulated form in; the same for the following block out.

        After the last block (`following` is None) the second is not normalised: the stream again.
        """
        arguments = (normed_BLC, own.qkv_bias, own.logit_scale_H, scale_ends, cache)
        branch = _recomputed(self.attn, *arguments) if recompute_attention else self.attn(*arguments)
        x_BLC, normed_BLC = kernels.gated_residual_norm(
            x_BLC, branch, own.gate1, own.scale2, own.shift2, self.eps, _bias_left(self.attn.proj)
        )
        branch, bias_C = self.ffn(normed_BLC), _bias_left(self.ffn.fc2)
        if following is None:
            x_BLC = kernels.gated_residual(x_BLC, branch, own.gate2, bias_C)
            return x_BLC, x_BLC
        return kernels.gated_residual_norm(
            x_BLC, branch, own.gate2, following.scale1, following.shift1, self.eps, bias_C
        )


def _recomputed(function: nn.Module, *arguments: Any) -> Any:
    """Call a module without keeping what its backward pass needs: that is computed again. Nothing in it is random."""
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


class VAR(nn.Module):
    """Class-conditional next-scale autoregressive transformer.

    Args:
        config: sizes.
    Attributes:
        compute_dtype: dtype of the activations between embedding and logits; weights stay as they are stored.
    """

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
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
        # Both buffers are constants that the public checkpoints carry. The mask is not used: see scale_ends.
        for name, constant in scale_buffers(config.patch_nums).items():
            self.register_buffer(name, constant)

    def make_strict(self) -> None:
        """From now on a token's bits do not depend on the batch, nor on whether its scale came alone."""
        for module in self.modules():
            if isinstance(module, Linear | Head | SelfAttention):
                module.strict = True

    @property
    def strict(self) -> bool:
        return self.head.strict

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

    def constants(self, cond_BC: Tensor) -> Constants:
        """What the condition makes of every block, in the compute dtype, and of the head's norm, in its own."""
        cond = cond_BC.to(self.compute_dtype)
        if self.shared_ada_lin is not None:
            cond = self.shared_ada_lin(cond).view(-1, 1, 6, self.config.width)
        blocks = [block.constants(cond) for block in self.blocks]  # type: ignore[operator]
        return Constants(blocks, self.head_nm.constants(cond_BC))

    def logits(self, x_BLC: Tensor, constants: Constants) -> Tensor:
        """(B, L, V) float32 (float64 for float64) from the residual stream after the last block."""
        return self.head(kernels.layer_norm_modulate(x_BLC, *constants.head, self.config.norm_eps))

    def logits_and_bias(self, x_BLC: Tensor, constants: Constants) -> tuple[Tensor, Tensor | None]:
        """As `logits`, but they may lack the bias, which then comes beside them, (V,): see Head.product."""
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

    def low_precision_copies(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each weight that is stored in float32 and read in the compute dtype, and the copy that is read, up to date.

        None where nothing is cast: compute_dtype float32, a frozen copy, sharded weights.
        """
        return [
            (m.get_parameter(name), m.low_precision(name, self.compute_dtype)) for m, name in self._copied_parameters()
        ]

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Write all low-precision copies anew, in one go: after whatever has changed the weights.

        Forward does so by itself, copy by copy, after changes that PyTorch knows of (see Linear).
        """
        copied = self._copied_parameters()
        if not copied:
            return
        targets = [m._buffers[f"_low_{name}"] for m, name in copied]
        if any(target is None for target in targets):  # the first time
            self.low_precision_copies()
            return
        torch._foreach_copy_(targets, [m.get_parameter(name).detach() for m, name in copied])  # type: ignore[arg-type]
        self.mark_copies_fresh()

    def mark_copies_fresh(self) -> None:
        """What has changed the weights has written the copies too (see low_precision_copies)."""
        for module, name in self._copied_parameters():
            module.mark_copied(name)

    def _copied_parameters(self) -> list[tuple[Linear, _Copied]]:
        """Modules and names of the parameters that have a low-precision copy."""
        found: list[tuple[Linear, _Copied]] = []
        for module in self._cast_modules():
            if isinstance(module, Linear) and module.keeps_copies and module.weight.dtype != self.compute_dtype:
                found.append((module, "weight"))
                if module.bias is not None and not isinstance(module, (Head, BranchLinear)):
                    found.append((module, "bias"))
        return found

    def drop_copies(self) -> None:
        """Cast weights at each use from here on: before they are sharded."""
        for module in self._cast_modules():
            if isinstance(module, Linear):
                module.drop_copies()

    def frozen_copy(self) -> VAR:
        """A copy without gradient that stores its large matrices in the compute dtype: no update reaches it."""
        memo: dict[int, Any] = {}
        for module in self._cast_modules():  # no float32 copy of them on the way
            memo[id(module.weight)] = nn.Parameter(module.weight.detach().to(self.compute_dtype, copy=True), False)
            memo |= {id(t): None for t in module.buffers()}
        return copy.deepcopy(self, memo).requires_grad_(False)

    @torch.no_grad()
    def refresh(self, original: VAR) -> None:
        """Copy the weights of the original into this frozen copy, in place; of all processes, if they are sharded."""
        pairs = list(zip(self.parameters(), original.parameters(), strict=True))
        if any(isinstance(theirs, DTensor) for _, theirs in pairs):
            for own, theirs in pairs:  # one at a time, and in 16 bits: little memory, half the traffic
                own.copy_(whole(theirs.to(own.dtype)))
        else:
            own_all, their_all = zip(*pairs, strict=True)
            torch._foreach_copy_(list(own_all), list(their_all))

    def store_in_compute_dtype(self) -> None:
        """Store the large matrices as every product reads them, frozen, in place and one at a time."""
        for module in self._cast_modules():
            module.weight = nn.Parameter(module.weight.detach().to(self.compute_dtype), False)
            if isinstance(module, Linear):
                module._low_weight = None

    @property
    def stored_in_compute_dtype(self) -> bool:
        """No weight has a copy: float32 throughout, or a frozen copy."""
        return self.head.weight.dtype == self.compute_dtype

    def large_modules(self) -> Iterator[nn.Module]:
        """Those with the large matrices, in the order in which forward calls them; what is left is read anywhere."""
        if self.shared_ada_lin is not None:
            yield self.shared_ada_lin
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        yield from (block.ada_lin for block in blocks if block.ada_gss is None)
        for block in blocks:
            yield from (block.attn.mat_qkv, block.attn.proj, block.ffn)

    def _cast_modules(self) -> list[nn.Linear]:
        """Those whose weight is cast to the compute dtype when it is used: all but what turns a condition or codes into
        float32."""
        linear = [m for m in self.modules() if isinstance(m, nn.Linear)]
        return [m for m in linear if m is not self.word_embed and m is not self.head_nm.ada_lin[1]]


def _drop_branches(constants: Constants, rate_of_last: float) -> Constants:
    """A gate of 0 drops the branch of an image."""
    depth = len(constants.blocks)
    rates = [rate_of_last * index / max(1, depth - 1) for index in range(depth)]
    blocks = [
        own._replace(gate1=own.gate1 * _keep(own.gate1, rate), gate2=own.gate2 * _keep(own.gate2, rate))
        for own, rate in zip(constants.blocks, rates, strict=True)
    ]
    return Constants(blocks, constants.head)
