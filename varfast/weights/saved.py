"""A saved model: a folder, or a repository of the hub, that holds everything an image is made with.

config.json says what it is; the weights lie beside it under fixed names (varfast.policies.pretrained). Anybody may have
written one, so it is data: its sizes and names are checked, and it names no file and no address to read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from varfast.files import read_json
from varfast.printable import printable
from varfast.types import InputError
from varfast.weights.files import resolve, shown
from varfast.weights.hub import fetch_from_hub, is_missing_entry, names_repository
from varfast.weights.shards import names_model

CONFIG_FILE = "config.json"
LIBRARY: Literal["varfast"] = "varfast"
# A repository as other tools name it: owner/name, or owner/name@revision.
_BARE = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")


class Saved(BaseModel):
    """The content of config.json.

    Attributes:
        library_name: by which the file is told from that of another library.
        varfast_version: that wrote it.
        policy: the family and its sizes, as in the section `policy` of a config, without addresses.
        image_size: H and W, in pixels; for people, since the sizes in `policy` say it too.
        labels: what they are called; None: unknown, or the model reads texts.
        base_model: the repository of the hub that training began with; None: there was none.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    library_name: Literal["varfast"]
    varfast_version: str = Field(max_length=100)
    policy: dict[str, Any]
    image_size: int = Field(ge=1)
    labels: list[str] | None = Field(None, max_length=1_000_000)
    base_model: str | None = Field(None, max_length=300)


def hub_address(address: str) -> str:
    """hf://owner/name for `owner/name` that is not on this disk; any other address as it is."""
    known = _BARE.fullmatch(address) and not os.path.lexists(os.path.expanduser(address))
    return f"hf://{address}" if known else address


@contextmanager
def taken_for(source: str, address: str) -> Iterator[None]:
    """Around what reads `address`: an error says that `source`, as it was given, has been taken for it."""
    try:
        yield
    except InputError as error:
        if source == address:
            raise
        raise InputError(f"{shown(source)} is not on this disk, so it was taken for a repository: {error}") from error


def is_saved(address: str | Path) -> bool:
    """Whether an address is a saved model. Of the hub, config.json is fetched to know it.

    Raises: InputError for a repository that cannot be asked, or a config.json of varfast's that is damaged.
    """
    address = str(address)
    if names_repository(address):
        try:
            path = fetch_from_hub(f"{address.rstrip('/')}/{CONFIG_FILE}")
        except InputError as error:
            if is_missing_entry(error):
                return False
            raise
        return _is_ours(path)
    folder = Path(address).expanduser()
    return not (folder / "config.yaml").is_file() and _is_ours(folder / CONFIG_FILE)


def is_run(address: str | Path) -> bool:
    """Whether an address is a folder that can only be a run's: no saved model, and none as transformers writes it."""
    return Path(address).expanduser().is_dir() and not names_model(address) and not is_saved(address)


def _is_ours(path: Path) -> bool:
    """Whether a config.json is varfast's: it names the library. Raises: InputError if it is no JSON."""
    if not path.is_file():
        return False
    content = read_json(path)
    return isinstance(content, dict) and content.get("library_name") == LIBRARY


def read_saved(address: str | Path) -> Saved:
    """What config.json of a saved model says. Raises: InputError that names what is wrong with it."""
    path = resolve(file_in(address, CONFIG_FILE))
    try:
        found = Saved.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{shown(path)} is damaged, or no saved model of varfast: {printable(where, 80)}: "
            f"{printable(first['msg'], 120)}; fetch it again"
        ) from error
    labels = None if found.labels is None else [printable(name) for name in found.labels]
    return found.model_copy(update={"labels": labels})


def file_in(address: str | Path, name: str) -> str:
    """The address of a file in a folder, or a repository."""
    return f"{str(address).rstrip('/')}/{name}"
