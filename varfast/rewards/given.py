"""A reward that is given from Python as an object, as to `varfast.train`, instead of by its name in a config.

A run folder cannot keep the object. It keeps a text in its place: where the object comes from, and a hash of its code.
With it a folder's config reads as before, and a run that goes on notices that another object, or other code, is given.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

_PREFIX = "given from Python: "
_PLAIN = (bool, int, float, str, bytes, type(None))


class Given:
    """An object that scores images: a function, a method, a class, an nn.Module or anything else that can be called.

    Attributes:
        function: the object.
        text: what a config file has in its place, as "given from Python: __main__:contrast (code 3f2a9c01)". The code
            is that of the function, or of all methods of the class, with plain default arguments and closed-over
            numbers and texts; not that of other functions which it calls, and not a module's weights.
    """

    # No dataclass: pydantic would take it apart when a config is dumped.
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        # Now, and not when it is saved: a function may count its calls in a variable that it closes over.
        self.text = f"{_PREFIX}{_origin(function)} (code {_code_hash(function)})"

    def __str__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and self.function is other.function

    def __hash__(self) -> int:
        return id(self.function)


def is_recorded(function: str | Given) -> bool:
    """Whether this is the text of an object that was given, without the object."""
    return isinstance(function, str) and function.startswith(_PREFIX)


def origin(function: str | Given) -> str:
    """Of what is given or recorded: where it comes from, as __main__:contrast."""
    return str(function).removeprefix(_PREFIX).partition(" (code ")[0]


def _origin(function: Any) -> str:
    if isinstance(function, functools.partial):
        return f"partial of {_origin(function.func)}"
    named = function if hasattr(function, "__qualname__") else type(function)
    module, name = getattr(named, "__module__", None), named.__qualname__
    return f"{module}:{name}" if module else name


def _code_hash(function: Any) -> str:
    """Eight hexadecimal digits that change with the code, whatever its comments, its place and its process."""
    return hashlib.sha256("\n".join(map(_told, _functions(function))).encode("utf-8", "replace")).hexdigest()[:8]


def _functions(thing: Any) -> Iterator[FunctionType]:
    """The functions that are written in Python behind something that can be called; of an object its class's."""
    if isinstance(thing, functools.partial):
        yield from _functions(thing.func)
    elif isinstance(thing, FunctionType):
        yield thing
        if hasattr(thing, "__wrapped__"):  # behind a decorator
            yield from _functions(thing.__wrapped__)
    else:
        owner = thing.__self__ if isinstance(thing, MethodType) else thing
        kind = owner if isinstance(owner, type) else type(owner)
        for one in kind.__mro__:
            if one.__module__ == kind.__module__:
                yield from (value for value in vars(one).values() if isinstance(value, FunctionType))


def _told(function: FunctionType) -> str:
    """What decides what a function does, as text."""
    code = function.__code__
    defaults = {"": function.__defaults__, **(function.__kwdefaults__ or {})}
    closed: dict[str, Any] = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            closed[name] = cell.cell_contents
        except ValueError:  # empty: its variable has no value yet
            continue
    return "\n".join([_code(code, function.__doc__), repr(_plain(defaults)), repr(_plain(closed))])


def _plain(value: Any) -> Any:
    """Numbers and texts, alone or in tuples and dicts; the type of anything else, whose repr may hold an address."""
    if isinstance(value, dict):
        return {key: _plain(inside) for key, inside in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value if isinstance(value, _PLAIN) else type(value).__qualname__


def _code(code: CodeType, doc: str | None) -> str:
    """The bytecode, its constants and the names it reads, without line numbers, files and the docstring."""
    return repr((code.co_code, code.co_names, code.co_varnames[: code.co_argcount + code.co_kwonlyargcount],
                 [_constant(value) for value in code.co_consts if doc is None or value != doc]))  # fmt: skip


def _constant(value: Any) -> str:
    if isinstance(value, CodeType):  # a function inside, or a comprehension
        return _code(value, None)
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)
