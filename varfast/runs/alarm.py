"""Whether a run can learn at all: what its last steps have in common, and the reason where nothing can come of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# Steps in a row that must look alike. A binary reward of a policy that never earns it may be found by chance later, so
# this is no proof; but whoever waits for it should know.
WINDOW = 15
# Of the tokens: hardly one has a gradient of the policy's part left.
_ALL_CLIPPED = 0.98
# A step of Adam moves a weight by about the learning rate; float32 weights of 0.02 are 2e-9 apart.
_LEAST_LR = 1e-9

_Step = Mapping[str, float]


@dataclass(frozen=True)
class Idle:
    """Why a run does not learn.

    Attributes:
        what: one word for the cause: the name of its test in `CAUSES`.
        why: what has been the case in the last steps, and what to do; the rest of a sentence.
        reason: the sentence.
    """

    what: str
    why: str
    reason: str


class Alarm:
    """Looks at the metrics of each step, and says each cause once.

    Args:
        groups: of a step: prompts that are drawn.
        window: steps in a row that must look alike.
    """

    def __init__(self, groups: float, window: int = WINDOW) -> None:
        self._groups, self._window = groups, window
        self._last: deque[_Step] = deque(maxlen=window)
        self._said: set[str] = set()

    def look(self, metrics: _Step) -> Idle | None:
        """Take in the metrics of a step. Returns: as `holds`, if it was not said before."""
        idle = self.holds(metrics)
        if idle is None or idle.what in self._said:
            return None
        self._said.add(idle.what)
        return idle

    def holds(self, metrics: _Step) -> Idle | None:
        """Take in the metrics of a step, by the names of metrics.jsonl.

        Returns: what has been the case in each of the last steps; the deepest cause alone: a constant reward makes all
            groups alike too.
        """
        if metrics.get("skipped_rollouts"):
            return None  # run.max_bad_rollouts ends those
        self._last.append(metrics)
        if len(self._last) < self._window:
            return None
        steps = list(self._last)
        for what, (is_so, why) in CAUSES.items():
            if is_so(steps, self._groups):
                return Idle(what, why, f"In the last {self._window} steps {why}")
        return None


def _all(name: str, value: float) -> Callable[[list[_Step], float], bool]:
    return lambda steps, groups: all(step.get(name) == value for step in steps)


def _too_small(steps: list[_Step], groups: float) -> bool:
    return all(step.get("learning_rate", 1.0) < _LEAST_LR for step in steps)


def _constant_reward(steps: list[_Step], groups: float) -> bool:
    means = {step.get("reward_mean") for step in steps}
    return len(means) == 1 and None not in means and _all("reward_std", 0.0)(steps, groups)


def _no_signal(steps: list[_Step], groups: float) -> bool:
    return all(step.get("groups_without_signal", 0) >= groups for step in steps)


def _clipped(steps: list[_Step], groups: float) -> bool:
    return all(step.get("clip_fraction", 0.0) >= _ALL_CLIPPED for step in steps)


# In the order in which they are looked at: a cause stands before its consequences.
CAUSES: dict[str, tuple[Callable[[list[_Step], float], bool], str]] = {
    "learning_rate": (
        _too_small,
        f"the learning rate was below {_LEAST_LR:g}, which moves no weight in float32; raise update.lr, or warm up in "
        "fewer steps",
    ),
    "reward": (
        _constant_reward,
        "every image earned the same reward, so there is nothing to learn from; look at samples/, and at whether the "
        "reward looks at the image at all",
    ),
    "signal": (
        _no_signal,
        "within each group all images earned the same, so no image is better than another of its prompt; raise "
        "rollout.group_size or rollout.temperature, or take a reward that tells samples apart",
    ),
    "gradient": (
        _all("grad_norm", 0.0),
        "the gradient was 0: rewards differ, but nothing of that reaches a weight; look at grpo.clip_eps and at which "
        "weights are trained",
    ),
    "clipped": (
        _clipped,
        "nearly all tokens were clipped, so they have no gradient; raise grpo.clip_eps (0.2 is usual), or lower "
        "update.lr",
    ),
}
