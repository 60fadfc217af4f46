"""A policy whose numbers are no longer finite: detected before it is sampled or saved, with an error that helps."""

from __future__ import annotations

from pathlib import Path

from varfast.config import Config
from varfast.distributed import World
from varfast.policies.protocol import Policy
from varfast.runs.checkpoint import Checkpoints
from varfast.types import NotFinitePolicy

_MOST_LABELS = 8  # that are sampled to find out
# Metrics of the last step that may tell why.
_SHOWN_METRICS = ("learning_rate", "grad_norm", "skipped_steps", "loss", "kl", "clip_fraction", "ratio_gap_max",
                  "entropy", "reward_mean")  # fmt: skip


def found_diverged(policy: Policy, labels: list[int], config: Config, world: World) -> NotFinitePolicy | None:
    """Check, in all processes, that the weights are finite and that images can be sampled from them.

    Args:
        labels: of the run; an image of up to 8 of them is sampled.
    Returns: what is wrong, in all processes, if the check fails in one of them.
    """
    found = None
    try:
        some, how = labels[:: -(-len(labels) // _MOST_LABELS)], config.rollout
        policy.check_usable(some, how.temperature, config.run.seed, how.cfg)
    except NotFinitePolicy as error:
        found = error
    if world.any(found is not None) and found is None:
        found = NotFinitePolicy("the weights of another process, which says which, are not finite")
        found.told_by = "first"
    return found


def diagnosis(
    found: NotFinitePolicy,
    config: Config,
    folder: Path,
    step: int,
    metrics: dict[str, float],
    checkpoints: Checkpoints | None = None,
) -> NotFinitePolicy:
    """The error to raise for a policy that diverged: what is known of it, and how to go on.

    Args:
        found: what the check saw.
        folder: of the run.
        step: steps done so far.
        metrics: of the last step; empty if this process has done none.
        checkpoints: of the run; a save in flight is waited for.
    """
    error = NotFinitePolicy(_diagnosis(found, config, folder, step, metrics, checkpoints))
    error.told_by = found.told_by
    return error


def _diagnosis(
    found: NotFinitePolicy,
    config: Config,
    folder: Path,
    step: int,
    metrics: dict[str, float],
    checkpoints: Checkpoints | None,
) -> str:
    if not step:
        guided = f"rollout.cfg={config.rollout.cfg:g}, " if config.rollout.cfg else ""
        return (
            f"the policy cannot be sampled before the first step: {found}\n"
            f"  rollout.temperature={config.rollout.temperature:g}, {guided}run.dtype={config.run.dtype}: try a "
            "temperature near 1, float32, or another policy.checkpoint"
        )
    if checkpoints is not None:
        checkpoints.wait()
    whole = sorted(path.name for path in (folder / "checkpoints").glob("step_*") if not path.suffix)
    lines = [f"the policy diverged: after step {step} of {config.run.steps} it cannot be sampled: {found}"]
    if seen := ", ".join(f"{name} {metrics[name]:.4g}" for name in _SHOWN_METRICS if name in metrics):
        lines.append(f"  step {step}: {seen}")
    good = [name for name in whole if name != f"step_{step:06d}"]
    if len(good) < len(whole):
        held = folder / "checkpoints" / whole[-1]
        lines.append(f"  {held} holds these weights; delete it to go on from an earlier one")
    if good:
        lines.append(f"  {folder / 'checkpoints' / good[-1]} is the last good checkpoint; to go on from it with these "
                     "settings would end alike")  # fmt: skip
    else:
        lines.append("  these weights were not saved, and there is no earlier checkpoint")
    lines.append(
        f"  in another run.dir, set a lower update.lr (now {config.update.lr:g}), {config.loss.holds_closer} or a "
        f"lower update.grad_clip (now {config.update.grad_clip:g})"
        + ("" if config.run.dtype == "float32" else ", or run.dtype=float32")
    )
    if good and len(good) == len(whole):
        lines.append(
            f"  to start there from {good[-1]}: python -m varfast.export checkpoint={folder} out=good.pth, then "
            "policy.checkpoint=good.pth"
        )
    return "\n".join(lines)
