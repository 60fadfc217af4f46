"""The section of the config that describes Janus-Pro: sizes, weights, text and adapter. No PyTorch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from varfast.policies.config import LoRAConfig, names_a_file
from varfast.policies.nexttoken.config import NextTokenPolicyConfig, TransformerConfig
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig
from varfast.settings.section import Source


class JanusConfig(TransformerConfig):
    """Sizes of Janus-Pro's language model and of what makes it draw. The defaults are those of Janus-Pro-1B."""

    depth: int = Field(24, ge=1, le=512, description="number of blocks")
    width: int = Field(2048, ge=4, le=65536, description="channels of the residual stream")
    num_heads: int = Field(16, ge=1, le=1024, description="heads of the queries; each has width / num_heads channels")
    mlp_width: int | None = Field(
        None, ge=1, le=2**18, description="hidden channels of SwiGLU; null: 8/3 of the width, rounded up to 256s"
    )
    vocab_size: int = Field(16384, ge=2, le=2**20, description="V, number of codes of an image")
    num_classes: Literal[0] = Field(0, description="prompts are texts, rows of a run's table")
    side: int = Field(
        24, ge=1, le=256, description="tokens a side of the image; default: of image_size and the tokenizer"
    )
    norm_eps: float = Field(1e-6, ge=1e-12, le=1, description="added to the mean square in norms")
    text_vocab_size: int = Field(102400, ge=3, le=2**22, description="rows of the table of text tokens")
    code_width: int = Field(
        8, ge=1, le=65536, description="channels of a code in the transformer's own table, which is not the tokenizer's"
    )
    head_width: int | None = Field(
        None, ge=1, le=2**18, description="hidden channels of the head of the codes; null: the width"
    )
    rope_theta: float = Field(10000.0, gt=1, le=1e9, description="base of the rotary positions")

    @property
    def hidden(self) -> int:
        """F."""
        return self.mlp_width or self.usual_hidden

    @property
    def usual_hidden(self) -> int:
        """F of the public models of this width."""
        return -(-int(2 * 4 * self.width / 3) // 256) * 256

    @property
    def head_hidden(self) -> int:
        """Hidden channels of the head of the codes."""
        return self.head_width or self.width


# Published for 24 x 24 tokens, 384 px.
PRESETS: dict[str, JanusConfig] = {
    "1B": JanusConfig(),
    "7B": JanusConfig(depth=30, width=4096, num_heads=32),
}


class JanusLoRAConfig(LoRAConfig):
    """Low-rank matrices that are trained beside the frozen ones, by the package peft: y = W x + alpha / rank B A x.

    There is no dropout: a log-probability must describe the policy that was sampled.
    """

    targets: tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        strict=False,
        description="matrices with an adapter: attention's four and the MLP's three of every block",
    )


class JanusPolicyConfig(NextTokenPolicyConfig):
    """Janus-Pro's language model, which draws what a text says, and the frozen VQ tokenizer that makes images of it.

    The parts for understanding images (vision_model, aligner) and the head for text are not loaded.
    """

    parts: ClassVar = ("transformer", "vq")
    sizes_key: ClassVar = "policy.transformer"
    conditioned_on: ClassVar = "text"
    as_transformers: ClassVar = True
    unguided_cfg: ClassVar = 0.0
    presets: ClassVar = PRESETS
    public_tokenizer: ClassVar = None

    family: Literal["janus"] = Field("janus", description="Janus-Pro: text to image, arXiv:2501.17811")
    preset: Literal["1B", "7B"] | None = Field(None, description="a public model's sizes")
    image_size: int = Field(384, ge=1, le=4096, description="pixels of a side: a whole number of tokens")
    transformer: JanusConfig | None = Field(None, description="sizes of the transformer, where no preset is named")
    vq: TokenizerConfig = Field(
        default_factory=TokenizerConfig,
        description="sizes of the tokenizer of images; vocab_size defaults to that of the transformer",
    )
    vq_checkpoint: Source | None = Field(
        None,
        description="weights of the tokenizer of images: a path or hf:// address; default: those in the checkpoint of "
        "the whole model, or the run folder's; not with 'random' and 'pretrain'",
    )
    text_tokenizer: Source | None = Field(
        None,
        description="tokenizer.json of the texts: a path or hf://owner/repo/file; default: that beside the weights; "
        "for checkpoint=random one of bytes",
    )
    max_prompt_tokens: int = Field(
        128, ge=3, le=4096, description="places of the longest prompt that is accepted, its template included"
    )
    lora: JanusLoRAConfig | None = Field(
        None, description="train an adapter beside the frozen weights; {} for its defaults; null: train all weights"
    )

    @property
    def tokenizer_address(self) -> Source | None:
        return self.text_tokenizer

    @property
    def frozen_checkpoint(self) -> Source | None:
        """A checkpoint of the whole model has the tokenizer too."""
        whole = self.checkpoint if names_a_file(self.checkpoint) else None
        return self.vq_checkpoint or whole
