"""What a run says about itself at its beginning and end. No PyTorch."""

from __future__ import annotations

import shlex
from pathlib import Path

from varfast.config import Config


def of_beginning(folder: Path, step: int, of_steps: str, config: Config, ended_by: str | None) -> str:
    """A line about a run that goes on.

    Args:
        step: that the folder holds. of_steps: in all, as "about 60".
        ended_by: the setting that ends the run there; None: it goes on.
    """
    more = f"run.steps={2 * step} would go on"
    if step > config.run.steps:
        return (
            f"{folder} holds step {step}, more than run.steps={config.run.steps}: no step is left to do, and the "
            f"weights stay those of step {step}. A new run.dir trains fewer steps; {more}"
        )
    if step == config.run.steps:
        return f"{folder} holds all of run.steps={config.run.steps}: no step is left to do; {more}"
    if ended_by is not None:
        return f"{folder} holds step {step}, and {ended_by} is reached: no step is left to do"
    return f"going on after step {step} of {of_steps} in {folder}"


def of_end(folder: Path, weights: Path, how: str) -> str:
    """What was written where, and the commands that come next. how: the run has ended, as "60 steps"."""
    name = shlex.quote(str(folder))
    return f"""run complete: {how}. Weights {weights}, curves and grids in {folder}
next: python -m varfast.report {name}
      python -m varfast.sample {name}
      python -m varfast.export {name} out=model.safetensors"""
