"""Equal to the public implementation: tests/data holds what it computes."""

import pytest
import torch

from varfast import Policy
from varfast.models import PRESETS, VAR, VQVAE, VQVAEConfig


def largest_difference(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())


@torch.no_grad()
def test_var_logits_equal_the_public_model(golden):
    logits = golden.var(golden.labels, golden.vqvae.var_input(golden.tokens))
    assert largest_difference(logits, golden.logits) < 2e-5


@torch.no_grad()
def test_vqvae_equals_the_public_model(golden):
    assert largest_difference(golden.vqvae.var_input(golden.tokens), golden.var_input) < 1e-5
    assert largest_difference(golden.vqvae.decode(golden.tokens), golden.image) < 1e-4
    assert torch.equal(golden.vqvae.encode(golden.encode_input), golden.encode_tokens)


@pytest.mark.parametrize("cfg", [0.0, 1.5, 4.0])
def test_greedy_sampling_equals_the_public_model(golden, cfg):
    policy = Policy(golden.var, golden.vqvae)
    rollout = policy.sample(golden.labels, cfg=cfg, top_k=1, seed=0)
    assert largest_difference(policy.decode(rollout.tokens_BL), getattr(golden, f"greedy_cfg{cfg}_image")) < 1e-4
    assert not rollout.on_policy


def test_parameter_counts_equal_the_public_models(golden):
    counts = [sum(p.numel() for p in model.parameters()) for model in (golden.var, golden.vqvae)]
    assert counts == golden.params


@pytest.mark.parametrize(
    ("preset", "billions"), [("d16", 0.310283520), ("d20", 0.6), ("d24", 1.0), ("d30", 2.0), ("d36", 2.3)]
)
def test_presets_build_on_the_meta_device(preset, billions):
    with torch.device("meta"):
        count = sum(p.numel() for p in VAR(PRESETS[preset]).parameters())
    exact = preset == "d16"
    assert count == 310_283_520 if exact else count / 1e9 == pytest.approx(billions, abs=0.06)


def test_public_vqvae_has_its_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in VQVAE(VQVAEConfig()).parameters()) == 108_948_355


def test_public_names():
    with torch.device("meta"):
        var, saln = VAR(PRESETS["d16"]).state_dict(), VAR(PRESETS["d36"]).state_dict()
        vqvae = VQVAE(VQVAEConfig()).state_dict()
    assert tuple(var["attn_bias_for_masking"].shape) == (1, 1, 680, 680)
    assert tuple(var["blocks.15.attn.scale_mul_1H11"].shape) == (1, 16, 1, 1)
    assert tuple(var["blocks.0.ada_lin.1.weight"].shape) == (6144, 1024)
    assert tuple(var["head_nm.ada_lin.1.weight"].shape) == (2048, 1024)
    assert tuple(saln["shared_ada_lin.1.weight"].shape) == (6 * 2304, 2304)
    assert tuple(saln["blocks.35.ada_gss"].shape) == (1, 1, 6, 2304)
    assert tuple(vqvae["quantize.quant_resi.qresi_ls.3.weight"].shape) == (32, 32, 3, 3)
    assert tuple(vqvae["quantize.ema_vocab_hit_SV"].shape) == (10, 4096)
    assert {"encoder.down.3.downsample.conv.bias", "encoder.down.4.attn.1.qkv.weight"} <= set(vqvae)
    assert {"decoder.up.4.attn.2.proj_out.weight", "decoder.up.1.upsample.conv.weight"} <= set(vqvae)
    assert {"decoder.mid.attn_1.norm.weight", "encoder.down.2.block.0.nin_shortcut.weight"} <= set(vqvae)


def test_buffers_are_the_scale_mask():
    var = VAR(PRESETS["d16"].model_copy(update={"depth": 1, "patch_nums": (1, 2)}))
    assert var.lvl_1L.tolist() == [[0, 1, 1, 1, 1]]
    mask = var.attn_bias_for_masking[0, 0]
    assert mask[0].tolist() == [0.0, *[-torch.inf] * 4]
    assert torch.equal(mask[1:], torch.zeros(4, 5))
