"""Turns what a reward returned into (B,) float32, or raises one line that says what it returned instead.

Axes: B image.
"""

from __future__ import annotations

import numbers
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varfast.printable import printable
from varfast.types import InputError, NotFiniteReward


def scores(name: str, value: Any, images: int, device: torch.device) -> Tensor:
    """What reward `name` returned for that many images, as a (B,) float32 tensor of its own on `device`.

    A tensor, an array or a list of numbers is taken, of shape (B,) or (B, 1).

    Raises: InputError for anything else; NotFiniteReward, which is one too, for a number that is not finite in float32.
    """
    wanted = f"want ({images},), one number an image: a tensor, an array or a list"
    try:
        given = _tensor(value, images)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f"reward {name} returned {_described(value)}, which holds no numbers that can be read: "
                         f"{printable(error)}; {wanted}") from error  # fmt: skip
    if given is None:
        raise InputError(f"reward {name} returned {_described(value)}; {wanted}")
    if tuple(given.shape) not in ((images,), (images, 1)):
        raise InputError(f"reward {name} returned shape {tuple(given.shape)} for {images} images; {wanted}")
    try:
        # A copy: the reward may write into its own tensor while the step is still using the numbers.
        scores_B = given.detach().reshape(images).to(device, torch.float32, copy=True)
    except RuntimeError as error:
        raise InputError(f"reward {name} returned {_described(value)}, which cannot be read: {printable(error)}; "
                         f"{wanted}") from error  # fmt: skip
    must_be_finite(name, scores_B, given)
    return scores_B


def must_be_finite(name: str, scores_B: Tensor, given: Tensor | None = None) -> None:
    """Raises: NotFiniteReward if a score is not finite; `given`: the scores before they were converted to float32."""
    bad = (~scores_B.isfinite()).nonzero().flatten().tolist()
    if bad:
        first = float(scores_B[bad[0]]) if given is None else float(given.reshape(-1)[bad[0]])
        beyond = f", more than float32 holds ({torch.finfo(torch.float32).max:.3g})" if abs(first) < np.inf else ""
        raise NotFiniteReward(
            f"reward {name} returned {first}{beyond} for image {bad[0]} ({len(bad)} of {len(scores_B)} are not "
            "finite); mend the reward, or clamp it"
        )


def _tensor(value: Any, images: int) -> Tensor | None:
    """A tensor of what was returned; None if it holds no numbers. Lists and arrays of a wrong length are not read."""
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and not (
            value.is_meta or value.is_nested or value.is_quantized or value.is_complex()
        )
        return value if plain else None
    if isinstance(value, np.ndarray | np.generic):
        return _from_array(np.asarray(value), images)
    if isinstance(value, bool | int | float):
        return torch.tensor(float(value))
    if isinstance(value, list | tuple):
        return _from_list(value) if len(value) == images else _shape_alone((len(value),))
    if hasattr(type(value), "__array__"):  # a Series of pandas, an array of JAX
        return _from_array(np.asarray(value), images)
    return None


def _shape_alone(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, device="meta")


def _from_list(values: list[Any] | tuple[Any, ...]) -> Tensor | None:
    if any(isinstance(value, Tensor) for value in values):
        parts = [value.detach() for value in values if isinstance(value, Tensor) and value.numel() == 1]
        if len(parts) < len(values):
            return None
        return torch.stack([part.reshape(()).to(parts[0].device) for part in parts])
    flat = [value[0] if isinstance(value, list | tuple | np.ndarray) and len(value) == 1 else value for value in values]
    if not all(isinstance(value, numbers.Real | np.number | np.bool_) for value in flat):
        return None
    return torch.tensor([float(value) for value in flat], dtype=torch.float64)


def _from_array(array: np.ndarray[Any, Any], images: int) -> Tensor | None:
    if array.dtype.kind not in "biuf":
        return None
    if array.size != images:
        return _shape_alone(array.shape)
    if isinstance(array, np.ma.MaskedArray):
        array = np.ma.filled(array.astype(np.float64), np.nan)
    return torch.from_numpy(np.array(array, dtype=np.float64))


def _described(value: Any) -> str:
    """The type of a returned value in words, without reading more than a few elements of it."""
    kind = type(value)
    what = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    if value is None:
        return "None"
    if isinstance(value, Tensor) and value.is_nested:
        return f"a nested tensor of {value.dtype}"
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}, {value.layout}, on {value.device}, of shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array of {printable(value.dtype, 80)} of shape {value.shape}"
    if isinstance(value, str | bytes):
        return f"the {what} '{printable(value, 60)}'"
    if isinstance(value, dict):
        return f"a dict with the keys {', '.join(printable(repr(key), 40) for key in islice(value, 4)) or '(none)'}"
    if isinstance(value, list | tuple | set | frozenset):
        inside = ", ".join(dict.fromkeys(type(part).__name__ for part in islice(value, 4)))
        return f"a {what} of {len(value)} ({printable(inside, 80) or 'nothing'})"
    return f"a {printable(what, 80)}"
