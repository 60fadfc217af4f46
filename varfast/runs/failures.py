"""A failure in one of several processes: all of them raise, so that none waits for a process that has ended."""

from __future__ import annotations

from varfast.distributed import World
from varfast.types import InputError, NotFinitePolicy, NotFiniteReward


def failure_of_all(found: BaseException | None, world: World, what: str) -> BaseException | None:
    """What kept a process from doing its part, in all processes: its own failure, or that another one has failed.

    Args:
        found: of this process; None: it has done its part.
        what: has failed, for the processes that only hear of it.
    Returns: None if all have done their parts. A NotFinitePolicy in one process is one in all of them, and so is a
        NotFiniteReward, where nothing worse has happened.
    """
    rank = 3 if isinstance(found, NotFinitePolicy) else 1 if isinstance(found, NotFiniteReward) else 2
    worst = world.largest(0 if found is None else rank)
    if worst == 3 and not isinstance(found, NotFinitePolicy):
        found = NotFinitePolicy("the logits or images of another process, which says which, are not finite")
        found.told_by = "first"
        return found
    if found is not None or worst == 0:
        return found
    elsewhere = f"{what} failed in another process, which says why"
    error = NotFiniteReward(elsewhere) if worst == 1 else InputError(elsewhere)
    error.told_by = "first"
    return error
