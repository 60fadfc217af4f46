"""The schema of configs/*.yaml: every field typed, validated and documented here.

A config is a YAML file and overrides `a.b=c` from the command line. An unknown key raises and names the nearest one.
"""

from __future__ import annotations

import difflib
import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from varfast.kernels import check_implementation
from varfast.types import InputError

HEAD_DIM = 64


_Model = TypeVar("_Model", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def check_labels(what: str, labels: list[int], num_classes: int) -> None:
    """Raises: InputError if `labels` is empty or one of them is not in [0, num_classes)."""
    if not labels:
        raise InputError(f"{what} is empty; name labels in 0..{num_classes - 1}")
    outside = [label for label in labels if not 0 <= label < num_classes]
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


class VARConfig(_Section):
    """Sizes of the transformer. Width is 64 * depth, with `depth` heads of 64, as in all public models."""

    depth: int = Field(16, ge=1, description="number of blocks, and of heads")
    patch_nums: tuple[int, ...] = Field(
        (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), description="side of the token map of each scale, coarse to fine"
    )
    vocab_size: int = Field(4096, ge=2, description="V, number of codes")
    code_width: int = Field(32, ge=1, description="channels of a code")
    num_classes: int = Field(1000, ge=1, description="labels; one more embedding stands for 'no label'")
    shared_adaln: bool = Field(False, description="one adaLN projection for all blocks (d36)")
    qk_l2_norm: bool = Field(True, description="L2-normalise queries and keys, with a learned scale a head")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP over the width")
    norm_eps: float = Field(1e-6, gt=0, description="added to the variance in LayerNorm")

    @field_validator("patch_nums")
    @classmethod
    def _increasing(cls, sides: tuple[int, ...]) -> tuple[int, ...]:
        if not sides or sides[0] < 1 or any(a >= b for a, b in pairwise(sides)):
            raise ValueError(
                f"got {list(sides)}, want positive sides that grow from scale to scale, as in [1, 2, 3, 4]"
            )
        return sides

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

    vocab_size: int = Field(4096, ge=2, description="V, number of codes")
    code_width: int = Field(32, ge=1, description="channels of a code")
    patch_nums: tuple[int, ...] = Field(
        (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), description="side of the token map of each scale, coarse to fine"
    )
    base_channels: int = Field(160, ge=32, multiple_of=32, description="channels at full resolution")
    channel_multipliers: tuple[int, ...] = Field(
        (1, 1, 2, 2, 4), min_length=1, description="channels over base_channels; each further level halves the side"
    )
    num_res_blocks: int = Field(2, ge=1, description="residual blocks a level of the encoder; the decoder has one more")
    num_phi: int = Field(4, ge=0, description="residual convolutions shared by the scales; 0: one a scale")
    phi_ratio: float = Field(0.5, ge=0, le=1, description="phi(x) = (1 - ratio) x + ratio conv(x)")
    commitment: float = Field(0.25, ge=0, description="weight of the commitment loss")

    _increasing = field_validator("patch_nums")(VARConfig._increasing.__func__)  # type: ignore[attr-defined]

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

    rank: int = Field(16, ge=1, description="rows of A and columns of B")
    alpha: float = Field(32.0, gt=0, description="B A is multiplied by alpha / rank")
    targets: tuple[Literal["mat_qkv", "proj", "fc1", "fc2", "ada_lin"], ...] = Field(
        ("mat_qkv", "proj", "fc1", "fc2"),
        min_length=1,
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
    checkpoint: str = Field(
        description="weights of the transformer: a path, hf://owner/repo/file, a run folder, 'random', or 'pretrain' "
        "for the model that the pretrain section describes (trained first if it is not in the cache)"
    )
    vqvae_checkpoint: str | None = Field(
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
        sizes: dict[str, Any] = PRESETS[preset].model_dump() if preset in PRESETS else {}
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

    dataset: str = Field("digits", description="'digits' (scikit-learn), or a folder with one sub-folder a class")
    cache_dir: str = Field("~/.cache/varfast", description="where base models are kept, by a hash of what made them")
    batch_size: int = Field(64, ge=1, description="images a step, for both models")
    num_workers: int = Field(0, ge=0, description="processes that read images; 0 for data in memory")
    vqvae_steps: int = Field(1000, ge=1, description="optimizer steps of the VQ-VAE")
    vqvae_lr: float = Field(1e-3, gt=0, description="peak learning rate of the VQ-VAE")
    var_steps: int = Field(1000, ge=1, description="optimizer steps of the transformer")
    var_lr: float = Field(1e-3, gt=0, description="peak learning rate of the transformer")
    weight_decay: float = Field(0.05, ge=0, description="of AdamW, for the transformer's matrices")
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
    temperature: float = Field(0.7, gt=0, description="of the plain multinomial draw; no guidance, no filters")
    labels: Literal["all"] | list[int] = Field("all", description="labels to draw from, uniformly")
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
    kl_beta: float = Field(0.2, ge=0, description="weight of the KL to the base model; 0: no reference is held")
    reference_every: int | None = Field(
        None,
        ge=1,
        description="steps (rollouts) after which, again and again, the policy becomes the reference of the KL; "
        "default: the base model stays it",
    )
    advantage_eps: float = Field(1e-6, gt=0, description="added to a group's standard deviation")
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


class UpdateConfig(_Section):
    """From a scored rollout to new weights."""

    minibatch: int = Field(32, ge=1, description="images an optimizer step")
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
    epochs: int = Field(1, ge=1, description="passes over a rollout")
    optimizer: Literal["adamw", "apex", "adamw8bit"] = Field(
        "adamw",
        description="PyTorch's fused AdamW, NVIDIA Apex's FusedAdam, or bitsandbytes' AdamW with moments of 8 bits: "
        "a quarter of their memory",
    )
    lr: float = Field(1e-4, gt=0, description="learning rate")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up, to 0")
    warmup_steps: int = Field(0, ge=0, description="steps (rollouts) of linear warm-up")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW, for matrices; the KL already holds the weights")
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")
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
        description="optimizer steps in a row left out for a gradient that is not finite, before the run stops",
    )

    @model_validator(mode="after")
    def _divides(self) -> UpdateConfig:
        _check_divides("update.micro_batch", self.micro_batch, self.minibatch, "images of a minibatch")
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


class BrightnessReward(_Section):
    """Mean luma of the image, in [0, 1]."""

    type: Literal["brightness"]
    weight: float = Field(1.0, description="factor in the sum")
    mode: Literal["bright", "dark", "raw"] = Field(
        "bright", description="1 if >= threshold; 1 if < it; the luma itself"
    )
    threshold: float | None = Field(None, description="default: 0.8 for bright, 0.2 for dark")


class _ClipModel(_Section):
    """How a CLIP runs; rewards that name the same one share its pass over the images."""

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the CLIP model; scores are float32")
    batch_size: int = Field(64, ge=1, description="images at a time; the smallest counts where rewards share a model")


class _Text(_Section):
    """What images are compared with: one text, or one a label."""

    prompt: str | None = Field(None, min_length=1, description="one text for all images, as 'a painting'")
    label_prompt: str | None = Field(None, description="a text a label, as 'a photo of a {name}'; needs names")
    names: list[str] | str | None = Field(
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

    type: Literal["aesthetic"]
    weight: float = Field(1.0, description="factor in the sum")
    head: str = Field(
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
        "sac%2Blogos%2Bava1-l14-linearMSE.pth",
        description="weights of the layers: a path, hf://owner/repo/file or https address; the default is the public "
        "file, and a file of its name must have its SHA-256",
    )
    pretrained: str = Field(
        "openai", description="weights of ViT-L-14: open_clip's tag, or a path or hf:// address of the same weights"
    )


class ClipReward(_ClipModel, _Text):
    """Cosine of image and text under a CLIP of open_clip."""

    type: Literal["clip"]
    weight: float = Field(1.0, description="factor in the sum")
    model: str = Field("ViT-L-14", description="a name of open_clip.list_models()")
    pretrained: str = Field(
        "openai",
        description="a tag of open_clip.list_pretrained(), a path or hf://owner/repo/file; for a file whose model was "
        "trained with QuickGELU (OpenAI, DFN, MetaCLIP) the model's name ends with -quickgelu",
    )


class HPSv2Reward(_ClipModel, _Text):
    """Human Preference Score v2.1: cosine of image and text under a ViT-H-14 tuned to people's choices."""

    type: Literal["hpsv2"]
    weight: float = Field(1.0, description="factor in the sum")
    pretrained: str = Field(
        "hf://xswu/HPSv2/HPS_v2.1_compressed.pt", description="the tuned weights: a path or hf://owner/repo/file"
    )


class ClassifierConfig(_Section):
    """A classifier whose classes are the labels."""

    model: str = Field(
        "resnet50", description="a classifier of torchvision.models.list_models(), or 'digits' for the handwritten ones"
    )
    weights: str = Field("IMAGENET1K_V2", description="name of the weights in torchvision, with their preprocessing")
    file: str | None = Field(
        None,
        description="the weights' path, hf:// or https address; default: torchvision's cache, then its address. A file "
        "of the public name must have its SHA-256",
    )
    batch_size: int = Field(64, ge=1, description="images at a time")


class ClassifierReward(ClassifierConfig):
    """Probability that a classifier gives to the label."""

    type: Literal["classifier"]
    weight: float = Field(1.0, description="factor in the sum")


class HttpReward(_Section):
    """A server of yours: gets images and labels, answers one number an image. The format is in docs/rewards.md."""

    type: Literal["http"]
    weight: float = Field(1.0, description="factor in the sum")
    url: str = Field(
        pattern=r"^https?://[^/?#@\s]+(/[^#\s]*)?$", description="http:// or https://; redirects are not followed"
    )
    timeout_s: float = Field(60.0, gt=0, le=86400, description="for one request, to the last byte of the answer")
    retries: int = Field(
        3, ge=0, description="further attempts after no connection, no time, 429 or 5xx; 1, 2, 4 ... s"
    )
    batch_size: int = Field(64, ge=1, description="images a request")
    max_response_bytes: int = Field(1_000_000, ge=1, description="a longer answer is refused")


class FunctionReward(_Section):
    """Your own function or class, by import path. Importing it runs its code."""

    type: Literal["function"]
    weight: float = Field(1.0, description="factor in the sum")
    function: str = Field(pattern=r"^[\w.]+:\w+$", description="module:name; called with (images, labels)")
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments, given once")


RewardConfig = Annotated[
    BrightnessReward | FunctionReward | AestheticReward | ClipReward | HPSv2Reward | ClassifierReward | HttpReward,
    Field(discriminator="type"),
]

# ---------------------------------------------------------------------------------------------------------------------
# The run


class RunConfig(_Section):
    """Where and how long."""

    dir: str = Field(description="folder of the run; an unfinished run in it goes on")
    steps: int = Field(ge=1, description="rollouts; each is followed by images / minibatch optimizer steps")
    seed: int = Field(0, ge=0, lt=2**63, description="fixes labels, samples and minibatches")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: cuda if there is one")
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
        3, ge=1, description="rollouts in a row left out for a reward that is not finite, before the run stops"
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
        description="under torchrun: a process waits so long for the others, which wait while the first "
        "one pre-trains, evaluates or writes a checkpoint",
    )


class LogConfig(_Section):
    """What is written into the run folder beside metrics.jsonl."""

    tensorboard: bool = Field(True, description="write TensorBoard events")
    wandb: str | None = Field(
        None, min_length=1, description="project of Weights & Biases to log to as well; WANDB_MODE=offline: no upload"
    )
    grid_every: int = Field(10, ge=1, description="steps between sample grids (one at start and end in any case)")
    grid_labels: int = Field(8, ge=1, description="rows of the grid: the first labels trained on")
    grid_samples: int = Field(8, ge=1, description="columns of the grid; the seeds are the same in every grid")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints (one at the end in any case)")
    checkpoint_minutes: float = Field(30.0, gt=0, description="minutes after which one is due in any case")
    keep_last: int = Field(2, ge=1, description="checkpoints kept; the one before serves where the last is damaged")
    keep_best: bool = Field(False, description="keep the one with the highest reward_mean too")


class EvalConfig(_Section):
    """The table of before and after, sampled with the rollout's temperature."""

    samples_per_label: int = Field(2, ge=0, description="images a label; 0: no table")
    max_labels: int = Field(1000, ge=1, description="the first labels, up to this many")
    classifier: Literal["digits"] | None = Field(None, description="whose accuracy on the samples is reported")


class KernelsConfig(_Section):
    """Which implementation of each op runs. `python -m varfast.env` says what auto means on a machine, and why."""

    sample_tokens: str = Field("auto", description="auto, triton or reference")
    selective_log_softmax: str = Field("auto", description="auto, triton or reference")
    split_heads: str = Field("auto", description="auto, triton, cpp or reference")
    split_heads_to_cache: str = Field("auto", description="auto, triton, cpp or reference")
    block_causal_attention: str = Field(
        "auto",
        description="auto, triton, triton_fused (one backward kernel instead of two), cpp, flex, flash_attn, sdpa, "
        "fa4 or flex_flash (the package flash-attn-4, called directly or by FlexAttention), triton_invariant, "
        "sdpa_invariant or reference",
    )
    cached_attention: str = Field(
        "auto", description="auto, triton, cpp, flash_attn, fa4, triton_invariant, sdpa_invariant or reference"
    )
    layer_norm_modulate: str = Field("auto", description="auto, triton, cpp or reference")
    gated_residual: str = Field("auto", description="auto, triton or reference")
    gated_residual_norm: str = Field("auto", description="auto, triton, cpp or reference")
    gelu_bias: str = Field("auto", description="auto, triton, cpp or reference")
    linear_gelu: str = Field("auto", description="auto, library, quack or reference; epilogue is for sampling alone")
    group_norm_silu: str = Field("auto", description="auto, triton, cpp or reference")
    channel_moments: str = Field("auto", description="auto, triton or reference")
    conv3x3: str = Field("auto", description="auto, triton, library or reference")
    grpo_token_loss: str = Field("auto", description="auto, cuda, cpp or reference")
    invariant_linear: str = Field("auto", description="of run.strict: auto, triton, blocks or reference")

    @model_validator(mode="after")
    def _exist(self) -> KernelsConfig:
        for op, impl in self.model_dump().items():
            check_implementation(op, impl)
        return self


class Config(_Section):
    """A whole experiment."""

    run: RunConfig
    policy: PolicyConfig
    pretrain: PretrainConfig = PretrainConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: dict[str, RewardConfig] = Field(min_length=1, description="components by name; their weighted sum counts")
    grpo: GRPOConfig = GRPOConfig()
    update: UpdateConfig = UpdateConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    kernels: KernelsConfig = KernelsConfig()

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

    checkpoint: str = Field(description="a run folder, or a transformer's weights: a path or hf://owner/repo/file")
    vqvae: str | None = Field(None, description="the VQ-VAE's weights, where checkpoint is not a run folder")
    out: str = Field("samples.png", description="the picture to write")
    labels: list[int] | None = Field(None, description="one row each; default: the first 8")
    samples_per_label: int = Field(8, ge=1, description="columns")
    temperature: float = Field(1.0, gt=0, description="of the draw")
    cfg: float = Field(0.0, ge=0, description="classifier-free guidance; VAR's demo: 4, its FID numbers: 1.5")
    top_k: int = Field(0, ge=0, description="0: off; VAR: 900")
    top_p: float = Field(0.0, ge=0, le=1, description="0: off; VAR's demo: 0.95, its FID numbers: 0.96")
    seed: int = Field(0, ge=0, description="one seed, one picture")
    micro_batch: int | None = Field(None, ge=1, description="images at a time; default: all")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: cuda if there is one")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of activations")


class EvaluateConfig(_Section):
    """Arguments of `python -m varfast.evaluate`. Sampling defaults to the settings of VAR's FID numbers."""

    checkpoint: str = Field(description="a run folder, or a transformer's weights: a path or hf://owner/repo/file")
    reference: str | None = Field(
        None,
        description="what it is compared with: as checkpoint, or 'base' for the model that the run folder started "
        "from, which is the default for a run folder; null: nothing",
    )
    vqvae: str | None = Field(None, description="the VQ-VAE's weights, for a transformer's weights")
    out: str | None = Field(
        None,
        description="folder of results; an unfinished evaluation in it goes on. Default: evaluation, in the run folder "
        "if checkpoint is one",
    )
    labels: Literal["all"] | list[int] = Field("all", description="to sample")
    samples_per_label: int = Field(10, ge=1, description="images a label")
    temperature: float = Field(1.0, gt=0, description="of the draw")
    cfg: float = Field(1.5, ge=0, description="classifier-free guidance; 0: off")
    top_k: int = Field(900, ge=0, description="0: off; no filter either for a model with no more codes than this")
    top_p: float = Field(0.96, ge=0, le=1, description="0: off")
    seed: int = Field(0, ge=0, lt=2**63, description="an image is a function of seed, label and number alone")
    micro_batch: int = Field(32, ge=1, description="images sampled and decoded at a time")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: cuda if there is one; each process its own"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of activations")
    save: Literal["none", "png", "npz"] = Field(
        "none", description="keep the images: a PNG each, or one .npz of uint8 (N, H, W, 3) a model, as ADM's evaluator"
    )
    scores: dict[str, RewardConfig] = Field(
        default_factory=dict,
        description="means to report, by names of your choice, as scores.aes.type=aesthetic; weights do not count. "
        "Default for a run folder: its rewards",
    )
    classifier: ClassifierConfig | None = Field(
        None,
        description="whose top-1 and top-5 accuracy on the samples is reported: digits, resnet50 or another of "
        "torchvision. Default for a run folder: its eval.classifier",
    )
    fid_reference: str | None = Field(
        None,
        description="real images for FID, precision, recall, density and coverage: a folder, 'digits', or an .npz with "
        "arr_0, uint8 (N, H, W, 3), or with mu and sigma, which are enough for FID",
    )
    features: Literal["inception", "digits"] | None = Field(
        None,
        description="what FID compares: Inception-v3's 2048, or 8 x 8 grey levels. Default: digits for "
        "fid_reference=digits, inception for another one, none without",
    )
    inception_weights: str | None = Field(
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

    checkpoint: str = Field(description="a run folder")
    out: str = Field(description="the file to write, .safetensors or .pth; a model card is written beside it as .md")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the weights in the file")
    overwrite: bool = Field(False, description="replace files that exist")

    @field_validator("out")
    @classmethod
    def _known_format(cls, out: str) -> str:
        if Path(out).suffix not in (".safetensors", ".pth"):
            raise ValueError(f"got {out}, want a name that ends with .safetensors or .pth")
        return out


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and apply overrides.

    Args:
        path: the YAML file. Its key `base` may name another, from the same folder, whose sections it changes; `reward`
            replaces the base's as a whole.
        overrides: "a.b=c" each; c is read as YAML, so `true`, `3`, `[1, 2]` and `null` mean what they mean there.
    Raises: InputError if the file is missing or no YAML, for unknown keys (with the nearest known one), wrong types
        and values out of range, all of them in one message.
    """
    data = _read(Path(path), ())
    for override in overrides or []:
        _apply_override(data, override)
    return parse_config(data, str(path))


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """A YAML file over the one that its key `base` names, by a path from its folder, over that one's base, ..."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        named = f" (the base of {readers[-1]})" if readers else ""
        raise InputError(f"config {path}{named}: {error.strerror}; the examples are in configs/") from error
    except UnicodeDecodeError as error:
        raise InputError(f"config {path} is no text in UTF-8: {error}; the examples are in configs/") from error
    data = _read_yaml(text, f"config {path}")
    if not isinstance(data, dict):
        raise InputError(
            f"config {path}: got {type(data).__name__} at the top, want sections as in configs/digits.yaml"
        )
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise InputError(f"config {path}: base is {base!r}, want the path of a config, as in base: digits.yaml")
    if path in readers:
        raise InputError(f"config {path}: base leads back to it, by {' -> '.join(map(str, (*readers, path)))}")
    return _merged(_read(path.parent / base, (*readers, path)), data)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Sections key by key; but rewards are replaced as a whole: a run has the rewards that its own file names."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict) and key != "reward"
        merged[key] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return merged


def parse_config(data: dict[str, Any], source: str = "config") -> Config:
    """Validate a nested dictionary; `source` names it in errors. Raises: InputError, as load_config."""
    return _validate(Config, data, source)


def parse_arguments(arguments: list[str], model: type[_Model]) -> _Model:
    """Arguments of the form a.b=c, as a `model`. Raises: InputError, as load_config."""
    data: dict[str, Any] = {}
    for argument in arguments:
        _apply_override(data, argument)
    return _validate(model, data, "arguments")


def _validate(model: type[_Model], data: dict[str, Any], source: str) -> _Model:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_explain(model, dict(problem)) for problem in error.errors()]
        raise InputError("\n  ".join([f"{source} cannot be used:", *problems])) from error


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise InputError(f"argument {override!r}: want key=value, as in update.lr=3e-5")
    node: Any = data
    *parents, last = key.split(".")
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise InputError(f"argument {override!r}: {parent} is a value, not a section")
    node[last] = _read_yaml(text, f"argument {override!r}: the value")


# PyYAML lets what int(), datetime() and its own tables raise through: `2001-13-45`, `0x_`, `!!bool x`, `!!timestamp x`.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


def _read_yaml(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except _YAML_ERRORS as error:
        raise InputError(f"{what} is no YAML: {error}") from error


def _explain(root: type[BaseModel], problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        known = _known_keys(root, problem["loc"][:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*_shown(location[:-1]), near[0]])}?" if near else f"known: {', '.join(known)}"
        return f"{'.'.join(_shown(location))}: unknown key; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("value_error", "missing"):
        return ": ".join([*filter(None, [".".join(_shown(location))]), message])
    return f"{'.'.join(_shown(location))}: got {_repr(problem['input'])}; {message[0].lower()}{message[1:]}"


def _repr(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of more than 4300 digits
        return "a number that is too long to show"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _shown(location: list[str]) -> list[str]:
    # pydantic names the chosen member of a union too: reward.bright.brightness.mode
    return [p for i, p in enumerate(location) if not (i == 2 and location[0] in ("reward", "scores"))]


def _known_keys(root: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    model: Any = root
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[str(part)].annotation
        elif get_origin(model) is dict:
            model = get_args(model)[1]
        else:
            members = get_args(get_args(model)[0]) if get_origin(model) is Annotated else get_args(model)
            model = next(m for m in members if get_args(m.model_fields["type"].annotation) == (part,))
        if type(None) in get_args(model):
            model = next(m for m in get_args(model) if m is not type(None))
    return list(model.model_fields)
