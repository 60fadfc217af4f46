"""The files that a run starts from, identified by SHA-256 and still found when the run folder has moved.

base.json of a run folder records path, size and SHA-256 of the file of each part of the policy, the trained transformer
first, then the VQ-VAE; of what was taken from another run, that run's folder and its step. A resumed run must have the
same reference and the same decoder, bit for bit. The folder base/ beside it holds

- what was made for the run (pre-trained, or taken from another run), as copies: a few MB that exist nowhere else;
- files that the config names, and those that an index among them names, as hard links, which take no space. Where the
  disk does not allow a hard link, the VQ-VAE is copied (0.4 GB for the public one), since no image can be decoded
  without it. The transformer is not copied (8 GB for d30, and a sweep would copy it for every run), nor are the files
  of an index; if they go missing, the error says which file to put where.

So a run folder that is copied or handed on can be sampled from, exported and evaluated. Anybody may have written
base.json, so a file is accepted as a base only if it is a regular file with the recorded size and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, RootModel

from varfast.files import (
    INCOMPLETE,
    open_regular,
    read_json,
    reason,
    remove_leftovers,
    save_tensors,
    save_text,
    write_atomically,
)
from varfast.types import InputError
from varfast.weights.shards import is_index, shards
from varfast.weights.state import State

if TYPE_CHECKING:
    from varfast.runs.folder import RunFolder


class FileNote(BaseModel):
    """Size and SHA-256, by which a file is recognised; of an index, those of it and all files that it names."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @classmethod
    def of(cls, path: Path) -> FileNote:
        """Raises: InputError if the file cannot be read."""
        try:
            files = _with_shards(path)
            return cls(bytes=_bytes_of(files), sha256=_digest_of(files))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {reason(error)}") from error

    def differs(self, path: Path, whole: bool = True) -> str | None:
        """How the file at `path` differs; None if it is the same. whole: compare its SHA-256, not only its size."""
        try:
            files = _with_shards(path)
            size = _bytes_of(files)
            if size != self.bytes:
                return f"has {size} of {self.bytes} bytes"
            if whole and _digest_of(files) != self.sha256:
                return "has another SHA-256"
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            return f"cannot be read: {reason(error) if isinstance(error, OSError) else error}"
        return None


def _with_shards(path: Path) -> list[Path]:
    return [path, *shards(path)] if is_index(path) else [path]


def _bytes_of(files: Sequence[Path]) -> int:
    total = 0
    for path in files:
        with open_regular(path) as file:
            total += os.fstat(file.fileno()).st_size
    return total


def _digest_of(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open_regular(path) as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


class _SavedFile(BaseModel):
    """An entry of base.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    file: FileNote
    step: int | None = Field(None, ge=0)


class _BaseFiles(RootModel[dict[Annotated[str, Field(pattern="^[a-z]{1,20}$")], _SavedFile | str]]):
    """Content of base.json. A string is a path or hf:// address without a hash, as the first version wrote it."""


@dataclass(frozen=True)
class Source:
    """Where a part of the base comes from.

    Attributes:
        content: its file, or tensors that are not in a file of their own yet.
        only_here: whether it was made for this run, so that the run folder must hold a copy.
        origin: the file, or the run folder, that it was taken from.
        step: after how many steps of that run; None: it is of no run, or its folder does not say.
    """

    content: Path | State
    only_here: bool
    origin: Path
    step: int | None = None


class Base:
    """base.json and base/ of a run folder.

    parts: of the policy, the trained one first; default: those of the folder's config.
    """

    def __init__(self, folder: RunFolder, parts: Sequence[str] | None = None) -> None:
        self._folder = folder
        self.parts = tuple(folder.load_config().policy.parts if parts is None else parts)
        self._json, self._files = folder.base, folder.path / "base"

    @property
    def exists(self) -> bool:
        """Whether there is a base.json. A run of random weights has none: they are a function of its config."""
        return self._json.exists()

    @property
    def hashed(self) -> bool:
        """Whether base.json holds the hashes of both files. Raises: InputError if it is damaged."""
        return self.exists and all(isinstance(note, _SavedFile) for note in self._read().values())

    def keep(self, sources: Sequence[Source]) -> None:
        """Bring the files into base/ and write base.json. Raises: InputError if the disk is full."""
        remove_leftovers(self._files)
        notes = {part: self._keep(part, source) for part, source in zip(self.parts, sources, strict=True)}
        shown = {part: note.model_dump(exclude_none=True) for part, note in notes.items()}
        save_text(self._json, json.dumps(shown, indent=2) + "\n")

    def find(self, part: str, whole: bool = True) -> Path:
        """The file of a part: in base/, or at its recorded path. Nothing is made, fetched or written.

        Args:
            whole: compare its SHA-256; False where another process has just done so.
        Raises: InputError, which says what to put where, if neither place holds the recorded file.
        """
        note = self._read()[part]
        if isinstance(note, str):
            return self._unhashed(part, note)
        inside = self._inside(part, note.path)
        problems = []
        for path in dict.fromkeys((inside, Path(note.path))):
            problem = note.file.differs(path, whole)
            if problem is None:
                return path
            problems.append(f"  {path} {problem}")
        raise InputError(
            "\n".join([f"{self._what(part)} that {self._folder.path} started from is not there as it was:", *problems])
            + f"\n  bring it back, as {inside}: {note.file.bytes} bytes, SHA-256 {note.file.sha256}"
        )

    def differs(self, part: str, source: Source) -> str | None:
        """How a source differs from what base.json records; None if it does not, or if no hash is recorded.

        Tensors are written into base/ to compare them, over the file that is there.
        """
        note = self._read()[part]
        if isinstance(note, str):
            return None
        path = source.content
        if not isinstance(path, Path):
            save_tensors(self._inside(part, ""), path)
            path = self._inside(part, "")
        problem = note.file.differs(path)
        return problem and f"{path} {problem}"

    def heal(self, part: str, only_here: bool) -> None:
        """If the file in base/ is missing or damaged, bring it there again from its recorded path.

        Raises: InputError as find.
        """
        found = self.find(part)
        if found != self._inside(part, found):
            self._bring(part, found, only_here)

    def _inside(self, part: str, origin: str | Path) -> Path:
        suffix = Path(origin).suffix
        if is_index(origin):
            return self._files / f"{part}.index.json"
        return self._files / f"{part}{suffix if suffix == '.safetensors' else '.pth'}"

    def _keep(self, part: str, source: Source) -> _SavedFile:
        if isinstance(source.content, Path):
            found = self._bring(part, source.content, source.only_here)
        else:
            found = self._inside(part, "")
            save_tensors(found, source.content)
        return _SavedFile(path=os.path.abspath(source.origin), file=FileNote.of(found), step=source.step)

    def _bring(self, part: str, path: Path, copy: bool) -> Path:
        """The path of a file in base/, as a hard link or copy; of a transformer that cannot be linked, its own path."""
        inside = self._inside(part, path)
        if inside.exists() and os.path.samefile(inside, path):
            return inside
        if is_index(path):
            return self._link_with_shards(path, inside)
        if not copy:
            beside = inside.with_name(f"{inside.name}.{uuid.uuid4().hex[:12]}{INCOMPLETE}")
            try:
                inside.parent.mkdir(parents=True, exist_ok=True)
                os.link(os.path.realpath(path), beside)  # the hub's cache holds symbolic links
                os.replace(beside, inside)
                return inside
            except OSError:  # another disk, a file system without hard links, or a file of another user
                if part == self.parts[0]:
                    inside.unlink(missing_ok=True)
                    return path
        with path.open("rb") as source:
            write_atomically(inside, lambda file: shutil.copyfileobj(source, file, 2**24))
        return inside

    def _link_with_shards(self, path: Path, inside: Path) -> Path:
        """An index and the files that it names as hard links; where the disk does not allow them, its own path."""
        try:
            inside.parent.mkdir(parents=True, exist_ok=True)
            for source, link in [(each, inside.with_name(each.name)) for each in shards(path)] + [(path, inside)]:
                if not link.exists():  # parts of one checkpoint have the same shards
                    os.link(os.path.realpath(source), link)
            return inside
        except OSError:
            inside.unlink(missing_ok=True)
            return path

    def _what(self, part: str) -> str:
        return "the transformer" if part == self.parts[0] else "the VQ-VAE"

    def _read(self) -> dict[str, _SavedFile | str]:
        if not os.path.lexists(self._json):
            raise InputError(
                f"{self._folder.path} has no {self._json.name}, which says what the run started from; "
                "`python -m varfast.train` with its config writes it again"
            )
        try:
            found = _BaseFiles.model_validate(read_json(self._json)).root
            if tuple(found) != self.parts:
                raise ValueError(f"it names {', '.join(found)}; want {', '.join(self.parts)}")
            return found
        except ValueError as error:  # pydantic's too
            raise InputError(
                f"{self._json} cannot be read; delete it, and `python -m varfast.train` with the run's config starts "
                "from what that names again"
            ) from error

    def _unhashed(self, part: str, address: str) -> Path:
        path = _in_hub_cache(address) if address.startswith("hf://") else Path(address).expanduser()
        if path is None or not path.is_file():
            raise InputError(
                f"{self._what(part)} that {self._folder.path} started from, {address}, is not there; bring it back, or "
                f"let `python -m varfast.train {self._folder.config}` make or fetch it again"
            )
        return path


def _in_hub_cache(address: str) -> Path | None:
    """The file of an hf:// address if it is in the local cache; an address from a run folder is never downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    owner, _, rest = address.removeprefix("hf://").partition("/")
    repo, _, name = rest.partition("/")
    try:
        found = try_to_load_from_cache(f"{owner}/{repo}", name)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
