"""Counts against torch's own counter and the real modules on the meta device, and against tables counted by hand."""

import math
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from varfast import kernels
from varfast.models import VAR, VQVAE, KVCache
from varfast.policies.lora import add_lora
from varfast.policies.var.config import PRESETS, VARConfig, VARLoRAConfig, VQVAEConfig
from varfast.policies.var.cost import (
    VARCost,
    decode_count,
    decoder_layers,
    forward_flop,
    num_pairs,
    num_vqvae_parameters,
)
from varfast.policies.var.sampler import sample
from varfast.types import Sampling

from ..counting import LiveBytes, as_declared, meta


def labels(count):
    return torch.zeros(count, dtype=torch.int64, device="meta")


def inputs(sizes, count):
    return torch.zeros(count, sizes.num_tokens - sizes.patch_nums[0] ** 2, sizes.code_width, device="meta")


def cost(sizes, dtype="bfloat16", lora=None, vqvae=None):
    sizes = PRESETS.get(sizes, sizes) if isinstance(sizes, str) else sizes
    return VARCost(sizes, vqvae or VQVAEConfig(patch_nums=sizes.patch_nums), dtype, lora)


# ---------------------------------------------------------------------------------------------------------------------
# Counts

ODD = VARConfig(depth=3, patch_nums=(2, 3, 5), vocab_size=70, code_width=6, num_classes=9, mlp_ratio=2.5)
ODD_VQVAE = VQVAEConfig(
    vocab_size=70, code_width=6, patch_nums=(2, 3, 5), base_channels=32, channel_multipliers=(1, 3, 2), num_phi=0
)


@pytest.mark.parametrize("sizes", [*PRESETS.values(), ODD, ODD.model_copy(update={"qk_l2_norm": False})])
def test_weights_are_those_of_the_module(sizes):
    var, weights = meta(lambda: VAR(sizes)), cost(sizes).weights
    assert weights.parameters == sum(p.numel() for p in var.parameters())
    var.compute_dtype = torch.bfloat16
    assert sum(weights.matrices) == sum(p.numel() for p, _ in var.low_precision_copies() if p.ndim == 2)
    assert weights.frozen_bytes == sum(p.nbytes for p in var.frozen_copy().parameters())


@pytest.mark.parametrize("sizes", [VQVAEConfig(), ODD_VQVAE, VQVAEConfig(num_phi=1, num_res_blocks=1)])
def test_num_vqvae_parameters_are_those_of_the_module(sizes):
    assert num_vqvae_parameters(sizes) == sum(p.numel() for p in meta(lambda: VQVAE(sizes)).parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [PRESETS["d16"], PRESETS["d36"], ODD])
def test_forward_flop_is_what_torch_counts(sizes, dtype, on_meta):
    var = meta(lambda: VAR(sizes))
    var.compute_dtype = dtype
    with FlopCounterMode(display=False) as counter:
        var(labels(2), inputs(sizes, 2))
    ours = forward_flop(sizes)
    # torch's counter sees attention over all pairs, and counts nothing else.
    assert counter.get_total_flops() == 2 * (ours.total - ours.attention + ours.attention_dense)


@pytest.mark.parametrize("sizes", [VQVAEConfig(), ODD_VQVAE])
def test_decode_count_is_what_torch_counts(sizes):
    vqvae = meta(lambda: VQVAE(sizes))
    tokens = torch.zeros(3, sum(s * s for s in sizes.patch_nums), dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        vqvae.decode(tokens)
    # Upsampling is a product, of which nothing is counted: 7 MFLOP of 394 GFLOP.
    upsampling = 2 * sizes.code_width * sizes.patch_nums[-1] ** 2 * sum(side**2 for side in sizes.patch_nums[:-1])
    assert counter.get_total_flops() == 3 * (decode_count(sizes, "float32").flop + upsampling)


def test_backward_flop_is_twice_the_forward(on_meta):
    """But for attention, 5 products where 2 are counted forward, and for what reaches no weight."""
    sizes = PRESETS["d16"]
    var = meta(lambda: VAR(sizes))
    with FlopCounterMode(display=False) as counter:
        var(labels(1), inputs(sizes, 1)).sum().backward()
    ours = forward_flop(sizes)
    without_attention = counter.get_total_flops() - 3 * ours.attention_dense
    assert without_attention == pytest.approx(3 * (ours.total - ours.attention), rel=2e-3)


ALL_TARGETS = ("mat_qkv", "proj", "fc1", "fc2", "ada_lin")
ADAPTERS = [VARLoRAConfig(), VARLoRAConfig(rank=64, targets=ALL_TARGETS)]


def adapted(sizes, dtype, lora):
    var = meta(lambda: VAR(sizes))
    var.compute_dtype = getattr(torch, dtype)
    if lora is not None:
        add_lora(var, lora, 0)
    return var


@pytest.mark.parametrize("lora", [*ADAPTERS, VARLoRAConfig(rank=3, targets=("proj", "fc1"))])
@pytest.mark.parametrize("sizes", [PRESETS["d16"], PRESETS["d36"], ODD])
def test_counts_with_an_adapter_are_what_torch_counts(sizes, lora, on_meta):
    var = adapted(sizes, "float32", lora)
    trained = sum(p.numel() for p in var.parameters() if p.requires_grad)
    assert cost(sizes, lora=lora).weights.trained == trained
    with FlopCounterMode(display=False) as counter:
        var(labels(2), inputs(sizes, 2))
    ours = forward_flop(sizes, lora)
    assert counter.get_total_flops() == 2 * (ours.total - ours.attention + ours.attention_dense)


@pytest.mark.parametrize(
    ("preset", "linear", "head", "attention", "dense", "total"),
    [("d16", 273.8, 5.7, 18.8, 30.3, 298.5), ("d30", 1804.9, 10.7, 66.0, 106.5, 1882.9)],
)
def test_forward_flop_is_that_of_the_table_counted_by_hand(preset, linear, head, attention, dense, total):
    flop = forward_flop(PRESETS[preset])
    ours = (flop.linear, flop.head, flop.attention, flop.attention_dense, flop.total - flop.embed)
    # The table leaves out the embedding of codes: 0.04 and 0.08 GFLOP.
    assert [round(x / 1e9, 1) for x in ours] == [linear, head, attention, dense, total]
    assert num_pairs(PRESETS[preset]) == 286_434


def test_decode_has_212_gflop_at_full_resolution():
    last = [x for x in decoder_layers(VQVAEConfig()) if x.elements >= 2 * 256 * 256 * 160 or x.flop == 566231040]
    assert round(sum(x.flop for x in last) / 1e9) == 212


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("sizes", [VQVAEConfig(), VQVAEConfig(base_channels=32, channel_multipliers=(1, 2))])
def test_decode_activations_are_what_exists_at_once(sizes):
    vqvae = meta(lambda: VQVAE(sizes)).requires_grad_(False)
    tokens = torch.zeros(1, 680, dtype=torch.int64, device="meta")
    with torch.no_grad(), LiveBytes() as live:
        vqvae.decode(tokens)
    assert live.peak <= cost("d16", "float32", vqvae=sizes).decode_activation_bytes <= 1.1 * live.peak


@as_declared
@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
@pytest.mark.parametrize(
    ("preset", "dtype", "lora"),
    [
        ("d16", "bfloat16", None),
        ("d16", "float32", None),
        ("d30", "bfloat16", None),
        ("d16", "bfloat16", VARLoRAConfig(rank=64)),
        ("d16", "float32", VARLoRAConfig()),
    ],
)
def test_update_activations_are_what_exists_at_once(preset, dtype, lora, checkpointing, on_meta):
    """Forward and backward; the gradient of the logits takes their place, as the kernel's does."""
    on_meta("triton")
    sizes = PRESETS[preset]
    var = adapted(sizes, dtype, lora)
    for parameter in (p for p in var.parameters() if p.requires_grad):  # they are there from the first micro-batch on
        parameter.grad = torch.zeros_like(parameter)
    var.low_precision_copies()
    peaks = []
    for count in (32, 64):  # the difference leaves out what is held once
        with LiveBytes() as live:
            logits = var(labels(count), inputs(sizes, count), checkpointing=checkpointing)
            gradient = logits.detach()
            logits.backward(gradient)
        peaks.append(live.peak)
        del logits, gradient
    ours = cost(preset, dtype, lora).update_activation_bytes(checkpointing)
    assert ours == pytest.approx((peaks[1] - peaks[0]) / 32, rel=0.05)
    held_once = 2 * peaks[0] - peaks[1]
    # The gradient of the largest matrix at work alone, in 16 and in 32 bits.
    assert held_once < (20e6 if dtype == "float32" else 6 * max(p.numel() for p in var.parameters()))


@as_declared
@pytest.mark.parametrize(
    ("depth", "dtype", "lora"),
    [(16, "bfloat16", None), (16, "float32", None), (30, "bfloat16", None), (16, "bfloat16", VARLoRAConfig())],
)
def test_rollout_activations_are_what_exists_at_once(depth, dtype, lora, on_meta):
    on_meta("triton")
    sizes = VARConfig(depth=depth, patch_nums=(1, 13, 16))
    ours = cost(sizes, dtype, lora)
    var, vqvae = adapted(sizes, dtype, lora), meta(lambda: VQVAE(ours.vqvae))
    var.low_precision_copies()  # they are there all the time
    key = torch.zeros(3, dtype=torch.int64, device="meta")
    peaks = []
    for count in (24, 32):
        with LiveBytes() as live:
            sample(var, vqvae, labels(count), key, Sampling(0.7))
        peaks.append(live.peak)
    cache = KVCache(sizes, 1, var.compute_dtype, torch.device("meta"))
    held = cache._k.nbytes + cache._v.nbytes
    beside_cache = (peaks[1] - peaks[0]) / 8 - held
    assert ours.rollout_activation_bytes == pytest.approx(beside_cache, rel=0.05)
    # All blocks share the room for the last scale.
    last_scale = 2 * 16**2 * sizes.width * var.compute_dtype.itemsize
    assert ours.kv_cache_bytes == held - last_scale


def test_kv_cache_is_that_of_the_table():
    """22.8 and 80.2 GB for 512 images, for all 680 tokens."""
    for preset, table in (("d16", 22.8), ("d30", 80.2)):
        assert round(512 * cost(preset).kv_cache_bytes * 680 / 424 / 1e9, 1) == table


@pytest.mark.gpu
def test_update_activations_are_what_the_allocator_hands_out():
    sizes = PRESETS["d16"]
    with torch.device("cuda"):
        var = VAR(sizes).init_weights(0)
    var.compute_dtype = torch.bfloat16
    peaks = []
    for count in (8, 8, 16):  # the first makes the gradients
        torch.cuda.reset_peak_memory_stats()
        logits = var(torch.zeros(count, dtype=torch.int64, device="cuda"), torch.zeros(count, 679, 32, device="cuda"))
        tokens = torch.zeros(count, 680, dtype=torch.int64, device="cuda")
        logp, _ = kernels.selective_log_softmax(logits, tokens, consume_logits=True)
        del logits
        logp.sum().backward()
        del logp
        peaks.append(torch.cuda.max_memory_allocated())
    assert cost("d16").update_activation_bytes("none") == pytest.approx((peaks[2] - peaks[1]) / 8, rel=0.1)


@pytest.mark.parametrize("sizes", [PRESETS["d16"], PRESETS["d36"], ODD])
def test_moment_bytes_with_8_bits_are_counted_by_tensor(sizes):
    """The optimizer's own state: tests/test_learner.py."""
    expected = 0
    for name, parameter in meta(lambda: VAR(sizes)).named_parameters():
        n = parameter.numel()
        float32 = n < 4096 or name in ("class_emb.weight", "lvl_embed.weight")
        expected += 2 * (4 * n if float32 else n + 4 * math.ceil(n / 256))
    assert cost(sizes).weights.moment_bytes("adamw8bit") == expected


def test_held_weights_with_an_adapter_are_those_of_the_module():
    var = adapted(PRESETS["d16"], "bfloat16", VARLoRAConfig())
    ours = cost("d16", "bfloat16", VARLoRAConfig()).weights
    assert ours.held_bytes == sum(p.nbytes for p in var.parameters())
    trained = sum(p.nbytes for p in var.parameters() if p.requires_grad)
    assert (4 * ours.trained, ours.moment_bytes("adamw"), ours.copy_bytes) == (trained, 2 * trained, trained // 2)
    wide = cost("d16", "float32", VARLoRAConfig()).weights
    assert wide.held_bytes == sum(p.nbytes for p in adapted(PRESETS["d16"], "float32", VARLoRAConfig()).parameters())
    assert wide.copy_bytes == 0


@pytest.mark.parametrize("lora", ADAPTERS)
def test_backward_flop_with_an_adapter_is_what_torch_counts(lora, on_meta):
    """4 N an image and token instead of 6 N, and the adapter's own; the first block's qkv product is counted too."""
    sizes = PRESETS["d16"]
    var = adapted(sizes, "float32", lora)
    with FlopCounterMode(display=False) as counter:
        var(labels(1), inputs(sizes, 1)).sum().backward()
    ours, flop = cost(sizes, lora=lora), forward_flop(sizes, lora)
    without_attention = counter.get_total_flops() - 3 * flop.attention_dense
    counted = ours.forward.flop + ours.backward.flop
    assert counted - 3 * flop.attention == pytest.approx(without_attention, rel=1e-2)
    assert ours.base.forward.flop == forward_flop(sizes).total
    again = flop.linear + flop.attention + flop.adaln
    assert ours.recomputed_share("full") * flop.total == pytest.approx(again, rel=1e-6)


def test_counting_imports_no_pytorch():
    code = "import sys, varfast.policies.var.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
