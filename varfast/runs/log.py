"""What a run shows while it goes on: metrics.jsonl, TensorBoard, trackers, progress bar, sample grids.

Axes: N image of a grid, B image of a step; H, W pixels.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from varfast.config import Config
from varfast.files import WriteError, advice, append, open_regular, parse_json, reason, save_text
from varfast.progress import Progress
from varfast.runs.pictures import extremes, image_grid, save_picture
from varfast.runs.trackers import start_trackers
from varfast.types import Rewards

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# A line of metrics.jsonl has 1 to 3 kB.
_MOST_LINE_BYTES = 2**20
_LAST_STEP = 2**53
# Why a run ended before it was complete; a run that goes on removes it.
ENDED = "ended.json"
# What each row of the grids shows, whole: the picture has space for the beginning.
GRID_ROWS = "grid_rows.json"


class RunLog:
    """Metrics and pictures of a run, in its folder. A context manager.

    A run does not depend on any of these files, so a failed write is reported, once for each kind of file, and the run
    goes on. Lines of metrics.jsonl are kept in memory and written when the disk has space again.

    Args:
        folder: of the run.
        start_step, total_steps: steps done already, and in all. A killed run may have left metrics of steps after
            `start_step`; they are dropped, since those steps are done again.
        tensorboard: write TensorBoard's events too.
        config: of the run, which says which trackers follow it.
    """

    def __init__(
        self, folder: Path, start_step: int, total_steps: int, tensorboard: bool, config: Config | None = None
    ) -> None:
        self._folder = folder
        self._metrics = folder / "metrics.jsonl"
        self._said: set[str] = set()
        self._progress = Progress("grpo" if config is None else config.loss.name, total_steps, start_step)
        self._unwritten = ""
        self._groups = None if config is None else config.rollout.labels_per_step
        self._first_reward: float | None = None  # of the run, to which the bar compares
        with self._optional("the lines of earlier steps"):
            kept = _lines(self._metrics, start_step)
            self._first_reward = next(_rewards(kept), None)
            save_text(self._metrics, "".join(line + "\n" for line in kept))
            (folder / ENDED).unlink(missing_ok=True)
        self._trackers = [] if config is None else start_trackers(folder, config)
        self._writer: SummaryWriter | None = None
        self._excepthook = threading.excepthook
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = self._of_thread
            with self._events():
                purge_step = start_step + 1 if start_step else None
                self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._append("")
        if self._writer is not None:
            with self._events():
                self._writer.close()
        threading.excepthook = self._excepthook
        self._progress.close()
        for tracker in self._trackers:
            tracker.finish(failed=kind is not None)

    def step(
        self,
        step: int,
        metrics: dict[str, float],
        total_steps: int | None = None,
        step_s: float | None = None,
        left_s: float | None = None,
    ) -> None:
        """Record the metrics of a step, counted from 1. Those that are not finite are skipped: JSON has no NaN.

        Args:
            total_steps: as far as is known now, where a budget may end the run before.
            step_s, left_s: for the bar: see Progress.update.
        """
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._append(json.dumps({"step": step, **metrics}) + "\n")
        self._scalars(step, metrics)
        self._progress.update(self._note(metrics), total_steps, step_s, left_s)

    def _note(self, metrics: dict[str, float]) -> str:
        """What matters of a step, in half a line. A skipped rollout has none of it; DPO has the KL in some steps alone,
        and no reward on saved pairs.
        """
        parts = []
        if (reward := metrics.get("reward_mean")) is not None:
            change = "" if self._first_reward is None else f" ({reward - self._first_reward:+.3f})"
            self._first_reward = reward if self._first_reward is None else self._first_reward
            parts.append(f"reward {reward:.3f}{change}")
        shown = {"kl": "kl", "margin": "implicit_margin", "pair accuracy": "pair_accuracy"}
        parts += [f"{short} {metrics[name]:.3f}" for short, name in shown.items() if name in metrics]
        if self._groups and "groups_without_signal" in metrics:
            parts.append(f"no signal {metrics['groups_without_signal']:.0f}/{self._groups}")
        return " ".join(parts)

    def _scalars(self, step: int, metrics: dict[str, float]) -> None:
        if self._writer is not None:
            with self._events():
                for name, value in metrics.items():
                    self._writer.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.scalars(metrics, step)

    def amend(self, step: int, metrics: dict[str, float]) -> None:
        """Add metrics to the line of a step that is over; of step 0 to that of the base, which only this makes."""
        self._append("")
        with self._optional("a line of metrics.jsonl, measured later,"):
            lines = {parse_json(line)["step"]: line for line in _lines(self._metrics, step)}
            before = parse_json(lines[step]) if step in lines else {"step": step}
            lines[step] = json.dumps(before | metrics)
            after = [line for line in _lines(self._metrics, _LAST_STEP) if parse_json(line)["step"] > step]
            kept = [lines[number] for number in sorted(lines)] + after
            save_text(self._metrics, "".join(line + "\n" for line in kept))
        self._scalars(step, metrics)

    def metrics_of(self, step: int) -> dict[str, Any]:
        """What metrics.jsonl has of a step, its number among it; empty if it has none."""
        last: dict[str, Any] = next(map(parse_json, _lines(self._metrics, step)[-1:]), {"step": -1})
        return last if last["step"] == step else {}

    def grid(
        self, step: int, images: Tensor, columns: int, titles: Sequence[str] = (), rows: Sequence[str] = ()
    ) -> None:
        """Save a grid of (N, 3, H, W) images in [0, 1] as grids/step_N.png, with a title beside each row.

        rows: what each row shows, for grid_rows.json; default: the titles.
        """
        picture = image_grid(images, columns, titles)
        with self._optional("a grid of samples"):
            save_text(self._folder / GRID_ROWS, json.dumps(list(rows or titles)) + "\n")
            save_picture(self._folder / "grids" / f"step_{step:06d}.png", picture)
        if self._writer is not None:
            with self._events():
                self._writer.add_image("samples", picture, step, dataformats="HWC")
        for tracker in self._trackers:
            tracker.picture("samples", Image.fromarray(picture), step)

    def samples(self, step: int, images: Tensor, labels_B: Tensor, rewards: Rewards) -> None:
        """Save the best and the worst of a step's (B, 3, H, W) images, with their rewards.

        samples/step_N.png has two rows: the best image first, and the worst first. samples/step_N.json describes them:
        "best" and "worst" list {"label", "reward", "rewards": {component: score before its weight}} for each image of
        the row, "ties" says how many images of the step have the same reward as the first of each row, and "images" how
        many the step has. Among equal rewards (of a reward that is 0 or 1, say), as many labels as possible are shown.
        """
        rows_2n, notes = extremes(labels_B, rewards)
        path = self._folder / "samples" / f"step_{step:06d}.png"
        with self._optional("the best and worst samples"):
            save_picture(path, image_grid(images[rows_2n.flatten().to(images.device)], rows_2n.shape[1]))
            save_text(path.with_suffix(".json"), json.dumps(notes, indent=1) + "\n")

    def pairs(self, write: Callable[[], None]) -> None:
        """Keep the pairs of a step, by a call of `write`."""
        with self._optional("the pairs of a step"):
            write()

    def of_base(self, appearance: dict[str, float]) -> None:
        """Save appearance.json: what the base's samples look like, to which drift/... in metrics.jsonl compares."""
        with self._optional("appearance.json"):
            save_text(self._folder / "appearance.json", json.dumps(appearance, indent=1) + "\n")

    def ended(self, step: int, why: str, diverged: bool) -> None:
        """Save ended.json: a signal or an error ends the run after `step` steps, before it is complete.

        Args:
            why: a signal's name, or what the error says.
            diverged: the policy's numbers are no longer finite.
        """
        with self._optional(ENDED):
            save_text(
                self._folder / ENDED, json.dumps({"step": step, "why": why, "diverged": diverged}, indent=1) + "\n"
            )

    def environment(self, here: dict[str, Any]) -> None:
        """Save environment.json: versions and hardware."""
        with self._optional("environment.json"):
            save_text(self._folder / "environment.json", json.dumps(here, indent=2) + "\n")

    def _append(self, line: str) -> None:
        """Add a line to metrics.jsonl, after those that could not be written so far."""
        self._unwritten += line
        if not self._unwritten:
            return
        with self._optional("a line of metrics.jsonl, kept until there is space,"):
            append(self._metrics, self._unwritten.encode())
            self._unwritten = ""

    @contextmanager
    def _events(self) -> Iterator[None]:
        """Around a write of TensorBoard. Its thread dies at the first failure, so no events are written after one."""
        try:
            yield
        except OSError as error:
            self._writer = None
            with self._optional("TensorBoard's events, which end here,"):
                raise error

    def _of_thread(self, failed: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread hands its error to the next caller, where _events reports it; do not print it here too.
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard.")):
            self._excepthook(failed)

    @contextmanager
    def _optional(self, what: str) -> Iterator[None]:
        """Around a write that the run can do without: a failure is reported the first time, and otherwise ignored."""
        try:
            yield
        except (OSError, WriteError) as error:
            if what not in self._said:
                self._said.add(what)
                text = str(error) if isinstance(error, WriteError) else f"{reason(error)}. {advice(error)}"
                self.say(f"{what} could not be written: {text}. The run goes on; this is said once")

    def say(self, text: str) -> None:
        """Print a line; on a terminal above the progress bar."""
        self._progress.say(text)


def step_seconds(folder: Path, last_step: int) -> list[float]:
    """Seconds of the steps up to `last_step` that metrics.jsonl has."""
    found = [parse_json(line.encode()).get("step_s") for line in _lines(folder / "metrics.jsonl", last_step)]
    return [float(s) for s in found if isinstance(s, int | float) and not isinstance(s, bool) and 0 <= s < math.inf]


def _rewards(lines: list[str]) -> Iterator[float]:
    """reward_mean of lines of metrics.jsonl, of those that have one."""
    for line in lines:
        reward = parse_json(line.encode()).get("reward_mean")
        if isinstance(reward, int | float) and not isinstance(reward, bool):
            yield float(reward)


def _lines(path: Path, last_step: int) -> list[str]:
    """The lines of metrics.jsonl up to `last_step`, one for each step; the later line where a step has two. Step 0 is
    the base, where eval.every has it evaluated.

    Half a line, which a killed run leaves at the end, and anything else that is not a line of metrics is skipped.
    """
    kept: dict[int, str] = {}
    with suppress(OSError), open_regular(path) as file:
        while line := file.readline(_MOST_LINE_BYTES):
            try:
                step = parse_json(line)["step"]
                text = line.decode().rstrip("\n")
            except (ValueError, RecursionError, TypeError, KeyError):
                continue
            if isinstance(step, int) and not isinstance(step, bool) and line.endswith(b"\n") and 0 <= step <= last_step:
                kept[step] = text
    return [kept[step] for step in sorted(kept)]
