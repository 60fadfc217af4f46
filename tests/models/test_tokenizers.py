import pytest
import torch

from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig, VQGANConfig

from ..published import checkpoint, golden


def of_vq(meta) -> TokenizerConfig:
    """LlamaGen's sizes, from the meta of a golden file."""
    vq = meta["vq"]
    return TokenizerConfig(
        vocab_size=meta["gpt"]["vocab_size"],
        code_width=vq["codebook_embed_dim"],
        latent_width=vq["z_channels"],
        base_channels=vq["ch"],
        channel_multipliers=tuple(vq["ch_mult"]),
    )


def of_vqgan(meta) -> VQGANConfig:
    """taming's sizes."""
    convolutions = meta["ddconfig"]
    return VQGANConfig(
        vocab_size=meta["gpt"]["vocab_size"],
        code_width=meta["embed_dim"],
        latent_width=convolutions["z_channels"],
        base_channels=convolutions["ch"],
        channel_multipliers=tuple(convolutions["ch_mult"]),
        num_res_blocks=convolutions["num_res_blocks"],
    )


def state_of(family: str) -> dict[str, torch.Tensor]:
    """The tokenizer's own tensors of a golden checkpoint."""
    if family == "llamagen":
        return checkpoint("llamagen", "vq.")
    whole, prefix = checkpoint("taming", "net."), "first_stage_model."
    return {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}


@pytest.fixture(scope="module", params=["llamagen", "taming"])
def public(request):
    """Arrays of the public code, and our tokenizer with its weights."""
    arrays = golden(request.param)
    tokenizer = Tokenizer((of_vq if request.param == "llamagen" else of_vqgan)(arrays.meta))
    missing, unexpected = tokenizer.load_state_dict(state_of(request.param), strict=False)
    assert (set(missing) - {"quantize.codebook_used"}, unexpected) == (set(), [])
    return arrays, tokenizer.requires_grad_(False)


def test_decode_equals_the_public_code(public):
    arrays, tokenizer = public
    image = tokenizer.decode_latent(tokenizer.latent(arrays.tokens))
    assert image.shape == arrays.image.shape
    assert float((image - arrays.image).abs().max()) < 2e-5


def test_encode_equals_the_public_code(public):
    arrays, tokenizer = public
    assert float((tokenizer.latents(arrays.encode_input) - arrays.encode_latent).abs().max()) < 1e-5
    assert torch.equal(tokenizer.encode(arrays.encode_input), arrays.encode_tokens)
