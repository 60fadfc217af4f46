"""GroupNorm and SiLU of an image, as the VQ-VAE's decoder uses them: forward only.

Axes: B image, C channel, H and W sides.
"""

from __future__ import annotations

from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.selection import Implementation, implementations, select

implementations("group_norm_silu", Implementation("reference", reference.group_norm_silu))


def group_norm_silu(
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float = 1e-6,
    silu: bool = True,
    input_bias_C: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """GroupNorm of x + input_bias over a group's channels and all pixels, * weight + bias, then SiLU.

    Args:
        x_BCHW: (B, C, H, W), any strides.
        weight_C, bias_C: (C,).
        num_groups: divides C.
        eps: added to the variance.
        silu: False: the normalised image itself.
        input_bias_C: (C,), or None for 0: the bias of the convolution before, which then need not add it.
        impl: "auto" or "reference".
    Returns: (B, C, H, W) in the dtype of x_BCHW; channels_last where x_BCHW has its channels innermost, else contiguous.
    Raises: ValueError for other shapes, or an impl that is unknown or cannot run.
    """
    if x_BCHW.ndim != 4 or x_BCHW.shape[2] * x_BCHW.shape[3] == 0:
        raise ValueError(f"x_BCHW is {tuple(x_BCHW.shape)}: want (B, C, H, W) with a pixel to average over")
    channels = x_BCHW.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide {channels} channels")
    for name, vector in (("weight_C", weight_C), ("bias_C", bias_C), ("input_bias_C", input_bias_C)):
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"{name} is {tuple(vector.shape)}, want ({channels},): one a channel")
    return select("group_norm_silu", impl, x_BCHW.device)(x_BCHW, weight_C, bias_C, num_groups, eps, silu, input_bias_C)
