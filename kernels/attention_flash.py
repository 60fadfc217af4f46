"""Attention by the packages flash-attn and flash-attn-4. They are for comparison and never picked by impl="auto".

Both packages install into the module `flash_attn`. flash-attn (FlashAttention 2) defines flash_attn_func in it.
flash-attn-4 (CuTe, for Hopper and later) only adds flash_attn.cute, with its own flash_attn_func. With flash-attn-4
alone, `import flash_attn` therefore succeeds although FlashAttention 2 is missing, so we test for the function itself.
Neither package supports the scale mask, so we make one call for each scale, which needs no mask. FlexAttention's FLASH
backend does support it: it passes the mask to flash-attn-4 as a function together with a list of the visible blocks.

Tensors of both packages are (B, L, H, D).

Axes: B image, H head, L token over all scales, l token of one scale, D head dim.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from varfast.kernels import reference
from varfast.kernels.position import on_host_only
from varfast.kernels.selection import Implementation

_MODULES = {"flash_attn": "flash_attn", "fa4": "flash_attn.cute"}
_PACKAGES = {"flash_attn": "flash-attn", "fa4": "flash-attn-4"}


@functools.cache
def _function(impl: str) -> Callable[..., Any] | str:
    """The implementation's flash_attn_func, or a message that says why it cannot be imported."""
    module, package = _MODULES[impl], _PACKAGES[impl]
    try:
        found: Callable[..., Any] | None = getattr(importlib.import_module(module), "flash_attn_func", None)
    except ImportError as error:  # not installed, a dependency is missing, or built for another torch
        return f"{module}.flash_attn_func cannot be imported ({error}); install the package {package}"
    if found is not None:
        return found
    without = " (flash-attn-4 alone makes such a module: impl='fa4')" if impl == "flash_attn" else ""
    return f"{module} has no flash_attn_func{without}; install the package {package}"


@functools.cache
def _cannot(impl: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"{_PACKAGES[impl]} needs a CUDA device"
    function = _function(impl)
    if isinstance(function, str):
        return function
    if not torch.cuda.is_available():
        return f"{_PACKAGES[impl]} needs a CUDA device; this machine has none"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"{_PACKAGES[impl]} needs compute capability 8.0 or later, got {major}.{minor}"
    if impl == "fa4" and major == 12:
        return "flash-attn-4 has no backward pass of a fixed order on compute capability 12"
    return None


@functools.cache
def _cannot_flex_flash(device: torch.device) -> str | None:
    from torch.nn.attention import flex_attention

    options = getattr(flex_attention, "FlexKernelOptions", None)
    if options is None or "BACKEND" not in options.__annotations__:
        return f"FlexAttention of torch {torch.__version__} has no backends to choose from; torch 2.11 has"
    return _cannot("fa4", device)


def _refuses(q: Tensor, *_: Any) -> str | None:
    taken = q.dtype in (torch.bfloat16, torch.float16)
    return None if taken else f"bfloat16 or float16, got {q.dtype}"


def _attend(
    impl: str, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, scale: float = 1.0, causal: bool = False
) -> Tensor:
    """Attention of (B, L, H, D) tensors, with deterministic sums in the backward pass."""
    function = _function(impl)
    assert not isinstance(function, str), function
    q, k, v = (x.transpose(1, 2) for x in (q_BHLD, k_BHLD, v_BHLD))
    found: Any = function(q, k, v, softmax_scale=scale, causal=causal, deterministic=True)
    out: Tensor = found[0] if isinstance(found, tuple) else found  # flash-attn-4 returns the log-sum too
    return out


def scale_by_scale(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    scale_ends: tuple[int, ...],
    logit_scale_H: Tensor,
) -> list[Tensor]:
    """A call of `attend` for each scale: its queries with all keys up to its end, which needs no mask."""
    q_BHLD = reference.scaled(q_BHLD, logit_scale_H)
    spans = zip((0, *scale_ends[:-1]), scale_ends, strict=True)
    return [attend(q_BHLD[:, :, start:end], k_BHLD[:, :, :end], v_BHLD[:, :, :end]) for start, end in spans]


def _run(impl: str, *given: Any) -> Tensor:
    return torch.cat(scale_by_scale(functools.partial(_attend, impl), *given), dim=1).transpose(1, 2)


def _run_cached(
    impl: str, q_BHlD: Tensor, k_cache_BHLD: Tensor, v_cache_BHLD: Tensor, num_keys: int, logit_scale_H: Tensor
) -> Tensor:
    k, v = (cache[:, :, :num_keys] for cache in (k_cache_BHLD, v_cache_BHLD))
    return _attend(impl, reference.scaled(q_BHlD, logit_scale_H), k, v).transpose(1, 2)


def block_causal(impl: str) -> Implementation:
    """The implementation "flash_attn" or "fa4" of block_causal_attention."""
    return Implementation(impl, functools.partial(_run, impl), functools.partial(_cannot, impl), (), _refuses)


def cached(impl: str) -> Implementation:
    """The implementation "flash_attn" or "fa4" of cached_attention."""
    refuses = on_host_only(5, _refuses)
    return Implementation(impl, functools.partial(_run_cached, impl), functools.partial(_cannot, impl), (), refuses)


def _run_causal(impl: str, q_BHLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, scale: float) -> Tensor:
    return _attend(impl, q_BHLD, k_BGLD, v_BGLD, scale, causal=True)


def causal(impl: str) -> Implementation:
    """The implementation "flash_attn" or "fa4" of causal_attention."""
    return Implementation(impl, functools.partial(_run_causal, impl), functools.partial(_cannot, impl), (), _refuses)


def flex_flash(run: Callable[..., Tensor]) -> Implementation:
    """FlexAttention with flash-attn-4's kernels. On Hopper its backward pass sums d q in a nondeterministic order."""
    return Implementation("flex_flash", run, _cannot_flex_flash, (), _refuses)
