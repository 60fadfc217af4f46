"""A policy from whatever names one: a run folder, a saved model, files of weights, addresses of the hub, or a config.

All commands and the Python API load models here. A run folder is data that somebody may have handed on: nothing is
made, fetched or executed because something in it says so (docs/security.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from varfast.config import Config
from varfast.data.labels import label_names, run_names
from varfast.data.prompts import saved_prompts
from varfast.policies.config import FamilyName
from varfast.policies.device import existing_device, pick_device
from varfast.policies.driver import Driver
from varfast.policies.families import family_named, family_of, section_named, text_tokenizer
from varfast.policies.lora import without_lora
from varfast.policies.pretrained import load_saved
from varfast.policies.text import TOKENIZER_FILE
from varfast.runs.base import Base
from varfast.runs.named import fault
from varfast.types import InputError
from varfast.weights.hub import names_repository, repository_of
from varfast.weights.saved import hub_address, is_run, is_saved, read_saved, taken_for
from varfast.weights.state import State

if TYPE_CHECKING:
    from varfast.policies.var.config import VARConfig, VQVAEConfig
    from varfast.runs.folder import RunFolder


def load_policy(
    var: str | Path,
    vqvae: str | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    var_config: VARConfig | None = None,
    vqvae_config: VQVAEConfig | None = None,
    fast: bool | None = None,
    strict: bool | None = None,
    *,
    family: FamilyName = "var",
    argument: str = "var",
) -> Driver:
    """A policy from a run folder, a saved model, or checkpoints, whose sizes are read from the files.

    Args:
        var: a run folder, whose last checkpoint is loaded; or a saved model, as a folder, owner/name or
            hf://owner/name, with @revision if wanted; or the transformer's weights, as a path or hf://owner/repo/file:
            the public ones are hf://FoundationVision/var/var_d16.pth. Of Janus a folder or a repository too, as
            hf://deepseek-ai/Janus-Pro-1B.
        vqvae: the VQ-VAE's weights, as hf://FoundationVision/var/vae_ch160v4096z32.pth. Not read for a run folder and a
            saved model, which have their own. Of another family its tokenizer's; taming's and Janus's may be in the
            transformer's file.
        device: "cpu", "cuda", "cuda:1".
        dtype: of activations, "float32" or "bfloat16".
        var_config, vqvae_config: sizes the files of a VAR must have; not with a folder, which says them.
        fast: False samples eagerly and decodes with the reference decoder: what the fast path is compared with.
            Default: as the run did, or True.
        strict: the same bits in sampling and in teacher forcing, whatever the batch: see varfast.Policy. Default: as
            the run did, or False.
        family: of the files: "var", "llamagen", "taming" or "janus". A run folder, or a saved model, says it.
        argument: what `var` is called where the user gave it, for errors.
    Raises: InputError if a file or folder cannot be read or does not fit, or for a device that is not there.
    """
    device, var = existing_device(device), str(var)
    # A command takes a path for a path: a typo in it is no question to the hub.
    given, var = var, hub_address(var) if argument == "var" else var
    with taken_for(given, var):
        saved, of_folder = is_saved(var), is_run(var)
        if not saved and names_repository(var) and not section_named(family).as_transformers:
            read_saved(var)  # which says why it is none
    if (of_folder or saved) and (var_config is not None or vqvae_config is not None):
        what = "a saved model" if saved else "a run folder"
        raise InputError(f"{argument}={var} is {what}, whose config says the sizes; give no sizes beside it")
    if saved:
        return load_saved(var, device, dtype, fast is not False, strict is True)
    if of_folder:
        from varfast.runs.folder import RunFolder  # and with it torch.distributed.checkpoint and FSDP, which take 0.8 s

        return load_run(RunFolder(var), device, dtype, fast, strict)
    if vqvae is None and family not in ("taming", "janus"):
        raise InputError(f"{argument}={var} {fault(var) or 'is not a run folder, so vqvae=... is needed too'}")
    policy = _of_files(var, vqvae, family, (device, dtype, fast is not False, strict is True), var_config, vqvae_config)
    policy.base_model = repository_of(var)
    policy.label_names = label_names(var, policy.num_classes)
    return policy


def _of_files(
    trained: str,
    frozen: str | None,
    family: FamilyName,
    how: tuple[torch.device, str, bool, bool],
    var_config: VARConfig | None,
    vqvae_config: VQVAEConfig | None,
) -> Driver:
    if family != "var":
        return family_named(family).from_files(trained, frozen, *how)
    from varfast.policies.var.build import from_files

    return from_files(trained, frozen, *how, var_config, vqvae_config)


def load_run(
    folder: RunFolder, device: torch.device, dtype: str, fast: bool | None = None, strict: bool | None = None
) -> Driver:
    """What a run delivers, as of its last checkpoint: with update.ema_decay, the averaged policy.

    fast, strict: default: as the run did.
    """
    config = folder.load_config()
    how = (config.run.fast if fast is None else fast, config.run.strict if strict is None else strict)
    family, trained = family_of(config.policy), config.policy.parts[0]
    if config.policy.checkpoint == "random":
        parts = family.random_parts(config.policy, config.run.seed, device)
    elif config.policy.lora:
        parts = _base_parts(config, folder)
    else:  # the checkpoint holds the whole trained model: the base's is not needed
        parts = {trained: family.empty_model(config.policy)} | _base_parts(config, folder, config.policy.parts[1:])
    policy = family.assemble(parts, device, dtype, *how)
    _read_texts(policy, config, folder)
    if config.policy.conditioned_on == "text":
        policy.set_prompts(saved_prompts(folder.path).texts)
    policy.base_model = repository_of(config.policy.checkpoint)
    policy.label_names = named_labels(config, folder)
    if config.policy.lora:
        policy.add_lora(config.policy.lora, config.run.seed)
    folder.newest().load_result(policy.trainable)
    return policy


def named_labels(config: Config, folder: RunFolder) -> list[str] | None:
    """Names of a run's labels, as its folder knows them; None: unknown, or the model reads texts."""
    if config.policy.conditioned_on == "text" or config.policy.checkpoint == "random":
        return None
    return run_names(config.policy, config.pretrain.dataset, folder.path, made=True)


def load_base(
    config: Config, folder: RunFolder, device: torch.device, dtype: str | None = None, whole: bool = True
) -> Driver:
    """The model that a run started from: random, or the files that its folder notes. Nothing is made or fetched.

    Args:
        config: of the run.
        dtype: of activations; default: the run's.
        whole: compare the files' SHA-256; False where that has just been done.
    Raises: InputError if the files are not there as they were.
    """
    family = family_of(config.policy)
    if config.policy.checkpoint == "random":
        parts = family.random_parts(config.policy, config.run.seed, device)
    else:
        parts = _base_parts(config, folder, whole=whole)
    policy = family.assemble(parts, device, dtype or config.run.dtype, config.run.fast, config.run.strict)
    _read_texts(policy, config, folder)
    return policy


def _read_texts(policy: Driver, config: Config, folder: RunFolder | None) -> None:
    """Give a policy that is conditioned on text the tokenizer of the folder; without one, one that reads any text."""
    if config.policy.conditioned_on == "text":
        made = folder is not None and config.policy.checkpoint != "random"
        path = folder.path / TOKENIZER_FILE if folder is not None and made else None
        policy.set_tokenizer(text_tokenizer(config.policy, path))


def _base_parts(
    config: Config, folder: RunFolder, parts: Sequence[str] | None = None, whole: bool = True
) -> dict[str, nn.Module]:
    """Parts (default all) from the files that the folder notes."""
    family, base = family_of(config.policy), Base(folder, config.policy.parts)
    return {part: family.load_part(part, str(base.find(part, whole)), config.policy) for part in parts or base.parts}


def random_policy(config: Config, device: torch.device) -> Driver:
    """Random weights of the configured sizes, a function of run.seed: for benchmarks and tests."""
    family = family_of(config.policy)
    parts = family.random_parts(config.policy, config.run.seed, device)
    policy = family.assemble(parts, device, config.run.dtype, config.run.fast, config.run.strict)
    _read_texts(policy, config, None)
    return policy


def base_state(config: Config, folder: RunFolder, device: torch.device) -> State:
    """The trained model's weights as the run started from them, in float32: in memory they may be rounded to 16 bits.

    device: where random weights were drawn.
    """
    part = config.policy.parts[0]
    if config.policy.checkpoint == "random":
        return family_of(config.policy).random_parts(config.policy, config.run.seed, device)[part].state_dict()
    return _base_parts(config, folder, [part], whole=False)[part].state_dict()


def frozen_part(folder: RunFolder, part: str) -> Path | State:
    """A frozen part of a run: its file, or of random weights, which have none, the tensors. Raises: as Base.find."""
    config = folder.load_config()
    if config.policy.checkpoint != "random":
        return Base(folder).find(part)
    device = pick_device(config.run.device)  # random weights are those of the device that they were drawn on
    return family_of(config.policy).random_parts(config.policy, config.run.seed, device)[part].state_dict()


def delivered_state(folder: RunFolder, dtype: torch.dtype) -> tuple[State, int | None]:
    """Names, shapes and order of the public checkpoints, buffers included; what is no integer in `dtype`.

    Returns: what the run delivers as of the last checkpoint (with update.ema_decay, the average), or var.pth where that
        alone is left, and the steps that made it (None for var.pth).
    Raises: InputError if the folder holds no weights, or others than its config says.
    """
    step, config = None, folder.load_config()
    family, trained = family_of(config.policy), config.policy.parts[0]
    weights = folder.weights(config)
    if weights.exists() and not folder.checkpoints.exists():
        found: State = family.load_part(trained, str(weights), config.policy).state_dict()
    elif config.policy.lora:
        # Random weights are those of the device that they were drawn on.
        device = pick_device(config.run.device if config.policy.checkpoint == "random" else "cpu")
        policy, step = load_run(folder, device, "float32"), folder.newest().step
        found = policy.merged_state(without_lora(policy.trainable).state_dict())
    else:
        checkpoint, model = folder.newest(), family.empty_model(config.policy)
        checkpoint.load_result(model)
        found, step = model.state_dict(), checkpoint.step
    with torch.device("meta"):
        wanted = family.empty_model(config.policy).state_dict()
    return {n: found[n].to(dtype if t.is_floating_point() else t.dtype).contiguous() for n, t in wanted.items()}, step
