"""taming's transformer and policy against what the public code computes: tests/data/golden/taming."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from varfast import InputError
from varfast.kernels.reference import filter_logits
from varfast.policies.nexttoken.sampler import sample
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.nexttoken.tokenizer_config import VQGANConfig
from varfast.policies.nexttoken.transformer import KVCache
from varfast.policies.taming.config import PRESETS, MinGPTConfig, TamingPolicyConfig
from varfast.policies.taming.policy import TamingPolicy
from varfast.policies.taming.transformer import MinGPT
from varfast.policies.taming.weights import load_mingpt
from varfast.types import Sampling

from ..published import checkpoint, golden, published

TAGS = ["tiny4", "tiny6"]  # heads of 16 and 48 channels, and a table of more places than are used


def sizes_of(meta) -> MinGPTConfig:
    gpt = meta["gpt"]
    return MinGPTConfig(
        depth=gpt["n_layer"],
        width=gpt["n_embd"],
        num_heads=gpt["n_head"],
        vocab_size=gpt["vocab_size"],
        num_classes=meta["n_classes"],
        side=meta["grid"],
        block_size=gpt["block_size"],
    )


def part(tag, prefix):
    whole = checkpoint("taming", "net.", tag)
    return {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}


@pytest.fixture(scope="module", params=TAGS)
def public(request):
    """Arrays of the public code, and our transformer with its weights."""
    arrays = golden("taming", request.param)
    model = MinGPT(sizes_of(arrays.meta))
    model.load_state_dict(part(request.param, "transformer."))
    return arrays, model


@pytest.fixture(scope="module")
def policy():
    """With the golden weights, of 16 tokens."""
    arrays = golden("taming")
    transformer, sizes = MinGPT(sizes_of(arrays.meta)), arrays.meta["ddconfig"]
    transformer.load_state_dict(part("tiny4", "transformer."))
    vqgan = Tokenizer(
        VQGANConfig(
            vocab_size=arrays.meta["gpt"]["vocab_size"],
            code_width=arrays.meta["embed_dim"],
            latent_width=sizes["z_channels"],
            base_channels=sizes["ch"],
        )
    )
    vqgan.load_state_dict(part("tiny4", "first_stage_model."))
    return TamingPolicy(transformer, vqgan)


def largest_difference(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())


@torch.no_grad()
def test_logits_equal_the_public_code_teacher_forced_and_token_by_token(public):
    arrays, model = public
    assert largest_difference(model(arrays.labels, arrays.tokens), arrays.logits) < 3e-6
    cache = KVCache(model.config, 2, torch.float32, arrays.labels.device)
    inputs = [model.embed_prompt(arrays.labels), *model.embed_tokens(arrays.tokens[:, :-1]).unbind(1)]
    steps = [model.step(x, torch.tensor(place), cache) for place, x in enumerate(inputs)]
    assert largest_difference(torch.stack(steps, 1), arrays.cached_logits) < 3e-6


@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
def test_gradients_have_the_norms_of_the_public_code(public, checkpointing):
    arrays, model = public
    model.zero_grad()
    logits = model(arrays.labels, arrays.tokens, checkpointing=checkpointing)
    loss = cross_entropy(logits.flatten(0, 1), arrays.tokens.flatten())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(arrays.meta["loss"], abs=2e-6)
    norms = {name: float(parameter.grad.norm()) for name, parameter in model.named_parameters()}
    # The gradient of a bias of the keys is 0 but for rounding: all scores of a query move alike.
    assert norms == pytest.approx(arrays.meta["grad_norms"], rel=3e-6, abs=2e-7)


def test_greedy_tokens_and_logits_equal_the_public_code(public):
    arrays, model = public
    decoding = sample(model, arrays.labels, torch.zeros(3, dtype=torch.int64), Sampling(top_k=1))
    assert torch.equal(decoding.tokens_BN, arrays.greedy_tokens)
    with torch.no_grad():
        assert largest_difference(model(arrays.labels, decoding.tokens_BN), arrays.greedy_logits) < 3e-6


def test_filters_are_those_of_the_public_code():
    arrays = golden("taming")
    names = [name for name in vars(arrays) if name.startswith("probs_")]
    assert len(names) == 3
    for name in names:
        temperature, top_k, top_p = (float(part[1:]) for part in name.split("_")[1:])
        logits = arrays.logits.flatten(0, 1)[:8] / temperature
        probs = filter_logits(logits.unsqueeze(0), int(top_k), top_p).softmax(-1).squeeze(0)
        assert largest_difference(probs, getattr(arrays, name)) < 1e-6


def test_policy_decodes_encodes_and_samples_as_the_public_code(policy):
    arrays = golden("taming")
    assert largest_difference(policy.decode(arrays.tokens), arrays.image.clamp(-1, 1).add(1).div(2)) < 2e-5
    tokens = policy.encode(arrays.encode_input.add(1).div(2))
    assert torch.equal(tokens, arrays.encode_tokens)
    with torch.no_grad():
        assert largest_difference(policy.transformer(arrays.labels, tokens), arrays.encode_logits) < 3e-6
    rollout = policy.sample(arrays.labels, top_k=1, seed=0)
    assert torch.equal(rollout.tokens_BL, arrays.greedy_tokens)
    wanted = arrays.greedy_image.clamp(-1, 1).add(1).div(2)
    assert largest_difference(policy.decode(rollout.tokens_BL), wanted) < 2e-5


def test_guidance_is_refused(policy):
    with pytest.raises(InputError, match="cfg=1.5: TamingPolicy knows no label that stands for none"):
        policy.sample([1, 2], seed=0, cfg=1.5)


def test_published_names_load_strictly():
    shapes = published("taming")["cin_transformer"]
    state = {name: shape for name, shape in shapes["other"].items() if name.startswith("transformer.")}
    for block in range(shapes["n_layer"]):
        state |= {
            name.replace("transformer.", f"transformer.blocks.{block}.", 1): shape
            for name, shape in shapes["each_block"].items()
            if not name.endswith("attn.mask")
        }
    state = {name.removeprefix("transformer."): torch.empty(s, device="meta") for name, s in state.items()}
    with torch.device("meta"):
        model = MinGPT(PRESETS["cin"])
    model.load_state_dict(state, strict=True, assign=True)
    assert sum(p.numel() for p in model.parameters()) == shapes["params_transformer"]


def saved(tmp_path, content):
    path = tmp_path / "net2net.ckpt"
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "global_step": 3}],
                         ids=["bare", "Lightning"])  # fmt: skip
def test_checkpoints_of_the_whole_model_are_read(tmp_path, wrap):
    masks = {f"transformer.blocks.{block}.attn.mask": torch.ones(1, 1, 16, 16) for block in range(2)}
    whole, config = checkpoint("taming", "net."), sizes_of(golden("taming").meta)
    loaded = load_mingpt(saved(tmp_path, wrap(whole | masks)), config).state_dict()
    own = part("tiny4", "transformer.")
    assert sorted(loaded) == sorted(own)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in own.items())
    assert load_mingpt(saved(tmp_path, own), config).config == config  # as a run exports it


def test_a_missing_or_foreign_checkpoint_says_what_it_is(tmp_path, make_models):
    config = sizes_of(golden("taming").meta)
    cases = [
        (
            make_models()[0].state_dict(),
            "is not a transformer of taming.*; it is a VAR transformer of 1 blocks, 64 wide",
        ),
        (checkpoint("llamagen", "gpt."), "it is LlamaGen's class-conditional transformer .* of 2 blocks, 64 wide"),
        (part("tiny4", "first_stage_model."), "it is a VQ-VAE"),
    ]
    for content, message in cases:
        with pytest.raises(InputError, match=message):
            load_mingpt(saved(tmp_path, content), config)
    own = saved(tmp_path, part("tiny4", "transformer."))
    with pytest.raises(InputError, match="does not fit the configured MinGPT; it fits policy.transformer with depth=2"):
        load_mingpt(own, config.model_copy(update={"depth": 3}))
    with pytest.raises(InputError, match="number of heads is not in a file: give policy.transformer.num_heads"):
        load_mingpt(own)


def test_config_takes_the_preset_and_sizes():
    config = TamingPolicyConfig(preset="cin", checkpoint="cin.ckpt")
    assert (config.sizes.num_tokens, config.sizes.hidden, config.image_size) == (256, 6144, 256)
    assert config.frozen_checkpoint == "cin.ckpt"  # the checkpoint has both


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"transformer": {"block_size": 8, "side": 4}}, "an image of 4 x 4 tokens needs 16 places"),
        ({"transformer": {"vocab_size": 10}}, "num_classes=1000 is more than vocab_size=10"),
        ({"transformer": {"num_kv_heads": 2}}, "num_kv_heads"),
        ({"preset": "cin", "image_size": 384}, "block_size=256: an image of 24 x 24 tokens needs 576 places"),
        ({}, "name a preset .cin. or give the sizes under transformer"),
    ],
)
def test_config_refuses_what_does_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        TamingPolicyConfig(**({"checkpoint": "random"} | given))
