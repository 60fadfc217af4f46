"""Janus-Pro's language model and policy against what the public code computes: tests/data/golden/janus."""

import re

import pytest
import torch
from torch.nn.functional import cross_entropy

from varfast import InputError
from varfast.policies import strict
from varfast.policies.janus.policy import JanusPolicy
from varfast.policies.janus.text import (
    ASSISTANT,
    BEGIN_OF_IMAGE,
    BOS,
    PAD,
    USER,
    TextTokenizer,
    byte_tokenizer,
    word_tokenizer,
)
from varfast.policies.janus.transformer import Janus
from varfast.policies.nexttoken.sampler import sample
from varfast.policies.nexttoken.tokenizer import Tokenizer
from varfast.policies.nexttoken.tokenizer_config import TokenizerConfig
from varfast.policies.nexttoken.transformer import KVCache
from varfast.types import Sampling

from ..janus import TEXTS, of_transformer, sizes_of, tiny_policy
from ..published import checkpoint, golden

TAGS = ["tiny4", "tiny6"]
CPU = torch.device("cpu")


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


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def test_the_template_is_that_of_the_public_code():
    tokenizers = pytest.importorskip("tokenizers")
    names = [
        BOS,
        PAD,
        BEGIN_OF_IMAGE,
        USER,
        ASSISTANT,
        "<unk>",
        ":",
        "Ċ",
        "Ġ",
        "a",
        "c",
        "t",
    ]  # as byte-level BPE has them
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({name: row for row, name in enumerate(names)}, [], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(names[:5])
    bos, pad, begin, user, assistant, colon, newline, space, a, c, t = (0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11)
    text = TextTokenizer(tokenizer)
    #            <|User|> : ' ' a ' ' c a t  blank line       <|Assistant|> :
    want = [bos, user, colon, space, a, space, c, a, t, newline, newline, assistant, colon, begin]
    assert text.encode([" a cat\n"]) == [want]
    assert text.unguided(4) == [bos, pad, pad, begin]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({BOS: 0, "a": 1}, []))
    with pytest.raises(InputError, match=f"has no token {re.escape(PAD)}, {BEGIN_OF_IMAGE}; give the tokenizer.json"):
        TextTokenizer(tokenizer)


def test_word_and_byte_tokenizers_read_what_they_wrote(tmp_path):
    words = word_tokenizer(["a", "dark", "seven", "on", "light", "paper"], max_tokens=8)
    words.save(tmp_path / "tokenizer.json")
    again = TextTokenizer.read(tmp_path / "tokenizer.json", 8)
    assert again.encode(["A dark seven"]) == words.encode(["A dark seven"]) == [[0, 4, 5, 9, 2]]
    assert again.encode(["a blue seven"]) == [[0, 4, 3, 9, 2]]
    assert again.vocab_size == 10
    with pytest.raises(
        InputError, match="the prompt 'a a a a a a a' has 9 tokens .* more than policy.max_prompt_tokens=8"
    ):
        again.encode(["a", "a a a a a a a"])
    with pytest.raises(InputError, match="prompts hold ' ', want texts that say something"):
        again.encode([" "])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is no tokenizer.json of the package tokenizers"):
        TextTokenizer.read(tmp_path / "tokenizer.json")
    assert byte_tokenizer().encode(["aé"]) == [[0, *(3 + i for i in (64, 127, 102)), 2]]


@pytest.mark.parametrize("cfg", [0.0, 3.0])
def test_prompts_of_unequal_length_together_equal_each_alone(cfg):
    together = tiny_policy()
    rollout = together.sample([3, 0, 2, 1], 0.9, seed=5, cfg=cfg)
    forced_BL = together.teacher_forced(rollout).logp_BL
    torch.testing.assert_close(forced_BL.detach(), rollout.logp_BL, rtol=0, atol=1e-5)
    forced_BL.sum().backward()
    summed = None
    for row, text in enumerate(TEXTS[i] for i in (3, 0, 2, 1)):
        alone = tiny_policy([text])
        single = alone.sample([text], 0.9, seed=5, first_sample=row, cfg=cfg)
        assert torch.equal(single.tokens_BL[0], rollout.tokens_BL[row])
        logp_1L = alone.teacher_forced(single).logp_BL
        torch.testing.assert_close(logp_1L[0], forced_BL[row], rtol=0, atol=1e-5)
        logp_1L.sum().backward()
        found = {name: p.grad for name, p in alone.trainable.named_parameters()}
        summed = found if summed is None else {name: summed[name] + grad for name, grad in found.items()}
    for name, parameter in together.trainable.named_parameters():
        assert float((parameter.grad - summed[name]).norm()) <= 1e-5 * float(summed[name].norm()), name


def test_texts_are_ids_of_one_table_and_new_ones_are_added():
    policy = tiny_policy()
    reference = policy.frozen_copy()
    assert policy.num_classes == reference.num_classes == 4
    by_id, by_text = policy.sample([2, 0], seed=1), policy.sample(["on", "a cat"], seed=1)
    assert torch.equal(by_id.tokens_BL, by_text.tokens_BL)
    assert by_text.labels_B.tolist() == [2, 0]
    longer = policy.sample(["the red sea on the red sea", "a cat"], seed=1)
    assert longer.labels_B.tolist() == [4, 0]
    assert reference.num_classes == 5
    assert torch.equal(longer.tokens_BL[1], by_id.tokens_BL[1])
    assert policy.cost("float32").kv_cache_bytes == (9 + 9 - 1) * 2 * 2 * 2 * 8 * 4  # places, k and v, blocks, heads, D
    policy.set_prompts(["the sea"])
    assert reference.num_classes == 1
    with pytest.raises(InputError, match="labels_B"):
        policy.sample([1], seed=0)
    with pytest.raises(InputError, match="prompts: got none"):
        policy.set_prompts([])
    with pytest.raises(InputError, match="prompts hold ' '"):
        policy.set_prompts(["a cat", " "])
    policy.set_tokenizer(word_tokenizer(map(str, range(400))))
    with pytest.raises(
        InputError, match=r"has 404 tokens, and the transformer's table 300 rows; give the tokenizer of"
    ):
        policy.set_prompts(["1"])
    assert policy.num_classes == 1


def test_weight_1_is_no_guidance_and_below_it_too_guides():
    policy = tiny_policy()
    free, one = (policy.sample([0, 1], seed=3, cfg=cfg) for cfg in (0.0, 1.0))
    assert torch.equal(free.tokens_BL, one.tokens_BL)
    assert torch.equal(free.logp_BL, one.logp_BL)
    tokens = free.tokens_BL
    with torch.no_grad():
        model = policy.transformer
        cond, uncond = model(torch.tensor([0, 1, 4, 5]), tokens.repeat(2, 1)).double().chunk(2)
        logp_BLV = (uncond + 0.25 * (cond - uncond)).log_softmax(-1)
        wanted_BL = logp_BLV.gather(2, tokens.unsqueeze(2)).squeeze(2)
        torch.testing.assert_close(policy.token_logp([0, 1], tokens, cfg=0.25).double(), wanted_BL, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("dtype", "cfg"), [("bfloat16", 3.0)])
def test_strict_mode_holds(dtype, cfg):
    policy = tiny_policy(dtype=dtype, strict=True)
    strict.check(policy, 0.8, cfg=cfg)
    whole = policy.sample([3, 0, 2], 0.8, seed=4, cfg=cfg)
    assert torch.equal(policy.teacher_forced(whole).logp_BL, whole.logp_BL)
    alone = tiny_policy([TEXTS[0]], dtype, strict=True).sample([0], 0.8, seed=4, first_sample=1, cfg=cfg)
    assert torch.equal(alone.logp_BL[0], whole.logp_BL[1])
