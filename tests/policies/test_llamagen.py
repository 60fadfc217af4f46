"""LlamaGen's transformer and policy against what the public code computes: tests/data/golden/llamagen."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from varfast import InputError
from varfast.kernels.reference import filter_logits
from varfast.policies.llamagen.config import PRESETS, GPTConfig, LlamaGenPolicyConfig
from varfast.policies.llamagen.policy import LlamaGenPolicy
from varfast.policies.llamagen.transformer import LlamaGen
from varfast.policies.llamagen.weights import load_gpt
from varfast.policies.nexttoken.rotary import rotary_2d
from varfast.policies.nexttoken.sampler import sample
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig
from varfast.policies.nexttoken.transformer import KVCache
from varfast.types import Sampling

from ..published import checkpoint, golden, published

TAGS = ["tiny4", "tiny6_gqa"]


def sizes_of(meta) -> GPTConfig:
    gpt = meta["gpt"]
    return GPTConfig(
        depth=gpt["n_layer"],
        width=gpt["dim"],
        num_heads=gpt["n_head"],
        num_kv_heads=gpt["n_kv_head"],
        mlp_width=meta["ffn_hidden"],
        vocab_size=gpt["vocab_size"],
        num_classes=gpt["num_classes"],
        side=meta["grid"],
    )


def tokenizer_of(meta) -> Tokenizer:
    vq = meta["vq"]
    sizes = {"code_width": vq["codebook_embed_dim"], "latent_width": vq["z_channels"], "base_channels": vq["ch"]}
    return Tokenizer(TokenizerConfig(vocab_size=meta["gpt"]["vocab_size"], **sizes))


@pytest.fixture(scope="module", params=TAGS)
def public(request):
    """Arrays of the public code, and our transformer, loaded from a file of the public names."""
    arrays = golden("llamagen", request.param)
    model = LlamaGen(sizes_of(arrays.meta))
    model.load_state_dict(checkpoint("llamagen", "gpt.", request.param))
    return arrays, model


@pytest.fixture(scope="module")
def policy():
    """With the golden weights, of 16 tokens."""
    arrays = golden("llamagen")
    gpt, vq = LlamaGen(sizes_of(arrays.meta)), tokenizer_of(arrays.meta)
    gpt.load_state_dict(checkpoint("llamagen", "gpt."))
    vq.load_state_dict(checkpoint("llamagen", "vq."), strict=False)
    return LlamaGenPolicy(gpt, vq)


def largest_difference(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())


@torch.no_grad()
def test_logits_equal_the_public_code_teacher_forced_and_token_by_token(public):
    arrays, model = public
    null = torch.full_like(arrays.labels, model.config.num_classes)
    for labels, name in ((arrays.labels, "cond"), (null, "uncond")):
        assert largest_difference(model(labels, arrays.tokens), getattr(arrays, f"logits_{name}")) < 3e-6
        cache = KVCache(model.config, 2, torch.float32, labels.device)
        inputs = [model.embed_prompt(labels), *model.embed_tokens(arrays.tokens[:, :-1]).unbind(1)]
        steps = [model.step(x, torch.tensor(place), cache) for place, x in enumerate(inputs)]
        assert largest_difference(torch.stack(steps, 1), getattr(arrays, f"cached_logits_{name}")) < 3e-6


@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
def test_gradients_have_the_norms_of_the_public_code(public, checkpointing):
    arrays, model = public
    model.zero_grad()
    logits = model(arrays.labels, arrays.tokens, checkpointing=checkpointing)
    loss = cross_entropy(logits.flatten(0, 1), arrays.tokens.flatten())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(arrays.meta["loss"], abs=2e-6)
    norms = {name: float(parameter.grad.norm()) for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(arrays.meta["grad_norms"], rel=3e-6, abs=1e-7)


def test_rotary_table_is_the_public_one(public):
    arrays, model = public
    table = rotary_2d(model.config.side, model.config.head_dim, torch.device("cpu"))
    assert largest_difference(table, arrays.rope_table[:-1]) < 1e-6
    assert not table[0].any()  # the class token: cosine 0 too


def with_and_without(model, labels):
    return torch.cat([labels, torch.full_like(labels, model.config.num_classes)])


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_greedy_tokens_equal_the_public_code(public, scale):
    arrays, model = public
    key, how = torch.zeros(3, dtype=torch.int64), Sampling(top_k=1)
    assert torch.equal(sample(model, arrays.labels, key, how).tokens_BN, getattr(arrays, "greedy_cfg1.0_tokens"))
    rows, strength_N = with_and_without(model, arrays.labels), torch.full((model.config.num_tokens,), scale - 1.0)
    tokens = sample(model, rows, key, how, strength_N).tokens_BN
    assert torch.equal(tokens, getattr(arrays, f"greedy_cfg{scale}_tokens"))
    if scale == 4.0:
        strength_N[5:] = 0.0  # the public cfg_interval=3
        tokens = sample(model, rows, key, how, strength_N).tokens_BN
        assert torch.equal(tokens, getattr(arrays, "greedy_cfg4.0_interval3_tokens"))


@torch.no_grad()
def test_guided_log_probabilities_are_those_of_the_public_logits(public):
    arrays, model = public
    rows, strength_N = with_and_without(model, arrays.labels), torch.full((model.config.num_tokens,), 3.0)
    decoding = sample(model, rows, torch.tensor([1, 0, 0]), Sampling(0.9), strength_N)
    tokens = decoding.tokens_BN
    cond, uncond = model(rows, tokens.repeat(2, 1)).double().chunk(2)
    logp_BNV = ((uncond + 4.0 * (cond - uncond)) / 0.9).log_softmax(-1)
    logp_BN, entropy_BN = logp_BNV.gather(2, tokens.unsqueeze(2)).squeeze(2), -(logp_BNV.exp() * logp_BNV).sum(-1)
    torch.testing.assert_close(decoding.logp_BN.double(), logp_BN, rtol=0, atol=2e-5)
    torch.testing.assert_close(decoding.entropy_BN.double(), entropy_BN, rtol=0, atol=2e-5)


def test_guided_greedy_logits_equal_the_public_code(public):
    arrays, model = public
    tokens = getattr(arrays, "greedy_cfg4.0_tokens")
    with torch.no_grad():
        cond, uncond = model(with_and_without(model, arrays.labels), tokens.repeat(2, 1)).chunk(2)
    # 7 times the error of the two: guidance multiplies them by 4 and -3.
    assert largest_difference(uncond + 4.0 * (cond - uncond), getattr(arrays, "greedy_cfg4.0_logits")) < 2.1e-5


def test_filters_are_those_of_the_public_code():
    arrays = golden("llamagen")
    names = [name for name in vars(arrays) if name.startswith("probs_")]
    assert len(names) == 4
    for name in names:
        temperature, top_k, top_p = (float(part[1:]) for part in name.split("_")[1:])
        logits = arrays.logits_cond.flatten(0, 1)[:8] / temperature
        probs = filter_logits(logits.unsqueeze(0), int(top_k), top_p).softmax(-1).squeeze(0)
        assert largest_difference(probs, getattr(arrays, name)) < 1e-6


def test_policy_decodes_encodes_and_samples_as_the_public_code(policy):
    arrays = golden("llamagen")
    images = arrays.image.clamp(-1, 1).add(1).div(2)
    assert largest_difference(policy.decode(arrays.tokens), images) < 2e-5
    assert torch.equal(policy.encode(arrays.encode_input.add(1).div(2)), arrays.encode_tokens)
    rollout = policy.sample(arrays.labels, cfg=4.0, top_k=1, seed=0)
    assert torch.equal(rollout.tokens_BL, getattr(arrays, "greedy_cfg4.0_tokens"))
    wanted = getattr(arrays, "greedy_cfg4.0_image").clamp(-1, 1).add(1).div(2)
    assert largest_difference(policy.decode(rollout.tokens_BL), wanted) < 2e-5
    assert not rollout.on_policy


def test_a_guided_rollout_is_that_of_the_guided_policy(policy):
    rollout = policy.sample([1, 2, 3], 0.8, seed=3, cfg=2.5)
    assert rollout.on_policy
    forced_BL = policy.teacher_forced(rollout).logp_BL
    torch.testing.assert_close(forced_BL.detach(), rollout.logp_BL, rtol=0, atol=5e-5)
    (gradient,) = torch.autograd.grad(forced_BL.sum(), policy.transformer.cls_embedding.embedding_table.weight)
    assert gradient.any(dim=1).nonzero().flatten().tolist() == [1, 2, 3, 10]  # through the null class too


def test_cfg_up_to_1_is_unguided(policy):
    free, one = (policy.sample([1, 2], seed=3, cfg=cfg) for cfg in (0.0, 1.0))
    assert torch.equal(free.tokens_BL, one.tokens_BL)
    assert not torch.equal(policy.sample([1, 2], seed=3, cfg=3.0).tokens_BL, free.tokens_BL)


def public_state(name: str) -> dict[str, torch.Tensor]:
    """A published state_dict on the meta device."""
    shapes = published("llamagen")[f"GPT-{name}"]
    state = dict(shapes["outside_layers"])
    for layer in range(shapes["n_layer"]):
        state |= {f"layers.{layer}.{part}": shape for part, shape in shapes["each_layer"].items()}
    return {name: torch.empty(shape, device="meta") for name, shape in state.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_published_names_load_strictly(preset):
    with torch.device("meta"):
        model = LlamaGen(PRESETS[preset])
    model.load_state_dict(public_state(preset), strict=True, assign=True)
    assert sum(p.numel() for p in model.parameters()) == published("llamagen")[f"GPT-{preset}"]["params"]
    config = PRESETS[preset]
    sizes = published("llamagen")[f"GPT-{preset}"]
    assert (config.depth, config.num_heads, config.width, config.head_dim) == tuple(
        sizes[key] for key in ("n_layer", "n_head", "dim", "head_dim")
    )


def saved(tmp_path, content, name="c2i.pt"):
    path = tmp_path / name
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "ema": {k: 0 * v for k, v in state.items()}, "steps": 3},
        lambda state: {"module": state},
        lambda state: {"state_dict": state},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
        lambda state: state | {"freqs_cis": torch.zeros(17, 8, 2)},
    ],
    ids=["bare", "DDP, with ema", "DeepSpeed", "state_dict", "wrapped names", "freqs_cis"],
)
def test_wrappers_of_public_checkpoints_are_read(tmp_path, wrap):
    state, config = checkpoint("llamagen", "gpt."), sizes_of(golden("llamagen").meta)
    loaded = load_gpt(saved(tmp_path, wrap(state)), config).state_dict()
    assert list(loaded) == list(state)  # and so an export has the public names
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_missing_or_foreign_checkpoint_says_what_it_is(tmp_path, make_models):
    state, config = checkpoint("llamagen", "gpt."), sizes_of(golden("llamagen").meta)
    other = {name: tensor for name, tensor in state.items() if "w1" not in name}
    cases = [
        (make_models()[0].state_dict(), "is not LlamaGen's class-conditional transformer.* it is a VAR transformer of "
                                        "1 blocks, 64 wide"),
        (checkpoint("taming", "net."), "it is a transformer of taming-transformers .*of 2 blocks, 64 wide"),
        (checkpoint("llamagen", "vq."), "it is LlamaGen's VQ tokenizer"),
        ({"tok_embeddings.weight": torch.ones(4, 8), "cls_embedding.cap_proj.fc1.weight": torch.ones(8, 2),
          "layers.0.x": torch.ones(1)}, "LlamaGen's text-conditioned transformer of 1 blocks, 8 wide"),
        (other, "no layers.0.feed_forward.w1.weight"),
    ]  # fmt: skip
    for content, message in cases:
        with pytest.raises(InputError, match=message):
            load_gpt(saved(tmp_path, content), config)
    with pytest.raises(InputError, match="does not fit the configured LlamaGen; it fits policy.gpt with depth=2"):
        load_gpt(saved(tmp_path, state), config.model_copy(update={"depth": 3}))
    with pytest.raises(InputError, match="2 blocks of width 64 are of no preset, and the number of heads"):
        load_gpt(saved(tmp_path, state))
    with pytest.raises(InputError, match="missing.pt"):
        load_gpt(str(tmp_path / "missing.pt"), config)


def test_another_size_names_the_preset_that_fits(tmp_path):
    tensors = {name: tensor[:1, :1].expand(tensor.shape) if tensor.ndim == 2 else tensor for name, tensor in
               ((name, torch.zeros(tensor.shape)) for name, tensor in public_state("B").items())}  # fmt: skip
    with pytest.raises(InputError, match="it fits preset B"):
        load_gpt(saved(tmp_path, tensors), PRESETS["L"])


def test_config_takes_presets_sizes_and_what_follows_from_them():
    config = LlamaGenPolicyConfig(preset="XL", checkpoint="random", image_size=384)
    assert (config.sizes.side, config.sizes.width, config.num_classes, config.vocab_size) == (24, 1280, 1000, 16384)
    eight = LlamaGenPolicyConfig(preset="L", checkpoint="random", vq={"channel_multipliers": [1, 2, 2, 4]})
    assert eight.sizes.num_tokens == 1024
    own = LlamaGenPolicyConfig(
        gpt={"depth": 2, "width": 64, "num_heads": 4, "vocab_size": 64, "num_classes": 5, "side": 4},
        vq={"base_channels": 32, "channel_multipliers": [1, 1]},
        checkpoint="random",
    )
    assert (own.image_size, own.tokenizer.vocab_size) == (8, 64)
    assert LlamaGenPolicyConfig(**own.model_dump()) == own


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "L", "image_size": 250}, "image_size=250 is no multiple of 16"),
        ({"preset": "L", "gpt": {}}, "name a preset .B, L, XL, XXL, 3B. or give the sizes under gpt"),
        ({"preset": "L", "checkpoint": "x.pt"}, "vq_checkpoint is missing; .* hf://FoundationVision/LlamaGen/vq_ds16"),
        ({"preset": "L", "vq_checkpoint": "x.pt"}, "makes its own tokenizer; remove vq_checkpoint"),
        ({"preset": "L", "vq": {"vocab_size": 64}}, "vocab_size is 16384 in the transformer and 64 in LlamaGen's VQ"),
        ({"gpt": {"side": 4}, "image_size": 256}, "has 16 tokens an image, and .* makes 16 x 16 of 256 pixels"),
        ({"gpt": {"num_heads": 5}}, "width=768 with num_heads=5"),
        ({"gpt": {"num_kv_heads": 5}}, "num_kv_heads=5 does not divide num_heads=12"),
        ({"gpt": {"width": 72}}, "heads of 6 channels: want a multiple of 4"),
    ],
)
def test_config_refuses_what_does_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        LlamaGenPolicyConfig(**({"checkpoint": "random"} | given))
