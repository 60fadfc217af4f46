"""Precision, in one place: weights are stored in float32, products are computed in the dtype of the activations.

Layers that cast their weights, and the base class of models that are built from them. There is no autocast.

Axes: B image, L token, N row, V vocabulary, C and M channels.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from varfast import kernels
from varfast.distributed import is_sharded, whole
from varfast.kernels.linear import LowPrecisionLinear, weight_gradient

_Copied = Literal["weight", "bias"]
# Steps of all optimizers of this process. Fused optimizers write weights without raising their version counters.
_optimizer_steps = 0


def _count_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


class Linear(nn.Linear):
    """A linear layer that keeps its weights as they are stored and multiplies in the dtype of its input.

    Where the two dtypes differ, the layer keeps low-precision copies of weight and bias, which rollout, update and
    reference all read. A copy is written again when its weight has changed: after a step of any torch.optim.Optimizer,
    after any in-place operation of PyTorch, after the tensor was replaced. Code that changes weights in another way (a
    kernel of our own, a replayed CUDA graph) must call MixedPrecision.refresh_copies() afterwards. The gradient of the
    weight is written in the weight's own dtype and never stored in 16 bits.

    Attributes:
        strict: the bits of a row do not depend on the other rows: see varfast/policies/strict.py.
        keeps_copies: False casts at each use. FSDP replaces the weights' storage without a change that PyTorch counts.
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
        """The product in strict mode, with the low-precision copy of the weight if there is one."""
        if self.keeps_copies and self.weight.dtype != input.dtype:
            low_MC = self.low_precision("weight", input.dtype)
            return kernels.invariant_linear(input, low_MC, bias, gelu, float32_out, self.weight)
        return kernels.invariant_linear(input, self.weight.to(input.dtype), bias, gelu, float32_out)

    def low_precision(self, name: _Copied, dtype: torch.dtype) -> Tensor:
        """The copy of a parameter in `dtype`, brought up to date."""
        parameter: Tensor = getattr(self, name)  # torch.func.functional_call replaces parameters by tensors
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
        """Record that the copy of a parameter holds the parameter's present value."""
        parameter: Tensor = getattr(self, name)
        self._copied[name] = (weakref.ref(parameter), parameter._version, parameter.data_ptr(), _optimizer_steps)

    def _is_copied(self, name: _Copied) -> bool:
        if name not in self._copied:
            return False
        parameter: Tensor = getattr(self, name)
        of, *state = self._copied[name]
        return of() is parameter and state == [parameter._version, parameter.data_ptr(), _optimizer_steps]

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: the new module has its own parameters, which have not been copied yet."""
        return self.__dict__ | {"_copied": {}}

    def drop_copies(self) -> None:
        """Cast at each use from here on."""
        self.keeps_copies = False
        self._low_weight = self._low_bias = None


class BranchLinear(Linear):
    """A Linear that leaves its bias to the op that reads its product, where the bias's gradient costs no extra pass.

    A sharded layer (keeps_copies False) adds the bias itself: outside of its forward, each process has only a shard.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, with_bias=not self.keeps_copies)

    def with_gelu(self, input: Tensor) -> Tensor:
        """Strict mode: product, bias and tanh GELU in one kernel."""
        return self.strict_product(input, self.get_parameter("bias").to(input.dtype), gelu=True)

    @property
    def bias_left(self) -> Tensor | None:
        """The bias that the caller must still add to the result of forward; None if it is in it."""
        return self.bias if self.keeps_copies else None


def bias_left(module: nn.Module) -> Tensor | None:
    """BranchLinear.bias_left of a layer, or of the layer under its LoRA adapter."""
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


_FEW_ROWS, _MANY_COLUMNS, _COLUMNS_AT_A_TIME = 64, 8192, 512


def _float32_out(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)  # the tensor cores' own accumulators: no float32 product
    # CPUs have no such product; 16-bit logits would cost far more than it.
    if len(a) > _FEW_ROWS or b.shape[1] < _MANY_COLUMNS:
        return a.float() @ b.float()
    # One token an image: the casts of a large matrix would go through memory, 25 MB read and 50 MB written and read
    # again for 16384 codes. Those of a part of it stay in the cache.
    a = a.float()
    return torch.cat([a @ part.float() for part in b.split(_COLUMNS_AT_A_TIME, dim=1)], dim=1)


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
        bias: Tensor | None = self.bias
        if input.dtype not in (torch.bfloat16, torch.float16):
            return F.linear(input, self.weight.to(input.dtype), None if bias is None else bias.to(input.dtype))
        logits_NV = self._without_bias(input)
        if bias is not None:
            # Before it is given its shape: an addition in place on a view would copy the gradient of all logits twice.
            logits_NV = logits_NV.add_(bias.float())
        return logits_NV.unflatten(0, input.shape[:-1])

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


class MixedPrecision(nn.Module):
    """A model of the layers above: stored in float32, computed in `compute_dtype`.

    Attributes:
        compute_dtype: dtype of the activations between embedding and logits; weights stay as they are stored.
        strict: see make_strict.
        lora_targets: patterns of the names of its Linear layers, by what policy.lora.targets calls them.
    """

    strict = False
    lora_targets: ClassVar[Mapping[str, str]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.compute_dtype = torch.float32

    def float32_layers(self) -> Collection[nn.Module]:
        """Linear layers whose input stays float32, so that their weights are never cast."""
        return ()

    def large_modules(self) -> Iterator[nn.Module]:
        """Modules that FSDP shards one by one, in the order in which forward calls them. Parameters outside of them are
        gathered for the whole step and may be read anywhere.
        """
        yield from ()

    def make_strict(self) -> None:
        """From now on a token's bits do not depend on the batch: varfast/policies/strict.py."""
        for module in self.modules():
            if hasattr(module, "strict"):
                setattr(module, "strict", True)  # noqa: B010 - the types of modules have no such attribute

    def low_precision_copies(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each weight that is stored in float32 and read in the compute dtype, with the copy that is read, up to date.

        Empty where nothing is cast: compute_dtype float32, a frozen copy, sharded weights.
        """
        return [
            (m.get_parameter(name), m.low_precision(name, self.compute_dtype)) for m, name in self._copied_parameters()
        ]

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Write all low-precision copies again, in one call: after whatever has changed the weights.

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
        for module in self._cast_layers():
            if isinstance(module, Linear) and module.keeps_copies and module.weight.dtype != self.compute_dtype:
                found.append((module, "weight"))
                if module.bias is not None and not isinstance(module, (Head, BranchLinear)):
                    found.append((module, "bias"))
        return found

    def drop_copies(self) -> None:
        """Cast weights at each use from here on: before they are sharded."""
        for module in self._cast_layers():
            if isinstance(module, Linear):
                module.drop_copies()

    def frozen_copy(self) -> Self:
        """A copy without gradient that stores its large matrices in the compute dtype: no update reaches it."""
        memo: dict[int, Any] = {}
        for module in self._cast_layers():  # their float32 weights are not copied on the way
            memo[id(module.weight)] = nn.Parameter(module.weight.detach().to(self.compute_dtype, copy=True), False)
            memo |= {id(t): None for t in module.buffers()}
        return copy.deepcopy(self, memo).requires_grad_(False)

    @torch.no_grad()
    def refresh(self, original: nn.Module) -> None:
        """Copy the weights of the original into this frozen copy, in place; of all processes, if they are sharded.

        Those that the two share, as the frozen ones beneath an adapter, stay as they are.
        """
        pairs = list(zip(self.parameters(), original.parameters(), strict=True))
        pairs = [(own, theirs) for own, theirs in pairs if own is not theirs]
        if any(is_sharded(theirs) for _, theirs in pairs):
            for own, theirs in pairs:  # one at a time, and in 16 bits: little memory, half the traffic
                own.copy_(whole(theirs.to(own.dtype)))
        else:
            own_all, their_all = zip(*pairs, strict=True)
            torch._foreach_copy_(list(own_all), list(their_all))

    def store_in_compute_dtype(self) -> None:
        """Store the large matrices as every product reads them, frozen, in place and one at a time."""
        for module in self._cast_layers():
            module.weight = nn.Parameter(module.weight.detach().to(self.compute_dtype), False)
            if isinstance(module, Linear):
                module._low_weight = None

    def _cast_layers(self) -> list[nn.Linear]:
        """Linear layers whose weight is cast to the compute dtype at use."""
        kept = self.float32_layers()
        return [m for m in self.modules() if isinstance(m, nn.Linear) and not any(m is other for other in kept)]
