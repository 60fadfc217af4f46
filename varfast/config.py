"""The schema of configs/*.yaml: joins the sections that the parts of varfast declare, and checks what spans them.

A section is declared beside what it configures, in a module that does not import PyTorch: each reward's in its own file
(rewards/), the others in the config.py of their folder. How a file and the overrides `a.b=c` become a Config, and what
is said of a wrong key, is in settings/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from varfast.losses.config import GRPOConfig
from varfast.optim.config import UpdateConfig
from varfast.policies.config import RolloutConfig
from varfast.policies.llamagen.config import LlamaGenPolicyConfig
from varfast.policies.taming.config import TamingPolicyConfig
from varfast.policies.var.config import VARPolicyConfig
from varfast.pretraining.config import PretrainConfig
from varfast.rewards import RewardConfig
from varfast.runs.config import EvalConfig, LogConfig, RunConfig
from varfast.settings.loading import load_as, validate
from varfast.settings.schema import Wanted
from varfast.settings.section import Section, check_divides, check_labels

# The families of models; varfast/policies/families.py says how to add one.
PolicyConfig = Annotated[VARPolicyConfig | LlamaGenPolicyConfig | TamingPolicyConfig, Field(discriminator="family")]


class KernelsConfig(Section):
    """Which implementation of each op runs. `python -m varfast.env` says what auto means on a machine, and why.

    The names are those of `implementations(...)` in kernels/ (tests/test_config.py). They are listed here because
    kernels/ imports PyTorch, and nothing of varfast.
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
    dpo_loss: Literal["auto", "cuda", "cpp", "reference"] = Field(
        "auto", description="the loss of pairs, from log-probabilities"
    )
    adamw_step: Literal["auto", "triton", "library", "reference"] = Field(
        "auto", description="of update.optimizer=adamw: one step; library: PyTorch's fused AdamW"
    )
    invariant_linear: Literal["auto", "triton", "blocks", "reference"] = Field(
        "auto", description="products of run.strict, the same bits whatever the batch"
    )
    rms_norm: Literal["auto", "triton", "cpp", "reference"] = Field("auto", description="RMSNorm of next-token models")
    residual_rms_norm: Literal["auto", "triton", "cpp", "reference"] = Field(
        "auto", description="a branch's result added to the residual stream, and the rms_norm after it"
    )
    swiglu: Literal["auto", "triton", "cpp", "reference"] = Field(
        "auto", description="silu(gate) * up in the MLP of next-token models"
    )
    split_heads_rotary: Literal["auto", "triton", "cpp", "reference"] = Field(
        "auto", description="queries, keys and values of a next-token model's block, with rotary positions"
    )
    split_heads_rotary_to_cache: Literal["auto", "triton", "cpp", "reference"] = Field(
        "auto", description="the same for one token an image: key and value go into the cache"
    )
    decode_attention: Literal["auto", "triton", "cpp", "sdpa", "triton_invariant", "sdpa_invariant", "reference"] = (
        Field("auto", description="attention of one new token an image against the cache")
    )
    causal_attention: Literal[
        "auto", "sdpa", "fa4", "flash_attn", "triton", "triton_invariant", "sdpa_invariant", "reference"
    ] = Field("auto", description="attention of a next-token model's update; sdpa: PyTorch's, by FlashAttention")


class Config(Section):
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

    @model_validator(mode="before")
    @classmethod
    def _default_family(cls, data: Any) -> Any:
        policy = data.get("policy") if isinstance(data, dict) else None
        return data | {"policy": {"family": "var"} | policy} if isinstance(policy, dict) else data

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
        check_divides("update.minibatch", self.update.minibatch, self.rollout.images, "images a step")
        if self.run.parallel == "fsdp" and self.update.optimizer != "adamw":
            raise ValueError(
                f"update.optimizer={self.update.optimizer} does not take sharded weights; use adamw, or "
                "run.parallel=ddp"
            )
        if self.grpo.scale_alpha and not self.policy.scale_sides:
            raise ValueError(
                f"grpo.scale_alpha={self.grpo.scale_alpha:g} weights tokens by the scale that they are of; "
                f"policy.family={self.policy.family} has no scales: leave it out"
            )
        self._check_strict()
        if self.policy.lora is not None and self.run.parallel == "fsdp":
            raise ValueError(
                "policy.lora with run.parallel=fsdp: there is little to spread, as the frozen weights have neither "
                "gradients nor moments; use run.parallel=ddp"
            )
        if self.policy.lora is not None and (key := self.grpo.reference_moves):
            raise ValueError(
                f"grpo.{key} with policy.lora: the reference is the base with the adapter off, which does not "
                "move; leave one of them out"
            )
        self._check_guidance()
        num_classes = self.policy.num_classes
        if self.rollout.labels != "all":
            check_labels("rollout.labels", self.rollout.labels, num_classes)
        labels = num_classes if self.rollout.labels == "all" else len(set(self.rollout.labels))
        for name, reward in self.reward.items():
            reward.check_step(f"reward.{name}", self.rollout.labels_per_step, labels)
        return self

    def _check_guidance(self) -> None:
        if self.rollout.cfg == 0.0:
            return
        if self.policy.unguided_cfg is None:
            raise ValueError(
                f"rollout.cfg={self.rollout.cfg:g}: models of policy.family={self.policy.family} know no label that "
                "stands for none, so nothing can guide them; use rollout.cfg=0"
            )
        if self.rollout.cfg <= self.policy.unguided_cfg:
            raise ValueError(
                f"rollout.cfg={self.rollout.cfg:g} guides nothing with policy.family={self.policy.family}, whose scale "
                f"begins above {self.policy.unguided_cfg:g}; use rollout.cfg=0, or more than that"
            )
        if self.policy.checkpoint == "pretrain" and self.pretrain.class_dropout == 0.0:
            raise ValueError(
                f"rollout.cfg={self.rollout.cfg:g} with pretrain.class_dropout=0: guidance needs a model that has "
                "learned to do without the label; set pretrain.class_dropout=0.1, or rollout.cfg=0"
            )

    def _check_strict(self) -> None:
        if not self.run.strict:
            return
        for op in ("block_causal_attention", "cached_attention"):
            impl = getattr(self.kernels, op)
            if impl != "auto":
                raise ValueError(f"run.strict=true chooses attention itself; leave kernels.{op}={impl} out")


class RooflineConfig(Config):
    """Arguments of `python -m varfast.roofline`: a run's, and the device that it is predicted for."""

    device: str = Field("H200", description="H200, H100, A100, RTX4090 and others (a wrong name lists them), or here")


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and apply overrides. Arguments and errors: varfast.settings.loading.load_as."""
    return load_as(Config, path, overrides or [])


def parse_config(data: dict[str, Any], source: str = "config") -> Config:
    """Validate a nested dictionary; `source` names it in errors. Raises: InputError, as load_config."""
    return validate(Config, data, source)
