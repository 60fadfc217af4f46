"""Hand on the model of a run: as files of the public checkpoints' format, as a folder that is whole, or to the hub.

python -m varfast.export runs/x out=model.safetensors
python -m varfast.export runs/x out=model.pth dtype=bfloat16
python -m varfast.export runs/x out=model/
python -m varfast.export runs/x hub=owner/name
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a typo are answered before the imports below, which take 6 s
    from varfast.command import run_command

    run_command("export")

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from varfast.config import Config
from varfast.files import read_text, save_text
from varfast.policies.families import family_of, text_tokenizer, whole_state
from varfast.policies.pretrained import CARD_FILE, Model, part_files, write_model
from varfast.policies.text import TOKENIZER_FILE
from varfast.runs.card import Place, identity, other_formats, run_card, save_pictures
from varfast.runs.config import ExportConfig
from varfast.runs.folder import RunFolder
from varfast.runs.load import delivered_state, frozen_part, named_labels
from varfast.settings.loading import parse_arguments
from varfast.types import InputError
from varfast.weights.hub import repository_of
from varfast.weights.saved import CONFIG_FILE
from varfast.weights.shards import index_of, stored_bytes
from varfast.weights.state import State
from varfast.weights.upload import check_upload, upload_folder
from varfast.weights.writing import save_shards, save_state


@dataclass(frozen=True)
class _Exported:
    """What is exported, and how.

    Attributes:
        arguments: of the command.
        trained: the delivered weights in the dtype of the file, after `step` steps; None: of the complete run.
    """

    arguments: ExportConfig
    folder: RunFolder
    run: Config
    trained: State
    step: int | None

    @classmethod
    def of(cls, arguments: ExportConfig) -> _Exported:
        folder = RunFolder(arguments.checkpoint)
        run = folder.load_config()
        trained, step = delivered_state(folder, getattr(torch, arguments.dtype))
        return cls(arguments, folder, run, trained, step)

    def frozen(self) -> State:
        """The frozen part. Raises: InputError if it is not where the run folder notes it."""
        part = self.run.policy.parts[1]
        try:
            content = frozen_part(self.folder, part)
        except InputError as error:
            if _of_hub(self.run):
                error.add_note(
                    f"  or leave it out, as {self.run.policy.frozen_checkpoint} is for everybody: vqvae=false"
                )
            raise
        if isinstance(content, Path):
            return family_of(self.run.policy).load_part(part, str(content), self.run.policy).state_dict()
        return content

    def tokenizer(self) -> str | None:
        """Content of the text tokenizer's file; None for a model of labels."""
        if self.run.policy.conditioned_on == "labels":
            return None
        path = self.folder.path / TOKENIZER_FILE
        read = text_tokenizer(self.run.policy, path if path.exists() else None)
        return read_text(path) if path.exists() else read.to_json()


def _of_hub(run: Config) -> bool:
    """Whether everybody can fetch the frozen part by its address."""
    return str(run.policy.frozen_checkpoint).startswith("hf://")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def export_files(arguments: ExportConfig) -> Path:
    """Write arguments.out, the frozen part and the text tokenizer beside it, and the card. Returns the card's path.

    Raises: InputError if the folder holds no run or no checkpoint, or a file is in the way and overwrite is not set.
    """
    assert arguments.out is not None
    out, run = Path(arguments.out).expanduser(), RunFolder(arguments.checkpoint).load_config()
    frozen, card = _frozen_file(out, run, arguments), out.with_suffix(".md")
    beside = out.with_name(TOKENIZER_FILE) if run.policy.conditioned_on == "text" else None
    _refuse([path for path in (out, frozen, index_of(out)) if path is not None], arguments)
    if arguments.shard_gb is not None and (out.suffix != ".safetensors" or not run.policy.as_transformers):
        raise InputError(
            f"shard_gb={arguments.shard_gb:g} writes several .safetensors files and their index, for a family that "
            f"reads those, as janus; here out={arguments.out} and policy.family={run.policy.family}: use shard_gb=null"
        )
    known = _known_formats(card, arguments, out.name)
    _refuse([] if known is not None else [card], arguments)
    found = _Exported.of(arguments)
    tokenizer = found.tokenizer()
    if beside is not None and beside.exists() and read_text(beside) != tokenizer:
        _refuse([beside], arguments)
    if run.policy.as_transformers:
        save_shards(whole_state(run.policy, found.trained, found.frozen()), out, arguments.shard_gb)
    else:
        save_state(found.trained, out)
    if frozen is not None:
        save_state(found.frozen(), frozen)
    if beside is not None and tokenizer is not None:
        save_text(beside, tokenizer)
    save_text(card, file_card(out, arguments, found.folder, run, found.step, known or {}))
    return card


def _refuse(paths: list[Path], arguments: ExportConfig) -> None:
    """Raises: InputError if one of the files exists and may not be replaced."""
    in_the_way = next((path for path in paths if path.exists()), None)
    if in_the_way is not None and not arguments.overwrite:
        raise InputError(f"{in_the_way} exists; choose another out, or overwrite=true")


def _frozen_file(out: Path, run: Config, arguments: ExportConfig) -> Path | None:
    """Where the frozen part is written; None if one file has all, or it is left out."""
    if run.policy.as_transformers:
        return None
    part = run.policy.parts[1]
    if arguments.vqvae:
        return out.with_suffix(f".{part}{out.suffix}")
    if not _of_hub(run):
        raise InputError(
            "vqvae=false: the frozen part came from no hf:// address, so nobody could fetch it; use vqvae=true"
        )
    return None


def _known_formats(card: Path, arguments: ExportConfig, name: str) -> dict[str, str] | None:
    """If `card` is of the very same model in another format: its other files, with their dtypes; else None."""
    if not card.is_file():
        return {}
    folder = RunFolder(arguments.checkpoint)
    run = folder.load_config()
    step = folder.newest().step if folder.checkpoints.exists() else None
    text = read_text(card)
    return other_formats(text, card.parent, name) if f"| model | {identity(folder, run, step)} |" in text else None


def file_card(
    out: Path, arguments: ExportConfig, folder: RunFolder, run: Config, step: int | None, others: dict[str, str]
) -> str:
    """The card of a file. others: dtypes of files that hold the same model in another format."""
    policy, written = run.policy, _frozen_file(out, run, arguments)
    frozen = out.name if policy.as_transformers else str(policy.frozen_checkpoint) if written is None else written.name
    family = "" if policy.family == "var" else f", family={policy.family!r}"
    vqvae = "" if policy.as_transformers else f", vqvae={frozen!r}"
    place = Place(
        name=out.stem,
        trained=out.name,
        frozen=frozen,
        load=f"var={out.name!r}{vqvae}{family}",
        dtypes=others | {out.name: arguments.dtype},
        pictures={},
    )
    return run_card(place, folder, run, step)


# ---------------------------------------------------------------------------------------------------------------------
# A folder


def export_folder(arguments: ExportConfig, out: Path, name: str, load: str) -> list[str]:
    """Write what Policy.save_pretrained writes, with the card of the run and its samples. Returns the files' names.

    Args:
        out: the folder.
        name: of the model.
        load: what varfast.load_policy is given for it.
    Raises: InputError as export_files.
    """
    if not arguments.vqvae:
        raise InputError("vqvae=false: a folder is whole; for the transformer alone use out=model.safetensors")
    policy = RunFolder(arguments.checkpoint).load_config().policy
    files = part_files(policy)
    planned = [*files, index_of(out / files[0]).name, TOKENIZER_FILE, CONFIG_FILE, CARD_FILE]
    _refuse([out / name for name in planned], arguments)
    if arguments.shard_gb is not None and not policy.as_transformers:
        raise InputError(f"shard_gb={arguments.shard_gb:g} is for janus; here policy.family={policy.family}: use null")
    found = _Exported.of(arguments)
    labels = named_labels(found.run, found.folder)
    base = repository_of(found.run.policy.checkpoint)
    model = Model(found.run.policy, found.trained, found.frozen(), labels, found.tokenizer(), base)
    names = write_model(out, model, arguments.shard_gb)
    pictures = save_pictures(found.folder, out, found.step)
    place = Place(name, files[0], files[1], repr(load), {files[0]: arguments.dtype}, pictures)
    save_text(out / CARD_FILE, run_card(place, found.folder, found.run, found.step))
    return [*names, *pictures.values(), CARD_FILE]


def _to_hub(arguments: ExportConfig, out: Path) -> str:
    """Write the folder and upload it. Returns the address of the commit."""
    assert arguments.hub is not None
    repo_id = check_upload(arguments.hub, revision=arguments.revision)  # before anything is written
    names = export_folder(arguments, out, repo_id.rpartition("/")[2], repo_id)
    how: dict[str, Any] = {"private": arguments.private, "revision": arguments.revision}
    return upload_folder(out, names, repo_id, **how, commit_message=arguments.commit_message)


def main(arguments: list[str]) -> int:
    """python -m varfast.export checkpoint=... out=... [key=value ...]"""
    config = parse_arguments(arguments, ExportConfig)
    out = None if config.out is None else Path(config.out).expanduser()
    if config.hub is not None:
        if out is not None:
            address = _to_hub(config, out)
        else:
            with tempfile.TemporaryDirectory(prefix="varfast-") as folder:
                address = _to_hub(config, Path(folder))
        print(f"{config.hub}: {config.dtype}. Uploaded: {address}")
        return 0
    assert out is not None
    if config.to_folder:
        name = out.resolve().name
        names = export_folder(config, out, name, name)
        size = sum((out / each).stat().st_size for each in names)
        print(f"{config.out}: {size / 1e6:.1f} MB, {config.dtype}. Model card: {out / CARD_FILE}")
        return 0
    card = export_files(config)
    size = stored_bytes(out if out.exists() else index_of(out))
    print(f"{config.out}: {size / 1e6:.1f} MB, {config.dtype}. Model card: {card}")
    return 0
