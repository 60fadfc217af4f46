import math

import pytest
import torch
from torch.nn.functional import linear, one_hot

import varfast
from varfast import InputError, Policy, load_policy
from varfast.models import KVCache
from varfast.policies.checks import check_finite
from varfast.policies.precision import Head
from varfast.randomness import Key
from varfast.types import NotFinitePolicy, Sampling

PATCH_NUMS = [(1,), (1, 2), (1, 2, 3, 4), (2, 3), (1, 3, 5)]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("patch_nums", PATCH_NUMS)
@pytest.mark.parametrize("shared_adaln", [False, True])
@torch.no_grad()
def test_sample_logp_equals_token_logp(make_policy, patch_nums, temperature, shared_adaln):
    policy = make_policy(patch_nums=patch_nums, depth=2, shared_adaln=shared_adaln)
    rollout = policy.sample([0, 1, 2, 3, 4] * 3, temperature, seed=1)
    forced = policy.token_logp(rollout.labels_B, rollout.tokens_BL, temperature)
    assert rollout.logp_BL.shape == (15, policy.var.config.num_tokens)
    assert float((forced - rollout.logp_BL).abs().max()) < 5e-5
    assert rollout.on_policy


def test_sample_and_token_logp_read_a_bias_that_the_head_left_out(make_policy, monkeypatch):
    policy = make_policy(depth=2)
    bias = policy.var.head.bias
    with torch.no_grad():
        bias.normal_(generator=torch.Generator().manual_seed(2))

    def sampled_and_forced():
        rollout = policy.sample([0, 1, 2], 0.7, seed=1)
        logp = policy.token_logp(rollout.labels_B, rollout.tokens_BL, 0.7)
        return rollout, logp, torch.autograd.grad(logp.sum(), bias)[0]

    rollout, logp, gradient = sampled_and_forced()
    # What a GPU does with 16-bit operands.
    monkeypatch.setattr(Head, "product", lambda self, x: (linear(x, self.weight), self.bias))
    apart, apart_logp, apart_gradient = sampled_and_forced()
    assert torch.equal(apart.tokens_BL, rollout.tokens_BL)
    torch.testing.assert_close(apart.logp_BL, rollout.logp_BL, rtol=0, atol=1e-5)
    torch.testing.assert_close(apart_logp, logp, rtol=0, atol=1e-5)
    assert gradient.abs().max() > 0.1
    torch.testing.assert_close(apart_gradient, gradient, rtol=0, atol=1e-4)


@torch.no_grad()
def test_token_logp_equals_the_logits_of_the_transformer_in_float64(make_policy):
    policy = make_policy(depth=2)
    tokens = torch.randint(32, (4, 14), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3])
    got = policy.token_logp(labels, tokens, 0.7)
    wide = policy.frozen_copy()
    wide.var.double().compute_dtype = torch.float64
    logits = wide.var(labels, policy.vqvae.var_input(tokens).double())
    exact = ((logits / 0.7).log_softmax(-1) * one_hot(tokens, 32)).sum(-1)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-5)


def test_token_logp_is_differentiable_and_the_vqvae_is_frozen(make_policy):
    policy = make_policy(depth=2)
    policy.token_logp([0, 1], torch.zeros(2, 14, dtype=torch.int64)).sum().backward()
    untouched = [n for n, p in policy.var.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []
    assert not any(p.requires_grad for p in policy.vqvae.parameters())


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("inference", [{}, {"cfg": 1.5, "top_k": 9, "top_p": 0.9}])
def test_sample_does_not_depend_on_the_batch_split(make_policy, micro_batch, inference):
    policy = make_policy(depth=2)
    labels = [0, 1, 2, 3, 4, 0] * 2
    whole = policy.sample(labels, 0.9, seed=5, **inference)
    split = policy.sample(labels, 0.9, seed=5, micro_batch=micro_batch, **inference)
    assert torch.equal(whole.tokens_BL, split.tokens_BL)
    torch.testing.assert_close(whole.logp_BL, split.logp_BL, rtol=0, atol=1e-5)
    calls = [policy.sample(labels[i : i + 4], 0.9, seed=5, first_sample=i, **inference) for i in (0, 4, 8)]
    assert torch.equal(whole.tokens_BL, torch.cat([call.tokens_BL for call in calls]))


def test_sample_differs_by_seed_and_step(make_policy):
    policy = make_policy()
    first = policy.sample([0] * 8, seed=0).tokens_BL
    assert torch.equal(first, policy.sample([0] * 8, seed=0).tokens_BL)
    assert not torch.equal(first, policy.sample([0] * 8, seed=1).tokens_BL)
    assert not torch.equal(first, policy.sample([0] * 8, seed=0, step=1).tokens_BL)
    assert not torch.equal(first[0], first[1])


@torch.no_grad()
def test_sample_logp_describes_the_guided_and_filtered_distribution(make_policy):
    # One scale of one token: the whole distribution can be written down.
    policy = make_policy(patch_nums=(1, 2))
    rollout = policy.sample([1] * 4000, 0.8, seed=2, cfg=2.0, top_k=5)
    first_cond = _first_logits(policy, 1)
    logits = first_cond[0, 0] / 0.8  # guidance is 0 at the first scale
    kept = logits.topk(5)
    expected = kept.values.log_softmax(-1)
    drawn = rollout.tokens_BL[:, 0]
    assert set(drawn.tolist()) <= set(kept.indices.tolist())
    position = (drawn[:, None] == kept.indices).float().argmax(1)
    torch.testing.assert_close(rollout.logp_BL[:, 0], expected[position], rtol=0, atol=1e-5)


def _first_logits(policy, label):
    x, cond = policy.var.embed_start(torch.tensor([label]))
    cache = KVCache(policy.var.config, 1, torch.float32, torch.device("cpu"))
    return policy.var.forward_scale(x, policy.var.constants(cond), 0, cache)


def test_sample_in_bfloat16_stays_near_float32(make_models):
    exact = Policy(*make_models(depth=2))
    rollout = exact.sample([0, 1, 2, 3] * 8, 1.0, seed=0)
    rough = Policy(*make_models(depth=2), dtype="bfloat16")
    with torch.no_grad():
        gap = rough.token_logp(rollout.labels_B, rollout.tokens_BL) - rollout.logp_BL
        own = rough.sample([0, 1, 2, 3] * 8, 1.0, seed=0)
        own_gap = rough.token_logp(own.labels_B, own.tokens_BL) - own.logp_BL
    assert rough.var.head.weight.dtype == torch.float32
    assert 0 < float(gap.std()) < 0.05
    assert float(own_gap.std()) < 0.05


def test_decode_encode_shapes_and_range(make_policy):
    policy = make_policy(patch_nums=(1, 2, 4))
    tokens = policy.sample([0, 1, 2], seed=0).tokens_BL
    images = policy.decode(tokens)
    assert images.shape == (3, 3, 4, 4)
    assert images.min() >= 0
    assert images.max() <= 1
    torch.testing.assert_close(images, policy.decode(tokens, micro_batch=1), rtol=0, atol=1e-5)
    assert policy.encode(images).shape == tokens.shape


def test_encode_takes_floats_in_0_to_1_alone(make_policy):
    policy = make_policy(patch_nums=(1, 2, 4))
    images = torch.rand(2, 3, 4, 4)
    assert policy.encode(images.half()).shape == (2, 21)
    for wrong, said in (
        ((images * 255).to(torch.uint8), "images are torch.uint8, want floats in [0, 1]; of bytes: images / 255"),
        (images * 255, "want [0, 1]: images / 255"),
        (images * 2 - 1, "want [0, 1]: (images + 1) / 2"),
        (images * 3 - 1.5, "want [0, 1]: clamp(0, 1)"),
        (images.log() * torch.nan, "images hold numbers from nan to nan"),
    ):
        with pytest.raises(InputError) as error:
            policy.encode(wrong)
        assert said in str(error.value)


def test_a_device_that_is_not_there_is_refused_before_files_are_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="device=cuda: this machine has 0 GPUs; use cpu"):
        load_policy("nowhere.pth", "nowhere.pth", device="cuda")
    with pytest.raises(InputError, match="device='gpu': want cpu, cuda or cuda:1"):
        load_policy("nowhere.pth", "nowhere.pth", device="gpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels_B": 3}, r"labels_B=3: want one label an image, as \[3\] or \[3\] \* 8"),
        ({"labels_B": torch.tensor(3)}, r"labels_B is \(\), want \(B,\)"),
        ({"labels_B": torch.tensor([0.5])}, "labels_B is torch.float32, want whole numbers"),
        ({"labels_B": [0, 0.5]}, "labels_B holds 0.5, want whole numbers"),
        ({"labels_B": [True]}, "labels_B holds True, want whole numbers"),
        ({"labels_B": ["tench"]}, "labels_B holds 'tench', want whole numbers"),
        ({"labels_B": [0, 5]}, "labels_B holds 5; the model has labels 0..4"),
        ({"labels_B": [-1]}, "labels_B holds -1"),
        ({"labels_B": []}, "labels_B is empty"),
        ({"temperature": 0.0}, "for greedy choice use top_k=1"),
        ({"micro_batch": 3}, "micro_batch=3 does not divide 4 images; use 2"),
        ({"cfg": -1.0}, "cfg >= 0"),
        ({"top_p": 1.5}, "0 <= top_p <= 1"),
    ],
)
def test_sample_refuses_bad_input(make_policy, arguments, message):
    with pytest.raises(InputError, match=message):
        make_policy().sample(**({"labels_B": [0, 1, 2, 3], "seed": 0} | arguments))


def test_token_logp_refuses_tokens_of_another_length(make_policy):
    with pytest.raises(InputError, match=r"tokens_BL is \(1, 5\), want \(B, 14\)"):
        make_policy().token_logp([0], torch.zeros(1, 5, dtype=torch.int64))


def test_nothing_depends_on_train_or_eval(make_policy):
    policy = make_policy(depth=2)
    tokens = torch.zeros(2, 14, dtype=torch.int64)
    policy.var.train()
    training = policy.token_logp([0, 1], tokens)
    policy.var.eval()
    assert torch.equal(training, policy.token_logp([0, 1], tokens))


def spoiled(make_policy, name="head.weight", value=math.nan, **sizes):
    policy = make_policy(**sizes)
    with torch.no_grad():
        policy.var.get_parameter(name).fill_(value)
    return policy


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("inference", [{}, {"cfg": 1.5, "top_k": 9, "top_p": 0.9}])
def test_sample_says_that_logits_are_not_finite_and_draws_tokens_of_the_vocabulary(make_policy, value, inference):
    policy = spoiled(make_policy, value=value)
    with pytest.raises(NotFinitePolicy, match="logits hold NaN or infinite numbers in 2 of 2 images, from token 0 on"):
        policy.sample([0, 1], seed=0, **inference)
    rollout, images = policy.sample_images([0, 1], Sampling(**inference), Key(0))
    assert ((rollout.tokens_BL >= 0) & (rollout.tokens_BL < 32)).all()
    assert rollout.logp_BL.isnan().all()
    with pytest.raises(NotFinitePolicy, match="logits"):
        check_finite(rollout, images)


def test_sample_counts_the_images_that_diverged(make_policy):
    policy = make_policy()
    with torch.no_grad():
        policy.var.class_emb.weight[3] = math.nan
    with pytest.raises(NotFinitePolicy, match="in 1 of 3 images"):
        policy.sample([0, 3, 1], seed=0)
    policy.sample([0, 1], seed=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("fast", [True, False])
def test_decode_says_that_the_decoder_is_not_finite(make_models, value, fast):
    policy = Policy(*make_models(), fast=fast)
    with torch.no_grad():
        policy.vqvae.decoder.conv_out.bias[1] = value
    rollout = policy.sample([0, 1], seed=0)
    with pytest.raises(NotFinitePolicy, match="decoder gives NaN or infinite numbers in 2 of 2 images"):
        policy.decode(rollout.tokens_BL)
    with pytest.raises(NotFinitePolicy, match="decoder"):
        check_finite(*policy.sample_images([0, 1], Sampling(), Key(0)))


def test_check_usable_looks_at_each_label(make_policy):
    policy = make_policy()
    with torch.no_grad():
        policy.var.class_emb.weight[3] = 3e38
    policy.check_usable([0, 1, 2, 4], 1.0, 0)
    with pytest.raises(NotFinitePolicy, match="in 1 of 2 images"):
        policy.check_usable([0, 3], 1.0, 0)


def test_check_usable_names_the_weights_and_draws_an_image(make_policy):
    make_policy().check_usable([0, 3], 1.0, 0)
    with pytest.raises(NotFinitePolicy, match="1 of .* weights hold NaN or infinite numbers, the first is class_emb"):
        spoiled(make_policy, "class_emb.weight", math.inf).check_usable([0, 3], 1.0, 0)
    with pytest.raises(NotFinitePolicy, match="logits hold NaN"):
        make_policy().check_usable([0], 1e-44, 0)
    spoiled(make_policy, "head.bias", 3e38).check_usable([0, 3], 1.0, 0)  # a sum that overflows, of numbers that do not


def test_a_policy_says_what_it_is_and_hands_its_parameters_to_an_optimizer(make_policy):
    policy = make_policy(patch_nums=(1, 2, 4))
    var, vqvae = (sum(p.numel() for p in part.parameters()) for part in policy.parts.values())
    assert repr(policy) == (
        f"VARPolicy(var {var / 1e3:.3g}k parameters, vqvae {vqvae / 1e3:.3g}k parameters, 5 labels or prompts, "
        "21 tokens, 4 px, cpu, float32)"
    )
    assert policy.dtype == torch.float32
    assert sum(p.numel() for p in policy.parameters()) == var  # the VQ-VAE is frozen
    rollout = policy.sample([0] * 8, seed=0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    (-policy.token_logp(rollout.labels_B, rollout.tokens_BL).mean()).backward()
    optimizer.step()
    policy.weights_changed()
    assert policy.token_logp(rollout.labels_B, rollout.tokens_BL).mean() > rollout.logp_BL.mean()


def test_images_become_pictures(make_policy):
    images = torch.tensor([0.0, 0.5, 0.998, 1.0]).view(4, 1, 1, 1).expand(4, 3, 4, 6)
    found = varfast.to_pil(images)
    assert [(one.size, one.mode, one.getpixel((0, 0))) for one in found] == [
        ((6, 4), "RGB", (level,) * 3) for level in (0, 128, 254, 255)
    ]
    assert varfast.picture(images, columns=2).size == (2 * 48 + 4, 2 * 32 + 4)  # enlarged eight times, gaps of 4 px
    assert varfast.picture(images[:1]).size == (48, 32)
    for wrong, said in (
        (images[0], r"images are \(3, 4, 6\), want \(B, 3, H, W\); of one image: images\[None\]"),
        (images[:, :1], r"images are \(4, 1, 4, 6\)"),
        (images * 255, r"want \[0, 1\]: images / 255"),
        (images.to(torch.uint8), "images are torch.uint8"),
    ):
        for function in (varfast.to_pil, varfast.picture):
            with pytest.raises(InputError, match=said):
                function(wrong)
