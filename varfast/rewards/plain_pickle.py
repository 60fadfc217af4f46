"""Reads pickles of plain data from servers whose protocol is pickle, and runs nothing that they name.

A pickle is a program: pickle.loads calls whatever it names. Here the two names of a number of NumPy stand for code of
this file, and any other is refused before anything is called. What is left are None, booleans, numbers, text, bytes,
lists, tuples, sets and dicts.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from typing import Any

# NumPy's kinds of numbers, by struct's letters.
_LETTERS = {"f2": "e", "f4": "f", "f8": "d", "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q",
            "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}  # fmt: skip


class NotPlain(ValueError):
    """A pickle that holds more than plain data, or is none."""


def plain_loads(content: bytes) -> Any:
    """The object of a pickle; a scalar of NumPy is a number.

    Raises: NotPlain, with the reason.
    """
    try:
        return _Plain(io.BytesIO(content)).load()
    except NotPlain:
        raise
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, ImportError, TypeError, ValueError,
            OverflowError, MemoryError, RecursionError, AssertionError, struct.error) as error:  # fmt: skip
        raise NotPlain(f"no pickle that can be read ({type(error).__name__}: {error})") from error


# The one in Python: that in C sets aside gigabytes if a few bytes of the pickle ask for it.
class _Plain(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "dtype"):
            return _Named(_Dtype)
        if (module, name) in (("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar")):
            return _Named(_scalar)
        raise NotPlain(f"it names {module}.{name}, and only plain data is read from a pickle")

    def persistent_load(self, pid: Any) -> Any:
        raise NotPlain("it refers to an object outside of it")


class _Named:
    """What a name of the pickle stands for: an object of its own, since a pickle may write into what it names."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)


class _Dtype:
    """numpy.dtype(code, align, copy), whose state is (version, byte order, ...)."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in _LETTERS:
            raise NotPlain(f"it holds NumPy's type {code!r}, which is no number")
        self._format = f"<{_LETTERS[code]}"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._format = (">" if state[1] == ">" else "<") + self._format[1:]

    def number(self, content: bytes) -> Any:
        (number,) = struct.unpack(self._format, content)
        return number


def _scalar(dtype: _Dtype, content: bytes) -> Any:
    return dtype.number(content)
