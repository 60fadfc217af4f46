"""Evaluation during training: the samples of the table of before and after, every eval.every steps.

Its numbers are eval/NAME in metrics.jsonl, TensorBoard and trackers, with the names of the table: eval/reward,
eval/reward/<component>, eval/entropy, eval/accuracy; of prompts that are not trained on with their domain, as
eval/held_out/reward. Labels, prompts and random numbers are the same in every evaluation, so the curve has no noise of
the draw. At step 0 they are the base's, which the table has measured in any case.

What is evaluated is what the run would deliver if it ended there: with update.ema_decay the averaged policy. So the
last point of a curve is the table's "after".
"""

from __future__ import annotations

import time
from collections.abc import Callable

from varfast.evaluation.metrics import Numbers
from varfast.perf.profile import memory_metrics
from varfast.progress import duration
from varfast.runs.before_after import BeforeAfter, domain_of, means
from varfast.runs.setup import Setup
from varfast.state import State


class Evaluations:
    """When a run is evaluated, and what comes out.

    Args:
        setup, state: of the run.
        before_after: measures; its "before" is there.
    """

    def __init__(self, setup: Setup, state: State, before_after: BeforeAfter) -> None:
        self._setup, self._state, self._before_after = setup, state, before_after
        self._every = setup.config.eval.every or 0

    @property
    def on(self) -> bool:
        return self._every > 0

    def due(self, step: int, last: bool) -> bool:
        """Whether there is an evaluation after `step` steps; last: the run ends there."""
        return self.on and (last or step % self._every == 0)

    @property
    def of_base(self) -> dict[str, float]:
        """The point at step 0, by the names of metrics.jsonl. In the first process."""
        return eval_metrics(self._before_after.values.get("before", {})) if self.on else {}

    def measure(self, trained: bool, stops: Callable[[], bool]) -> tuple[dict[str, float], str] | None:
        """Evaluate what the run would deliver now. In all processes.

        Args:
            trained: whether this process has done a step; if not, values of the same step may be there already.
            stops: asked before each chunk of images: whether to give up.
        Returns: numbers by the names of metrics.jsonl, and a line about them; None if a process gave up.
        Raises: in all processes, whatever failed in one of them.
        """
        begin_s, step, state = time.perf_counter(), self._state.step, self._state
        with state.delivered():
            batch = self._setup.evaluation_batch
            values = self._before_after.after(state.policy, state.rewards, step, batch, trained, stops)
        memory_metrics(self._setup.device)  # the peak of the next step is its own
        if values is None:
            return None
        seconds = time.perf_counter() - begin_s
        return eval_metrics(values) | {"eval_s": seconds}, self._line(values, seconds)

    def _line(self, values: Numbers, seconds: float) -> str:
        before, after = means(self._before_after.values.get("before", {})), means(values)
        shown = [name for name in after if domain_of(name)[0] in ("reward", "accuracy")]
        parts = [
            f"{name} {after[name]:.3f}" + (f" ({after[name] - before[name]:+.3f})" if name in before else "")
            for name in shown
        ]
        return f"evaluation after step {self._state.step}: {', '.join(parts)}; {duration(seconds)}"


def eval_metrics(values: Numbers) -> dict[str, float]:
    """Means over images, by the names of metrics.jsonl."""
    found = {}
    for whole, mean in means(values).items():
        name, domain = domain_of(whole)
        found[f"eval/{name}" if domain == "train" else f"eval/{domain}/{name}"] = mean
    return found
