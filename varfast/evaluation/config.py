"""The arguments of `sample` and `evaluate`. No PyTorch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from varfast.policies.config import FamilyName
from varfast.rewards import RewardConfig
from varfast.rewards.classifier import ClassifierConfig
from varfast.settings.schema import Wanted
from varfast.settings.section import AllOrLabels, Device, Labels, LocalPath, Section, Source


class SampleConfig(Section):
    """Arguments of `python -m varfast.sample`."""

    checkpoint: Source = Field(description="a run folder, or a transformer's weights: a path or hf://owner/repo/file")
    vqvae: Source | None = Field(
        None, description="the VQ-VAE's or tokenizer's weights, where checkpoint is not a run folder"
    )
    family: FamilyName = Field("var", description="of models, where checkpoint is not a run folder")
    out: LocalPath = Field("samples.png", description="the picture to write")
    labels: Labels | None = Field(
        None, description="numbers or names, as [207, golden retriever], one row each; default: the first 8"
    )
    samples_per_label: int = Field(8, ge=1, le=10_000, description="columns")
    temperature: float = Field(1.0, ge=1e-3, le=1000, description="of the draw")
    cfg: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="classifier-free guidance, whatever the run's rollout.cfg was; 0: off; VAR's demo: 4, its FID "
        "numbers: 1.5",
    )
    top_k: int = Field(0, ge=0, lt=2**31, description="0: off; VAR: 900")
    top_p: float = Field(0.0, ge=0, le=1, description="0: off; VAR's demo: 0.95, its FID numbers: 0.96")
    seed: int = Field(0, ge=0, lt=2**63, description="one seed, one picture")
    micro_batch: int | None = Field(None, ge=1, description="images at a time; default: all")
    device: Device = Field("auto", description="auto: cuda if there is one")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of activations")


class EvaluateConfig(Section):
    """Arguments of `python -m varfast.evaluate`. Sampling defaults to the settings of VAR's FID numbers."""

    checkpoint: Source = Field(description="a run folder, or a transformer's weights: a path or hf://owner/repo/file")
    reference: Source | None = Field(
        None,
        description="what it is compared with: as checkpoint, or 'base' for the model that the run folder started "
        "from, which is the default for a run folder; null: nothing",
    )
    vqvae: Source | None = Field(None, description="the VQ-VAE's or tokenizer's weights, for a transformer's weights")
    family: FamilyName = Field("var", description="of models, where checkpoint is not a run folder")
    out: LocalPath | None = Field(
        None,
        description="folder of results; an unfinished evaluation in it goes on. Default: evaluation, in the run folder "
        "if checkpoint is one",
    )
    labels: AllOrLabels = Field("all", description="to sample: numbers or names, as [207, golden retriever]")
    samples_per_label: int = Field(10, ge=1, le=1_000_000, description="images a label")
    temperature: float = Field(1.0, ge=1e-3, le=1000, description="of the draw")
    cfg: float = Field(
        1.5, ge=0, le=1000, description="classifier-free guidance, whatever the run's rollout.cfg was; 0: off"
    )
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

    @field_validator("scores")
    @classmethod
    def _of_images(cls, scores: dict[str, RewardConfig]) -> dict[str, RewardConfig]:
        for name, reward in scores.items():
            if reward.of_sets:
                raise ValueError(
                    f"{name}: {reward.type} scores an image among those of a step of training; here fid_reference and "
                    "features measure how far the whole set is from real images"
                )
        return scores

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
