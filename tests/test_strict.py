"""run.strict: bits of the rollout, of the update, and of other batch splits.

`hostile` stands for a library that computes otherwise at every shape: on a friendly one a product that was forgotten
may agree by luck.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.init import normal_

from varfast import InputError, Policy, kernels
from varfast.kernels.selection import OPS
from varfast.models import VAR, VQVAE, VARConfig, VQVAEConfig
from varfast.policies import strict
from varfast.policies.var import transformer as var_module
from varfast.policies.var.config import VARLoRAConfig
from varfast.train import train

LABELS = [0, 1, 2, 3, 4, 0, 1, 2]


@pytest.fixture
def make_strict(make_models):
    def make(dtype="float32", device="cpu", **sizes) -> Policy:
        return Policy(*make_models(**({"depth": 2, "patch_nums": (1, 2, 3, 4)} | sizes)), device, dtype, strict=True)

    return make


@pytest.fixture
def hostile(monkeypatch):
    """Library calls whose result depends on their shape, far more than that of any library does."""

    def disturb(name, size):
        call = getattr(F, name)
        monkeypatch.setattr(F, name, lambda *a, **k: call(*a, **k) * (1.0 + 2.0**-9 * size(a[0])))

    disturb("linear", lambda x: x.numel() // x.shape[-1])
    disturb("conv2d", lambda x: x.shape[0])
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(a, b) * (1.0 + 2.0**-9 * a.shape[0]))
    disturb("scaled_dot_product_attention", lambda q: q.shape[0] + q.shape[2])
    # In place of the extension's attention, which no call of a library disturbs.
    kernels.configure(dict.fromkeys(("block_causal_attention", "cached_attention"), "reference"))
    yield
    kernels.configure({})


def same_bits(policy, temperature=0.7, cfg=0.0):
    """Rollout, teacher forcing, and any split of both."""
    whole = policy.sample(LABELS, temperature, seed=3, cfg=cfg)
    forced = policy.token_logp(whole.labels_B, whole.tokens_BL, temperature, cfg=cfg)
    assert torch.equal(forced.detach(), whole.logp_BL)
    for size in (4, 1):
        split = policy.sample(LABELS, temperature, seed=3, cfg=cfg, micro_batch=size)
        assert torch.equal(split.tokens_BL, whole.tokens_BL)
        assert torch.equal(split.logp_BL, whole.logp_BL)
        assert torch.equal(split.entropy_BL, whole.entropy_BL)
    alone = policy.token_logp(whole.labels_B[5:6], whole.tokens_BL[5:6], temperature, cfg=cfg)
    assert torch.equal(alone.detach(), whole.logp_BL[5:6])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [{}, {"shared_adaln": True}, {"qk_l2_norm": False}], ids=["d16", "d36", "no norm"])
def test_rollout_update_and_every_split_have_the_same_bits(make_strict, dtype, sizes):
    same_bits(make_strict(dtype, **sizes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_they_have_where_the_library_computes_otherwise_at_every_shape(make_strict, hostile, dtype, cfg):
    same_bits(make_strict(dtype), cfg=cfg)


MODULES = {
    "blocks.0.ada_lin.1": "output of blocks.0.ada_lin.1",
    "blocks.0.attn": "input of blocks.0.attn.proj",  # attention itself
    "blocks.0.attn.mat_qkv": "output of blocks.0.attn.mat_qkv",
    "blocks.1.attn.proj": "output of blocks.1.attn.proj",
    "blocks.1.ffn.fc1": "input of blocks.1.ffn.fc2",  # with GELU it is one op, not the module
    "blocks.1.ffn.fc2": "output of blocks.1.ffn.fc2",
    "head_nm.ada_lin.1": "output of head_nm.ada_lin.1",
    "head": "output of head",
    "word_embed": "output of word_embed",
}


@pytest.mark.parametrize(("name", "where"), MODULES.items(), ids=MODULES)
def test_check_names_the_module_that_is_not_strict(make_strict, hostile, name, where):
    policy = make_strict()
    for cfg in (0.0, 1.5):
        policy.var.get_submodule(name).strict = True
        strict.check(policy, cfg=cfg)
        policy.var.get_submodule(name).strict = False
        with pytest.raises(InputError, match=rf"does not hold here.*: the {where} of an image alone"):
            strict.check(policy, cfg=cfg)


@pytest.mark.parametrize("name", ["quant_resi.qresi_ls.0", ""], ids=["phi", "upsampling"])
def test_check_names_the_quantizer(make_strict, hostile, name):
    policy = make_strict()
    policy.vqvae.quantize.get_submodule(name).strict = False
    with pytest.raises(InputError, match="the quantizer's sum of several images has other bits"):
        strict.check(policy)


def test_log_probabilities_are_those_of_the_update_s_kernel(make_strict, monkeypatch):
    sampled = kernels.sample_tokens
    policy = make_strict()

    def by_another_sum(*arguments, **keywords):
        tokens, logp, entropy = sampled(*arguments, **keywords)
        return tokens, logp + 1e-3, entropy

    monkeypatch.setattr(kernels, "sample_tokens", by_another_sum)
    strict.check(policy)
    strict.check(policy, cfg=2.0)
    # A filtered draw is from another distribution: its log-probability is what sampling says.
    filtered = policy.sample([1, 2], 0.7, seed=0, top_k=9)
    monkeypatch.undo()
    assert torch.equal(filtered.logp_BL, policy.sample([1, 2], 0.7, seed=0, top_k=9).logp_BL + 1e-3)


def test_phi_by_patches_is_the_convolution(make_strict):
    phi = make_strict().vqvae.quantize.quant_resi.of_index(0)
    x = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    by_patches = phi(x)
    phi.strict = False
    exact = phi.double()(x.double())
    assert float((by_patches.double() - exact).abs().max()) < 2e-6


def test_gradients_are_those_without_strict(make_strict, make_policy):
    tokens = torch.randint(32, (2, 30), generator=torch.Generator().manual_seed(0))
    found = []
    for policy in (make_strict(), make_policy(depth=2, patch_nums=(1, 2, 3, 4))):
        policy.token_logp([0, 1], tokens).sum().backward()
        found.append({name: p.grad for name, p in policy.var.named_parameters()})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-4)


def test_with_an_adapter(make_strict, hostile):
    pytest.importorskip("peft")
    policy = make_strict("bfloat16")
    policy.add_lora(VARLoRAConfig(rank=2), seed=0)
    for module in policy.var.modules():
        if hasattr(module, "lora_B"):
            normal_(module.lora_B["default"].weight, std=0.1)
    same_bits(policy)


def test_kernels_of_the_gpu_interpreted(make_strict, monkeypatch):
    """Tiles and masks of the Triton path; not the tensor cores' bits."""
    if not kernels.selection.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    monkeypatch.setitem(var_module.STRICT_ATTENTION, "cpu", "triton_invariant")
    kernels.configure({op: "triton" for op in OPS if any(i.name == "triton" for i in OPS[op])})
    try:
        policy = make_strict("bfloat16", depth=1, patch_nums=(1, 3))
        assert strict.difference(policy, [0, 1], 0.7, seed=0) is None
    finally:
        kernels.configure({})


@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_train_shows_a_ratio_gap_of_zero(make_config, cfg):
    config = make_config(run__strict=True, run__dtype="bfloat16", policy__var__patch_nums=[1, 2, 3], rollout__cfg=cfg)
    assert train(config) == 0
    steps = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert [step["ratio_gap_max"] for step in steps] == [0.0] * config.run.steps


def test_train_stops_where_the_bits_differ(make_config, hostile, monkeypatch):
    monkeypatch.setattr(strict, "check", lambda policy, *_: setattr(policy.var.head, "strict", False))
    with pytest.raises(InputError, match="in step 1, .* were not those of the update: the output of head of"):
        train(make_config(run__strict=True))


def test_strict_is_refused_where_its_product_cannot_run(make_models, monkeypatch):
    monkeypatch.setitem(OPS, "invariant_linear", OPS["invariant_linear"][-1:])
    with pytest.raises(InputError, match="run.strict=true cannot run on cpu"):
        Policy(*make_models(), strict=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kernels__block_causal_attention": "sdpa"}, "leave kernels.block_causal_attention=sdpa out"),
        ({"kernels__cached_attention": "reference"}, "leave kernels.cached_attention=reference out"),
    ],
)
def test_config_refuses_what_strict_does_not_hold_with(make_config, overrides, message):
    with pytest.raises(InputError, match=message):
        make_config(run__strict=True, **overrides)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_train_on_the_gpu_shows_a_ratio_gap_of_zero(make_config, captured):
    config = make_config(run__device="cuda", run__strict=True, run__dtype="bfloat16", update__cuda_graph=captured,
                         policy__var__patch_nums=[1, 2, 3])  # fmt: skip
    assert train(config) == 0
    steps = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert [step["ratio_gap_max"] for step in steps] == [0.0] * config.run.steps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_on_the_gpu(dtype):
    config = VARConfig(depth=16 if dtype == "bfloat16" else 4)
    torch.manual_seed(0)
    var, vqvae = VAR(config).cuda().init_weights(0), VQVAE(VQVAEConfig(base_channels=32)).cuda()
    policy = Policy(var, vqvae, "cuda", dtype, strict=True)
    for cfg in (1.5, 0.0):
        strict.check(policy, 0.7, cfg=cfg)
        same_bits(policy, cfg=cfg)
    captured = policy.sample(LABELS, 0.7, seed=3)  # the third time in a row that it is so many
    policy.cuda_graph = False
    eager = policy.sample(LABELS, 0.7, seed=3)
    assert torch.equal(captured.tokens_BL, eager.tokens_BL)
    assert torch.equal(captured.logp_BL, eager.logp_BL)
