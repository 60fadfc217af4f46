"""The schema of configs/*.yaml: joins the sections that the parts of varfast declare, and checks what spans them.

A section is declared beside what it configures, in a module that does not import PyTorch: each reward's in its own file
(rewards/), the others in the config.py of their folder. How a file and the overrides `a.b=c` become a Config, and what
is said of a wrong key, is in settings/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from varfast.data.config import PromptsConfig
from varfast.losses.config import DPOConfig, GRPOConfig, LossConfig
from varfast.optim.config import UpdateConfig
from varfast.policies.config import RolloutConfig
from varfast.policies.janus.config import JanusPolicyConfig
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
PolicyConfig = Annotated[
    VARPolicyConfig | LlamaGenPolicyConfig | TamingPolicyConfig | JanusPolicyConfig, Field(discriminator="family")
]


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
    prompts: PromptsConfig | None = Field(
        None, description="what a model that is conditioned on text is trained on; null: the model has labels"
    )
    rollout: RolloutConfig = RolloutConfig()
    reward: Annotated[
        dict[str, RewardConfig], Wanted("rewards by names of your choice, such as {bright: {type: brightness}}")
    ] = Field(min_length=1, description="components by name; their weighted sum counts")
    grpo: GRPOConfig = GRPOConfig()
    dpo: DPOConfig | None = None
    update: UpdateConfig = UpdateConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    kernels: KernelsConfig = KernelsConfig()

    @property
    def loss(self) -> LossConfig:
        """The settings of the loss that is minimised: dpo where it is there, else grpo."""
        return self.dpo or self.grpo

    @property
    def measure_kl_every(self) -> int | None:
        """Steps between measurements of the KL apart from the loss; None where the loss has it or none is asked."""
        return self.loss.measure_kl_every(adapter=self.policy.lora is not None)

    @property
    def holds_reference(self) -> bool:
        """Whether the base model is held beside the policy: for the loss, or to measure the KL."""
        return self.loss.reads_reference or self.measure_kl_every is not None

    @property
    def sampled_images(self) -> int:
        """Images a step that are sampled and scored; 0 where saved pairs are learned from."""
        return self.rollout.images if self.loss.saved_pairs is None else 0

    @property
    def learned_images(self) -> int:
        """Images a step that the update reads: all, or those of pairs."""
        return self.rollout.labels_per_step * self.loss.learned(self.rollout.group_size)

    @model_validator(mode="before")
    @classmethod
    def _default_family(cls, data: Any) -> Any:
        policy = data.get("policy") if isinstance(data, dict) else None
        return data | {"policy": {"family": "var"} | policy} if isinstance(policy, dict) else data

    @model_validator(mode="before")
    @classmethod
    def _null_grpo(cls, data: Any) -> Any:
        """grpo=null, beside dpo={}, takes back the section of a file."""
        drops = isinstance(data, dict) and "grpo" in data and data["grpo"] is None
        return {key: value for key, value in data.items() if key != "grpo"} if drops else data

    @model_serializer(mode="wrap")
    def _without_the_other_loss(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What a run folder keeps: with dpo, no section grpo, whose settings nothing reads."""
        data: dict[str, Any] = serialise(self)
        return {key: value for key, value in data.items() if self.dpo is None or key != "grpo"}

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
        self._check_loss()
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
        self._check_guidance()
        labels = self._checked_labels()
        for name, reward in self.reward.items():
            reward.check_step(f"reward.{name}", self.rollout.labels_per_step, labels)
            reward.check_prompts(f"reward.{name}", self.prompts is not None)
        return self

    def _checked_labels(self) -> int:
        """How many labels a run draws from; of texts, which are not read here, as many as a step has."""
        family, labels = self.policy.family, self.rollout.labels
        if self.policy.conditioned_on == "text":
            if self.prompts is None:
                raise ValueError(
                    f"prompts is missing: policy.family={family} is conditioned on text; name a file, as "
                    "prompts: {source: prompts.txt}"
                )
            if labels != "all" or self.rollout.label_share != 1.0:
                raise ValueError(
                    f"rollout.labels and rollout.label_share choose among labels; policy.family={family} has prompts: "
                    "use prompts.tags and prompts.share"
                )
            return self.rollout.labels_per_step
        if self.prompts is not None:
            raise ValueError(
                f"prompts are texts, and policy.family={family} is conditioned on labels; leave prompts out, and use "
                "rollout.labels"
            )
        num_classes = self.policy.num_classes
        if labels == "all":
            return num_classes
        check_labels("rollout.labels", labels, num_classes)
        return len(set(labels))

    def _check_loss(self) -> None:
        loss, group = self.loss, self.rollout.group_size
        if self.dpo is not None and "grpo" in self.model_fields_set:
            keys = ", ".join(f"grpo.{key}" for key in sorted(self.grpo.model_fields_set)) or "grpo"
            raise ValueError(f"dpo beside {keys}: a run minimises one loss; leave one out (grpo=null, or dpo=null)")
        if loss.saved_pairs is None and loss.learned(group) > group:
            raise ValueError(
                f"dpo.pairs_per_prompt={loss.learned(group) // 2} takes {loss.learned(group)} images of each group, "
                f"which has rollout.group_size={group}; sample more, or make fewer pairs"
            )
        of = "images a step" if self.dpo is None else "images of a step's pairs (2 a pair)"
        check_divides("update.minibatch", self.update.minibatch, self.learned_images, of)
        for key in ("minibatch", "micro_batch"):
            if (size := getattr(self.update, key)) is not None and size % loss.unit:
                raise ValueError(
                    f"update.{key}={size} splits a pair of {loss.name}: count 2 images a pair, and be even"
                )
        apart = [name for name, reward in self.reward.items() if getattr(reward, "normalise", None) is not None]
        if self.dpo is not None and apart:
            raise ValueError(
                f"reward.{apart[0]}.normalise={self.reward[apart[0]].normalise} with dpo, which chooses pairs by the "
                "weighted sum of the rewards as they are; set it to null, and weight to what brings it to their scale"
            )
        if self.grpo.scale_alpha and not self.policy.scale_sides:
            raise ValueError(
                f"grpo.scale_alpha={self.grpo.scale_alpha:g} weights tokens by the scale that they are of; "
                f"policy.family={self.policy.family} has no scales: leave it out"
            )
        if self.run.budget_images is not None and loss.saved_pairs is not None:
            raise ValueError(
                f"run.budget_images={self.run.budget_images} with dpo.pairs={loss.saved_pairs}, which samples none; "
                "use run.budget_flop or run.budget_hours"
            )

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
        if self.loss.samples_reference or self.loss.saved_pairs is not None:
            key = "dpo.samples=reference" if self.loss.samples_reference else f"dpo.pairs={self.loss.saved_pairs}"
            raise ValueError(
                f"run.strict=true compares the policy with what it has sampled itself, which {key} is not; leave one "
                "of them out"
            )


class RooflineConfig(Config):
    """Arguments of `python -m varfast.roofline`: a run's, and the device that it is predicted for."""

    device: str = Field("H200", description="H200, H100, A100, RTX4090 and others (a wrong name lists them), or here")


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and apply overrides. Arguments and errors: varfast.settings.loading.load_as."""
    return load_as(Config, path, overrides or [])


def parse_config(data: dict[str, Any], source: str = "config") -> Config:
    """Validate a nested dictionary; `source` names it in errors. Raises: InputError, as load_config."""
    return validate(Config, data, source)
