"""What the commands share: how they end when the user's input is at fault."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from varfast.printable import printable
from varfast.types import InputError

# torch 2.11 and 2.14 read both; the first has been used on a GPU.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_LONGEST_MESSAGE = 20_000  # characters of an error; a config with a hundred wrong keys has 10 000


def run_command(main: Callable[[list[str]], int]) -> None:
    """Run a command on the command line's arguments and exit with its code; for bad input with 2 and no traceback."""
    expand_segments()
    try:
        code = main(sys.argv[1:])
    except InputError as error:
        _complain(f"error: {error}", error)
        code = 2
    except KeyboardInterrupt as error:
        _complain(str(error) or "interrupted", error)
        code = getattr(error, "code", 130)  # of another signal than Ctrl-C
    sys.exit(code)


def _complain(text: str, error: BaseException) -> None:
    # An error may quote a server, a file or a folder that somebody handed on: here all of it meets the terminal.
    for part in (text, *getattr(error, "__notes__", [])):
        print(printable(part, _LONGEST_MESSAGE, lines=True), file=sys.stderr)


def expand_segments() -> None:
    """Let CUDA's allocator grow its segments, unless the user has set the allocator. Before the first use of CUDA.

    Rollout and update want blocks of other sizes. With segments of fixed size d30 ran out of an H100's 80 GB in its 4th
    step, 27.7 GiB of them reserved and not allocated; with these it went on. Where the platform has none, torch warns.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def split_arguments(arguments: list[str], usage: str) -> tuple[str, list[str]]:
    """The config's path and the overrides. Raises: InputError with the usage if there is no single path."""
    paths = [a for a in arguments if "=" not in a]
    if len(paths) != 1 or paths[0].startswith("-"):
        raise InputError(f"usage: {usage}")
    return paths[0], [a for a in arguments if "=" in a]
