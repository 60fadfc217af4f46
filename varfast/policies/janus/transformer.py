"""Janus-Pro's language model as it draws images, with the parameter names of the public checkpoints.

A text token is looked up in the language model's table, a code of the image in a table of its own (gen_embed), whose
rows gen_aligner brings to the width of the stream. Then come Llama's blocks, and a head for codes (gen_head). The head
for text (lm_head) and the parts that understand images (vision_model, aligner) are not here: no image needs them.

Queries, keys and values are three products, as the checkpoints have them, and not one: each can then have an adapter, a
shard, a quantised moment and its published name like every other matrix. It costs a pass over their results, read and
written once more (predicted for 1B on an H100: 2 % of an update), and three launches a block.

Axes: B image, N token of an image, T place of the longest prompt, L place, C channel, F channel of the MLP,
X channels of queries, keys and values together.
Sources: Chen et al., arXiv:2501.17811 (Janus-Pro); Touvron et al., arXiv:2302.13971 (Llama).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu

from varfast import kernels
from varfast.policies.janus.config import JanusConfig
from varfast.policies.janus.text import TextTokenizer
from varfast.policies.nexttoken.prompts import Prompted, PromptTable
from varfast.policies.nexttoken.rotary import rotary_1d
from varfast.policies.nexttoken.transformer import Block, CausalTransformer, Positions, RMSNorm
from varfast.policies.precision import Head, Linear
from varfast.types import InputError


class Attention(nn.Module):
    """Its four matrices."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        of_keys = config.kv_heads * config.head_dim
        self.q_proj = Linear(config.width, config.width, bias=False)
        self.k_proj = Linear(config.width, of_keys, bias=False)
        self.v_proj = Linear(config.width, of_keys, bias=False)
        self.o_proj = Linear(config.width, config.width, bias=False)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.width, config.hidden, bias=False)
        self.up_proj = Linear(config.width, config.hidden, bias=False)
        self.down_proj = Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


class LlamaBlock(Block):
    """RMSNorm, no biases."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__(config)
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)

    def qkv(self, x_BLC: Tensor) -> Tensor:
        normed, attention = self.input_layernorm(x_BLC), self.self_attn
        return torch.cat([attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)], dim=-1)

    def attention_out(self, heads_BLC: Tensor) -> Tensor:
        return self.self_attn.o_proj(heads_BLC)

    def mlp_branch(self, x_BLC: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(x_BLC))


class Llama(nn.Module):
    """Table of text tokens, blocks and norm."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.text_vocab_size, config.width)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)


class LanguageModel(nn.Module):
    """As the public names have it, around the one that has the weights."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.model = Llama(config)


class Aligner(nn.Module):
    """Two layers from the width of a code to that of the stream."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Linear(config.code_width, config.width), nn.GELU(), Linear(config.width, config.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class CodeHead(nn.Module):
    """Two layers from the stream to the logits of codes."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.output_mlp_projector = Linear(config.width, config.head_hidden)
        self.vision_head = Head(config.head_hidden, config.vocab_size)


class Janus(CausalTransformer):
    """See the top of this file.

    Args:
        config: sizes.
    Attributes:
        prompts: the run's prompts, which `set_prompts` sets. All copies of the model share them.
        text: what turns texts into tokens, once it is set.
    """

    lora_targets: ClassVar = {
        name: rf"language_model\.model\.layers\.\d+\.self_attn\.{name}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    } | {name: rf"language_model\.model\.layers\.\d+\.mlp\.{name}" for name in ("gate_proj", "up_proj", "down_proj")}

    def __init__(self, config: JanusConfig) -> None:
        super().__init__(config)
        self.prompts = PromptTable()
        self.text: TextTokenizer | None = None
        self._theta = config.rope_theta
        self.gen_aligner = Aligner(config)
        self.gen_head = CodeHead(config)
        self.gen_embed = nn.Embedding(config.vocab_size, config.code_width)
        self.language_model = LanguageModel(config)

    @torch.no_grad()
    def init_weights(self, seed: int) -> Janus:
        """Random weights, a function of `seed` and the sizes alone: normal, of Llama's deviation 0.02.

        Codes are as large as the sum over their few channels needs, or the aligner would begin with next to nothing.
        """
        rng = torch.Generator(device=self.gen_embed.weight.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                narrow = name in ("gen_embed.weight", "gen_aligner.layers.0.weight")
                parameter.normal_(std=parameter.shape[1] ** -0.5 if narrow else 0.02, generator=rng)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return self

    # Prompts

    def set_prompts(self, texts: Sequence[str]) -> None:
        """Make the table of a run's prompts: prompt i is texts[i].

        Raises: InputError for no texts, for one that is too long, or where there is no tokenizer that fits.
        """
        if not texts:
            raise InputError("prompts: got none, want at least one text")
        rows = self._encoded(texts)
        self.prompts.clear()
        self._add_prompts(texts, rows)

    def prompt_ids(self, texts: Sequence[str]) -> list[int]:
        """Rows of texts; those that are not in the table yet are added. Raises: as set_prompts."""
        new = [text for text in dict.fromkeys(texts) if self.prompts.id_of(text) is None]
        if new:
            self._add_prompts(new, self._encoded(new))
        return [row for text in texts if (row := self.prompts.id_of(text)) is not None]

    def _add_prompts(self, texts: Sequence[str], rows: list[list[int]]) -> None:
        assert self.text is not None
        unguided = [self.text.unguided(len(row)) for row in rows]
        self.prompts.add(texts, rows, unguided, self.gen_embed.weight.device)

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        config, text = self.config, self.text
        assert isinstance(config, JanusConfig)
        if text is None:
            raise InputError("there is no text tokenizer; give one by set_tokenizer")
        text.check_fits(config.text_vocab_size)
        return text.encode(texts)

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    @property
    def prompts_version(self) -> int:
        return self.prompts.version

    def unguided(self, ids_B: Tensor) -> Tensor:
        """Rows of the same prompts with pads between their first and last token."""
        return self.prompts.unguided(ids_B)

    # What the blocks read

    def transformer_blocks(self) -> list[Block]:
        return cast(list[Block], list(self.language_model.model.layers))

    def positions(self, device: torch.device) -> Positions:
        config = self.config
        places = self.prompts.places + config.num_tokens - 1
        return Positions(rotary_1d(places, config.head_dim, device, self._theta), "halves")

    def embed_prompts(self, ids_B: Tensor) -> Prompted:
        token_BT, length_B = self.prompts.rows(ids_B)
        return Prompted(self.language_model.model.embed_tokens(token_BT).to(self.compute_dtype), length_B)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return self.gen_aligner(embedding(tokens, self.gen_embed.weight).to(self.compute_dtype))

    def final_norm(self, x: Tensor) -> Tensor:
        """Norm, and the first layer of the head."""
        return gelu(self.gen_head.output_mlp_projector(self.language_model.model.norm(x)))

    def head_layer(self) -> Head:
        return self.gen_head.vision_head

    def large_modules(self) -> Iterator[nn.Module]:
        yield self.language_model.model.embed_tokens
        yield self.gen_aligner
        for block in self.language_model.model.layers:
            assert isinstance(block, LlamaBlock)
            attention = block.self_attn
            yield from (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, block.mlp)
        yield self.gen_head.output_mlp_projector
        yield self.gen_head.vision_head
