"""What the commands share: how they end when the user's input is at fault."""

from __future__ import annotations

import sys
from collections.abc import Callable

from varfast.types import InputError


def run_command(main: Callable[[list[str]], int]) -> None:
    """Run a command on the command line's arguments and exit with its code; for bad input with 2 and no traceback."""
    try:
        code = main(sys.argv[1:])
    except InputError as error:
        print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def split_arguments(arguments: list[str], usage: str) -> tuple[str, list[str]]:
    """The config's path and the overrides. Raises: InputError with the usage if there is no single path."""
    paths = [a for a in arguments if "=" not in a]
    if len(paths) != 1 or paths[0].startswith("-"):
        raise InputError(f"usage: {usage}")
    return paths[0], [a for a in arguments if "=" in a]
