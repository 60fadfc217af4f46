"""What a new run starts from: pre-trained, fetched, copied from files or from another run, and kept in its folder."""

from __future__ import annotations

from pathlib import Path

import torch

from varfast.config import Config
from varfast.data.labels import LABELS_FILE, labels_json, read_labels
from varfast.files import save_text
from varfast.pretraining.cache import pretrained
from varfast.printable import printable
from varfast.runs.base import PARTS, Base, Source
from varfast.runs.folder import RunFolder
from varfast.runs.load import delivered_state, frozen_part
from varfast.types import InputError
from varfast.weights.files import resolve


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
    base = Base(folder)
    outside = of_folder and not (address == "pretrain" and config.pretrain.dataset == "digits")
    untrusted = (
        f"{folder.path} was named, and not its config: if you trust that, and what it starts from "
        f"(policy.checkpoint={printable(address)}), pass it as a file: {folder.config} run.dir={folder.path}"
    )
    if outside and not base.exists:
        raise InputError(f"what the run starts from is not in its folder. {untrusted}")
    if not resume and not outside:
        var, vqvae = _sources(config, device)
        _keep_labels(folder, var.origin)
        base.keep(var, vqvae)
        return
    if not base.exists:
        print(f"{folder.base} is gone; the base is what policy.checkpoint names now, unchecked")
        base.keep(*_sources(config, device))
        return
    only_here = address == "pretrain" or Path(address).expanduser().is_dir()
    try:
        if base.hashed:
            base.heal("var", only_here)
            base.heal("vqvae", only_here)
        else:  # of a version that recorded no hashes
            base.keep(*(Source(path, only_here, path) for path in (base.find("var"), base.find("vqvae"))))
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
        for part, source in zip(PARTS, sources, strict=True):
            if other := base.differs(part, source):
                lost.add_note(f"  it cannot be had again {again}: {other}")
                raise
        base.keep(*sources)


def _sources(config: Config, device: torch.device) -> tuple[Source, Source]:
    """What policy.checkpoint names: transformer and VQ-VAE, pre-trained now or earlier, files, or of another run."""
    address, vqvae_address = config.policy.checkpoint, config.policy.vqvae_checkpoint
    if address == "pretrain":
        var, vqvae = pretrained(config, device)
        return Source(var, True, var), Source(vqvae, True, vqvae)
    path = Path(address).expanduser()
    if not path.is_dir():
        var = resolve(address)
        if vqvae_address is None:
            raise InputError(f"policy.checkpoint={address} is no run folder, so policy.vqvae_checkpoint is needed too")
        vqvae = resolve(vqvae_address)
        return Source(var, False, var), Source(vqvae, False, vqvae)
    other = RunFolder(path)
    state, _ = delivered_state(other, torch.float32)
    vqvae_content = frozen_part(other, "vqvae") if vqvae_address is None else resolve(vqvae_address)
    return Source(state, True, path), Source(vqvae_content, vqvae_address is None, path)


def _keep_labels(folder: RunFolder, origin: Path) -> None:
    """What the labels of the base are called, from beside it into the run's folder."""
    found = read_labels(origin if origin.is_dir() else origin.parent)
    if found is not None:
        save_text(folder.path / LABELS_FILE, labels_json(found))
