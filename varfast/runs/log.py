"""What a run shows while it goes on: metrics.jsonl, TensorBoard, Weights & Biases, progress bar, sample grids.

Axes: N, B image; H, W pixels.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import re
import subprocess
import threading
import unicodedata
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from varfast.perf.allocator import ALLOCATOR_VARIABLES
from varfast.config import Config
from varfast.files import (
    WriteError,
    advice,
    append,
    open_regular,
    parse_json,
    read_text,
    reason,
    save_text,
    write_atomically,
)
from varfast.progress import Progress
from varfast.roofline import measure_here, speed_of_light_s, stage_counts
from varfast.types import InputError, Rewards

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Small images are enlarged by repetition, so that a grid of digits can be looked at.
_SMALLEST_CELL_PX = 48
GAP_PX = 4
_TITLE_PX = 14
_TITLE_LETTERS = 28
# Best and worst samples kept a grid step: at 256 pixels two rows of 8 are a PNG of 2 MB.
_EXTREMES = 8
# A line of metrics.jsonl has 1 to 3 kB.
_MOST_LINE_BYTES = 2**20


class RunLog:
    """Metrics and pictures of a run, in its folder. A context manager.

    None of it is what a run is for: what cannot be written is said, once of each kind, and the run goes on. Lines of
    metrics.jsonl are kept and written when there is space again.

    Args:
        folder: of the run.
        start_step, total_steps: steps done already, and in all. Metrics of later steps than `start_step`, which a
            killed run left behind, are dropped: those steps are done again.
        tensorboard: write events too.
        config: of the run; with log.wandb, Weights & Biases follows it.
    """

    def __init__(
        self, folder: Path, start_step: int, total_steps: int, tensorboard: bool, config: Config | None = None
    ) -> None:
        self._folder = folder
        self._metrics = folder / "metrics.jsonl"
        self._said: set[str] = set()
        self._progress = Progress("grpo", total_steps, start_step)
        self._unwritten = ""
        with self._optional("the lines of earlier steps"):
            kept = _lines(self._metrics, start_step)
            save_text(self._metrics, "".join(line + "\n" for line in kept))
        self._wandb = _start_wandb(folder, config) if config is not None and config.log.wandb else None
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
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step, counted from 1, but for those that are not finite: JSON has no NaN."""
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._append(json.dumps({"step": step, **metrics}) + "\n")
        if self._writer is not None:
            with self._events():
                for name, value in metrics.items():
                    self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)
        shown = {"reward": "reward_mean", "kl": "kl"}  # a rollout that was left out has neither
        note = [f"{short}={metrics[name]:.3f}" for short, name in shown.items() if name in metrics]
        if "reward_mean" in metrics and "images_per_s" in metrics:
            note.append(f"{metrics['images_per_s']:.0f} img/s")
        self._progress.update(" ".join(note))

    def grid(self, step: int, images: Tensor, columns: int, titles: Sequence[str] = ()) -> None:
        """Save a grid of (N, 3, H, W) images in [0, 1] as grids/step_N.png, with a title beside each row."""
        picture = image_grid(images, columns, titles)
        with self._optional("a grid of samples"):
            save_png(self._folder / "grids" / f"step_{step:06d}.png", picture)
        if self._writer is not None:
            with self._events():
                self._writer.add_image("samples", picture, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({"samples": import_wandb().Image(Image.fromarray(picture))}, step=step)

    def samples(self, step: int, images: Tensor, labels_B: Tensor, rewards: Rewards) -> None:
        """Save the best and the worst of a step's (B, 3, H, W) images, with their rewards.

        samples/step_N.png: two rows, best first and worst first. samples/step_N.json: {"best": [...], "worst": [...]},
        in the order of the rows, {"label", "reward", "rewards": {component: before its weight}} an image; "ties", how
        many images of the step have the reward of the first one of each row, and "images", of the step. Of equal
        rewards, as rewards of 0 and 1 are, images of as many labels as possible are shown.
        """
        shown = min(_EXTREMES, len(labels_B))
        order_B, ties = _ranked(rewards.total_B, labels_B), {}
        worst_B = _ranked(-rewards.total_B.flip(0), labels_B.flip(0))
        rows = {"best": order_B[:shown], "worst": len(labels_B) - 1 - worst_B[:shown]}
        for name, row in rows.items():
            ties[name] = int((rewards.total_B == rewards.total_B[row[0]]).sum())
        noted: dict[str, Any] = {
            name: [
                {
                    "label": int(labels_B[i]),
                    "reward": float(rewards.total_B[i]),
                    "rewards": {component: float(score_B[i]) for component, score_B in rewards.components.items()},
                }
                for i in row.tolist()
            ]
            for name, row in rows.items()
        }
        path = self._folder / "samples" / f"step_{step:06d}.png"
        noted |= {"ties": ties, "images": len(labels_B)}
        with self._optional("the best and worst samples"):
            save_png(path, image_grid(images[torch.cat(list(rows.values())).to(images.device)], shown))
            save_text(path.with_suffix(".json"), json.dumps(noted, indent=1) + "\n")

    def environment(self, here: dict[str, Any]) -> None:
        """Save environment.json: versions and hardware."""
        with self._optional("environment.json"):
            save_text(self._folder / "environment.json", json.dumps(here, indent=2) + "\n")

    def _append(self, line: str) -> None:
        """Add a line to metrics.jsonl, with those that could not be written before."""
        self._unwritten += line
        if not self._unwritten:
            return
        with self._optional("a line of metrics.jsonl, kept until there is space,"):
            append(self._metrics, self._unwritten.encode())
            self._unwritten = ""

    @contextmanager
    def _events(self) -> Iterator[None]:
        """Write TensorBoard's events. Its thread ends at the first failure, and with it the events of this start."""
        try:
            yield
        except OSError as error:
            self._writer = None
            with self._optional("TensorBoard's events, which end here,"):
                raise error

    def _of_thread(self, failed: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread hands its error to whoever writes next, and raises it too: a traceback among the lines.
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard.")):
            self._excepthook(failed)

    @contextmanager
    def _optional(self, what: str) -> Iterator[None]:
        """Do what the run can go on without; if the disk does not let it, say so the first time."""
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


def _ranked(rewards_B: Tensor, labels_B: Tensor) -> Tensor:
    """Rows by reward, highest first; of equal rewards the first image of each label, then the second of each, ..."""
    turns: Counter[tuple[float, int]] = Counter()
    keys = []
    for row, (reward, label) in enumerate(zip(rewards_B.tolist(), labels_B.tolist(), strict=True)):
        keys.append((-reward, turns[reward, label], row))
        turns[reward, label] += 1
    return torch.tensor([row for *_, row in sorted(keys)])


def import_wandb() -> Any:
    """The package of Weights & Biases. Raises: InputError if it is not installed."""
    try:
        package: Any = importlib.import_module("wandb")
    except ImportError:
        package = None
    if not hasattr(package, "init"):  # a folder wandb/, which the package makes where it runs, can be imported too
        raise InputError(
            "log.wandb: the package wandb cannot be imported; pip install 'varfast[wandb]', or log.wandb=null"
        )
    return package


def _start_wandb(folder: Path, config: Config) -> Any:
    """The run of Weights & Biases that belongs to a run folder, and again the same one after a stop."""
    wandb = import_wandb()
    noted = folder / "wandb_id.txt"
    try:
        name = read_text(noted).strip()
    except InputError:
        name = ""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):  # none yet, or damaged
        name = uuid.uuid4().hex[:8]
        try:
            save_text(noted, name + "\n")
        except WriteError as error:
            print(f"{error}. The run goes on; taken up after a stop, it will be another run of Weights & Biases")
    try:
        return wandb.init(
            project=config.log.wandb,
            id=name,
            resume="allow",
            dir=str(folder),
            name=folder.resolve().name,
            config=config.model_dump(mode="json"),
        )
    except wandb.Error as error:
        raise InputError(
            f"log.wandb={config.log.wandb}: {error}\n  log in with `wandb login`, set WANDB_MODE=offline to write into "
            "the run folder alone, or log.wandb=null"
        ) from error


class StageLimits:
    """What the stages of a step take against what they could: ms, share of the limit, MFU, images/s.

    The limit of a stage is what its FLOPs or its bytes take at least (`varfast.roofline`), at the rates that this
    device was measured to reach when the run began.
    """

    def __init__(self, config: Config, device: torch.device, images: int) -> None:
        """config: of this process' share, with micro-batches and checkpointing in use; images: of all processes."""
        self._images = images
        counts = stage_counts(config)
        ceilings = measure_here(device, getattr(torch, config.run.dtype))
        self._limit_ms = {name: speed_of_light_s(count, ceilings) * 1e3 for name, count in counts.items()}
        # Model FLOPs: what checkpointing computes again does not count.
        self._step_at_peak_s = sum(count.flop for count in stage_counts(config, "none").values()) / ceilings.flop_per_s

    def metrics(self, stages_ms: dict[str, float], step_s: float) -> dict[str, float]:
        """The numbers of a step, by the names of metrics.jsonl."""
        shares = {f"{n}_share": self._limit_ms[n] / ms for n, ms in stages_ms.items() if self._limit_ms.get(n)}
        return {
            **{f"{name}_ms": ms for name, ms in stages_ms.items()},
            **shares,
            "step_s": step_s,
            "mfu": self._step_at_peak_s / step_s,
            "images_per_s": self._images / step_s,
        }


@contextmanager
def profiled(folder: Path, device: torch.device) -> Iterator[None]:
    """Write trace.json (for chrome://tracing or ui.perfetto.dev), and what the body did with memory.

    On a GPU memory.pickle, the allocator's history, for pytorch.org/memory_viz; on a CPU memory.txt, by operator.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    with torch.profiler.profile(activities=activities, profile_memory=not on_gpu) as profiler:
        yield
    try:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        if on_gpu:
            torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
        else:
            of_operators = profiler.key_averages().table(sort_by="self_cpu_memory_usage", row_limit=50)
            save_text(folder / "memory.txt", of_operators)
        print(f"profile of one step: {folder}")
    except (OSError, WriteError) as error:
        print(f"the profile could not be written: {error}. The run goes on")
    finally:
        if on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)


def _lines(path: Path, last_step: int) -> list[str]:
    """The lines of a metrics.jsonl up to a step, one a step: the last, where two processes wrote.

    Left out: half a line, which a killed run leaves at the end, and whatever else is no line of metrics.
    """
    kept: dict[int, str] = {}
    with suppress(OSError), open_regular(path) as file:
        while line := file.readline(_MOST_LINE_BYTES):
            try:
                step = parse_json(line)["step"]
                text = line.decode().rstrip("\n")
            except (ValueError, RecursionError, TypeError, KeyError):
                continue
            if isinstance(step, int) and not isinstance(step, bool) and line.endswith(b"\n") and 0 < step <= last_step:
                kept[step] = text
    return [kept[step] for step in sorted(kept)]


def image_grid(images: Tensor, columns: int, titles: Sequence[str] = ()) -> np.ndarray:
    """(N, 3, H, W) in [0, 1] -> one (rows, columns) picture, (height, width, 3) uint8, row by row, with white gaps.

    Args:
        titles: of the rows; they stand in a column of their own at the left, beside the images.
    """
    enlarge = max(1, math.ceil(_SMALLEST_CELL_PX / images.shape[-1]))
    images = images.detach().float().cpu().repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    images = F.pad(images, (0, GAP_PX, 0, GAP_PX), value=1.0)
    num, _, height, width = images.shape
    rows = math.ceil(num / columns)
    cells = torch.ones(rows * columns, 3, height, width)
    cells[:num] = images
    picture = cells.view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2).reshape(rows * height, -1, 3)
    pixels: np.ndarray = picture[:-GAP_PX, :-GAP_PX].mul(255.0).round().clamp(0, 255).to(torch.uint8).numpy()
    return np.concatenate([_row_titles(titles, len(pixels), height), pixels], axis=1) if titles else pixels


def _row_titles(titles: Sequence[str], height_px: int, row_px: int) -> np.ndarray:
    """A white column with a line of text in the middle of each row, as wide as the longest."""
    font = ImageFont.load_default(_TITLE_PX)
    shown = [_drawable(title) for title in titles]
    width_px = max(math.ceil(font.getlength(text)) for text in shown) + 2 * GAP_PX
    column = Image.new("RGB", (width_px, height_px), "white")
    draw = ImageDraw.Draw(column)
    for row, text in enumerate(shown):
        middle_px = row * row_px + (row_px - GAP_PX) // 2
        draw.text((width_px - 2 * GAP_PX, middle_px), text, fill="black", font=font, anchor="rm")
    return np.asarray(column)


def _drawable(title: str) -> str:
    """What the font that Pillow brings has letters for: accents are dropped, other scripts become question marks."""
    plain = unicodedata.normalize("NFKD", title)
    plain = "".join(c for c in plain if not unicodedata.combining(c)).encode("ascii", "replace").decode()
    return plain if len(plain) <= _TITLE_LETTERS else plain[: _TITLE_LETTERS - 2] + ".."


PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write an (H, W, 3) uint8 picture in the format of its suffix. Raises: InputError if it cannot be written."""
    kind = PICTURE_FORMATS[path.suffix.lower()]
    of_kind: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    settings = of_kind.get(kind, {})
    write_atomically(path, lambda file: Image.fromarray(picture).save(file, format=kind, **settings))


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write an (H, W, 3) uint8 picture. Raises: InputError if it cannot be written."""
    write_atomically(path, lambda file: Image.fromarray(picture).save(file, format="PNG"))


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Bytes of a GPU's memory since the last call, by the names of metrics.jsonl; nothing on a CPU.

    memory_allocated_bytes and memory_reserved_bytes at their peaks, and memory_unused_bytes now: reserved, and not
    allocated, so what fragmentation can cost at most. Of a run that holds, all three stay where they are. (The largest
    free block would want a snapshot of all blocks.)
    """
    if device.type != "cuda":
        return {}
    statistics = torch.cuda.memory_stats(device)
    torch.cuda.reset_peak_memory_stats(device)
    reserved, allocated = (f"{name}_bytes.all" for name in ("reserved", "allocated"))
    return {
        "memory_allocated_bytes": float(statistics[f"{allocated}.peak"]),
        "memory_reserved_bytes": float(statistics[f"{reserved}.peak"]),
        "memory_unused_bytes": float(statistics[f"{reserved}.current"] - statistics[f"{allocated}.current"]),
    }


def environment() -> dict[str, Any]:
    """Versions and hardware, for the run folder and for `python -m varfast.env`."""
    from varfast import __version__

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "varfast": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": gpus,
        "allocator": {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ},
    }


def _commit() -> str | None:
    """Commit of the checkout that this code runs from, with a + if it was changed; None if it is none."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
