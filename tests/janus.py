"""Tiny Janus models for the tests: with the weights of the golden files, and random ones."""

import json

import torch
from safetensors.torch import save_file

from varfast.policies.janus import build
from varfast.policies.janus.config import JanusConfig, JanusPolicyConfig
from varfast.policies.janus.text import word_tokenizer

from .published import checkpoint

CPU = torch.device("cpu")


def sizes_of(meta) -> JanusConfig:
    language = meta["language"]
    return JanusConfig(
        depth=language["num_hidden_layers"],
        width=language["hidden_size"],
        num_heads=language["num_attention_heads"],
        num_kv_heads=language["num_key_value_heads"],
        mlp_width=language["intermediate_size"],
        vocab_size=meta["image_vocab"],
        side=meta["grid"],
        text_vocab_size=language["vocab_size"],
        code_width=meta["code_width"],
        head_width=meta["gen_head_embed"],
    )


def of_transformer(state):
    """The part of a whole checkpoint that is loaded."""
    skipped = ("gen_vision_model.", "vision_model.", "aligner.", "language_model.lm_head.")
    return {name: tensor for name, tensor in state.items() if not name.startswith(skipped)}


def whole_checkpoint(tag="tiny4"):
    """All that a public checkpoint has: the tower, aligner and head for text too."""
    state = checkpoint("janus", "janus.", tag)
    return state | {"vision_model.vision_tower.pos_embed": torch.zeros(1, 4, 8), "aligner.layers.0.bias": torch.ones(3)}


def write_folder(folder, state, suffix=".safetensors", files=1):
    """As the package transformers writes a model; returns the folder's address."""
    folder.mkdir()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names, weight_map = list(state), {}
    for number in range(files):
        file = f"{stem}{suffix}" if files == 1 else f"{stem}-{number + 1:05d}-of-{files:05d}{suffix}"
        part = {name: state[name].clone() for name in names[number::files]}
        weight_map |= dict.fromkeys(part, file)
        if suffix == ".safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if files > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    word_tokenizer(["a", "red", "cat", "on", "the", "sea"]).save(folder / "tokenizer.json")
    return str(folder)


TINY = {
    "family": "janus",
    "max_prompt_tokens": 12,
    "transformer": {"depth": 2, "width": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 64, "vocab_size": 24,
                    "text_vocab_size": 300, "code_width": 4, "head_width": 40, "side": 3},
    "vq": {"base_channels": 32, "channel_multipliers": [1, 1], "num_res_blocks": 1, "latent_width": 32,
           "code_width": 4},
}  # fmt: skip
TEXTS = ["a cat", "the red sea", "on", "a red cat on the sea"]


def tiny_policy(texts=TEXTS, dtype="float32", device="cpu", **options):
    config = JanusPolicyConfig(checkpoint="random", **TINY)
    parts = build.random_parts(config, 0, CPU)
    with torch.no_grad():
        for name, parameter in parts["transformer"].named_parameters():
            parameter.mul_(7.0 if parameter.ndim > 1 and "gen_embed" not in name else 1.0)
    policy = build.assemble(parts, torch.device(device), dtype, **options)
    policy.set_tokenizer(word_tokenizer(["a", "red", "cat", "on", "the", "sea"]))
    policy.set_prompts(texts)
    return policy
