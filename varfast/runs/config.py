"""The sections of the config that describe a run and its folder, and the arguments of `export`. No PyTorch."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from varfast.settings.problems import show
from varfast.settings.section import MANY, Device, LocalPath, Section

# Sections whose keys a run may go on with in another way, and keys among them that its checkpoints have the state of.
_CHANGEABLE = ("run.steps", "update", "grpo", "dpo", "rollout", "reward")
_OF_STATE = ("update.optimizer", "update.ema_decay", "reference_every", "reference_ema", "dpo.pairs")


# Suffixes by which an export is a file of weights.
_FORMATS = (".safetensors", ".pth")


def _check_changeable(key: str) -> str:
    inside = any(key == name or key.startswith(name + ".") for name in _CHANGEABLE)
    whole, of_state = key in ("grpo", "dpo", "update"), any(key == n or key.endswith("." + n) for n in _OF_STATE)
    if not inside or whole or of_state:
        raise ValueError(
            f"got {show(key)}; want keys such as update.lr, grpo.kl_beta or reward: of {', '.join(_CHANGEABLE)}, and "
            "none that a checkpoint holds the state of, such as update.optimizer"
        )
    return key


# Services that may follow a run; the keys of LogConfig that name a project there. See trackers.py.
TRACKERS = ("wandb", "trackio", "mlflow", "swanlab")


class RunConfig(Section):
    """Where and how long."""

    dir: LocalPath = Field(description="folder of the run; an unfinished run in it goes on")
    steps: int = Field(ge=1, le=MANY, description="rollouts; each is followed by images / minibatch optimizer steps")
    seed: int = Field(0, ge=0, lt=2**63, description="fixes labels, samples and minibatches")
    budget_images: int | None = Field(
        None,
        ge=1,
        le=2**53,
        description="the run ends after the step in which so many images have been sampled, if run.steps has not ended "
        "it before; a larger budget goes on with it",
    )
    budget_flop: float | None = Field(
        None,
        gt=0,
        le=1e22,
        description="the same for FLOP of the policy: sampling, decoding, passes of the reference, forward and "
        "backward of the images that have a gradient; what checkpointing computes again and rewards are not counted",
    )
    budget_hours: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="the same for hours of the steps, on the clock, without evaluations, grids and checkpoints",
    )
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
    allow_change: tuple[Annotated[str, AfterValidator(_check_changeable)], ...] = Field(
        (),
        strict=False,
        description="keys that may differ from those that the run in the folder went on with so far, such as "
        "[update.lr]: what changes is said, and the run goes on with it. Any of update, grpo, dpo, rollout and reward "
        "but those that a checkpoint depends on",
    )
    stop_when_idle: bool = Field(
        False,
        description="end a run that cannot learn, as its last step would. It is said in any case: a constant reward, "
        "groups without signal, a gradient of 0, everything clipped, or a learning rate near 0 for 15 steps in a row",
    )
    max_bad_rollouts: int = Field(
        3,
        ge=1,
        le=MANY,
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


class LogConfig(Section):
    """What is written into the run folder beside metrics.jsonl."""

    tensorboard: bool = Field(True, description="write TensorBoard events")
    wandb: str | None = Field(
        None, min_length=1, description="project of Weights & Biases to log to as well; WANDB_MODE=offline: no upload"
    )
    trackio: str | None = Field(None, min_length=1, description="the same for trackio, which writes to this machine")
    mlflow: str | None = Field(
        None, min_length=1, description="the same for MLflow: the experiment; MLFLOW_TRACKING_URI says where"
    )
    swanlab: str | None = Field(None, min_length=1, description="the same for SwanLab; SWANLAB_MODE=offline: no upload")
    grid_every: int = Field(
        10, ge=1, le=MANY, description="steps between sample grids (one at start and end in any case)"
    )
    grid_labels: int = Field(
        8,
        ge=1,
        le=1000,
        description="rows of the grid: the first labels trained on; of prompts some of each domain, chosen by run.seed",
    )
    grid_samples: int = Field(8, ge=1, le=1000, description="columns of the grid; the seeds are the same in every grid")
    checkpoint_every: int = Field(
        50, ge=1, le=MANY, description="steps between checkpoints (one at the end in any case)"
    )
    checkpoint_minutes: float = Field(30.0, gt=0, le=1e6, description="minutes after which one is due in any case")
    keep_last: int = Field(
        2, ge=1, le=MANY, description="checkpoints kept; the one before serves where the last is damaged"
    )
    keep_best: bool = Field(False, description="keep the one with the highest reward_mean too")

    @property
    def trackers(self) -> list[str]:
        """Services that follow the run."""
        return [name for name in TRACKERS if getattr(self, name) is not None]


class EvalConfig(Section):
    """The table of before and after, sampled with the rollout's temperature."""

    every: int | None = Field(
        None,
        ge=0,
        le=MANY,
        description="steps between evaluations during training, of the table's samples: eval/reward and the table's "
        "other rows in metrics.jsonl, TensorBoard and trackers, eval/held_out/... of prompts held out. There is one "
        "after the last step too. null or 0: none",
    )
    samples_per_label: int = Field(2, ge=0, le=100_000, description="images a label or prompt; 0: no table")
    max_labels: int = Field(
        1000,
        ge=1,
        le=MANY,
        description="the first labels, up to this many; of prompts so many of each domain (trained on, held out, "
        "out of domain), chosen by run.seed",
    )
    held_out_labels: int = Field(
        0,
        ge=0,
        le=MANY,
        description="so many of the labels that the run does not draw from (rollout.labels, rollout.label_share), "
        "which run.seed chooses, are sampled too: rows such as reward (held out). Of prompts: prompts.held_out",
    )
    classifier: Literal["digits"] | None = Field(None, description="whose accuracy on the samples is reported")

    @model_validator(mode="after")
    def _has_samples(self) -> EvalConfig:
        if self.every and not self.samples_per_label:
            raise ValueError(
                f"eval.every={self.every} with eval.samples_per_label=0, which samples nothing; set it to 1 or more"
            )
        return self


class ExportConfig(Section):
    """Arguments of `python -m varfast.export`."""

    checkpoint: LocalPath = Field(description="a run folder")
    out: LocalPath | None = Field(
        None,
        description="the file to write, .safetensors or .pth, with the VQ-VAE and a model card beside it; or a folder "
        "that is whole, such as model/, which varfast.load_policy reads",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the trained weights in the file")
    vqvae: bool = Field(
        True,
        description="write the VQ-VAE, or tokenizer of images, too; false: leave it out where it came from the hub",
    )
    shard_gb: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="for janus: several files of at most so many GB, and their index, as the hub has large models; "
        "null: one file",
    )
    overwrite: bool = Field(False, description="replace files that exist")
    hub: str | None = Field(
        None, min_length=1, description="upload the folder to this repository of the hub, owner/name; out is optional"
    )
    private: bool | None = Field(
        None, description="of a repository that is made: whether others may not see it; null: as the hub's settings say"
    )
    revision: str | None = Field(None, min_length=1, description="branch of the hub to upload to; null: main")
    commit_message: str = Field("Upload a model of varfast", min_length=1, description="of the upload")

    @property
    def to_folder(self) -> bool:
        """Whether out is a folder: it ends with / or has no suffix of a file."""
        return self.out is not None and not self.out.endswith(_FORMATS)

    @model_validator(mode="after")
    def _known_format(self) -> ExportConfig:
        out, suffix = self.out, "" if self.out is None else PurePath(self.out).suffix
        if out is None and self.hub is None:
            raise ValueError("out is missing; want a file, as model.safetensors, a folder, as model/, or hub=")
        if out is not None and re.fullmatch(r"\.[a-z]+", suffix) and not out.endswith(("/", *_FORMATS)):
            raise ValueError(f"out: got {out}, want a name that ends with .safetensors or .pth, or a folder, as {out}/")
        if out is not None and self.hub is not None and not self.to_folder:
            raise ValueError(f"out: got {out}; with hub={self.hub} want a folder, as {PurePath(out).stem}/, or no out")
        for key in ("private", "revision"):
            if self.hub is None and getattr(self, key) is not None:
                raise ValueError(f"{key} is of an upload; give hub=owner/name too")
        return self
