"""A policy of this family from random weights or from files: see varfast.policies.families.Family."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from varfast.perf.cost import Cost
from varfast.policies.llamagen.config import GPTConfig, LlamaGenPolicyConfig
from varfast.policies.llamagen.cost import count
from varfast.policies.llamagen.policy import LlamaGenPolicy
from varfast.policies.llamagen.transformer import LlamaGen
from varfast.policies.llamagen.weights import load_gpt
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig
from varfast.policies.nexttoken.tokenizer_weights import load_tokenizer
from varfast.types import InputError

section = LlamaGenPolicyConfig


def _sizes(config: LlamaGenPolicyConfig) -> GPTConfig:
    sizes = config.sizes
    assert isinstance(sizes, GPTConfig)
    return sizes


def empty_model(config: LlamaGenPolicyConfig) -> LlamaGen:
    """The transformer, with weights that are still to be loaded."""
    return LlamaGen(_sizes(config))


def load_part(part: str, address: str, config: LlamaGenPolicyConfig) -> nn.Module:
    """A part with the weights at `address`, on the CPU.

    Raises: InputError if the file cannot be read, or does not have the sizes of the config.
    """
    if part == "gpt":
        return load_gpt(address, _sizes(config))
    return load_tokenizer(address, TokenizerConfig, config.vq)


def random_parts(config: LlamaGenPolicyConfig, seed: int, device: torch.device) -> dict[str, nn.Module]:
    """All parts with random weights of the configured sizes, a function of the seed: for benchmarks and tests."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        tokenizer = Tokenizer(config.vq)
        return {"gpt": LlamaGen(_sizes(config)).init_weights(seed), "vq": tokenizer}


def assemble(
    parts: Mapping[str, nn.Module], device: torch.device, dtype: str, fast: bool = True, strict: bool = False
) -> LlamaGenPolicy:
    """The policy of all parts, by name. Raises: as LlamaGenPolicy."""
    transformer, tokenizer = parts["gpt"], parts["vq"]
    assert isinstance(transformer, LlamaGen)
    assert isinstance(tokenizer, Tokenizer)
    return LlamaGenPolicy(transformer, tokenizer, device, dtype, fast, strict)


def from_files(
    trained: str, frozen: str | None, device: torch.device, dtype: str, fast: bool = True, strict: bool = False
) -> LlamaGenPolicy:
    """The policy of transformer and tokenizer (paths or hf:// addresses); the sizes are the files'.

    Of the 16 x 16 tokens of 256 px: how many an image has is not in the files.
    Raises: InputError if a file cannot be read or does not fit, or the tokenizer's is not given.
    """
    if frozen is None:
        raise InputError(f"{trained} has no tokenizer: give that of vq_ds16_c2i.pt too")
    parts = {"gpt": load_gpt(trained), "vq": load_tokenizer(frozen, TokenizerConfig)}
    return assemble(parts, device, dtype, fast, strict)


def cost_of(config: LlamaGenPolicyConfig, dtype: str) -> Cost:
    """What one image costs. dtype: "float32" or "bfloat16", of activations."""
    return count(_sizes(config), config.tokenizer, dtype, config.lora)


def model_card(config: LlamaGenPolicyConfig, trained: str, frozen: str) -> tuple[str, str, str]:
    """For a model card: what the model is, its sizes, and how LlamaGen's public code loads it."""
    sizes, side = _sizes(config), config.image_size
    named = f"GPT-{config.preset}" if config.preset else f"{sizes.depth} blocks of width {sizes.width}"
    described = f"{named}, images of {side} x {side} pixels, {sizes.num_classes} labels"
    if config.preset is None or sizes.num_classes != 1000 or sizes.vocab_size != 16384:
        public = (
            "The public code (github.com/FoundationVision/LlamaGen) reads the weights, which have its names and "
            "shapes, into a model of these sizes (autoregressive/models/gpt.py, ModelArgs)."
        )
    else:
        public = f"""With the public code, in a checkout of github.com/FoundationVision/LlamaGen:

```
python autoregressive/sample/sample_c2i.py --gpt-model GPT-{config.preset} --gpt-ckpt {trained} \\
    --vq-ckpt {frozen} --image-size {side} --from-fsdp
```

`--from-fsdp` says that the file holds the weights alone; the tokenizer's it reads under the key "model"."""
    return "A LlamaGen transformer", described, public
