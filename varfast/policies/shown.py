"""What a policy says of itself to somebody who works with it by hand: in a notebook, or in a loop of their own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from varfast.policies.precision import MixedPrecision


class Shown:
    """Of a policy with models by name, the trained one first."""

    parts: dict[str, nn.Module]
    device: torch.device
    num_classes: int
    tokens_shape: tuple[int, ...]
    image_size: int

    @property
    def dtype(self) -> torch.dtype:
        """Of activations. The weights are float32."""
        model = next(iter(self.parts.values()))
        assert isinstance(model, MixedPrecision)
        return model.compute_dtype

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that are trained, for an optimizer: of the adapter alone, where there is one.

        After each step of the optimizer call `weights_changed()`: in bfloat16 copies of the weights are sampled from.
        """
        return (p for p in next(iter(self.parts.values())).parameters() if p.requires_grad)

    def __repr__(self) -> str:
        sizes = [f"{name} {_count(part)}" for name, part in self.parts.items()]
        tokens = " x ".join(map(str, self.tokens_shape))
        what = [*sizes, f"{self.num_classes} labels or prompts", f"{tokens} tokens", f"{self.image_size} px"]
        return f"{type(self).__name__}({', '.join(what)}, {self.device}, {str(self.dtype).removeprefix('torch.')})"


def _count(part: nn.Module) -> str:
    parameters = sum(p.numel() for p in part.parameters())
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if parameters >= size:
            return f"{parameters / size:.3g}{unit} parameters"
    return f"{parameters} parameters"
