"""CLIP models of open_clip: images and texts to embeddings of norm 1, on the device.

Axes: B image, N text, D embedding; H, W pixels.
"""

from __future__ import annotations

import difflib
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from varfast.printable import printable
from varfast.rewards.building import Building
from varfast.rewards.clip_names import to_open_clip
from varfast.rewards.files import fetch
from varfast.rewards.preprocess import Preprocessing
from varfast.types import InputError
from varfast.weights.containers import check_file, read_checkpoint
from varfast.weights.hub import hub_cause, one_line

_QUICK = "-quickgelu"
_PRECISION = {"float32": "fp32", "bfloat16": "bf16"}  # bf16: matrices only; LayerNorm stays float32
_KEPT_TEXTS = 4096  # 16 MB of embeddings of ViT-H-14
_TEXT_TOWER = ("text", "text_decoder", "transformer", "token_embedding")


@dataclass(frozen=True)
class BackboneSpec:
    """Identifies a CLIP model: rewards with equal specs share one model.

    Attributes:
        model: a name of open_clip.list_models(), without -quickgelu.
        quick_gelu: x * sigmoid(1.702 x) in place of GELU.
        pretrained: a tag of open_clip, a path or an hf:// address.
        dtype: of activations and matrices.
        resize_mode: instead of that of the pretrained tag.
        names: whose names the weights have, open_clip's or those of transformers' CLIPModel.
    """

    model: str
    quick_gelu: bool
    pretrained: str
    dtype: Literal["float32", "bfloat16"]
    resize_mode: Literal["shortest", "longest", "squash"] | None = None
    names: Literal["open_clip", "transformers"] = "open_clip"


def backbone_spec(model: str, pretrained: str, dtype: Literal["float32", "bfloat16"], key: str) -> BackboneSpec:
    """The spec of a model by its name in open_clip and a tag, or a file, of weights.

    A tag knows the activation that its weights were trained with: ViT-L-14 with the tag openai is ViT-L-14-quickgelu
    (open_clip 3 warns of that and computes with GELU). For a file, the name of the model says it.

    Args:
        key: where model and pretrained stand in the config, as reward.mine; for errors.
    Raises: InputError for a name or a tag that open_clip does not have.
    """
    open_clip = import_open_clip()
    models = open_clip.list_models()
    if model not in models:
        raise InputError(f"{key}.model={model}: open_clip has no such model{_nearest(model, models)}")
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if not tag and not pretrained.startswith("hf://") and not Path(pretrained).expanduser().is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise InputError(
            f"{key}.pretrained={pretrained} is neither a file, nor hf://owner/repo/file, nor a tag of {model}; "
            f"its tags: {tags}"
        )
    quick_gelu = bool(open_clip.get_model_config(model).get("quick_gelu") or tag.get("quick_gelu"))
    return BackboneSpec(model.removesuffix(_QUICK) if quick_gelu else model, quick_gelu, pretrained, dtype)


class Backbone:
    """A frozen CLIP.

    Args:
        spec: which.
        device: where it runs.
        batch_size: images, or texts, at a time.
        key: where it stands in the config, for errors.
    Raises: InputError if its weights cannot be had, or belong to another model.

    The weights of a tag come from the hub, which promises no hash; those in its cache are used without a network
    (HF_HUB_OFFLINE=1 makes that certain). Some models read further files of the hub beside their weights, whether
    these come from there or not: a tokenizer (SigLIP), a description of the text tower (RoBERTa).
    """

    def __init__(self, spec: BackboneSpec, device: torch.device, batch_size: int, key: str) -> None:
        open_clip = import_open_clip()
        tag = open_clip.get_pretrained_cfg(spec.model, spec.pretrained)
        # First, for it is quick: without it no text can be read.
        self._tokenizer = _from_the_hub(lambda: open_clip.get_tokenizer(spec.model), spec, key)
        path = _tag_file(spec, tag, key) if tag else fetch(spec.pretrained, f"{key}.pretrained")
        try:
            check_file(path)
        except InputError as error:
            raise InputError(f"{key}: {error}") from error
        _from_the_hub(lambda: _text_config(spec), spec, key)
        try:
            self._model = _load(spec, path, device, tag)
        except ImportError as error:
            raise InputError(f"{key}: {spec.model} needs another package: {one_line(error)}; pip install it") from error
        # check_file has found the file whole and harmless; what is left is another model.
        except (RuntimeError, LookupError, EOFError, ValueError, AssertionError, OSError, TypeError,
                AttributeError) as error:  # fmt: skip
            raise InputError(
                f"{key}: {path} does not hold the weights of {spec.model}, or is damaged. Detail: "
                f"{one_line(str(error).partition(chr(10))[0] or type(error).__name__)}"
            ) from error
        wrong = [name for name, p in self._model.named_parameters() if not bool(p.isfinite().all())]
        if wrong:
            raise InputError(f"{key}: {path} holds numbers that are not finite, first in {wrong[0]}; fetch it again")
        self._model.eval().requires_grad_(False)
        self._device = device
        self._dtype = torch.float32 if spec.dtype == "float32" else torch.bfloat16
        self.batch_size = batch_size
        self._keeps_texts = self._warned = False
        self._read: OrderedDict[str, Tensor] = OrderedDict()
        self._preprocess = clip_preprocessing(open_clip.get_model_preprocess_cfg(self._model))

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D) float32 of norm 1."""
        parts = [
            self._model.encode_image(self._preprocess(part.to(self._device)).to(self._dtype)).float()
            for part in images.split(self.batch_size)
        ]
        return F.normalize(torch.cat(parts), dim=1)

    @torch.no_grad()
    def embed_texts(self, texts: list[str], key: str) -> Tensor:
        """N texts -> (N, D) float32 of norm 1.

        Raises: InputError for a text of more tokens than the model reads; open_clip would cut it off.
        """
        context = self._tokenizer.context_length
        used_N = self._count_tokens(texts)
        longest = int(used_N.argmax())
        excess = int(used_N[longest]) - context
        if excess > 0:
            raise InputError(
                f"{key}: {texts[longest]!r} has {context + excess} tokens with start and end, {excess} more than the "
                f"{context} that the model reads; shorten it"
            )
        tokens = self._tokenizer(texts).to(self._device)
        parts = [self._model.encode_text(part).float() for part in tokens.split(self.batch_size)]
        return F.normalize(torch.cat(parts), dim=1)

    def reads_texts_of_batches(self) -> None:
        """Call it while rewards are built: `texts_are_read` then frees nothing."""
        self._keeps_texts = True

    @torch.no_grad()
    def embed_texts_of_batch(self, texts: list[str], key: str) -> Tensor:
        """B texts -> (B, D) float32 of norm 1. Those that were read last are kept.

        A text of more tokens than the model reads is cut off, as by its own code, and a warning says so once.

        Each text is a batch of its own, so that its embedding depends neither on the others nor on what is kept: a run
        that goes on, or has more processes, gets the same bits.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._read]
        if new:
            self._warn_of_cut(new, key)
        rows = {text: self._read[text] for text in set(texts).difference(new)}
        for text in new:
            rows[text] = F.normalize(self._model.encode_text(self._tokenizer([text]).to(self._device)).float(), dim=1)
        for text in dict.fromkeys(texts):
            self._read[text] = rows[text]
            self._read.move_to_end(text)
        while len(self._read) > _KEPT_TEXTS:
            self._read.popitem(last=False)
        return torch.cat([rows[text] for text in texts])

    def _count_tokens(self, texts: list[str]) -> Tensor:
        """(N,), with start and end."""
        # No tokenizer makes more tokens than a text has bytes, beside start and end; so the last column is padding.
        room = self._tokenizer.context_length + 8 + max(len(text.encode()) for text in texts)
        roomy = self._tokenizer(texts, context_length=room)
        return (roomy != roomy[:, -1:]).sum(dim=1)

    def _warn_of_cut(self, texts: list[str], key: str) -> None:
        if not self._warned:
            context, used_N = self._tokenizer.context_length, self._count_tokens(texts)
            longest = int(used_N.argmax())
            self._warned = warn_of_cut(key, texts[longest], int(used_N[longest]), context)

    @property
    def logit_scale(self) -> float:
        """The factor of the cosine in the model's training: exp of its parameter, 100 in most."""
        return float(self._model.logit_scale.exp())

    def texts_are_read(self) -> None:
        """Free the memory of what embed_texts needs: 0.5 GB of ViT-L-14, 1.4 GB of ViT-H-14 in float32."""
        for name in () if self._keeps_texts else _TEXT_TOWER:
            if hasattr(self._model, name):
                delattr(self._model, name)


def _load(spec: BackboneSpec, path: Path, device: torch.device, tag: dict[str, Any]) -> Any:
    """The model with the weights of a file. Raises: what open_clip and load_state_dict raise if they do not fit."""
    open_clip = import_open_clip()
    settings = {
        "precision": _PRECISION[spec.dtype],
        "device": device,
        "force_quick_gelu": spec.quick_gelu,
        "force_preprocess_cfg": tag | ({"resize_mode": spec.resize_mode} if spec.resize_mode else {}),
    }
    if spec.names == "open_clip":
        return open_clip.create_model(spec.model, pretrained=str(path), weights_only=True, **settings)
    with _no_warnings():  # of a model without weights, which it gets in the next line
        model = open_clip.create_model(spec.model, pretrained_text=False, **settings)
    model.load_state_dict(to_open_clip(read_checkpoint(path)))
    return model


@contextmanager
def _no_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def clip_preprocessing(config: dict[str, Any]) -> Preprocessing:
    """Of a model's preprocessing in open_clip's terms. Raises: InputError for a model of images that are not square."""
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise InputError(f"the model reads images of {height} x {width} pixels; choose one of square images")
    return Preprocessing(
        height, height, config["resize_mode"], config["interpolation"], tuple(config["mean"]), tuple(config["std"])
    )


def shared_backbone(building: Building, spec: BackboneSpec, batch_size: int) -> Backbone:
    """The CLIP model of a reward, which rewards with the same spec share."""
    return building.share(spec, batch_size, lambda: Backbone(spec, building.device, batch_size, building.key))


def warn_of_cut(key: str, text: str, tokens: int, most: int) -> bool:
    """Warn of a text of more tokens than a model reads. Returns: whether it has so many."""
    if tokens > most:
        warnings.warn(
            f"{key}: prompts of more than {most} tokens are cut off, as by the model's own code; the first, "
            f"'{printable(text, 80)}', has {tokens} with start and end",
            stacklevel=2,
        )
    return tokens > most


def import_open_clip() -> Any:
    """The package. Raises: InputError if it is not installed."""
    try:
        import open_clip
    except ImportError as error:
        raise InputError(f"this reward needs open_clip_torch; pip install 'varfast[rewards]' ({error})") from error
    return open_clip


def _beside(spec: BackboneSpec) -> dict[str, str]:
    """What else a model reads from the hub besides its weights, with the repository of each."""
    text = (import_open_clip().get_model_config(spec.model) or {}).get("text_cfg", {})
    parts = {"tokenizer": text.get("hf_tokenizer_name"), "description of the text tower": text.get("hf_model_name")}
    return {what: repository for what, repository in parts.items() if repository}


def _text_config(spec: BackboneSpec) -> None:
    """Read the config of a text tower from transformers; open_clip reads it again when it builds the model."""
    if repository := _beside(spec).get("description of the text tower"):
        from transformers import AutoConfig

        AutoConfig.from_pretrained(repository)


def _from_the_hub(read: Callable[[], Any], spec: BackboneSpec, key: str) -> Any:
    """Call `read`. Raises: InputError that lists what the model needs from the hub besides its weights, if it fails."""
    beside = _beside(spec)
    try:
        return read()
    except ModuleNotFoundError as error:
        raise InputError(f"{key}: {spec.model} reads its texts by {error.name}; pip install {error.name}") from error
    except Exception as error:
        if not beside:
            raise
        # transformers raises what it finds: OSError, ValueError, its tokenizers' own, the hub's and its HTTP library's.
        parts = " and ".join(f"a {what} ({repository})" for what, repository in beside.items())
        commands = "; ".join(f"hf download {repository}" + _ONLY_SMALL for repository in dict.fromkeys(beside.values()))
        raise InputError(
            f"{key}: {spec.model} reads {parts} from the hub beside its weights, which cannot be had: "
            f"{hub_cause(error, next(iter(beside.values())), 'config.json')}\n"
            f"  where there is a network: {commands}; without one, copy the hub's cache (HF_HOME) from there"
        ) from error


# Not the weights: they are given.
_ONLY_SMALL = " --exclude '*.bin' '*.safetensors' '*.h5' '*.msgpack' '*.ot'"


def _tag_file(spec: BackboneSpec, tag: dict[str, Any], key: str) -> Path:
    try:
        return Path(import_open_clip().download_pretrained(tag))
    except Exception as error:  # of open_clip, the hub's client and its HTTP library: see fetch_from_hub
        where = f"hf://{tag['hf_hub'].rstrip('/')}" if tag.get("hf_hub") else tag.get("url", "")
        cause = hub_cause(error, tag["hf_hub"].rstrip("/"), "") if tag.get("hf_hub") else one_line(error)
        raise InputError(
            f"{key}.pretrained={spec.pretrained}: the weights of {spec.model} cannot be fetched from {where} and are "
            f"not in the cache: {cause}\n"
            f"  without a network, set {key}.pretrained to the path of the weights (.safetensors)"
        ) from error


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else "; open_clip.list_models() names them"
