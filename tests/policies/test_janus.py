"""Janus-Pro's language model and policy against what the public code computes: tests/data/golden/janus."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from varfast.policies.janus.config import JanusConfig
from varfast.policies.janus.policy import JanusPolicy
from varfast.policies.janus.transformer import Janus
from varfast.policies.nexttoken.sampler import sample
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig
from varfast.policies.nexttoken.transformer import KVCache
from varfast.types import Sampling

from ..published import checkpoint, golden

TAGS = ["tiny4", "tiny6"]
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


def with_prompts(model, arrays):
    """The golden prompts as the table: rows of the unguided ones have the pads of the public code."""
    rows, pad = arrays.prompt.tolist(), arrays.meta["pad_id"]
    unguided = [[row[0], *[pad] * (len(row) - 2), row[-1]] for row in rows]
    model.prompts.add([f"prompt {row}" for row in range(len(rows))], rows, unguided, CPU)
    return model


@pytest.fixture(scope="module", params=TAGS)
def public(request):
    """Arrays of the public code, and our transformer of the public names."""
    arrays = golden("janus", request.param)
    model = Janus(sizes_of(arrays.meta))
    model.load_state_dict(of_transformer(checkpoint("janus", "janus.", request.param)))
    return arrays, with_prompts(model, arrays)


@pytest.fixture(scope="module", params=TAGS)
def policy(request):
    """With the golden weights."""
    arrays, state = golden("janus", request.param), checkpoint("janus", "janus.", request.param)
    vq = arrays.meta["vq"]
    tokenizer = Tokenizer(
        TokenizerConfig(
            vocab_size=arrays.meta["image_vocab"],
            latent_width=vq["z_channels"],
            base_channels=vq["ch"],
        )
    )
    prefix = "gen_vision_model."
    of_tokenizer = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    missing, unexpected = tokenizer.load_state_dict(of_tokenizer, strict=False)
    assert (missing, unexpected) == (["quantize.codebook_used"], [])
    model = Janus(sizes_of(arrays.meta))
    model.load_state_dict(of_transformer(state))
    return arrays, JanusPolicy(with_prompts(model, arrays), tokenizer)


def largest_difference(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())


# ---------------------------------------------------------------------------------------------------------------------
# The public code


@torch.no_grad()
def test_logits_equal_the_public_code_teacher_forced_and_token_by_token(public):
    arrays, model = public
    first, num_tokens = model.prompts.places - 1, model.config.num_tokens
    for ids, name in ((torch.tensor([0, 1]), "cond"), (torch.tensor([2, 3]), "uncond")):
        assert largest_difference(model(ids, arrays.tokens), getattr(arrays, f"logits_{name}")) < 3e-6
        cache = KVCache(model.config, 2, torch.float32, CPU, model.prompts.places)
        x_BTC, length_B = model.embed_prompts(ids)
        assert length_B.tolist() == [first + 1] * 2
        model.prefill(x_BTC, cache)
        inputs = [x_BTC[:, -1], *model.embed_tokens(arrays.tokens[:, :-1]).unbind(1)]
        steps = [model.step(x, torch.tensor([first + place] * 2), cache) for place, x in enumerate(inputs)]
        assert len(steps) == num_tokens
        assert largest_difference(torch.stack(steps, 1), getattr(arrays, f"cached_logits_{name}")) < 3e-6


@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
def test_gradients_have_the_norms_of_the_public_code(public, checkpointing):
    arrays, model = public
    model.zero_grad()
    logits = model(torch.tensor([0, 1]), arrays.tokens, checkpointing=checkpointing)
    loss = cross_entropy(logits.flatten(0, 1), arrays.tokens.flatten())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(arrays.meta["loss"], abs=2e-6)
    norms = {name: float(parameter.grad.norm()) for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(arrays.meta["grad_norms"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("weight", [1.0, 3.0, 5.0])
def test_greedy_tokens_and_logits_equal_the_public_code(public, weight):
    arrays, model = public
    key, how = torch.zeros(3, dtype=torch.int64), Sampling(top_k=1)
    strength_N = torch.full((model.config.num_tokens,), weight - 1.0)
    tokens = sample(model, torch.arange(4), key, how, strength_N).tokens_BN
    assert torch.equal(tokens, getattr(arrays, f"greedy_cfg{weight}_tokens"))
    if weight == 1.0:  # and without guidance, which is not another thing
        assert torch.equal(sample(model, torch.arange(2), key, how).tokens_BN, tokens)
    if weight == 5.0:
        with torch.no_grad():
            cond, uncond = model(torch.arange(4), tokens.repeat(2, 1)).chunk(2)
        # 9 times the error of the two: guidance multiplies them by 5 and -4.
        guided = uncond + 5.0 * (cond - uncond)
        assert largest_difference(guided, getattr(arrays, "greedy_cfg5.0_logits")) < 2.7e-5


def test_policy_decodes_encodes_and_samples_as_the_public_code(policy):
    arrays, policy = policy
    images = arrays.image.clamp(-1, 1).add(1).div(2)
    assert largest_difference(policy.decode(arrays.tokens), images) < 2e-5
    assert torch.equal(policy.encode(arrays.encode_input.add(1).div(2)), arrays.encode_tokens)
    logp_BL = policy.token_logp([0, 1], arrays.tokens)
    assert largest_difference(logp_BL.detach(), arrays.logprob) < 5e-6
    for weight in (1.0, 3.0, 5.0):
        rollout = policy.sample([0, 1], cfg=weight, top_k=1, seed=0)
        assert torch.equal(rollout.tokens_BL, getattr(arrays, f"greedy_cfg{weight}_tokens"))
    wanted = getattr(arrays, "greedy_cfg5.0_image").clamp(-1, 1).add(1).div(2)
    assert largest_difference(policy.decode(rollout.tokens_BL), wanted) < 2e-5
    assert policy.rounding == "truncate"
