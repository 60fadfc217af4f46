"""A policy of this family from random weights or from files: see varfast.policies.families.Family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from varfast.perf.cost import Cost
from varfast.policies.janus.config import JanusConfig, JanusPolicyConfig
from varfast.policies.janus.cost import count
from varfast.policies.janus.policy import JanusPolicy
from varfast.policies.janus.text import TextTokenizer, byte_tokenizer
from varfast.policies.janus.transformer import Janus
from varfast.policies.janus.weights import NOT_TOKENIZER, load_janus
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig
from varfast.policies.nexttoken.tokenizer_weights import load_tokenizer
from varfast.policies.text import TOKENIZER_FILE
from varfast.weights.files import resolve
from varfast.weights.state import State

section = JanusPolicyConfig


def _sizes(config: JanusPolicyConfig) -> JanusConfig:
    sizes = config.sizes
    assert isinstance(sizes, JanusConfig)
    return sizes


def empty_model(config: JanusPolicyConfig) -> Janus:
    """The transformer, with weights that are still to be loaded."""
    return Janus(_sizes(config))


def load_part(part: str, address: str, config: JanusPolicyConfig) -> nn.Module:
    """A part with the weights at `address`, on the CPU.

    Raises: InputError if the file cannot be read, or does not have the sizes of the config.
    """
    if part == "transformer":
        return load_janus(address, _sizes(config))
    return load_tokenizer(address, TokenizerConfig, config.vq, NOT_TOKENIZER)


def random_parts(config: JanusPolicyConfig, seed: int, device: torch.device) -> dict[str, nn.Module]:
    """All parts with random weights of the configured sizes, a function of the seed: for benchmarks and tests."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        tokenizer = Tokenizer(config.vq)
        return {"transformer": Janus(_sizes(config)).init_weights(seed), "vq": tokenizer}


def text_tokenizer(path: Path | None, config: JanusPolicyConfig) -> TextTokenizer:
    """That of a tokenizer.json, or for random weights one of bytes. Raises: InputError if it cannot be used."""
    limit = config.max_prompt_tokens
    found = byte_tokenizer(limit) if path is None else TextTokenizer.read(path, limit)
    found.check_fits(_sizes(config).text_vocab_size)
    return found


def assemble(
    parts: Mapping[str, nn.Module], device: torch.device, dtype: str, fast: bool = True, strict: bool = False
) -> JanusPolicy:
    """The policy of all parts, by name. Raises: as JanusPolicy."""
    transformer, tokenizer = parts["transformer"], parts["vq"]
    assert isinstance(transformer, Janus)
    assert isinstance(tokenizer, Tokenizer)
    return JanusPolicy(transformer, tokenizer, device, dtype, fast, strict)


def from_files(
    trained: str, frozen: str | None, device: torch.device, dtype: str, fast: bool = True, strict: bool = False
) -> JanusPolicy:
    """The policy of a whole checkpoint, or of transformer and tokenizer (paths or hf:// addresses), for 384 px.

    frozen: None: `trained` is a checkpoint of the whole model.
    Raises: InputError if a file cannot be read or does not fit.
    """
    parts = {
        "transformer": load_janus(trained),
        "vq": load_tokenizer(frozen or trained, TokenizerConfig, None, NOT_TOKENIZER),
    }
    policy = assemble(parts, device, dtype, fast, strict)
    if (path := _tokenizer_beside(trained)) is not None:
        policy.set_tokenizer(TextTokenizer.read(path))
    return policy


def _tokenizer_beside(address: str) -> Path | None:
    """tokenizer.json in the folder, or the repository, of the weights; None: there is none."""
    if address.startswith("hf://"):
        owner, repository = address.removeprefix("hf://").split("/")[:2]
        return resolve(f"hf://{owner}/{repository}/{TOKENIZER_FILE}")
    path = Path(address).expanduser()
    beside = (path if path.is_dir() else path.parent) / TOKENIZER_FILE
    return beside if beside.is_file() else None


def cost_of(config: JanusPolicyConfig, dtype: str) -> Cost:
    """What one image costs with the longest prompt that is accepted. dtype: "float32" or "bfloat16", of activations."""
    return count(_sizes(config), config.tokenizer, dtype, config.lora, config.max_prompt_tokens)


def whole_state(trained: State, frozen: State) -> State:
    """Both parts under the names of the public checkpoints."""
    return trained | {f"gen_vision_model.{name}": tensor for name, tensor in frozen.items()}


def model_card(config: JanusPolicyConfig, trained: str, frozen: str) -> tuple[str, str, str]:
    """For a model card: what the model is, its sizes, and how Janus's public code loads it."""
    sizes, side = _sizes(config), config.image_size
    named = f"Janus-Pro-{config.preset}" if config.preset else f"{sizes.depth} blocks of width {sizes.width}"
    described = f"{named}, images of {side} x {side} pixels from texts of up to {config.max_prompt_tokens} tokens"
    left_out = "what understands images and writes text (`vision_model`, `aligner`, `language_model.lm_head`) is not"
    if config.preset is None:
        return (
            "A Janus-Pro model",
            described,
            f"The file has the names of the public code (github.com/deepseek-ai/Janus); {left_out} in it.",
        )
    public = f"""With the public code (github.com/deepseek-ai/Janus), over the weights of its base:

```python
from glob import glob
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
import janus.models

model = AutoModelForCausalLM.from_pretrained("deepseek-ai/Janus-Pro-{config.preset}", trust_remote_code=True)
for file in glob("{Path(trained).stem}*.safetensors"):
    model.load_state_dict(load_file(file), strict=False)
```

`strict=False`: {left_out} in the file, and stays the base's."""
    return "A Janus-Pro model", described, public
