"""What a new run starts from: pre-trained, fetched, copied from files or from another run, and kept in its folder."""

from __future__ import annotations

from pathlib import Path

import torch

from varfast.config import Config
from varfast.data.datasets import LABELLED
from varfast.data.labels import LABELS_FILE, labels_json, read_labels
from varfast.files import read_text, save_text
from varfast.policies.families import text_tokenizer
from varfast.policies.pretrained import saved_section
from varfast.policies.text import TOKENIZER_FILE
from varfast.pretraining.cache import pretrained
from varfast.printable import printable
from varfast.runs.base import Base, Source
from varfast.runs.folder import RunFolder
from varfast.runs.load import delivered_state, frozen_part
from varfast.types import InputError
from varfast.weights.files import regular_file, resolve
from varfast.weights.hub import names_repository
from varfast.weights.saved import is_run, is_saved, read_saved
from varfast.weights.shards import resolve_model


def prepare_base(config: Config, folder: RunFolder, resume: bool, device: torch.device, of_folder: bool) -> None:
    """Have what the run starts from in its folder: pre-train, fetch or copy it. In the main process.

    Args:
        resume: the run in the folder goes on, from the very files that it started from. Files that are lost are made or
            fetched again, if that gives the same bits.
        of_folder: nothing is read or fetched that the config names.
    Raises: InputError if it cannot be had.
    """
    address = config.policy.checkpoint
    if address == "random":
        return
    base = Base(folder, config.policy.parts)
    outside = of_folder and not (address == "pretrain" and config.pretrain.dataset in LABELLED)
    untrusted = (
        f"{folder.path} was named, and not its config: if you trust that, and what it starts from "
        f"(policy.checkpoint={printable(address)}), pass it as a file: {folder.config} run.dir={folder.path}"
    )
    if outside and not base.exists:
        raise InputError(f"what the run starts from is not in its folder. {untrusted}")
    if not resume and not outside:
        sources = _sources(config, device)
        _keep_labels(folder, sources[0].origin)
        _keep_tokenizer(config, folder, sources[0].origin)
        base.keep(sources)
        return
    if not base.exists:
        print(f"{folder.base} is gone; the base is what policy.checkpoint names now, unchecked")
        base.keep(_sources(config, device))
        return
    only_here = address == "pretrain" or is_run(address)
    try:
        if base.hashed:
            for part in base.parts:
                base.heal(part, only_here)
        else:  # of a version that recorded no hashes
            base.keep([Source(path, only_here, path) for path in map(base.find, base.parts)])
    except InputError as lost:
        if outside:
            lost.add_note(f"  {untrusted}")
            raise
        again = f"from policy.checkpoint={address}"
        print(f"{lost}\n  it is had again {again}")
        try:
            sources = _sources(config, device)
        except InputError as error:
            lost.add_note(f"  it cannot be had again {again}: {error}")
            raise lost from error
        for part, source in zip(base.parts, sources, strict=True):
            if other := base.differs(part, source):
                lost.add_note(f"  it cannot be had again {again}: {other}")
                raise
        base.keep(sources)


def _sources(config: Config, device: torch.device) -> list[Source]:
    """What policy.checkpoint names, part by part: pre-trained now or earlier, files, or of another run."""
    address, frozen_address = config.policy.checkpoint, config.policy.frozen_checkpoint
    if address == "pretrain":
        return [Source(made, True, made) for made in pretrained(config, device)]
    path = Path(address).expanduser()
    if is_saved(address):
        section = saved_section(address)
        if section.family != config.policy.family:
            raise InputError(
                f"policy.checkpoint={address} is a model of the family {section.family}, and policy.family is "
                f"{config.policy.family}; use policy.family={section.family} and its sizes"
            )
        own = section.frozen_checkpoint if frozen_address in (None, address) else frozen_address
        files = [resolve_model(source) for source in (section.checkpoint, own or section.checkpoint)]
        return [Source(file, False, file) for file in files]
    if config.policy.as_transformers and not is_run(address):
        trained = resolve_model(address)
        frozen = trained if frozen_address in (None, address) else resolve_model(str(frozen_address))
        return [Source(file, False, file) for file in (trained, frozen)]
    if names_repository(address):
        read_saved(address)  # which says why it is none
    if not path.is_dir():
        trained = resolve(address)
        if frozen_address is None:
            key = f"policy.{config.policy.parts[1]}_checkpoint"
            raise InputError(f"policy.checkpoint={address} is no run folder, so {key} is needed too")
        return [Source(file, False, file) for file in (trained, resolve(frozen_address))]
    other = RunFolder(path)
    state, step = delivered_state(other, torch.float32)
    print(f"starting from what {path} delivers" + ("" if step is None else f" after step {step}"))
    content = frozen_part(other, config.policy.parts[1]) if frozen_address is None else resolve(frozen_address)
    return [Source(state, True, path, step), Source(content, frozen_address is None, path)]


def _keep_tokenizer(config: Config, folder: RunFolder, origin: Path) -> None:
    """The text tokenizer of the base, checked, into the run's folder; for a family that is conditioned on text."""
    if config.policy.conditioned_on == "labels":
        return
    address, of_weights = config.policy.tokenizer_address, config.policy.checkpoint
    if address is None and of_weights.startswith("hf://"):
        address = "/".join([*of_weights.split("/")[:4], TOKENIZER_FILE])  # hf://owner/repository
    beside = (origin if origin.is_dir() else origin.parent) / TOKENIZER_FILE
    if address is not None and address.startswith("hf://"):
        path = resolve(address)
    else:
        path = regular_file(str(beside if address is None else address), "text tokenizer", f"a {TOKENIZER_FILE}")
    text_tokenizer(config.policy, path)
    save_text(folder.path / TOKENIZER_FILE, read_text(path))


def _keep_labels(folder: RunFolder, origin: Path) -> None:
    """What the labels of the base are called, from beside it into the run's folder.

    The files of a repository lie beside each other in the hub's cache too.
    """
    found = read_labels(origin if origin.is_dir() else origin.parent)
    if found is not None:
        save_text(folder.path / LABELS_FILE, labels_json(found))
