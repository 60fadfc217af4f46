"""Linear layers that compute with a low-precision (16-bit) copy of their float32 weight. Autograd saves the copy for
the backward pass, and the float32 weight receives the gradient.

Axes: N row, C channel in, M channel out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class LowPrecisionLinear(torch.autograd.Function):
    """x @ low^T + low_bias, where low and low_bias are copies of a float32 weight and bias, which get the gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_MC: Tensor, low_MC: Tensor, bias_M: Tensor | None, low_bias_M: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, low_MC)  # a frozen weight needs no x
        ctx.dtype = weight_MC.dtype
        return F.linear(x, low_MC, low_bias_M)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low_MC = ctx.saved_tensors
        wants_x, wants_weight, _, wants_bias, _ = ctx.needs_input_grad
        grad_NM = grad.flatten(0, -2)
        d_weight = weight_gradient(grad_NM, x.flatten(0, -2), ctx.dtype) if wants_weight else None
        d_bias = grad_NM.sum(dim=0, dtype=ctx.dtype) if wants_bias else None
        return grad @ low_MC if wants_x else None, d_weight, None, d_bias, None


def weight_gradient(grad_NM: Tensor, x_NC: Tensor, dtype: torch.dtype) -> Tensor:
    """grad^T @ x, (M, C) in the weight's dtype, from 16-bit operands."""
    if grad_NM.device.type == "cuda" and dtype == torch.float32 and grad_NM.dtype != dtype:
        return torch.mm(grad_NM.T, x_NC, out_dtype=torch.float32)  # float32 result: not rounded to 16 bits, no cast
    return (grad_NM.T @ x_NC).to(dtype)  # CPUs lack out_dtype; float32 operands take 7 times as long
