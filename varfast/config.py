"""The schema of configs/*.yaml: every field typed, validated and documented here.

A config is a YAML file and overrides `a.b=c` from the command line. An unknown key raises and names the nearest one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from varfast.settings.arguments import sort as arguments_of
from varfast.settings.paths import address_parts, check_local, check_source, expanded
from varfast.settings.problems import explain, show
from varfast.settings.reading import apply_override, is_finite, plain, read_config, scalar
from varfast.settings.schema import Wanted
from varfast.types import InputError

HEAD_DIM = 64


_Model = TypeVar("_Model", bound=BaseModel)


class _Section(BaseModel):
    # strict: text is not a number, nor a number a boolean. Where a list stands for a tuple, the field is strict=False.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)


# A count that nothing but patience limits.
_MANY = 1_000_000_000

# A folder or file of this machine; a path or an address.
LocalPath = Annotated[str, AfterValidator(check_local), Wanted("a path")]
Source = Annotated[str, AfterValidator(check_source), Wanted("a path or address")]


def _check_device(device: str) -> str:
    name, colon, number = device.partition(":")
    # torch counts devices in 8 bits.
    if name not in ("auto", "cpu", "cuda") or (
        colon and not (name == "cuda" and number.isdecimal() and int(number[:4]) < 128)
    ):
        raise ValueError(f"got {device[:60]!r}, want auto, cpu, cuda, or cuda:0 and so on to cuda:127")
    return device


Device = Annotated[str, AfterValidator(_check_device), Wanted("auto, cpu, cuda or cuda:0")]


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
    """A number, or a name: whose, labels.py knows."""
    return 0 <= label < 2**31 if type(label) is int else isinstance(label, str) and bool(label.strip())


Labels = Annotated[list[int | str], BeforeValidator(_read_labels), Wanted("a list of labels, such as [0, 1, 2]")]
AllOrLabels = Annotated[
    Literal["all"] | list[int | str],
    BeforeValidator(_read_labels),
    Wanted("all, or a list of labels, such as [0, 1, 2]"),
]


def check_labels(what: str, labels: Sequence[int | str], num_classes: int) -> None:
    """Raises: InputError if `labels` is empty or a number in it is not in [0, num_classes). Names: see labels.py."""
    if not labels:
        raise InputError(f"{what} is empty; name labels in 0..{num_classes - 1}")
    outside = [label for label in labels if isinstance(label, int) and not 0 <= label < num_classes]
    if outside:
        raise InputError(f"{what} holds {outside[0]}; the model has labels 0..{num_classes - 1}")


def check_micro_batch(what: str, size: int | None, total: int) -> None:
    """Raises: InputError unless `size` divides `total` images."""
    _check_divides(what, size, total, "images")


def _check_divides(what: str, part: int | None, whole: int, of: str) -> None:
    if part is not None and (part < 1 or whole % part):
        small = [d for d in range(1, math.isqrt(whole) + 1) if whole % d == 0]
        nearest = min(sorted({*small, *(whole // d for d in small)}), key=lambda d: abs(d - part))
        raise InputError(f"{what}={part} does not divide {whole} {of}; use {nearest}")


# ---------------------------------------------------------------------------------------------------------------------
# Models


def _check_sides(sides: tuple[int, ...]) -> tuple[int, ...]:
    if not sides or not 1 <= sides[0] <= sides[-1] <= 128 or any(a >= b for a, b in pairwise(sides)):
        raise ValueError(
            f"got {show(list(sides))}, want sides of 1 to 128 that grow from scale to scale, as in [1, 2, 3, 4]"
        )
    return sides


PatchNums = Annotated[tuple[int, ...], AfterValidator(_check_sides), Wanted("a list, such as [1, 2, 3, 4]")]


class VARConfig(_Section):
    """Sizes of the transformer. Width is 64 * depth, with `depth` heads of 64, as in all public models."""

    depth: int = Field(16, ge=1, le=64, description="number of blocks, and of heads")
    patch_nums: PatchNums = Field(
        (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        strict=False,
        description="side of the token map of each scale, coarse to fine",
    )
    vocab_size: int = Field(4096, ge=2, le=2**20, description="V, number of codes")
    code_width: int = Field(32, ge=1, le=4096, description="channels of a code")
    num_classes: int = Field(1000, ge=1, le=1_000_000, description="labels; one more embedding stands for 'no label'")
    shared_adaln: bool = Field(False, description="one adaLN projection for all blocks (d36)")
    qk_l2_norm: bool = Field(True, description="L2-normalise queries and keys, with a learned scale a head")
    mlp_ratio: float = Field(4.0, ge=0.0625, le=64, description="hidden width of the MLP over the width")
    norm_eps: float = Field(1e-6, ge=1e-12, le=1, description="added to the variance in LayerNorm")

    @property
    def width(self) -> int:
        return HEAD_DIM * self.depth

    @property
    def scale_ends(self) -> tuple[int, ...]:
        """Cumulated number of tokens after each scale."""
        ends, total = [], 0
        for side in self.patch_nums:
            total += side * side
            ends.append(total)
        return tuple(ends)

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.scale_ends[-1]


class VQVAEConfig(_Section):
    """Sizes of the multi-scale VQ-VAE. The defaults are those of vae_ch160v4096z32.pth."""

    vocab_size: int = Field(4096, ge=2, le=2**20, description="V, number of codes")
    code_width: int = Field(32, ge=1, le=4096, description="channels of a code")
    patch_nums: PatchNums = Field(
        (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        strict=False,
        description="side of the token map of each scale, coarse to fine",
    )
    base_channels: int = Field(160, ge=32, le=4096, multiple_of=32, description="channels at full resolution")
    channel_multipliers: Annotated[
        tuple[Annotated[int, Field(ge=1, le=64)], ...], Wanted("a list of 1 to 8 whole numbers from 1 to 64")
    ] = Field(
        (1, 1, 2, 2, 4),
        min_length=1,
        max_length=8,
        strict=False,
        description="channels over base_channels; each further level halves the side",
    )
    num_res_blocks: int = Field(
        2, ge=1, le=64, description="residual blocks a level of the encoder; the decoder has one more"
    )
    num_phi: int = Field(4, ge=0, le=128, description="residual convolutions shared by the scales; 0: one a scale")
    phi_ratio: float = Field(0.5, ge=0, le=1, description="phi(x) = (1 - ratio) x + ratio conv(x)")
    commitment: float = Field(0.25, ge=0, le=1e6, description="weight of the commitment loss")

    @model_validator(mode="after")
    def _has_a_size(self) -> VQVAEConfig:
        if self.image_size > 4096 or sum(side * side for side in self.patch_nums) > 2**16:
            raise ValueError(
                f"patch_nums and channel_multipliers make images of {self.image_size} pixels a side, of "
                f"{sum(side * side for side in self.patch_nums)} tokens; want at most 4096 pixels and 65536 tokens"
            )
        return self

    @property
    def downsampling(self) -> int:
        """Pixels of a side over latents of a side."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.patch_nums[-1] * self.downsampling


_PATCH_NUMS_512PX = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
PRESETS: dict[str, VARConfig] = {
    "d16": VARConfig(depth=16),
    "d20": VARConfig(depth=20),
    "d24": VARConfig(depth=24),
    "d30": VARConfig(depth=30),
    "d36": VARConfig(depth=36, patch_nums=_PATCH_NUMS_512PX, shared_adaln=True),
}


class LoRAConfig(_Section):
    """Low-rank matrices that are trained beside the frozen ones, by the package peft: y = W x + alpha / rank B A x.

    There is no dropout: a log-probability must describe the policy that was sampled. Embeddings and the head stay as
    they are: their products are few, and the head's are summed in float32, which peft's layers would not keep.
    """

    rank: int = Field(16, ge=1, le=4096, description="rows of A and columns of B")
    alpha: float = Field(32.0, gt=0, le=1e6, description="B A is multiplied by alpha / rank")
    targets: tuple[Literal["mat_qkv", "proj", "fc1", "fc2", "ada_lin"], ...] = Field(
        ("mat_qkv", "proj", "fc1", "fc2"),
        min_length=1,
        strict=False,
        description="matrices with an adapter: attention's two and the MLP's two of every block; ada_lin is the "
        "projection of the class, of every block or (d36) the one that all share",
    )


def _names_a_file(checkpoint: str) -> bool:
    """Whether it can be no run folder. What is on the disk does not count: a config is read elsewhere too."""
    suffixes = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
    return checkpoint.startswith("hf://") or Path(checkpoint).suffix in suffixes


class PolicyConfig(_Section):
    """The model that is trained, and the frozen VQ-VAE that turns its tokens into images."""

    preset: Literal["d16", "d20", "d24", "d30", "d36"] | None = Field(None, description="a public model's sizes")
    var: VARConfig | None = Field(None, description="sizes of the transformer, where no preset is named")
    vqvae: VQVAEConfig = Field(
        default_factory=VQVAEConfig,
        description="sizes of the VQ-VAE; vocab_size, code_width and patch_nums default to those of the transformer",
    )
    checkpoint: Source = Field(
        description="weights of the transformer: a path, hf://owner/repo/file, a run folder, 'random', or 'pretrain' "
        "for the model that the pretrain section describes (trained first if it is not in the cache)"
    )
    vqvae_checkpoint: Source | None = Field(
        None,
        description="weights of the VQ-VAE: a path or hf:// address; default: the run folder's; not with 'random' and "
        "'pretrain'",
    )
    lora: LoRAConfig | None = Field(
        None, description="train an adapter beside the frozen weights; {} for its defaults; null: train all weights"
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve_sizes(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        preset, var = data.get("preset"), data.get("var")
        if (preset is None) == (var is None):
            raise ValueError("name a preset (d16, d20, d24, d30, d36) or give the sizes under var, one of the two")
        sizes: dict[str, Any] = PRESETS[preset].model_dump() if isinstance(preset, str) and preset in PRESETS else {}
        if isinstance(var, VARConfig):
            sizes = var.model_dump()
        elif isinstance(var, dict):
            sizes = VARConfig().model_dump() | var
        vqvae = data.get("vqvae") or {}
        if isinstance(vqvae, dict):
            data["vqvae"] = {k: sizes[k] for k in ("vocab_size", "code_width", "patch_nums") if k in sizes} | vqvae
        return data

    @model_validator(mode="after")
    def _agree(self) -> PolicyConfig:
        for name in ("vocab_size", "code_width", "patch_nums"):
            of_var, of_vqvae = getattr(self.sizes, name), getattr(self.vqvae, name)
            if of_var != of_vqvae:
                raise ValueError(f"{name} is {of_var} in the transformer and {of_vqvae} in vqvae; they must be equal")
        if self.checkpoint in ("random", "pretrain"):
            if self.vqvae_checkpoint is not None:
                raise ValueError(f"checkpoint={self.checkpoint} makes its own VQ-VAE; remove vqvae_checkpoint")
        elif self.vqvae_checkpoint is None and _names_a_file(self.checkpoint):
            raise ValueError(
                "vqvae_checkpoint is missing; for the public models it is hf://FoundationVision/var/vae_ch160v4096z32.pth"
            )
        return self

    @property
    def sizes(self) -> VARConfig:
        """Sizes of the transformer, from the preset or from var."""
        if self.var is not None:
            return self.var
        assert self.preset is not None
        return PRESETS[self.preset]


class PretrainConfig(_Section):
    """How the base model is made when policy.checkpoint is 'pretrain': for the digits, or for your own small folder."""

    dataset: LocalPath = Field("digits", description="'digits' (scikit-learn), or a folder with one sub-folder a class")
    cache_dir: LocalPath = Field(
        "~/.cache/varfast", description="where base models are kept, by a hash of what made them"
    )
    batch_size: int = Field(64, ge=1, le=1_000_000, description="images a step, for both models")
    num_workers: int = Field(0, ge=0, le=1024, description="processes that read images; 0 for data in memory")
    vqvae_steps: int = Field(1000, ge=1, le=_MANY, description="optimizer steps of the VQ-VAE")
    vqvae_lr: float = Field(1e-3, gt=0, le=1e9, description="peak learning rate of the VQ-VAE")
    var_steps: int = Field(1000, ge=1, le=_MANY, description="optimizer steps of the transformer")
    var_lr: float = Field(1e-3, gt=0, le=1e9, description="peak learning rate of the transformer")
    weight_decay: float = Field(0.05, ge=0, le=1e6, description="of AdamW, for the transformer's matrices")
    class_dropout: float = Field(0.1, ge=0, lt=1, description="share of labels replaced by 'no label'")
    drop_path: float = Field(0.0, ge=0, lt=1, description="DropPath rate of the last block; it grows linearly from 0")


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm. Defaults are the settings of arXiv:2505.23331.


class RolloutConfig(_Section):
    """What is sampled in a step: labels_per_step * group_size images."""

    labels_per_step: int = Field(32, ge=1, le=1_000_000, description="P, labels drawn a step")
    group_size: int = Field(
        16, ge=2, le=1_000_000, description="G, images a label; the group within which advantages are relative"
    )
    temperature: float = Field(
        0.7, ge=1e-3, le=1000, description="of the plain multinomial draw; no guidance, no filters"
    )
    labels: AllOrLabels = Field(
        "all", description="labels to draw from, uniformly: numbers, or names of ImageNet's classes or of your folders"
    )
    label_share: float = Field(1.0, gt=0, le=1, description="train on this share of the labels, chosen by run.seed")
    micro_batch: int | None = Field(
        None, ge=1, description="images sampled and decoded at a time; default: chosen from free memory"
    )
    cuda_graph: bool | None = Field(
        None,
        description="on a GPU, replay a captured rollout, which holds on to its memory during the update; default: "
        "where that leaves the update its room",
    )

    @property
    def images(self) -> int:
        """B, images a step."""
        return self.labels_per_step * self.group_size

    @model_validator(mode="after")
    def _divides(self) -> RolloutConfig:
        _check_divides("rollout.micro_batch", self.micro_batch, self.images, "images a step")
        return self


class GRPOConfig(_Section):
    """The loss."""

    clip_eps: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped to 1 +- this")
    kl_beta: float = Field(
        0.2,
        ge=0,
        le=1e6,
        description="weight of the KL to the base model; 0: no reference is held, unless kl_every asks for it",
    )
    kl_every: int | None = Field(
        None,
        ge=1,
        description="with kl_beta=0, steps between measurements of the KL to the base, for which the base is held as "
        "with kl_beta > 0 (that of an adapter takes no memory) and runs forward once. Default: 10 with an adapter, "
        "else the KL is not measured. With kl_beta > 0 every step measures it",
    )
    reference_every: int | None = Field(
        None,
        ge=1,
        le=_MANY,
        description="steps (rollouts) after which, again and again, the policy becomes the reference of the KL; "
        "default: the base model stays it",
    )
    advantage_eps: float = Field(1e-6, ge=1e-30, le=1e6, description="added to a group's standard deviation")
    combine: Literal["sum_then_normalise", "normalise_then_sum"] = Field(
        "sum_then_normalise",
        description="several rewards: advantages of their weighted sum, or the weighted sum of each one's advantages",
    )

    @model_validator(mode="after")
    def _has_reference(self) -> GRPOConfig:
        if self.reference_every is not None and self.kl_beta == 0.0:
            raise ValueError(
                f"reference_every={self.reference_every} with kl_beta=0, which holds no reference; set kl_beta > 0, or "
                "leave reference_every out"
            )
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class UpdateConfig(_Section):
    """From a scored rollout to new weights."""

    minibatch: int = Field(32, ge=1, le=_MANY, description="images an optimizer step")
    micro_batch: int | None = Field(
        None, ge=1, description="images a forward and backward pass; default: chosen from free memory"
    )
    checkpointing: Literal["auto", "none", "attention", "full"] = Field(
        "auto",
        description="activations recomputed in the backward pass to save memory: none, each block's attention branch, "
        "or whole blocks; auto: chosen from free memory",
    )
    cuda_graph: bool | None = Field(
        None,
        description="on one GPU, replay captured forward and backward passes, which hold on to the memory of a "
        "micro-batch during the rollout; default: where memory allows it",
    )
    epochs: int = Field(1, ge=1, le=_MANY, description="passes over a rollout")
    optimizer: Literal["adamw", "apex", "adamw8bit"] = Field(
        "adamw",
        description="PyTorch's fused AdamW, NVIDIA Apex's FusedAdam, or bitsandbytes' AdamW with moments of 8 bits: "
        "a quarter of their memory",
    )
    lr: float = Field(1e-4, gt=0, le=1e9, description="learning rate")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up, to 0")
    warmup_steps: int = Field(0, ge=0, le=_MANY, description="steps (rollouts) of linear warm-up")
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), strict=False, description="of AdamW: how much of the moments stays from step to step"
    )
    weight_decay: float = Field(
        0.0, ge=0, le=1e6, description="of AdamW, for matrices; the KL already holds the weights"
    )
    grad_clip: float = Field(1.0, gt=0, le=1e30, description="largest gradient norm; 1e30: none")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="the run delivers an average of the weights, which begins with the base model and becomes decay * "
        "average + (1 - decay) * weights after every optimizer step: the last 1 / (1 - decay) steps or so. Default: "
        "the weights themselves",
    )
    max_skipped_steps: int = Field(
        10,
        ge=1,
        le=_MANY,
        description="optimizer steps in a row left out for a gradient that is not finite, before the run stops",
    )

    @model_validator(mode="after")
    def _divides(self) -> UpdateConfig:
        _check_divides("update.micro_batch", self.micro_batch, self.minibatch, "images of a minibatch")
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


Weight = Annotated[float, Field(ge=-1e6, le=1e6)]


class BrightnessReward(_Section):
    """Mean luma of the image, in [0, 1]."""

    type: Literal["brightness"] = Field(description="the kind of reward")
    weight: Weight = Field(1.0, description="factor in the sum")
    mode: Literal["bright", "dark", "raw"] = Field(
        "bright", description="1 if >= threshold; 1 if < it; the luma itself"
    )
    threshold: float | None = Field(None, ge=-1e6, le=1e6, description="default: 0.8 for bright, 0.2 for dark")


class _ClipModel(_Section):
    """How a CLIP runs; rewards that name the same one share its pass over the images."""

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the CLIP model; scores are float32")
    batch_size: int = Field(
        64, ge=1, le=1_000_000, description="images at a time; the smallest counts where rewards share a model"
    )


class _Text(_Section):
    """What images are compared with: one text, or one a label."""

    prompt: str | None = Field(None, min_length=1, description="one text for all images, as 'a painting'")
    label_prompt: str | None = Field(None, description="a text a label, as 'a photo of a {name}'; needs names")
    names: list[str] | Source | None = Field(
        None, description="what stands for {name}: a list in the order of the labels, or a file with one a line"
    )

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if (self.prompt is None) == (self.label_prompt is None):
            raise ValueError("give prompt, or label_prompt and names, one of the two")
        if self.label_prompt is not None and "{name}" not in self.label_prompt:
            raise ValueError(f"label_prompt {self.label_prompt!r} has no {{name}}; as in 'a photo of a {{name}}'")
        if (self.label_prompt is None) != (self.names is None):
            raise ValueError("label_prompt and names go together: the names stand for {name}")
        if not (self.label_prompt or self.prompt or "").strip():
            raise ValueError("prompt is blank; describe what images should look like, as 'a painting'")
        return self


class AestheticReward(_ClipModel):
    """LAION aesthetic predictor V2: linear layers on the embedding of OpenAI's CLIP ViT-L/14; about 1 to 10."""

    type: Literal["aesthetic"] = Field(description="the kind of reward")
    weight: Weight = Field(1.0, description="factor in the sum")
    head: Source = Field(
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
        "sac%2Blogos%2Bava1-l14-linearMSE.pth",
        description="weights of the layers: a path, hf://owner/repo/file or https address; the default is the public "
        "file, and a file of its name must have its SHA-256",
    )
    pretrained: Source = Field(
        "openai", description="weights of ViT-L-14: open_clip's tag, or a path or hf:// address of the same weights"
    )


class ClipReward(_ClipModel, _Text):
    """Cosine of image and text under a CLIP of open_clip."""

    type: Literal["clip"] = Field(description="the kind of reward")
    weight: Weight = Field(1.0, description="factor in the sum")
    model: str = Field("ViT-L-14", description="a name of open_clip.list_models()")
    pretrained: Source = Field(
        "openai",
        description="a tag of open_clip.list_pretrained(), a path or hf://owner/repo/file; for a file whose model was "
        "trained with QuickGELU (OpenAI, DFN, MetaCLIP) the model's name ends with -quickgelu",
    )


class HPSv2Reward(_ClipModel, _Text):
    """Human Preference Score v2.1: cosine of image and text under a ViT-H-14 tuned to people's choices."""

    type: Literal["hpsv2"] = Field(description="the kind of reward")
    weight: Weight = Field(1.0, description="factor in the sum")
    pretrained: Source = Field(
        "hf://xswu/HPSv2/HPS_v2.1_compressed.pt", description="the tuned weights: a path or hf://owner/repo/file"
    )


class ClassifierConfig(_Section):
    """A classifier whose classes are the labels."""

    model: str = Field(
        "resnet50", description="a classifier of torchvision.models.list_models(), or 'digits' for the handwritten ones"
    )
    weights: str = Field("IMAGENET1K_V2", description="name of the weights in torchvision, with their preprocessing")
    file: Source | None = Field(
        None,
        description="the weights' path, hf:// or https address; default: torchvision's cache, then its address. A file "
        "of the public name must have its SHA-256",
    )
    batch_size: int = Field(64, ge=1, le=1_000_000, description="images at a time")


class ClassifierReward(ClassifierConfig):
    """Probability that a classifier gives to the label."""

    type: Literal["classifier"] = Field(description="the kind of reward")
    weight: Weight = Field(1.0, description="factor in the sum")


def _check_url(url: str) -> str:
    try:
        parts = address_parts(url)
    except ValueError as error:
        raise ValueError(f"{show(url)} is no address that can be asked: {error}") from error
    if "@" in parts.netloc or "#" in url:
        raise ValueError(f"got {show(url)}, want an address without user and without #")
    return url


class HttpReward(_Section):
    """A server of yours: gets images and labels, answers one number an image. The format is in docs/rewards.md."""

    type: Literal["http"] = Field(description="the kind of reward")
    weight: Weight = Field(1.0, description="factor in the sum")
    url: Annotated[str, AfterValidator(_check_url), Wanted("an address, such as http://127.0.0.1:8000/score")] = Field(
        description="http:// or https://; redirects are not followed"
    )
    timeout_s: float = Field(60.0, gt=0, le=86400, description="for one request, to the last byte of the answer")
    retries: int = Field(
        3, ge=0, le=10, description="further attempts after no connection, no time, 429 or 5xx; 1, 2, 4 ... s"
    )
    batch_size: int = Field(64, ge=1, le=1_000_000, description="images a request")
    max_response_bytes: int = Field(1_000_000, ge=1, le=_MANY, description="a longer answer is refused")


def _check_function(function: str) -> str:
    source, colon, name = function.rpartition(":")
    in_file = source.endswith(".py") and "\0" not in source
    if not colon or not (in_file or all(part.isidentifier() for part in source.split("."))):
        module, _, attribute = function.rpartition(".")
        meant = f"; did you mean {module}:{attribute}?" if module and attribute.isidentifier() and not colon else ""
        raise ValueError(f"want module:name or file.py:name, as my_rewards:redness or ./my_rewards.py:redness{meant}")
    if not name.isidentifier():
        raise ValueError(
            f"{name!r} is no name of a module's own; name a function, or a class whose instance is called; for a "
            "method, write a function that calls it"
        )
    return check_source(function)


class FunctionReward(_Section):
    """Your own function or class, by import path. Importing it runs its code."""

    type: Literal["function"] = Field(description="the kind of reward")
    weight: Weight = Field(1.0, description="factor in the sum")
    function: Annotated[str, AfterValidator(_check_function), Wanted("module:name or file.py:name")] = Field(
        description="module:name, or file.py:name, from the working directory or the config's folder; called with "
        "(images, labels), or what its parameters name (docs/rewards.md)"
    )
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments, given once")

    @field_validator("args")
    @classmethod
    def _finite(cls, args: dict[str, Any]) -> dict[str, Any]:
        if not is_finite(args):
            raise ValueError(f"got {show(args)}; want finite numbers, below 2**63")
        return args


RewardConfig = Annotated[
    BrightnessReward | FunctionReward | AestheticReward | ClipReward | HPSv2Reward | ClassifierReward | HttpReward,
    Field(discriminator="type"),
]


def reaches_outside(config: RewardConfig) -> str | None:
    """What a reward does beyond computing on the images: the code, the server or the files that its config names.

    None: nothing, so that it may be taken from a folder that somebody handed on (docs/security.md).
    """
    if isinstance(config, BrightnessReward) or (isinstance(config, ClassifierReward) and config.model == "digits"):
        return None
    if isinstance(config, FunctionReward):
        return f"runs {config.function}"
    if isinstance(config, HttpReward):
        return f"asks {config.url}"
    if isinstance(config, ClassifierReward):
        return f"reads or fetches {config.file or f'the weights of {config.model}'}"
    named = [config.head] if isinstance(config, AestheticReward) else []
    if not isinstance(config, AestheticReward) and isinstance(config.names, str):
        named.append(config.names)
    return f"reads or fetches {', '.join([config.pretrained, *named])}"


# ---------------------------------------------------------------------------------------------------------------------
# The run


class RunConfig(_Section):
    """Where and how long."""

    dir: LocalPath = Field(description="folder of the run; an unfinished run in it goes on")
    steps: int = Field(ge=1, le=_MANY, description="rollouts; each is followed by images / minibatch optimizer steps")
    seed: int = Field(0, ge=0, lt=2**63, description="fixes labels, samples and minibatches")
    device: Device = Field("auto", description="auto: cuda if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "float32",
        description="of activations; weights stay float32. auto: bfloat16 where the device computes in it (a CPU with "
        "AVX512-BF16 or AMX), else float32",
    )
    deterministic: bool = Field(
        False,
        description="equal runs on one machine give equal bits: PyTorch takes algorithms that sum in one order, and "
        "refuses to run an operation that has none; micro-batches are chosen from the memory that there is, not from "
        "what is free. On a CPU no cost was seen (docs/measured.md); not measured on a GPU",
    )
    max_bad_rollouts: int = Field(
        3,
        ge=1,
        le=_MANY,
        description="rollouts in a row left out for a reward that is not finite, before the run stops",
    )
    fast: bool = Field(
        True, description="false: sample eagerly, decode plainly: what the fast path is compared with; see also kernels"
    )
    strict: bool = Field(
        False,
        description="the rollout's log-probability of every token equals the update's before its first optimizer step "
        "bit for bit, in bfloat16 too, and tokens do not depend on the batch split: products and attention add in one "
        "order, whatever the batch. Checked at the start and in every step. Its cost is not measured; on a CPU every "
        "image's attention is a call of its own (docs/training.md)",
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="under torchrun: ddp, every process holds everything; fsdp: weights in training, gradients and "
        "moments are spread over processes; auto: ddp",
    )
    timeout_s: float = Field(
        1800.0,
        gt=0,
        le=30 * 86400,
        description="under torchrun: a process waits so long for the others, which wait while the first "
        "one pre-trains, evaluates or writes a checkpoint",
    )


class LogConfig(_Section):
    """What is written into the run folder beside metrics.jsonl."""

    tensorboard: bool = Field(True, description="write TensorBoard events")
    wandb: str | None = Field(
        None, min_length=1, description="project of Weights & Biases to log to as well; WANDB_MODE=offline: no upload"
    )
    grid_every: int = Field(
        10, ge=1, le=_MANY, description="steps between sample grids (one at start and end in any case)"
    )
    grid_labels: int = Field(8, ge=1, le=1000, description="rows of the grid: the first labels trained on")
    grid_samples: int = Field(8, ge=1, le=1000, description="columns of the grid; the seeds are the same in every grid")
    checkpoint_every: int = Field(
        50, ge=1, le=_MANY, description="steps between checkpoints (one at the end in any case)"
    )
    checkpoint_minutes: float = Field(30.0, gt=0, le=1e6, description="minutes after which one is due in any case")
    keep_last: int = Field(
        2, ge=1, le=_MANY, description="checkpoints kept; the one before serves where the last is damaged"
    )
    keep_best: bool = Field(False, description="keep the one with the highest reward_mean too")


class EvalConfig(_Section):
    """The table of before and after, sampled with the rollout's temperature."""

    samples_per_label: int = Field(2, ge=0, le=100_000, description="images a label; 0: no table")
    max_labels: int = Field(1000, ge=1, le=_MANY, description="the first labels, up to this many")
    classifier: Literal["digits"] | None = Field(None, description="whose accuracy on the samples is reported")


class KernelsConfig(_Section):
    """Which implementation of each op runs. `python -m varfast.env` says what auto means on a machine, and why.

    The names are those of `implementations(...)` in kernels/, which would import PyTorch (tests/test_config.py).
    """

    sample_tokens: Literal["auto", "triton", "triton_segments", "reference"] = Field(
        "auto", description="draws a token from its logits; triton_segments: fewer instructions by count, not measured"
    )
    selective_log_softmax: Literal["auto", "triton", "reference"] = Field(
        "auto", description="log-probability and entropy of tokens, from logits"
    )
    split_heads: Literal["auto", "triton", "cpp", "reference"] = Field(
        "auto", description="queries, keys and values of a block from one product"
    )
    split_heads_to_cache: Literal["auto", "triton", "cpp", "reference"] = Field(
        "auto", description="the same while sampling: keys and values go into the cache"
    )
    block_causal_attention: Literal[
        "auto",
        "triton",
        "triton_fused",
        "cpp",
        "flex",
        "flex_flash",
        "fa4",
        "flash_attn",
        "sdpa",
        "triton_invariant",
        "sdpa_invariant",
        "reference",
    ] = Field(
        "auto",
        description="attention of the update; triton_fused: one backward kernel instead of two; fa4 and flex_flash: "
        "the package flash-attn-4, called directly or by FlexAttention",
    )
    cached_attention: Literal[
        "auto", "triton", "cpp", "fa4", "flash_attn", "triton_invariant", "sdpa_invariant", "reference"
    ] = Field("auto", description="attention while sampling")
    layer_norm_modulate: Literal["auto", "triton", "cpp", "reference"] = Field(
        "auto", description="LayerNorm, then the class's scale and shift"
    )
    gated_residual: Literal["auto", "triton", "reference"] = Field(
        "auto", description="a branch's result times the class's gate, added to the residual stream"
    )
    gated_residual_norm: Literal["auto", "triton", "cpp", "reference"] = Field(
        "auto", description="gated_residual and the layer_norm_modulate after it"
    )
    gelu_bias: Literal["auto", "triton", "cpp", "reference"] = Field("auto", description="bias and GELU of the MLP")
    linear_gelu: Literal["auto", "library", "epilogue", "quack", "reference"] = Field(
        "auto", description="product, bias and GELU of the MLP; epilogue is for sampling alone"
    )
    group_norm_silu: Literal["auto", "triton", "cpp", "reference"] = Field(
        "auto", description="GroupNorm and SiLU of the VQ-VAE"
    )
    channel_moments: Literal["auto", "triton", "reference"] = Field(
        "auto", description="sum and sum of squares of each channel, for the next GroupNorm"
    )
    conv3x3: Literal["auto", "triton", "library", "reference"] = Field(
        "auto", description="convolutions of the VQ-VAE's decoder"
    )
    grpo_token_loss: Literal["auto", "cuda", "cpp", "reference"] = Field(
        "auto", description="the loss, from log-probabilities"
    )
    adamw_step: Literal["auto", "triton", "library", "reference"] = Field(
        "auto", description="of update.optimizer=adamw: one step; library: PyTorch's fused AdamW"
    )
    invariant_linear: Literal["auto", "triton", "blocks", "reference"] = Field(
        "auto", description="products of run.strict, the same bits whatever the batch"
    )


class Config(_Section):
    """A whole experiment."""

    run: RunConfig
    policy: PolicyConfig
    pretrain: PretrainConfig = PretrainConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: Annotated[
        dict[str, RewardConfig], Wanted("rewards by names of your choice, such as {bright: {type: brightness}}")
    ] = Field(min_length=1, description="components by name; their weighted sum counts")
    grpo: GRPOConfig = GRPOConfig()
    update: UpdateConfig = UpdateConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    kernels: KernelsConfig = KernelsConfig()

    @property
    def measure_kl_every(self) -> int | None:
        """Steps between measurements of the KL apart from the loss; None with kl_beta > 0, or where none is asked."""
        if self.grpo.kl_beta > 0.0:
            return None
        return self.grpo.kl_every or (10 if self.policy.lora else None)

    @property
    def holds_reference(self) -> bool:
        """Whether the base model is held beside the policy: for the KL in the loss, or to measure it."""
        return self.grpo.kl_beta > 0.0 or self.measure_kl_every is not None

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.kernels.linear_gelu == "epilogue":
            raise ValueError(
                "kernels.linear_gelu=epilogue has no gradient, and rollout, reference and update must have the same "
                "arithmetic; use auto, or quack where it is installed"
            )
        adapted = self.policy.lora is not None and "fc1" in self.policy.lora.targets
        if self.kernels.linear_gelu == "quack" and (adapted or self.run.parallel == "fsdp"):
            raise ValueError(
                "kernels.linear_gelu=quack takes neither an adapter on fc1, whose part is added before GELU, nor "
                "weights sharded by run.parallel=fsdp; use auto"
            )
        _check_divides("update.minibatch", self.update.minibatch, self.rollout.images, "images a step")
        if self.run.parallel == "fsdp" and self.update.optimizer != "adamw":
            raise ValueError(
                f"update.optimizer={self.update.optimizer} does not take sharded weights; use adamw, or "
                "run.parallel=ddp"
            )
        self._check_strict()
        if self.policy.lora is not None and self.run.parallel == "fsdp":
            raise ValueError(
                "policy.lora with run.parallel=fsdp: there is little to spread, as the frozen weights have neither "
                "gradients nor moments; use run.parallel=ddp"
            )
        if self.policy.lora is not None and self.grpo.reference_every is not None:
            raise ValueError(
                "grpo.reference_every with policy.lora: the reference is the base with the adapter off, which does not "
                "move; leave one of them out"
            )
        num_classes = self.policy.sizes.num_classes
        if self.rollout.labels != "all":
            check_labels("rollout.labels", self.rollout.labels, num_classes)
        return self

    def _check_strict(self) -> None:
        if not self.run.strict:
            return
        for op in ("block_causal_attention", "cached_attention"):
            impl = getattr(self.kernels, op)
            if impl != "auto":
                raise ValueError(f"run.strict=true chooses attention itself; leave kernels.{op}={impl} out")


class SampleConfig(_Section):
    """Arguments of `python -m varfast.sample`."""

    checkpoint: Source = Field(description="a run folder, or a transformer's weights: a path or hf://owner/repo/file")
    vqvae: Source | None = Field(None, description="the VQ-VAE's weights, where checkpoint is not a run folder")
    out: LocalPath = Field("samples.png", description="the picture to write")
    labels: Labels | None = Field(
        None, description="numbers or names, as [207, golden retriever], one row each; default: the first 8"
    )
    samples_per_label: int = Field(8, ge=1, le=10_000, description="columns")
    temperature: float = Field(1.0, ge=1e-3, le=1000, description="of the draw")
    cfg: float = Field(
        0.0, ge=0, le=1000, description="classifier-free guidance; 0: off; VAR's demo: 4, its FID numbers: 1.5"
    )
    top_k: int = Field(0, ge=0, lt=2**31, description="0: off; VAR: 900")
    top_p: float = Field(0.0, ge=0, le=1, description="0: off; VAR's demo: 0.95, its FID numbers: 0.96")
    seed: int = Field(0, ge=0, lt=2**63, description="one seed, one picture")
    micro_batch: int | None = Field(None, ge=1, description="images at a time; default: all")
    device: Device = Field("auto", description="auto: cuda if there is one")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of activations")


class EvaluateConfig(_Section):
    """Arguments of `python -m varfast.evaluate`. Sampling defaults to the settings of VAR's FID numbers."""

    checkpoint: Source = Field(description="a run folder, or a transformer's weights: a path or hf://owner/repo/file")
    reference: Source | None = Field(
        None,
        description="what it is compared with: as checkpoint, or 'base' for the model that the run folder started "
        "from, which is the default for a run folder; null: nothing",
    )
    vqvae: Source | None = Field(None, description="the VQ-VAE's weights, for a transformer's weights")
    out: LocalPath | None = Field(
        None,
        description="folder of results; an unfinished evaluation in it goes on. Default: evaluation, in the run folder "
        "if checkpoint is one",
    )
    labels: AllOrLabels = Field("all", description="to sample: numbers or names, as [207, golden retriever]")
    samples_per_label: int = Field(10, ge=1, le=1_000_000, description="images a label")
    temperature: float = Field(1.0, ge=1e-3, le=1000, description="of the draw")
    cfg: float = Field(1.5, ge=0, le=1000, description="classifier-free guidance; 0: off")
    top_k: int = Field(
        900, ge=0, lt=2**31, description="0: off; no filter either for a model with no more codes than this"
    )
    top_p: float = Field(0.96, ge=0, le=1, description="0: off")
    seed: int = Field(0, ge=0, lt=2**63, description="an image is a function of seed, label and number alone")
    micro_batch: int = Field(32, ge=1, le=1_000_000, description="images sampled and decoded at a time")
    device: Device = Field("auto", description="auto: cuda if there is one; each process its own")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of activations")
    save: Literal["none", "png", "npz"] = Field(
        "none", description="keep the images: a PNG each, or one .npz of uint8 (N, H, W, 3) a model, as ADM's evaluator"
    )
    scores: Annotated[
        dict[str, RewardConfig], Wanted("sections as those of reward, whose keys `train --help reward` shows", True)
    ] = Field(
        default_factory=dict,
        description="means to report, by names of your choice, as scores.aes.type=aesthetic; weights do not count. "
        "Default for a run folder: its rewards",
    )
    classifier: ClassifierConfig | None = Field(
        None,
        description="whose top-1 and top-5 accuracy on the samples is reported: digits, resnet50 or another of "
        "torchvision. Default for a run folder: its eval.classifier",
    )
    fid_reference: Source | None = Field(
        None,
        description="real images for FID, precision, recall, density and coverage: a folder, 'digits', or an .npz with "
        "arr_0, uint8 (N, H, W, 3), or with mu and sigma, which are enough for FID",
    )
    features: Literal["inception", "digits"] | None = Field(
        None,
        description="what FID compares: Inception-v3's 2048, or 8 x 8 grey levels. Default: digits for "
        "fid_reference=digits, inception for another one, none without",
    )
    inception_weights: Source | None = Field(
        None, description="path, hf:// or https address; default: torch-fidelity's public file"
    )

    @field_validator("classifier", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @property
    def feature_network(self) -> Literal["inception", "digits"] | None:
        """What computes the features."""
        if self.features is None and self.fid_reference is not None:
            return "digits" if self.fid_reference == "digits" else "inception"
        return self.features


class ExportConfig(_Section):
    """Arguments of `python -m varfast.export`."""

    checkpoint: LocalPath = Field(description="a run folder")
    out: LocalPath = Field(
        description="the file to write, .safetensors or .pth; a model card is written beside it as .md"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the weights in the file")
    overwrite: bool = Field(False, description="replace files that exist")

    @field_validator("out")
    @classmethod
    def _known_format(cls, out: str) -> str:
        if Path(out).suffix not in (".safetensors", ".pth"):
            raise ValueError(f"got {out}, want a name that ends with .safetensors or .pth")
        return out


class ReportConfig(_Section):
    """Arguments of `python -m varfast.report`."""

    runs: list[LocalPath] = Field(min_length=1, description="run folders, each an argument of its own")
    out: LocalPath = Field("report.html", description="the page to write")


class RooflineConfig(Config):
    """Arguments of `python -m varfast.roofline`: a run's, and the device that it is predicted for."""

    device: str = Field("H200", description="H200, H100, A100, RTX4090 and others (a wrong name lists them), or here")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and apply overrides.

    Args:
        path: the YAML file. Its key `base` may name another, from the same folder, whose sections it changes; `reward`
            replaces the base's as a whole.
        overrides: "a.b=c" each; c is read as YAML, so `true`, `3`, `[1, 2]` and `null` mean what they mean there.
    Raises: InputError if the file is missing or not valid YAML, for unknown keys (with the nearest known one), wrong
        types and values out of range, all of them in one message.
    """
    return load_as(Config, path, overrides or [])


def load_as(model: type[_Model], path: str | Path, overrides: list[str]) -> _Model:
    """As load_config, for a command whose arguments are a config and more."""
    data = read_config(expanded(str(path)))
    for override in overrides:
        apply_override(data, override)
    return _validate(model, data, str(path))


def parse_config(data: dict[str, Any], source: str = "config") -> Config:
    """Validate a nested dictionary; `source` names it in errors. Raises: InputError, as load_config."""
    return _validate(Config, data, source)


def parse_arguments(arguments: list[str], model: type[_Model]) -> _Model:
    """A command's arguments, `a.b=c` or `--a.b c` each; a word alone is the command's first key. Raises: InputError."""
    found, data = arguments_of(arguments, model), dict[str, Any]()
    for override in found.overrides:
        apply_override(data, override)
    key = next(iter(model.model_fields))
    if get_origin(model.model_fields[key].annotation) is list:
        if found.paths:
            data[key] = found.paths
    elif len(found.paths) > 1:
        raise InputError(
            f"arguments {found.paths[0]!r} and {found.paths[1]!r}: want one {key}; the others as key=value"
        )
    elif found.paths:
        if key in data:
            raise InputError(f"argument {found.paths[0]!r} and {key}={data[key]}: want one of the two")
        data[key] = found.paths[0]
    return _validate(model, data, "arguments")


def _validate(model: type[_Model], data: Any, source: str) -> _Model:
    data = plain(data, source)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InputError("\n  ".join([f"{source} cannot be used:", *explain(model, error)])) from error
