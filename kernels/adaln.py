"""Adaptive LayerNorm, as VAR's block uses it: normalise and modulate before a branch, gate its result after.

Axes: B image, L token, C channel.
"""

from __future__ import annotations

from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.selection import Implementation, implementations, select

implementations("layer_norm_modulate", Implementation("reference", reference.layer_norm_modulate))
implementations("gated_residual", Implementation("reference", reference.gated_residual))


def layer_norm_modulate(
    x_BLC: Tensor, scale_BC: Tensor, shift_BC: Tensor, eps: float = 1e-6, impl: str = "auto"
) -> Tensor:
    """LayerNorm without affine parameters, then * (1 + scale) + shift, one scale and shift an image.

    Args:
        x_BLC: (B, L, C); statistics in float32 (float64 for float64).
        scale_BC, shift_BC: (B, C).
        eps: added to the variance.
        impl: "auto" or "reference".
    Returns: (B, L, C) in the dtype of x_BLC.
    Raises: ValueError for an unknown impl.
    """
    return select("layer_norm_modulate", impl, x_BLC.device)(x_BLC, scale_BC, shift_BC, eps)


def gated_residual(x_BLC: Tensor, branch_BLC: Tensor, gate_BC: Tensor, impl: str = "auto") -> Tensor:
    """x + gate * branch, one gate an image and channel.

    Args:
        x_BLC, branch_BLC: (B, L, C).
        gate_BC: (B, C).
        impl: "auto" or "reference".
    Returns: (B, L, C).
    Raises: ValueError for an unknown impl.
    """
    return select("gated_residual", impl, x_BLC.device)(x_BLC, branch_BLC, gate_BC)
