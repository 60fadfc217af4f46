import copy
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from varfast import InputError
from varfast.policies.decoder import FastDecoder
from varfast.policies.nexttoken.tokenizer import Codebook, Tokenizer
from varfast.policies.nexttoken.tokenizer_config import TOKENIZERS, TokenizerConfig, VQGANConfig, check_fits
from varfast.policies.nexttoken.tokenizer_weights import infer_tokenizer_config, load_tokenizer

from ..published import checkpoint, golden, published


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


@torch.no_grad()
def test_fast_decoder_is_as_exact_as_the_plain_one(public):
    arrays, tokenizer = public
    latent = tokenizer.latent(arrays.tokens)
    exact = copy.deepcopy(tokenizer).double().decode_latent(latent.double())
    in_float32 = FastDecoder(tokenizer, torch.float32)(latent)
    assert float((in_float32 - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    plain = copy.deepcopy(tokenizer).bfloat16().decode_latent(latent.bfloat16())
    in_bfloat16 = FastDecoder(tokenizer)(latent)
    assert (in_bfloat16 - exact).square().mean() <= 4 * (plain - exact).square().mean()


def test_forward_is_straight_through(public):
    _, tokenizer = public
    tokenizer = copy.deepcopy(tokenizer).requires_grad_(True)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reconstruction, loss, tokens_BN = tokenizer(images)
    assert torch.equal(tokens_BN, tokenizer.encode(images))
    torch.testing.assert_close(reconstruction, tokenizer.decode_latent(tokenizer.latent(tokens_BN)))
    rows, codes = (
        tokenizer.quantize.normalised(tokenizer.latents(images).permute(0, 2, 3, 1)),
        tokenizer.quantize.codes(),
    )
    distance = (rows.flatten(0, 2) - codes[tokens_BN.flatten()]).square().mean()
    torch.testing.assert_close(loss, (1 + tokenizer.config.commitment) * distance)
    of_codes, of_encoder = tokenizer.quantize.embedding.weight, tokenizer.encoder.conv_in.weight
    through, nothing = torch.autograd.grad(
        reconstruction.square().sum(), (of_encoder, of_codes), retain_graph=True, allow_unused=True
    )
    assert through.abs().sum() > 0
    assert nothing is None
    to_encoder, to_codes = torch.autograd.grad(loss, (of_encoder, of_codes))
    assert to_encoder.abs().sum() > 0
    used = torch.zeros(len(codes), dtype=torch.bool).index_fill(0, tokens_BN.flatten(), True)
    assert torch.equal(to_codes.abs().sum(dim=1) > 0, used)


@pytest.mark.parametrize("sides", [(33, 32), (32, 0), (8, 8)])
def test_encode_refuses_images_that_are_no_whole_number_of_tokens(public, sides):
    with pytest.raises(ValueError, match=r"want \(B, 3, H, W\) with H and W multiples of 16"):
        public[1].encode(torch.zeros(1, 3, *sides))


@pytest.mark.parametrize(("image_size", "vocab_size", "num_tokens", "said"), [
    (256, 16384, 256, None),
    (384, 16384, 576, None),
    (256, 4096, 256, "vocab_size is 4096 in the transformer and 16384 in LlamaGen's VQ tokenizer; they must be equal"),
    (256, 16384, 576, "has 576 tokens an image, and LlamaGen's VQ tokenizer makes 16 x 16 of 256 pixels"),
    (250, 16384, 256, "image_size=250 is no multiple of 16, .*; use 256"),
])  # fmt: skip
def test_check_fits_says_in_what_tokenizer_and_transformer_differ(image_size, vocab_size, num_tokens, said):
    with nullcontext() if said is None else pytest.raises(InputError, match=said):
        check_fits(TOKENIZERS["vq_ds16"], image_size, vocab_size, num_tokens)


# Published checkpoints.


def published_state(name: str) -> dict[str, torch.Tensor]:
    """Names and shapes of a published tokenizer, without memory."""
    shapes = (
        published("taming")["cin_transformer"]["other"] if name == "vqgan_f16" else published("llamagen")[name]["state"]
    )
    prefix = "first_stage_model."
    return {n.removeprefix(prefix): torch.empty(shape, device="meta") for n, shape in shapes.items()
            if not n.startswith("transformer.")}  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), [("vq_ds16", 71883403), ("vq_ds8", 70109835), ("vqgan_f16", 76073859)])
def test_published_names_load_strictly(name, parameters):
    state = published_state(name)
    assert infer_tokenizer_config(state) == TOKENIZERS[name]
    assert type(infer_tokenizer_config(state)) is type(TOKENIZERS[name])
    with torch.device("meta"):
        tokenizer = Tokenizer(TOKENIZERS[name])
    assert {n: t.shape for n, t in tokenizer.state_dict().items()} == {n: t.shape for n, t in state.items()}
    tokenizer.load_state_dict(state, assign=True)
    assert sum(p.numel() for p in tokenizer.parameters()) == parameters
    if name != "vqgan_f16":
        assert published("llamagen")[name]["params"] == parameters


def saved(content, folder: Path) -> str:
    torch.save(content, folder / "file.pt")
    return str(folder / "file.pt")


def test_load_tokenizer_reads_public_checkpoints(tmp_path):
    vq, vqgan = state_of("llamagen"), state_of("taming")
    usage = {"quantize.codebook_used": torch.full((65536,), math.nan)}
    trained = {
        "loss.discriminator.main.0.weight": torch.ones(1),
        "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1),
    }
    whole = checkpoint("taming", "net.")
    for kind, state, content in (
        (TokenizerConfig, vq, {"model": vq | usage}),
        (TokenizerConfig, vq, {"model": vq, "ema": {n: t + 1 for n, t in vq.items()}, "optimizer": {"state": {}}}),
        (TokenizerConfig, vq, vq),
        (TokenizerConfig, vq, {f"gen_vision_model.{n}": t for n, t in (vq | usage).items()}),
        (VQGANConfig, vqgan, {"state_dict": whole, "epoch": 1}),
        (VQGANConfig, vqgan, {"state_dict": vqgan | trained}),
        (VQGANConfig, vqgan, vqgan | trained),
    ):
        loaded = load_tokenizer(saved(content, tmp_path), kind).state_dict()
        assert loaded.keys() - {"quantize.codebook_used"} == state.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
        assert "quantize.codebook_used" not in loaded or not loaded["quantize.codebook_used"].any()


def test_load_tokenizer_says_whose_and_of_which_sizes_a_wrong_file_is(tmp_path):
    vq, vqgan = state_of("llamagen"), state_of("taming")
    sizes = "vocab_size=64, .*latent_width=32, base_channels=32"
    gpt = checkpoint("llamagen", "gpt.")
    resi = vqgan | {"quantize.quant_resi.qresi.weight": torch.ones(1)}
    diffusers = {"quantize.embedding.weight": torch.ones(8, 4), "encoder.down_blocks.0.x": torch.ones(1)}
    for kind, state, said in (
        (TokenizerConfig, vqgan, f"is not LlamaGen's VQ tokenizer: it is taming-transformers' VQGAN with {sizes}"),
        (VQGANConfig, vq, f"is not taming-transformers' VQGAN: it is LlamaGen's VQ tokenizer with {sizes}"),
        (TokenizerConfig, resi, "it is VAR's multi-scale VQ-VAE, for policy.family=var"),
        (VQGANConfig, diffusers, "it is an autoencoder of diffusers"),
        (
            TokenizerConfig,
            {"model": gpt},
            "it has no quantize.embedding.weight, but .*; it is LlamaGen's class-conditional transformer",
        ),
    ):
        with pytest.raises(InputError, match=said):
            load_tokenizer(saved(state, tmp_path), kind)
    path = saved(vq, tmp_path)
    with pytest.raises(InputError, match=r"(?s)does not fit .*; it is LlamaGen's VQ tokenizer with vocab_size=64, .*"
                       r"encoder.conv_in.weight: file \(32, 3, 3, 3\), model \(128, 3, 3, 3\)"):  # fmt: skip
        load_tokenizer(path, TokenizerConfig, TOKENIZERS["vq_ds16"])
    del vq["decoder.conv_out.bias"]
    with pytest.raises(InputError, match="1 missing: decoder.conv_out.bias"):
        load_tokenizer(saved(vq, tmp_path), TokenizerConfig)


@pytest.mark.parametrize("kind", [TokenizerConfig, VQGANConfig])
def test_nearest_is_the_euclidean_nearest_in_parts_too(monkeypatch, kind):
    torch.manual_seed(0)
    codebook, rows = Codebook(kind(vocab_size=50, code_width=6)), torch.randn(103, 6)
    expected = torch.cdist(codebook.normalised(rows).double(), codebook.codes().double()).argmin(dim=1)
    assert torch.equal(codebook.nearest(rows), expected)
    monkeypatch.setattr("varfast.policies.nexttoken.tokenizer._ROWS", 10)
    assert torch.equal(codebook.nearest(rows), expected)
