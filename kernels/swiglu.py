"""SwiGLU of an MLP: silu(gate) * up, between its two products.

Axes: B image, L token, F hidden channel.
"""

from __future__ import annotations

from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.selection import Implementation, implementations, run

implementations("swiglu", Implementation("reference", reference.swiglu))


def swiglu(gate_BLF: Tensor, up_BLF: Tensor, impl: str = "auto") -> Tensor:
    """silu(gate) * up in at least float32, rounded once.

    Args:
        gate_BLF, up_BLF: (..., F), one shape and dtype. Differentiable.
        impl: "auto" or "reference".
    Returns: the shape and dtype of gate.
    Raises: ValueError for two shapes or dtypes, or an impl that is unknown or cannot run.
    """
    if gate_BLF.shape != up_BLF.shape or gate_BLF.dtype != up_BLF.dtype:
        raise ValueError(
            f"gate is {tuple(gate_BLF.shape)} of {gate_BLF.dtype}, up {tuple(up_BLF.shape)} of {up_BLF.dtype}: want "
            "one shape and dtype"
        )
    out: Tensor = run("swiglu", impl, gate_BLF, up_BLF)
    return out
