"""The arguments of `sample` and `evaluate`. No PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from varfast.features.config import FeaturesName, FeaturesSection
from varfast.policies.config import FamilyName
from varfast.rewards import RewardConfig
from varfast.rewards.classifier import ClassifierConfig
from varfast.settings.problems import near, show
from varfast.settings.reading import scalar
from varfast.settings.schema import Wanted
from varfast.settings.section import MANY, AllOrLabels, Device, Labels, LocalPath, Section, Source, ends_with

# A benchmark of text-to-image models whose own code evaluates images: evaluation/benchmarks.py.
BenchmarkName = Literal["geneval", "geneval2", "t2i_compbench"]


# Suffixes of pictures, and Pillow's names of their formats.
PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def _read_prompts(value: Any) -> Any:
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError(f"got {show(value)}, want texts, such as [a red cube, two dogs], or the name of a file")
    files = [is_prompt_file(text) for text in texts]
    if any(files) and not all(files):
        raise ValueError(f"got {show(value)}, which mixes texts and files; give either")
    if isinstance(value, str) and not files[0]:
        raise ValueError(f"got {show(value)}, which is no .txt or .jsonl; for a prompt as text: [{value}]")
    return tuple(texts)


def is_prompt_file(text: str) -> bool:
    """Whether it names prompts, and is none itself."""
    return text == "digits" or text.startswith("hf://datasets/") or text.lower().endswith((".txt", ".jsonl"))


PromptTexts = Annotated[
    tuple[str, ...], BeforeValidator(_read_prompts), Wanted("a list of texts, or a .txt or .jsonl, or several")
]


class SampleConfig(Section):
    """Arguments of `python -m varfast.sample`."""

    checkpoint: Source = Field(
        description="a run folder; a saved model: a folder or hf://owner/name; or a transformer's weights: a path or "
        "hf://owner/repo/file"
    )
    vqvae: Source | None = Field(
        None, description="the VQ-VAE's or tokenizer's weights, where checkpoint is not a run folder"
    )
    family: FamilyName = Field("var", description="of models, where checkpoint is not a run folder")
    out: Annotated[LocalPath, ends_with(*PICTURE_FORMATS)] = Field(
        "samples.png", description="the picture to write: .png, .jpg or .webp"
    )
    labels: Labels | None = Field(
        None, description="numbers or names, as [207, golden retriever], one row each; default: the first 8"
    )
    prompts: PromptTexts | None = Field(
        None,
        description="of a model of texts: [a red cube, two dogs], a .txt with one a line, or a .jsonl, one row each; "
        "default: the first 8 that the run trains on",
    )
    samples_per_label: int = Field(8, ge=1, le=10_000, description="columns")
    samples_per_prompt: int = Field(8, ge=1, le=10_000, description="columns, for a model of texts")
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


def _parts(value: Any) -> list[Any]:
    """`a,b`, `[a, b]` and `a` alone are lists: on a command line nobody thinks of brackets."""
    if isinstance(value, str):
        return [scalar(part.strip()) for part in value.split(",")]
    return list(value) if isinstance(value, list | tuple) else [value]


def _read_guidance(value: Any) -> Any:
    if value is None:
        return None
    parts = _parts(value)
    if not parts or not all(type(part) in (int, float) and 0 <= part <= 1000 for part in parts):
        raise ValueError(f"got {show(value)}, want a number in 0..1000, or several, such as [0, 1.5]")
    if len(set(parts)) < len(parts):
        raise ValueError(f"got {show(value)}, which names one of them twice")
    return tuple(map(float, parts))


def _read_features(value: Any) -> Any:
    if value is None:
        return None
    parts = _parts(value)
    known = get_args(FeaturesName)
    if not parts or not all(isinstance(part, str) and part in known for part in parts):
        wrong = next((part for part in parts if part not in known), None)
        raise ValueError(f"got {show(value)}, want {', '.join(known)}, or a list of them{near(list(known), wrong)}")
    if len(set(parts)) < len(parts):
        raise ValueError(f"got {show(value)}, which names one of them twice")
    return tuple(parts)


Guidances = Annotated[
    tuple[float, ...], BeforeValidator(_read_guidance), Wanted("a number, or several, such as [0, 1.5]")
]
FeatureNames = Annotated[
    tuple[FeaturesName, ...], BeforeValidator(_read_features), Wanted(f"{', '.join(get_args(FeaturesName))}, or a list")
]


def _read_results(value: Any) -> Any:
    if value is None:
        return None
    named = value if isinstance(value, dict) else {"checkpoint": value}
    files = {name: (file,) if isinstance(file, str) else file for name, file in named.items()}
    for given in files.values():
        if not isinstance(given, list | tuple) or not given or not all(isinstance(f, str) and f.strip() for f in given):
            raise ValueError(f"got {show(value)}, want a file, several, or {{checkpoint: FILE, reference: FILE}}")
    return {name: tuple(given) for name, given in files.items()}


ResultFiles = Annotated[
    dict[str, tuple[LocalPath, ...]],
    BeforeValidator(_read_results),
    Wanted("a path, several, or {checkpoint: path, reference: path}"),
]


class EvaluateConfig(Section):
    """Arguments of `python -m varfast.evaluate`. Sampling defaults to the settings of the family's own FID numbers."""

    checkpoint: Source = Field(
        description="a run folder; a saved model: a folder or hf://owner/name; or a transformer's weights: a path or "
        "hf://owner/repo/file"
    )
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
    prompts: PromptTexts | None = Field(
        None,
        description="of a model of texts: [a red cube, two dogs], a .txt with one a line, a .jsonl (prompt, tag, "
        "metadata), or several such files. Default: those of the run, by domain: trained on, held out, out of domain",
    )
    max_prompts: int | None = Field(
        None,
        ge=1,
        le=MANY,
        description="so many prompts of each domain, drawn by seed; default: all, but 500 of a run's own",
    )
    samples_per_prompt: int = Field(4, ge=1, le=1_000_000, description="images a prompt")
    export: BenchmarkName | None = Field(
        None,
        description="save the images as a benchmark's own evaluator reads them, in a folder of that name in out, and "
        "print what to run on it; prompts is the benchmark's file",
    )
    results: ResultFiles | None = Field(
        None,
        description="of an evaluation with export that is complete: what the benchmark's evaluator wrote, to be read "
        "into its table: the file, several, or {checkpoint: FILE, reference: FILE}. Nothing is sampled",
    )
    temperature: float | None = Field(None, ge=1e-3, le=1000, description="of the draw; default: 1")
    cfg: Guidances | None = Field(
        None,
        description="classifier-free guidance, whatever the run's rollout.cfg was; 0: off; several, as [0, 1.5]: "
        "samples with each, in one table. Default: 1.5 for VAR; 2, 1.75 or 1.65 by size for LlamaGen; 5 for Janus; 0 "
        "for taming, which has none",
    )
    top_k: int | None = Field(
        None,
        ge=0,
        lt=2**31,
        description="0: off; no filter either for a model with no more codes than this. Default: 900 for VAR, 0 for "
        "LlamaGen, 600 for taming",
    )
    top_p: float | None = Field(
        None, ge=0, le=1, description="0: off. Default: 0.96 for VAR, 0 for LlamaGen, 0.92 for taming"
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="an image is a function of seed, label and number alone; for prompts, of their number and "
        "the row in place of the label",
    )
    micro_batch: int = Field(32, ge=1, le=1_000_000, description="images sampled and decoded at a time")
    device: Device = Field("auto", description="auto: cuda if there is one; each process its own")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of activations")
    image_size: int | None = Field(
        None,
        ge=8,
        le=8192,
        description="side in pixels of the images that are measured and saved, resized by a bicubic filter without "
        "antialiasing, as LlamaGen does from 384 to 256; default: as sampled",
    )
    rounding: Literal["nearest", "truncate"] | None = Field(
        None,
        description="of pixels to 8 bits; default: truncate for taming, as its own code does, else nearest "
        "(VAR's own code truncates)",
    )
    save: Literal["none", "png", "npz"] = Field(
        "none",
        description="keep the images: a PNG each, or one .npz a model and guidance that ADM's evaluator reads: arr_0, "
        "uint8 (N, H, W, 3), label after label in each round of all labels",
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
    fid_reference: Source | dict[FeaturesName, Source] | None = Field(
        None,
        description="real images for FID, precision, recall, density and coverage: a folder, 'digits', or an .npz with "
        "arr_0, uint8 (N, H, W, 3), or with mu and sigma, which are enough for FID. For several features that have "
        "statistics of their own: one each, as {inception: a.npz, digits: digits}",
    )
    features: FeatureNames | None = Field(
        None,
        description="what FID compares: the features of these networks, side by side in the table, as one FID can "
        "misrank; `varfast.statistics --help` describes them. Default: digits for fid_reference=digits, inception for "
        "another one, none without",
    )
    networks: Annotated[
        dict[FeaturesName, FeaturesSection], Wanted("sections with the keys of `statistics --help` for features", True)
    ] = Field(
        default_factory=dict,
        description="how networks of features are made where that is not the default, as networks.clip.model=ViT-B-32 "
        "networks.clip.pretrained=laion2b_s34b_b79k",
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

    @field_validator("fid_reference", mode="before")
    @classmethod
    def _one_or_by_name(cls, value: Any) -> Any:
        known = get_args(FeaturesName)
        named = value if isinstance(value, dict) else {known[0]: value}
        if value is not None and not (named.keys() <= set(known) and all(isinstance(v, str) for v in named.values())):
            raise ValueError(
                f"got {show(value)}; want a path or address, or one for each of several features, as "
                f"{{inception: a.npz, digits: digits}}; features are {', '.join(known)}"
            )
        return value

    @field_validator("classifier", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @field_validator("networks", mode="before")
    @classmethod
    def _of_their_names(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: {"features": k} | v if isinstance(v, dict) else v for k, v in value.items()}

    @model_validator(mode="after")
    def _networks_are_used(self) -> EvaluateConfig:
        for name, section in self.networks.items():
            if section.features != name:
                raise ValueError(f"networks.{name}.features is {section.features}; leave it out")
            if name not in self.feature_networks:
                raise ValueError(f"networks.{name}: features does not name {name}; add it there")
        return self

    @model_validator(mode="after")
    def _one_reference_each(self) -> EvaluateConfig:
        given, named = self.fid_reference, self.features
        if isinstance(given, Mapping) and named is not None and set(given) != set(named):
            raise ValueError(
                f"fid_reference names {', '.join(given) or 'no features'}, features {', '.join(named)}; name the same"
            )
        return self

    @property
    def feature_networks(self) -> tuple[FeaturesName, ...]:
        """What computes the features."""
        if self.features is None and isinstance(self.fid_reference, Mapping):
            return tuple(self.fid_reference)
        if self.features is None and self.fid_reference is not None:
            return ("digits",) if self.fid_reference == "digits" else ("inception",)
        return self.features or ()

    @property
    def fid_references(self) -> dict[FeaturesName, str]:
        """The real images of each feature network; none, or all of them."""
        if isinstance(self.fid_reference, Mapping):
            return dict(self.fid_reference)
        return {} if self.fid_reference is None else dict.fromkeys(self.feature_networks, self.fid_reference)
