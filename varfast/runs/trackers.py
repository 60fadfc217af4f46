"""Services that follow a run beside its folder: Weights & Biases, trackio, MLflow, SwanLab. One class each.

Each is asked for by the name of a project (`log.wandb: my-project`), and imported then alone. A run that goes on is the
same run there: the file <service>_id.txt in the run folder keeps its id. Each service's own variables say where to
(WANDB_MODE=offline, MLFLOW_TRACKING_URI, TRACKIO_DIR, SWANLAB_MODE); without a network all of them can write to a disk.
"""

from __future__ import annotations

import importlib
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from PIL import Image

from varfast.config import Config
from varfast.files import WriteError, leaves, read_text, save_text
from varfast.runs.config import TRACKERS, LogConfig
from varfast.types import InputError


class Tracker(Protocol):
    """A run at a service."""

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        """Finite numbers of a step, by the names of metrics.jsonl."""
        ...

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """A picture of a step."""
        ...

    def finish(self, failed: bool) -> None:
        """The run is over, or stopped."""
        ...


class Service(ABC):
    """What is the same for all of them.

    Args:
        folder: of the run.
        config: of the run.
    Attributes:
        name: the key of `log`, and the package.
        wanted: a function of the package, by which an empty folder of that name is told from it.
        advice: what to do where it cannot start.
    """

    name: ClassVar[str]
    wanted: ClassVar[str]
    advice: ClassVar[str]

    def __init__(self, folder: Path, config: Config) -> None:
        self.package = import_tracker(self.name)
        self.project: str = getattr(config.log, self.name)
        self.folder, self.title = folder, folder.resolve().name
        self.config = config.model_dump(mode="json")
        try:
            self.run = self.start()
        except self.errors() as error:
            raise InputError(
                f"log.{self.name}={self.project}: {error}\n  {self.advice}, or log.{self.name}=null"
            ) from error

    @abstractmethod
    def start(self) -> Any:
        """Begin the run, or go on with it."""

    def errors(self) -> tuple[type[Exception], ...]:
        """What the package raises where the service cannot be reached, or refuses."""
        return (OSError, RuntimeError, ValueError)

    def id_of_before(self) -> str | None:
        """What `keep_id` kept; None if there is none yet, or it is damaged."""
        try:
            found = read_text(self._id_file).strip()
        except InputError:
            return None
        return found if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found) else None

    def keep_id(self, found: str) -> str:
        try:
            save_text(self._id_file, found + "\n")
        except WriteError as error:
            print(f"{error}. The run goes on; taken up after a stop, it will be another run of {self.name}")
        return found

    @property
    def run_id(self) -> str:
        """Of this run folder, made when it is first asked for."""
        return self.id_of_before() or self.keep_id(uuid.uuid4().hex[:8])

    @property
    def _id_file(self) -> Path:
        return self.folder / f"{self.name}_id.txt"


class Wandb(Service):
    """Weights & Biases."""

    name, wanted = "wandb", "init"
    advice = "log in with `wandb login`, set WANDB_MODE=offline to write into the run folder alone"

    def errors(self) -> tuple[type[Exception], ...]:
        return (self.package.Error,)

    def start(self) -> Any:
        of_run = {"project": self.project, "id": self.run_id, "name": self.title, "config": self.config}
        return self.package.init(resume="allow", dir=str(self.folder), **of_run)

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.run.log({name: self.package.Image(picture)}, step=step)

    def finish(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackio(Service):
    """trackio, by Hugging Face: local first."""

    name, wanted = "trackio", "init"
    advice = "set TRACKIO_DIR to a folder that can be written"

    def start(self) -> Any:
        # A run goes on by its name there.
        return self.package.init(
            project=self.project, name=f"{self.title}-{self.run_id}", config=self.config, resume="allow"
        )

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        self.package.log(dict(metrics), step=step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.package.log({name: self.package.Image(picture)}, step=step)

    def finish(self, failed: bool) -> None:
        self.package.finish()


class MLflow(Service):
    """MLflow."""

    name, wanted = "mlflow", "start_run"
    advice = "set MLFLOW_TRACKING_URI to a server that answers, or to a database, as sqlite:///mlflow.db"

    def errors(self) -> tuple[type[Exception], ...]:
        return (*super().errors(), self.package.exceptions.MlflowException)

    def start(self) -> Any:
        self.package.set_experiment(self.project)
        before = self.id_of_before()
        run = self.package.start_run(run_id=before, run_name=None if before else self.title)
        if before is None:
            self.keep_id(run.info.run_id)
            settings = {key: str(value)[:500] for key, value in leaves(self.config).items()}
            self.package.log_params(settings)
        return run

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        self.package.log_metrics(dict(metrics), step=step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.package.log_image(picture, key=name, step=step)

    def finish(self, failed: bool) -> None:
        self.package.end_run("FAILED" if failed else "FINISHED")


class SwanLab(Service):
    """SwanLab."""

    name, wanted = "swanlab", "init"
    advice = "log in with `swanlab login`, or set SWANLAB_MODE=offline"

    def start(self) -> Any:
        return self.package.init(
            project=self.project,
            experiment_name=self.title,
            config=self.config,
            logdir=str(self.folder / "swanlab"),
            id=self.run_id,
            resume="allow",
        )

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        self.package.log(dict(metrics), step=step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.package.log({name: self.package.Image(picture)}, step=step)

    def finish(self, failed: bool) -> None:
        self.package.finish(state="crashed" if failed else "success")


_SERVICES: dict[str, type[Wandb | Trackio | MLflow | SwanLab]] = {
    service.name: service for service in (Wandb, Trackio, MLflow, SwanLab)
}
assert tuple(_SERVICES) == TRACKERS


def import_trackers(config: LogConfig) -> None:
    """Import what a run will need, before anything is loaded. Raises: InputError if a package is not installed."""
    for name in config.trackers:
        import_tracker(name)


def start_trackers(folder: Path, config: Config) -> list[Tracker]:
    """Begin, or go on with, the run of a folder at each service that the config names.

    Raises: InputError if a package is not installed, or its service refuses.
    """
    return [_SERVICES[name](folder, config) for name in config.log.trackers]


def import_tracker(name: str) -> Any:
    """The package of a service. Raises: InputError if it is not installed."""
    try:
        package: Any = importlib.import_module(name)
    except ImportError:
        package = None
    # A folder of that name, which some of them create where they run, can be imported too: as an empty package.
    if not hasattr(package, _SERVICES[name].wanted):
        raise InputError(
            f"log.{name}: the package {name} cannot be imported; pip install 'varfast[{name}]', or log.{name}=null"
        )
    return package
