"""What the commands share: how they end when the user's input is at fault."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from varfast.types import InputError

# torch 2.11 and 2.14 read both; the first has been used on a GPU.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def run_command(main: Callable[[list[str]], int]) -> None:
    """Run a command on the command line's arguments and exit with its code; for bad input with 2 and no traceback."""
    expand_segments()
    try:
        code = main(sys.argv[1:])
    except InputError as error:
        print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        code = 2
    except KeyboardInterrupt as error:
        print("\n".join([str(error) or "interrupted", *getattr(error, "__notes__", [])]), file=sys.stderr)
        code = getattr(error, "code", 130)  # of another signal than Ctrl-C
    sys.exit(code)


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
