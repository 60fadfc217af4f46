"""The base of every section of a config, and the types of fields that several sections have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from varfast.settings.paths import check_local, check_source
from varfast.settings.problems import show
from varfast.settings.reading import scalar
from varfast.settings.schema import Wanted, listed
from varfast.types import InputError


class Section(BaseModel):
    # strict: text is not a number, nor a number a boolean. Where a list stands for a tuple, the field is strict=False.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)


# A count that nothing but patience limits.
MANY = 1_000_000_000

# A folder or file of this machine; a path or an address.
LocalPath = Annotated[str, AfterValidator(check_local), Wanted("a path", path=True)]
Source = Annotated[str, AfterValidator(check_source), Wanted("a path or address", path=True)]


def ends_with(*suffixes: str) -> AfterValidator:
    """For a path to write: a check of its suffix, before anything is computed."""

    def check(path: str) -> str:
        if not path.lower().endswith(suffixes) or path.lower() in suffixes:
            raise ValueError(f"got {path}, want a name that ends with {listed(suffixes)}")
        return path

    return AfterValidator(check)


def _check_device(device: str) -> str:
    name, colon, number = device.partition(":")
    # torch counts devices in 8 bits.
    if name not in ("auto", "cpu", "cuda") or (
        colon and not (name == "cuda" and number.isdecimal() and int(number[:4]) < 128)
    ):
        raise ValueError(f"got {device[:60]!r}, want auto, cpu, cuda, or cuda:0 and so on to cuda:127")
    return device


Device = Annotated[
    str, AfterValidator(_check_device), Wanted("auto, cpu, cuda or cuda:0", words=("auto", "cpu", "cuda"))
]


def _read_labels(value: Any) -> Any:
    """`3` and `0,1,2` are lists too: on a command line nobody thinks of brackets."""
    labels = value
    if isinstance(value, str) and value != "all":
        labels = [scalar(part.strip()) for part in value.split(",")]
    elif isinstance(value, int) and not isinstance(value, bool):
        labels = [value]
    if labels != "all" and not (isinstance(labels, list) and all(map(_is_label, labels))):
        raise ValueError(f"got {show(value)}, want numbers or names of labels, such as [0, 1, golden retriever]")
    return labels


def _is_label(label: Any) -> bool:
    """A number, or a name; varfast/data/labels.py knows which names there are."""
    return 0 <= label < 2**31 if type(label) is int else isinstance(label, str) and bool(label.strip())


Labels = Annotated[list[int | str], BeforeValidator(_read_labels), Wanted("a list of labels, such as [0, 1, 2]")]
AllOrLabels = Annotated[
    Literal["all"] | list[int | str],
    BeforeValidator(_read_labels),
    Wanted("all, or a list of labels, such as [0, 1, 2]"),
]


def check_labels(what: str, labels: Sequence[int | str], num_classes: int) -> None:
    """Check numbers of labels; names are checked by varfast/data/labels.py.

    Raises: InputError if `labels` is empty or a number in it is not in [0, num_classes).
    """
    if not labels:
        raise InputError(f"{what} is empty; name labels in 0..{num_classes - 1}")
    outside = [label for label in labels if isinstance(label, int) and not 0 <= label < num_classes]
    if outside:
        raise InputError(f"{what} holds {outside[0]}; the model has labels 0..{num_classes - 1}")


def check_divides(what: str, part: int | None, whole: int, of: str = "images") -> None:
    """Raises: InputError, with the nearest divisor, unless `part` divides `whole`; None is not checked."""
    if part is not None and (part < 1 or whole % part):
        small = [d for d in range(1, math.isqrt(whole) + 1) if whole % d == 0]
        nearest = min(sorted({*small, *(whole // d for d in small)}), key=lambda d: abs(d - part))
        raise InputError(f"{what}={part} does not divide {whole} {of}; use {nearest}")
