"""A reward of the user's own: finds and imports it, passes what its parameters name, and protects the trainer from it.

Axes: B image.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, field_validator

from varfast.printable import printable
from varfast.rewards.building import Building, PerImage, Reward, RewardSection, Scored
from varfast.rewards.given import Given, is_recorded, origin
from varfast.settings.paths import check_source
from varfast.settings.problems import show
from varfast.settings.reading import is_finite
from varfast.settings.schema import Wanted
from varfast.types import InputError

_NAMED = ("labels", "batch", "names", "prompts", "tags", "metadata", "step", "seed")
_TAKES = (
    "a reward takes (images, labels), (images), or images and any of labels, batch, names, prompts, tags, metadata, "
    "step, seed by name"
)


def _check_function(function: Any) -> str | Given:
    if isinstance(function, Given):
        return function
    if callable(function):
        return Given(function)
    if not isinstance(function, str):
        raise ValueError(f"got {show(function)}, want module:name or file.py:name, or from Python a function")
    return function if is_recorded(function) else _check_name(function)


def _check_name(function: str) -> str:
    source, colon, name = function.rpartition(":")
    in_file = source.endswith(".py") and "\0" not in source
    if not colon or not (in_file or all(part.isidentifier() for part in source.split("."))):
        if function.endswith(".py"):
            raise ValueError(f"got {function!r}, want the function's name too, as {function}:redness")
        module, _, attribute = function.rpartition(".")
        meant = f"; did you mean {module}:{attribute}?" if module and attribute.isidentifier() and not colon else ""
        raise ValueError(f"want module:name or file.py:name, as my_rewards:redness or ./my_rewards.py:redness{meant}")
    if not name.isidentifier():
        raise ValueError(
            f"{name!r} is no name of a module's own; name a function, or a class whose instance is called; for a "
            "method, write a function that calls it"
        )
    return check_source(function)


class FunctionReward(RewardSection):
    """Your own function or class, by import path, or from Python itself. Importing it runs its code."""

    type: Literal["function"] = Field(description="the kind of reward")
    function: Annotated[
        str | Given,
        PlainValidator(_check_function),
        PlainSerializer(str, when_used="json"),
        Wanted("module:name or file.py:name"),
    ] = Field(
        description="module:name, or file.py:name, from the working directory or the config's folder; called with "
        "(images, labels), or what its parameters name (docs/rewards.md). From Python the function itself"
    )
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments, given once")

    @field_validator("args")
    @classmethod
    def _finite(cls, args: dict[str, Any]) -> dict[str, Any]:
        if not is_finite(args):
            raise ValueError(f"got {show(args)}; want finite numbers, below 2**63")
        return args

    def build(self, building: Building) -> Reward:
        return PerImage(building, UserReward(self, building))

    def reaches_outside(self) -> str:
        known = isinstance(self.function, str) and not is_recorded(self.function)
        return f"runs {self.function if known else origin(self.function)}"

    @property
    def is_missing(self) -> bool:
        return is_recorded(self.function)


def missing(key: str, function: str | Given) -> str:
    """What to do where a run folder's config names what was given from Python, as reward.mine."""
    return (
        f"{key}.function={printable(origin(function))} was given from Python, and no file can keep it. Give it again, "
        f"as varfast.train(..., rewards={{{key.partition('.')[2]!r}: ...}}); or name it as module:name or "
        "file.py:name, and set run.allow_change=[reward]"
    )


class UserReward:
    """A function, a class, or an instance with __call__, of the user's.

    What it changes of the process is put back (varfast.rewards.shield). Its random numbers are a function of seed, step
    and image alone, so that a resumed run draws the same. An nn.Module is moved to the device, and put in eval().

    Args:
        config: what names it.
        building: its folder `beside` is searched after Python's path and the working directory.
    Raises: InputError if it cannot be found or made, or has parameters that nothing stands for. What its own code
        raises goes on as it is, with a note that names the reward.
    """

    def __init__(self, config: FunctionReward, building: Building) -> None:
        from torch import nn

        from varfast.randomness import Purpose
        from varfast.rewards.shield import shielded

        key, device = building.key, building.device
        self._name = building.name
        self._source = config.function if isinstance(config.function, str) else origin(config.function)
        self._shielded = functools.partial(shielded, self._name, device)
        self._key = (building.seed, int(Purpose.REWARD), zlib.crc32(self._name.encode("utf-8", "replace")))
        where = f"{key}.function={printable(self._source)}"
        if config.is_missing:
            raise InputError(missing(key, config.function))
        with self._shielded(self._key), self._named("while it was imported or made"):
            target = _found(where, config.function, building.beside)
            reward = _made(where, target, config.args)
            if isinstance(reward, nn.Module):
                reward.to(device).eval()
            self._positional, self._by_name = _arguments(self._name, reward, set(config.args))
        takes_args = bool(config.args) and reward is target
        self._reward: Callable[..., Any] = functools.partial(reward, **config.args) if takes_args else reward

    def __call__(self, scored: Scored) -> Any:
        """What the reward returns for copies of the images and labels.

        Raises: InputError if it ends the process by SystemExit.
        """
        batch = scored.batch
        step = (0, 0) if batch.step is None else (1, batch.step)
        values = {"images": scored.images.clone(), "batch": batch.copy()} | batch.copy().__dict__
        with (
            self._named("" if batch.step is None else f"in step {batch.step + 1}"),
            self._shielded((*self._key, *step, scored.first_sample)),
        ):
            return self._reward(*(values[p] for p in self._positional), **{p: values[p] for p in self._by_name})

    @contextmanager
    def _named(self, when: str) -> Iterator[None]:
        """Errors of the reward's own code get a note that names it; an exit of its code becomes an error."""
        where = f"reward {self._name} ({printable(self._source)}){when and ', '}{when}"
        try:
            yield
        except (SystemExit, GeneratorExit) as error:
            shown = f"{type(error).__name__}({printable(error, 80)})"
            raise InputError(
                f"{where}: it raised {shown}, which would end the run as if it were complete; let it return numbers, "
                "or raise an error"
            ) from error
        except BaseException as error:
            if not (isinstance(error, InputError) and self._name in str(error)):
                error.add_note(f"  in {where}")
            raise


# ---------------------------------------------------------------------------------------------------------------------
# Finding it


def _found(where: str, function: str | Given, beside: Path | None) -> Any:
    """The object that is given, or that module:name or file.py:name names."""
    if isinstance(function, Given):
        return function.function
    source, _, name = function.rpartition(":")
    places = list(dict.fromkeys([Path.cwd(), *([] if beside is None else [beside.resolve()])]))
    find = _of_file if source.endswith(".py") else _of_name
    module = find(where, source, places)
    target = getattr(module, name, None)
    if not callable(target):
        near = difflib.get_close_matches(name, vars(module), n=1)
        raise InputError(f"{where}: {source} has no such function{f'; did you mean {near[0]}?' if near else ''}")
    return target


def _of_file(where: str, source: str, places: list[Path]) -> ModuleType:
    path = Path(source).expanduser()
    files = [path] if path.is_absolute() else [place / path for place in places]
    file = next((f.resolve() for f in files if f.is_file()), None)
    if file is None:
        raise InputError(f"{where}: no file {' nor '.join(str(f) for f in files)}")
    for module in list(sys.modules.values()):  # another reward of the same file
        if getattr(module, "__file__", None) == str(file):
            return module
    taken = file.stem in sys.modules or importlib.util.find_spec(file.stem) is not None
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}" if taken else file.stem
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made  # before it runs: pickles and dataclasses ask for it by its name
    _search(file.parent)
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[name]
        raise
    return made


def _of_name(where: str, source: str, places: list[Path]) -> ModuleType:
    first = source.partition(".")[0]
    importlib.invalidate_caches()
    for place in (None, *places):
        if place is not None:
            if not ((place / f"{first}.py").is_file() or (place / first).is_dir()):
                continue
            _search(place)
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as error:
            if not f"{source}.".startswith(f"{error.name}."):
                raise  # something that the user's module imports
    raise InputError(
        f"{where}: no module {source}; run from its folder, or set PYTHONPATH to it, or name the file, as in "
        f"./my_rewards.py:redness (searched: Python's path, {', '.join(map(str, places))})"
    )


def _search(folder: Path) -> None:
    # At the end: a file of the user's hides none of the installed packages.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _made(where: str, target: Any, args: dict[str, Any]) -> Callable[..., Any]:
    """An instance, if the target is a class; otherwise the target itself. Raises: InputError if `args` do not fit."""
    if isinstance(target, type) and not any("__call__" in kind.__dict__ for kind in target.__mro__):
        raise InputError(
            f"{where}: instances of {target.__name__} cannot be called; give it __call__(self, images, labels)"
        )
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # built in
        pass
    else:
        try:
            (signature.bind if isinstance(target, type) else signature.bind_partial)(**args)
        except TypeError as error:
            fits = printable(f"{target.__name__}{signature}")
            raise InputError(f"{where}: args do not fit {fits}: {printable(error)}") from error
    return target(**args) if isinstance(target, type) else target


# ---------------------------------------------------------------------------------------------------------------------
# Asking it


def _arguments(name: str, reward: Callable[..., Any], given: set[str]) -> tuple[list[str], list[str]]:
    """Which of images, labels, batch ... the reward's parameters take, by position and by name.

    The first parameter gets the images, whatever its name; further ones what their names say; a second one of any other
    name the labels. One with a default keeps it, but None.

    Raises: InputError for a parameter that nothing stands for.
    """
    from torch import nn

    asked: Any = reward.forward if isinstance(reward, nn.Module) else reward
    shown = getattr(asked, "__qualname__", None) or f"{type(reward).__name__}.__call__"
    if inspect.iscoroutinefunction(asked) or inspect.iscoroutinefunction(getattr(asked, "__call__", None)):  # noqa: B004
        raise InputError(f"reward {name}: {shown} is async; {_TAKES}, and returns (B,) numbers at once")
    try:
        parameters = list(inspect.signature(asked).parameters.values())
    except (TypeError, ValueError):
        return ["images", "labels"], []
    images_by_name = any(p.name == "images" for p in parameters)
    positional: list[str] = []
    by_name: list[str] = []
    missing: list[str] = []
    skipped = False
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD or parameter.name in given:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += [] if by_name or skipped else ["images", "labels"][len(positional) :]
            continue
        optional = parameter.default is not parameter.empty
        by_position = parameter.kind is not parameter.KEYWORD_ONLY and not skipped
        if parameter.name == "images" or (by_position and not positional and not images_by_name):
            what = "images"
        elif parameter.name in _NAMED and (not optional or parameter.default is None):
            what = parameter.name
        elif optional:
            skipped = True
            continue
        elif by_position and positional == ["images"]:
            what = "labels"
        else:
            missing.append(parameter.name)
            continue
        if by_position:
            positional.append(what)
        else:
            by_name.append(what)
    if missing or "images" not in (*positional, *by_name):
        needs = f"needs {', '.join(map(repr, missing))}" if missing else "takes no images"
        raise InputError(f"reward {name} must take (images, labels); {shown} {needs}. {_TAKES[0].upper()}{_TAKES[1:]}; "
                         "other parameters need a default, or a value under args")  # fmt: skip
    return positional, by_name
