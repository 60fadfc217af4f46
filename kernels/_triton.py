"""The one place where the kernels' files import Triton: `from varfast.kernels._triton import jit, tl`.

Where it cannot be imported, stand-ins let these files be imported for their other implementations. Nothing launches a
kernel then: selection.cannot_run_triton reads NO_TRITON. A kernel's file must import `tl` into its own globals, which
is where Triton's compiler and its interpreter look up the names in a kernel.
"""

from __future__ import annotations

from typing import Any

NO_TRITON: str | None = None  # why it cannot be imported

try:
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError as error:
    NO_TRITON = f"the package triton cannot be imported ({error})"
    tl = None

    def jit(function: Any = None, **_: Any) -> Any:
        """As a decorator, with or without options: leaves the function as it is."""
        return function or jit

    def constexpr(value: Any) -> Any:
        """A constant that kernels read: the value itself."""
        return value


__all__ = ["NO_TRITON", "constexpr", "jit", "tl"]
