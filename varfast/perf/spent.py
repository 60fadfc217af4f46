"""What a run has spent, what a step of it costs, and the budget that ends it.

How work is counted: varfast.perf.cost. FLOP are the policy's own: sampling, decoding to pixels, the passes of the
reference, forward and backward of the images that have a gradient. What checkpointing computes again is not counted:
these are model FLOP. Nor are rewards, of which a server's are not known, evaluations, and sample grids. So two ways of
training, and two rewards, stand on one axis.

Hours are those of the steps, on the clock of the first process, without evaluations, grids and checkpoints. Images and
FLOP are those of all processes together.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from varfast.config import Config
from varfast.perf.cost import Cost
from varfast.perf.work import Work
from varfast.runs.config import RunConfig

# Of steps of equal cost the sum is their number times the cost up to rounding, which must not add a step.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Spent:
    """What a run, or a step, has spent.

    Attributes:
        images: that were sampled.
        flop: model FLOP of the policy.
        hours: of the steps.
    """

    images: int = 0
    flop: float = 0.0
    hours: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.images + other.images, self.flop + other.flop, self.hours + other.hours)

    def __mul__(self, times: int) -> Spent:
        return Spent(self.images * times, self.flop * times, self.hours * times)

    def __str__(self) -> str:
        return f"{self.images} images, {self.flop:.4g} FLOP, {self.hours:.4g} h of steps"

    @property
    def metrics(self) -> dict[str, float]:
        """By the names of metrics.jsonl."""
        return {f"spent_{name}": value for name, value in asdict(self).items()}


def step_flop(config: Config, cost: Cost, updated: float, referenced: float) -> float:
    """FLOP of a step.

    Args:
        cost: of the policy.
        updated: images of forward and backward passes, counted again in each epoch.
        referenced: images of forward passes of the reference.
    """
    images, rows = config.sampled_images, config.rollout.rows
    sampler, learned = cost.base if config.loss.samples_reference else cost, cost.forward.flop + cost.backward.flop
    of_transformer = images * sampler.rollout.flop + updated * learned + referenced * cost.base.forward.flop
    return rows * of_transformer + images * cost.decode.flop


def whole_step(work: Work) -> Spent:
    """What a step costs on average in which every image has a gradient; hours are not known.

    work: of a step on one process.
    """
    config, learned, every = work.config, work.config.learned_images, work.config.measure_kl_every
    referenced = learned if work.reads_reference else 0
    drift = config.sampled_images / every if every else 0.0  # for the KL apart from the loss
    return Spent(
        config.sampled_images, step_flop(config, work.cost, learned * config.update.epochs, referenced + drift)
    )


@dataclass(frozen=True)
class Budget:
    """How far a run goes: run.steps, or fewer where it reaches one of its budgets before.

    Attributes:
        steps: at most.
        most: the budgets, by what is spent: images, flop, hours.
        step: what a step is expected to cost.
    """

    steps: int
    most: dict[str, float]
    step: Spent

    @classmethod
    def of(cls, config: RunConfig, step: Spent) -> Budget:
        named = {name: getattr(config, f"budget_{name}") for name in ("images", "flop", "hours")}
        return cls(config.steps, {name: most for name, most in named.items() if most is not None}, step)

    def ended_by(self, step: int, spent: Spent) -> str | None:
        """The setting that ends the run after `step` steps that have spent so much; None: it goes on."""
        for name, most in self.most.items():
            if getattr(spent, name) >= most:
                return _setting(name, most)
        return f"run.steps={self.steps}" if step >= self.steps else None

    def total_steps(self, step: int, spent: Spent) -> int:
        """Steps of the whole run, as far as is known after `step` of them: run.steps, or what the budgets buy.

        A budget buys steps of the mean cost so far; before the first one of the cost that is expected, if it is known.
        Computed from what a checkpoint holds, so a run that goes on finds the same number. Where all steps cost the
        same, it stays the same, and the learning rates are those of a run of so many steps.
        """
        totals = [self.steps]
        for name, most in self.most.items():
            of_step = getattr(spent, name) / step if step else getattr(self.step, name)
            if of_step > 0.0:
                left = (most - getattr(spent, name)) / of_step
                totals.append(step + max(0, math.ceil(left * (1.0 - _ROUNDING))))
        return max(step, min(totals))

    def bought(self) -> list[str]:
        """A sentence for each budget: how many steps it buys at the cost that is expected."""
        found = []
        for name, most in self.most.items():
            of_step = getattr(self.step, name)
            if of_step > 0.0:
                steps = math.ceil(most / of_step * (1.0 - _ROUNDING))
                unit = {"images": "images", "flop": "FLOP", "hours": "h"}[name]
                found.append(f"{_setting(name, most)} buys {steps} steps of {of_step:.4g} {unit}")
        return found


def _setting(name: str, most: float) -> str:
    """As one writes it: run.budget_flop=1.2e9, run.budget_images=5000."""
    digits, _, power = f"{most:.14e}".partition("e")
    short = f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    plain = f"{most:.15g}"
    return f"run.budget_{name}={min(short, plain, key=len) if name == 'flop' else plain}"


def spent_before(step: int, of_step: Spent, step_s: list[float]) -> Spent:
    """What `step` steps have spent of a run whose checkpoint does not say so, as one of an earlier version.

    Images are exact. FLOP are those of steps in which every image had a gradient: an upper bound. Steps without a time
    count with the mean of the others.

    Args:
        step_s: seconds of steps, as far as metrics.jsonl has them.
    """
    found = of_step * step
    hours = math.fsum(step_s) / len(step_s) * step / 3600 if step_s else 0.0
    return Spent(found.images, found.flop, hours)
