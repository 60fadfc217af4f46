"""The only module that imports Triton for the kernels' files: `from varfast.kernels._triton import jit, tl`.

If Triton cannot be imported, this module provides stubs, so that the kernels' files can still be imported for their
other implementations. No kernel is launched then, because selection.cannot_run_triton checks NO_TRITON. A kernel's file
must import `tl` into its own globals, where Triton's compiler and its interpreter look up the names used in a kernel.
"""

from __future__ import annotations

from typing import Any

NO_TRITON: str | None = None  # why Triton cannot be imported; None if it can

try:
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError as error:
    NO_TRITON = f"the package triton cannot be imported ({error})"
    tl = None

    def jit(function: Any = None, **_: Any) -> Any:
        """Stub for triton.jit: a decorator, with or without options, that returns the function unchanged."""
        return function or jit

    def constexpr(value: Any) -> Any:
        """Stub for tl.constexpr: returns the value itself."""
        return value


__all__ = ["NO_TRITON", "constexpr", "jit", "tl"]
