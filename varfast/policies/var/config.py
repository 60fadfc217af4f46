"""The sections of the config that describe VAR: sizes, weights and adapter. No PyTorch."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from varfast.policies.config import FamilyConfig, LoRAConfig, names_a_file
from varfast.settings.problems import show
from varfast.settings.schema import Wanted
from varfast.settings.section import Section, Source
from varfast.weights.hub import names_repository

HEAD_DIM = 64


def _check_sides(sides: tuple[int, ...]) -> tuple[int, ...]:
    if not sides or not 1 <= sides[0] <= sides[-1] <= 128 or any(a >= b for a, b in pairwise(sides)):
        raise ValueError(
            f"got {show(list(sides))}, want sides of 1 to 128 that grow from scale to scale, as in [1, 2, 3, 4]"
        )
    return sides


PatchNums = Annotated[tuple[int, ...], AfterValidator(_check_sides), Wanted("a list, such as [1, 2, 3, 4]")]


class VARConfig(Section):
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


class VQVAEConfig(Section):
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


class VARLoRAConfig(LoRAConfig):
    """Low-rank matrices that are trained beside the frozen ones, by the package peft: y = W x + alpha / rank B A x.

    There is no dropout: a log-probability must describe the policy that was sampled. Embeddings and the head stay as
    they are: their products are few, and the head's are summed in float32, which peft's layers would not keep.
    """

    targets: tuple[Literal["mat_qkv", "proj", "fc1", "fc2", "ada_lin"], ...] = Field(
        ("mat_qkv", "proj", "fc1", "fc2"),
        min_length=1,
        strict=False,
        description="matrices with an adapter: attention's two and the MLP's two of every block; ada_lin is the "
        "projection of the class, of every block or (d36) the one that all share",
    )


class VARPolicyConfig(FamilyConfig):
    """A VAR transformer, and the frozen VQ-VAE that turns its tokens into images."""

    parts: ClassVar = ("var", "vqvae")
    sizes_key: ClassVar = "policy.var"
    presets: ClassVar = PRESETS
    unguided_cfg: ClassVar = 0.0

    family: Literal["var"] = Field("var", description="VAR: next-scale prediction, arXiv:2404.02905")
    preset: Literal["d16", "d20", "d24", "d30", "d36"] | None = Field(None, description="a public model's sizes")
    var: VARConfig | None = Field(None, description="sizes of the transformer, where no preset is named")
    vqvae: VQVAEConfig = Field(
        default_factory=VQVAEConfig,
        description="sizes of the VQ-VAE; vocab_size, code_width and patch_nums default to those of the transformer",
    )
    vqvae_checkpoint: Source | None = Field(
        None,
        description="weights of the VQ-VAE: a path or hf:// address; default: the run folder's; not with 'random' and "
        "'pretrain'",
    )
    lora: VARLoRAConfig | None = Field(
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
    def _agree(self) -> VARPolicyConfig:
        for name in ("vocab_size", "code_width", "patch_nums"):
            of_var, of_vqvae = getattr(self.sizes, name), getattr(self.vqvae, name)
            if of_var != of_vqvae:
                raise ValueError(f"{name} is {of_var} in the transformer and {of_vqvae} in vqvae; they must be equal")
        if self.checkpoint in ("random", "pretrain"):
            if self.vqvae_checkpoint is not None:
                raise ValueError(f"checkpoint={self.checkpoint} makes its own VQ-VAE; remove vqvae_checkpoint")
        elif self.vqvae_checkpoint is None and names_a_file(self.checkpoint) and not names_repository(self.checkpoint):
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

    @property
    def num_classes(self) -> int:
        return self.sizes.num_classes

    @property
    def image_size(self) -> int:
        return self.vqvae.image_size

    @property
    def vocab_size(self) -> int:
        return self.sizes.vocab_size

    @property
    def scale_sides(self) -> tuple[int, ...]:
        return self.sizes.patch_nums

    @property
    def frozen_checkpoint(self) -> Source | None:
        return self.vqvae_checkpoint
