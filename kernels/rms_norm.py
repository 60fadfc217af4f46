"""RMSNorm: each token divided by its root mean square, times a weight for each channel.

Axes: B image, L token, C channel.
"""

from __future__ import annotations

from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.selection import Implementation, implementations, run

implementations("rms_norm", Implementation("reference", reference.rms_norm))


def rms_norm(x_BLC: Tensor, weight_C: Tensor, eps: float, impl: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) along C in at least float32, rounded to the dtype of x, times the weight.

    Args:
        x_BLC: (..., C). Differentiable.
        weight_C: (C,). Differentiable.
        eps: added to the mean square.
        impl: "auto" or "reference".
    Returns: the shape and dtype of x.
    Raises: ValueError for a weight of another size, or an impl that is unknown or cannot run.
    """
    if weight_C.shape != x_BLC.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight_C.shape)}: want ({x_BLC.shape[-1]},), one a channel of x")
    out: Tensor = run("rms_norm", impl, x_BLC, weight_C, eps)
    return out
