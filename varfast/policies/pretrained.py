"""Saving a policy as a folder that is whole, reading it back bit for bit, and handing it to the hub.

    config.json                          what it is: varfast.weights.saved
    var.safetensors, vqvae.safetensors   the parts, by their names in the family; or model.safetensors, or several and
                                         their index, of a family that the package transformers lays out
    tokenizer.json                       of the texts, of a family that reads texts
    README.md                            the model card

The weights have the names and shapes of the public checkpoints. The methods are those of huggingface_hub's
ModelHubMixin, which is not a base here: it reads config.json before anybody could look at it, lets its exceptions
through as they are, keeps the arguments of every constructor, and takes jinja2 to write a card.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import torch

from varfast.cards.model import policy_card
from varfast.files import save_text
from varfast.policies import lora
from varfast.policies.config import FamilyConfig, FamilyName
from varfast.policies.device import existing_device
from varfast.policies.text import TOKENIZER_FILE, Conditioned
from varfast.printable import printable
from varfast.settings.loading import validate
from varfast.types import InputError
from varfast.weights.files import resolve, shown
from varfast.weights.hub import names_repository
from varfast.weights.saved import CONFIG_FILE, LIBRARY, Saved, file_in, hub_address, is_saved, read_saved, taken_for
from varfast.weights.state import State
from varfast.weights.upload import upload_folder
from varfast.weights.writing import save_shards, save_state

if TYPE_CHECKING:
    from varfast.policies.driver import Driver

CARD_FILE = "README.md"
_WHOLE = "model.safetensors"


@dataclass(frozen=True)
class Model:
    """What a folder holds.

    Attributes:
        section: the family and its sizes; its addresses are not looked at.
        trained, frozen: the parts, on the CPU, contiguous.
        labels: names of all labels; None: unknown, or it reads texts.
        tokenizer: content of tokenizer.json, of a family that reads texts.
        base_model: the repository of the hub that training began with, if it was one.
    """

    section: FamilyConfig
    trained: State
    frozen: State
    labels: Sequence[str] | None = None
    tokenizer: str | None = None
    base_model: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Files


def part_files(section: FamilyConfig | type[FamilyConfig]) -> tuple[str, str]:
    """Names of the files of the two parts; the same one twice if one has all."""
    trained, frozen = section.parts
    return (_WHOLE, _WHOLE) if section.as_transformers else (f"{trained}.safetensors", f"{frozen}.safetensors")


def write_model(folder: Path, model: Model, shard_gb: float | None = None) -> list[str]:
    """Write all files but the card, config.json last: a folder without it is no model yet. Returns their names.

    Raises: InputError for a run folder, or if a file cannot be written.
    """
    from varfast import __version__
    from varfast.policies.families import whole_state

    if (folder / "config.yaml").exists():
        raise InputError(f"{folder} is a run folder; choose another one for the model")
    section = model.section
    files = part_files(section)
    if section.as_transformers:
        names = save_shards(whole_state(section, model.trained, model.frozen), folder / files[0], shard_gb)
    else:
        names = list(files)
        for name, state in zip(files, (model.trained, model.frozen), strict=True):
            save_state(state, folder / name)
    if model.tokenizer is not None:
        save_text(folder / TOKENIZER_FILE, model.tokenizer)
        names.append(TOKENIZER_FILE)
    saved = Saved(
        library_name=LIBRARY,
        varfast_version=__version__,
        policy=_described(section),
        image_size=section.image_size,
        labels=None if model.labels is None else list(model.labels),
        base_model=model.base_model,
    )
    content = json.dumps(saved.model_dump(mode="json", exclude_none=True), indent=2, ensure_ascii=False)
    save_text(folder / CONFIG_FILE, content + "\n")
    return [*names, CONFIG_FILE]


def _described(section: FamilyConfig) -> dict[str, Any]:
    """The family and its sizes, without a preset: what it stands for may change in another version."""
    trained, frozen = section.parts
    sizes: Mapping[str, Any] = {trained: getattr(section, "sizes"), frozen: getattr(section, frozen)}  # noqa: B009
    described = {"family": section.family} | {name: each.model_dump(mode="json") for name, each in sizes.items()}
    keys = ("image_size", "max_prompt_tokens")
    return described | {key: getattr(section, key) for key in keys if key in type(section).model_fields}


def saved_section(address: str) -> FamilyConfig:
    """The section `policy` of a saved model, whose addresses are the files in its folder or repository.

    Raises: InputError if config.json cannot be used.
    """
    return _section(read_saved(address), address)


def _section(saved: Saved, address: str) -> FamilyConfig:
    from varfast.policies.families import section_named

    named = shown(file_in(address, CONFIG_FILE))
    family = saved.policy.get("family")
    if not isinstance(family, str) or family not in get_args(FamilyName):
        raise InputError(
            f"{named}: policy.family={printable(family, 80)}, and this version of varfast knows "
            f"{', '.join(get_args(FamilyName))}; varfast {printable(saved.varfast_version, 40)} wrote it"
        )
    kind = section_named(family)
    allowed = {"family", *kind.parts, *({"image_size", "max_prompt_tokens"} & kind.model_fields.keys())}
    if unknown := next((key for key in saved.policy if key not in allowed), None):
        raise InputError(f"{named}: policy.{printable(unknown, 80)} has no place in a saved model; take it out")
    trained, frozen = part_files(kind)
    sources = {"checkpoint": file_in(address, trained), f"{kind.parts[1]}_checkpoint": file_in(address, frozen)}
    section = validate(kind, saved.policy | ({"checkpoint": address} if kind.as_transformers else sources), named)
    if saved.labels is not None and len(saved.labels) != section.num_classes:
        raise InputError(f"{named} names {len(saved.labels)} labels, and the model has {section.num_classes}")
    return section


def load_saved(address: str, device: torch.device, dtype: str, fast: bool = True, strict: bool = False) -> Driver:
    """The policy of a saved model. Raises: InputError if a file cannot be had, or does not fit."""
    from varfast.policies.families import family_of, text_tokenizer

    saved = read_saved(address)
    section = _section(saved, address)
    family, (trained, frozen) = family_of(section), section.parts
    sources = {trained: section.checkpoint, frozen: section.frozen_checkpoint or section.checkpoint}
    parts = {part: family.load_part(part, source, section) for part, source in sources.items()}
    policy = family.assemble(parts, device, dtype, fast, strict)
    if section.conditioned_on == "text":
        policy.set_tokenizer(text_tokenizer(section, resolve(file_in(address, TOKENIZER_FILE))))
    policy.label_names, policy.base_model = saved.labels, saved.base_model
    return policy


# ---------------------------------------------------------------------------------------------------------------------
# Methods of a policy


class Pretrained(Conditioned):
    """The methods by which a policy becomes a folder or a repository, and the other way round.

    Attributes:
        family: its name in a config; None: it is of none, and nothing could read what is saved.
        label_names: of all labels; None: unknown, or it reads texts. Whoever loads a policy sets it.
        base_model: the repository of the hub, as owner/name, that training began with; None: there was none.
    """

    family: ClassVar[FamilyName | None] = None
    label_names: Sequence[str] | None = None
    base_model: str | None = None

    def save_pretrained(self, folder: str | Path, *, dtype: Literal["float32", "bfloat16"] = "float32") -> Path:
        """Write a folder that is whole: weights, config.json, of a model of texts tokenizer.json, and a card.

        Files of these names are replaced, but for a README.md that is there: it may be yours.

        Args:
            dtype: of the trained weights in the file.
        Returns: the folder. Raises: InputError if it cannot be written, or is a run folder.
        """
        self._save(folder := Path(folder).expanduser(), dtype, folder.name or "model")
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a model of varfast",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> str:
        """Upload what `save_pretrained` writes; the repository is made if it is not there.

        Args:
            repo_id: owner/name, or name for your own.
            private: of a repository that is made; None: as the hub's settings say.
            token: that may write; None: that of `hf auth login`, or HF_TOKEN.
            revision: a branch, which is made if it is not there; None: main.
        Returns: address of the commit. Raises: InputError without a login, a right or a network.
        """
        with tempfile.TemporaryDirectory() as folder:
            names = self._save(Path(folder), dtype, repo_id.rpartition("/")[2], repo_id)
            return upload_folder(Path(folder), names, repo_id, private, token, revision, commit_message)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        fast: bool = True,
        strict: bool = False,
    ) -> Self:
        """The policy of a folder that `save_pretrained` wrote, or of a repository: owner/name or hf://owner/name.

        Args:
            revision: of a repository: a branch, a tag or a commit.
            device, dtype, fast, strict: as of varfast.load_policy.
        Raises: InputError if it is no such folder, or of another family.
        """
        address = hub_address(str(source))
        if revision is not None:
            if not names_repository(address):
                raise InputError(f"revision={revision}: {address} is no repository of the hub; leave it out")
            address = f"{address.rstrip('/')}@{revision}"
        with taken_for(str(source), address):
            if not is_saved(address):
                if names_repository(address):
                    read_saved(address)  # which says why it is none
                raise InputError(
                    f"{shown(address)} is no folder or repository that save_pretrained wrote: it has no {CONFIG_FILE} "
                    "of varfast; varfast.load_policy reads run folders and files of weights"
                )
        policy = load_saved(address, existing_device(device), dtype, fast, strict)
        if not isinstance(policy, cls):
            raise InputError(
                f"{shown(address)} is a model of the family {policy.family}, and no {cls.__name__}; "
                "varfast.load_policy reads all families"
            )
        return policy

    def _save(
        self, folder: Path, dtype: Literal["float32", "bfloat16"], name: str, repo_id: str | None = None
    ) -> list[str]:
        model = _model_of(self, dtype)
        names = write_model(folder, model)
        if not (folder / CARD_FILE).exists():
            save_text(folder / CARD_FILE, policy_card(model, name, part_files(model.section), dtype, repo_id))
        return [*names, CARD_FILE]


def _model_of(policy: Any, dtype: Literal["float32", "bfloat16"]) -> Model:
    """What is saved of a policy, which is a Driver."""
    from varfast.policies.families import section_named

    if policy.family is None:
        raise InputError(f"{type(policy).__name__} is of no family of varfast, so nothing could read what is saved")
    kind = section_named(policy.family)
    sizes = {part: module.config.model_dump(mode="json") for part, module in policy.parts.items()}
    fixed = {"family": policy.family, "checkpoint": "random"} | policy.text_settings()
    section = _with_preset(validate(kind, sizes | fixed, "the policy"))
    frozen = policy.parts[kind.parts[1]]
    return Model(
        section,
        on_cpu(_trained_state(policy), getattr(torch, dtype)),
        on_cpu(frozen.state_dict()),
        policy.label_names,
        policy.tokenizer_json(),
        policy.base_model,
    )


def _trained_state(policy: Any) -> State:
    model = policy.trainable
    if lora.lora_layers(model):
        if model.compute_dtype != torch.float32:
            raise InputError(
                "the policy has an adapter on weights that are rounded to bfloat16 in memory: load it with "
                "dtype='float32', or export the run folder"
            )
        merged: State = policy.merged_state(lora.without_lora(model).state_dict())
        return merged
    state: State = model.state_dict()
    if any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        raise InputError("the policy's weights are spread over processes; export the run folder")
    return state


def on_cpu(state: State, dtype: torch.dtype | None = None) -> State:
    """A state_dict as a file takes it. dtype: of what is no integer; None: as it is."""
    return {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in state.items()
    }


def _with_preset(section: FamilyConfig) -> FamilyConfig:
    """The section with the preset that has its sizes, by which cards name the model; if none has, as it is."""
    kind, trained = type(section), section.parts[0]
    data = section.model_dump(exclude={trained, "preset"})
    for name in kind.presets:
        try:
            found = validate(kind, data | {"preset": name}, "a preset")
        except InputError:  # of another number of codes, for which there is no such tokenizer
            continue
        if getattr(found, "sizes") == getattr(section, "sizes"):  # noqa: B009
            return found
    return section
