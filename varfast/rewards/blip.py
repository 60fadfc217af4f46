"""The network of ImageReward: BLIP's image tower, and BERT that reads a text and attends to the image.

timm's VisionTransformer and transformers' BlipTextModel are what BLIP is made of, and have the names of its weights.

Axes: B image, N text, T token of a text, P place of the image tower (class token and patches), W its width, D width of
the text encoder; H, W pixels of images.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from varfast.rewards.backbone import warn_of_cut
from varfast.rewards.files import fetch, read_names
from varfast.rewards.preprocess import Preprocessing
from varfast.types import InputError
from varfast.weights.containers import read_checkpoint
from varfast.weights.files import shown
from varfast.weights.hub import one_line
from varfast.weights.state import Known, State, axis_size, count_parts, inferred, select

# Of the ratings in its training data.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
_OWN_WORDS = 2  # [DEC] and [ENC], which BLIP adds to BERT's words; no text has them
_HEAD_WIDTH = 64  # of both encoders
_LAYER_NORM_EPS = {"image": 1e-6, "text": 1e-12}
_PIXEL_MEAN, _PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_KNOWN = Known("ImageReward's weights", "blip.visual_encoder.cls_token", frozenset({"blip", "mlp"}))
# Of BLIP's pre-training: the file has them, and nothing reads them. position_ids counts 0, 1, 2 and so on.
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


@dataclass(frozen=True)
class BlipSpec:
    """Identifies the network: rewards with equal specs share one.

    Attributes:
        pretrained: a path or hf:// address of the weights.
        vocabulary: likewise of the tokenizer's words.
        dtype: of activations and weights.
    """

    pretrained: str
    vocabulary: str
    dtype: Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class BlipSizes:
    """Published: images of 224 pixels in patches of 16, 24 layers 1024 wide; texts of 30524 words, 12 layers 768 wide.

    Attributes:
        image_size, patch_size: in pixels.
        image_width, image_layers: of the image tower.
        text_width, text_layers: of the text encoder.
        words: of the vocabulary, with BLIP's own two.
        places: tokens that a text may have at most.
        text_inner, image_inner: width inside of the feed-forward layers.
    """

    image_size: int = 224
    patch_size: int = 16
    image_width: int = 1024
    image_layers: int = 24
    image_inner: int = 4096
    text_width: int = 768
    text_layers: int = 12
    text_inner: int = 3072
    words: int = 30524
    places: int = 512


class BlipNetwork(nn.Module):
    """The layers, under the names of the published file.

    Raises: InputError if a library is missing.
    """

    def __init__(self, sizes: BlipSizes) -> None:
        super().__init__()
        try:
            from timm.models.vision_transformer import VisionTransformer
            from transformers import BlipTextConfig, BlipTextModel
        except ImportError as error:
            raise InputError(f"ImageReward needs transformers and timm; pip install 'varfast[rewards]' ({error})"
                             ) from error  # fmt: skip
        self.blip = nn.Module()
        self.blip.visual_encoder = VisionTransformer(
            img_size=sizes.image_size,
            patch_size=sizes.patch_size,
            num_classes=0,
            global_pool="",
            embed_dim=sizes.image_width,
            depth=sizes.image_layers,
            num_heads=sizes.image_width // _HEAD_WIDTH,
            mlp_ratio=sizes.image_inner / sizes.image_width,
            norm_layer=functools.partial(nn.LayerNorm, eps=_LAYER_NORM_EPS["image"]),
        )
        self.blip.text_encoder = BlipTextModel(
            BlipTextConfig(
                vocab_size=sizes.words,
                hidden_size=sizes.text_width,
                encoder_hidden_size=sizes.image_width,
                intermediate_size=sizes.text_inner,
                num_hidden_layers=sizes.text_layers,
                num_attention_heads=sizes.text_width // _HEAD_WIDTH,
                max_position_embeddings=sizes.places,
                hidden_act="gelu",
                layer_norm_eps=_LAYER_NORM_EPS["text"],
                is_decoder=True,  # has cross-attention; the mask is not causal unless forward is told so
            ),
            add_pooling_layer=False,
        )
        # As in Aesthetic: no activations, and dropout for the numbers in the names of the weights.
        self.mlp = nn.Module()
        self.mlp.layers = nn.Sequential(
            nn.Linear(sizes.text_width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )


class Blip:
    """ImageReward's network with its weights, on the device.

    Args:
        spec: which.
        device: where it runs.
        batch_size: images at a time.
        key: where it stands in the config, for errors.
    Raises: InputError if a library is missing, or if the weights or the words cannot be had, or do not fit.
    """

    def __init__(self, spec: BlipSpec, device: torch.device, batch_size: int, key: str) -> None:
        self._tokenizer = _tokenizer(spec.vocabulary, f"{key}.vocabulary")
        path = fetch(spec.pretrained, f"{key}.pretrained")
        try:
            network, sizes = load(path)
        except InputError as error:
            raise InputError(f"{key}: {error}") from error
        words = self._tokenizer.get_vocab_size()
        if words != sizes.words - _OWN_WORDS:
            raise InputError(
                f"{key}.vocabulary={spec.vocabulary} has {words} words, the model was trained with "
                f"{sizes.words - _OWN_WORDS} and {_OWN_WORDS} of its own; give the vocab.txt of bert-base-uncased"
            )
        self._dtype = torch.float32 if spec.dtype == "float32" else torch.bfloat16
        network.blip.to(self._dtype)
        self._network: Any = network.to(device)
        self._device = device
        self.batch_size = batch_size
        self._warned = False
        side = sizes.image_size
        self._preprocess = Preprocessing(side, side, "shortest", "bicubic", _PIXEL_MEAN, _PIXEL_STD)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, P, W) of the image tower: 0.8 MB an image in float32."""
        tower = self._network.blip.visual_encoder
        parts = [
            tower(self._preprocess(part.to(self._device)).to(self._dtype)) for part in images.split(self.batch_size)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def rate(self, images_BPW: Tensor, tokens_BT: Tensor, used_BT: Tensor) -> Tensor:
        """Ratings (B,) float32 of images for texts.

        Args:
            images_BPW: as embed_images returns them.
            tokens_BT, used_BT: the text of each image, and where it has tokens.
        """
        parts = []
        for first in range(0, len(images_BPW), self.batch_size):
            rows = slice(first, first + self.batch_size)
            hidden_BTD = self._network.blip.text_encoder(
                tokens_BT[rows],
                attention_mask=used_BT[rows],
                encoder_hidden_states=images_BPW[rows],
                use_cache=False,
            ).last_hidden_state
            parts.append(self._network.mlp.layers(hidden_BTD[:, 0].float()).squeeze(1))
        return (torch.cat(parts) - MEAN) / STD

    def tokens(self, texts: list[str], key: str) -> tuple[Tensor, Tensor]:
        """Tokens (N, T) of texts, and where they are, 1 or 0.

        Raises: InputError for a text of more than 35 tokens with start and end: ImageReward cuts them off.
        """
        encoded = [self._tokenizer.encode(text).ids for text in texts]
        longest = max(range(len(texts)), key=lambda i: len(encoded[i]))
        most = len(encoded[longest])
        if most > MAX_TOKENS:
            raise InputError(
                f"{key}: {texts[longest]!r} has {most} tokens with start and end, {most - MAX_TOKENS} more than the "
                f"{MAX_TOKENS} that the model reads; shorten it"
            )
        return self._padded(encoded, most)

    def tokens_of_batch(self, texts: list[str], key: str) -> tuple[Tensor, Tensor]:
        """Tokens (B, 35) of texts, and where they are; longer ones are cut off, as by ImageReward, which is said once.

        All have the same width, so that a rating does not depend on the other texts of its batch.
        """
        encoded = [self._tokenizer.encode(text).ids for text in texts]
        longest = max(range(len(texts)), key=lambda i: len(encoded[i]))
        if not self._warned:
            self._warned = warn_of_cut(key, texts[longest], len(encoded[longest]), MAX_TOKENS)
        cut = [ids if len(ids) <= MAX_TOKENS else [*ids[: MAX_TOKENS - 1], ids[-1]] for ids in encoded]
        return self._padded(cut, MAX_TOKENS)

    def _padded(self, encoded: list[list[int]], width: int) -> tuple[Tensor, Tensor]:
        tokens_NT = torch.tensor([ids + [0] * (width - len(ids)) for ids in encoded], device=self._device)
        used_NT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in encoded], device=self._device)
        return tokens_NT, used_NT

    def texts_are_read(self) -> None:
        """Nothing is freed: the text encoder reads every image."""


def load(path: Path) -> tuple[BlipNetwork, BlipSizes]:
    """The network of a file in eval mode, float32, on the CPU, and its sizes.

    Raises: InputError if the file cannot be read, or holds anything but ImageReward's weights.
    """
    state = select(read_checkpoint(path), _KNOWN, path)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(_UNUSED)}
    sizes = inferred(lambda: infer_sizes(state), path)
    network = BlipNetwork(sizes)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"checkpoint {shown(path)} does not hold ImageReward's weights: {one_line(error, 400)}"
                         ) from error  # fmt: skip
    wrong = [name for name, parameter in network.named_parameters() if not bool(parameter.isfinite().all())]
    if wrong:
        raise InputError(f"checkpoint {shown(path)} holds numbers that are not finite, first in {wrong[0]}; fetch it "
                         "again")  # fmt: skip
    return network.eval().requires_grad_(False), sizes


def infer_sizes(state: State) -> BlipSizes:
    """The sizes of a state_dict. Raises: InputError for what is missing or has other axes."""
    image, text = "blip.visual_encoder", "blip.text_encoder"
    patch_size = axis_size(state, f"{image}.patch_embed.proj.weight", 2, 4)
    places = axis_size(state, f"{image}.pos_embed", 1, 3)
    side = round((places - 1) ** 0.5)
    if side * side + 1 != places or side == 0:
        raise InputError(f"{image}.pos_embed has {places} places, which are no square and one")
    widths = {name: axis_size(state, f"{name}.{tensor}", axis) for name, tensor, axis in (
        (image, "cls_token", 2), (text, "embeddings.word_embeddings.weight", 1))}  # fmt: skip
    for name, width in widths.items():
        if width % _HEAD_WIDTH:
            raise InputError(f"{name} is {width} wide, which is no multiple of {_HEAD_WIDTH}")
    return BlipSizes(
        image_size=side * patch_size,
        patch_size=patch_size,
        image_width=widths[image],
        image_layers=count_parts(state, f"{image}.blocks", 100),
        image_inner=axis_size(state, f"{image}.blocks.0.mlp.fc1.weight", 0, 2),
        text_width=widths[text],
        text_layers=count_parts(state, f"{text}.encoder.layer", 100),
        text_inner=axis_size(state, f"{text}.encoder.layer.0.intermediate.dense.weight", 0, 2),
        words=axis_size(state, f"{text}.embeddings.word_embeddings.weight", 0, 2),
        places=axis_size(state, f"{text}.embeddings.position_embeddings.weight", 0, 2),
    )


def _tokenizer(address: str, key: str) -> Any:
    """BERT's tokenizer of lower-case texts. Raises: InputError if the library is missing, or the words are no such."""
    try:
        from tokenizers import BertWordPieceTokenizer
    except ImportError as error:
        raise InputError(f"ImageReward needs the package tokenizers; pip install 'varfast[rewards]' ({error})"
                         ) from error  # fmt: skip
    words = {word: number for number, word in enumerate(read_names(str(fetch(address, key)), key))}
    if not {"[CLS]", "[SEP]", "[UNK]"} <= words.keys():
        raise InputError(f"{key}={address} is no vocabulary of BERT: it has no [CLS], [SEP] or [UNK]")
    return BertWordPieceTokenizer(words, lowercase=True)
