"""Counts of next-token families against the published sizes, torch's own counter and numbers counted by hand."""

import pytest

from varfast.policies.nexttoken.cost import NextTokenCost, TokenizerSizes, TransformerSizes

LLAMAGEN = {  # layers, heads, width, hidden width
    "B": (12, 12, 768, 2048),
    "L": (24, 16, 1024, 2816),
    "XL": (36, 20, 1280, 3584),
    "XXL": (48, 24, 1536, 4096),
    "3B": (24, 32, 3200, 8704),
}


def llamagen(name, side=16, kv_heads=None):
    layers, heads, width, hidden = LLAMAGEN[name]
    head_dim, rows = width // heads, 16384 + 1001
    return TransformerSizes(layers, width, heads, kv_heads or heads, head_dim, hidden, 16384, side**2, rows)


TAMING = TransformerSizes(48, 1536, 24, 24, 64, 6144, 16384, 256, 16384, places=256, gated=False, biases=True)
VQ16, VQ8 = TokenizerSizes(16), TokenizerSizes(32, multipliers=(1, 2, 2, 4))
VQGAN = TokenizerSizes(16, code_width=256)


def cost(sizes, dtype="bfloat16", tokenizer=VQ16, **adapter):
    return NextTokenCost(llamagen(sizes) if isinstance(sizes, str) else sizes, tokenizer, dtype, **adapter)


@pytest.mark.parametrize(
    ("name", "parameters"),  # those of the public code's modules
    [("B", 110888448), ("L", 342910976), ("XL", 774699520), ("XXL", 1410972672), ("3B", 3096659200)],
)
def test_parameters_of_llamagen_are_those_of_the_public_models(name, parameters):
    assert cost(name).weights.parameters == cost(name).weights.trained == parameters
    # The grid is no weight.
    assert cost(llamagen(name, side=24)).weights.parameters == parameters


def test_parameters_of_taming_are_those_of_the_public_model():
    """Without the buffers of the mask."""
    assert cost(TAMING).weights.parameters == 1410640896
    assert cost(TAMING).weights.parameters + VQGAN.parameters == 1486714755


def test_parameters_of_the_tokenizers_are_those_of_the_public_ones():
    """Without the usage log of the codebook, a buffer of 65536 numbers."""
    assert (VQ16.parameters, VQ8.parameters) == (71883403, 70109835)
    assert (VQ16.image_size, VQ8.image_size, TokenizerSizes(24).image_size) == (256, 256, 384)


def test_rollout_bytes_are_those_counted_by_hand():
    """LlamaGen-L at 256 px: step i of 256 writes place i of a cache of 24 blocks, and reads those before it."""
    found = cost("L")
    of_token = 24 * 2 * 1024 * 2
    cached = sum(of_token + i * of_token for i in range(256))
    assert found.rollout.io_bytes - found.forward.io_bytes == cached == pytest.approx(3.234e9, rel=1e-3)
    # qkv 1 + 3, proj 1 + 1 widths; gate and fc1 read 1024 and write 2816 each, fc2 reads that and writes 1024.
    block = 2 * (6 * 1024 + 1024 + 3 * 2816 + 1024)
    assert found.forward.io_bytes == 256 * (24 * block + 2 * 1024 + 4 * 16384)
    # A step reads the blocks' matrices and the head in 16 bits, and the norms; no table of embeddings.
    matrices = 24 * (4 * 1024**2 + 3 * 1024 * 2816) + 1024 * 16384
    assert found.weights.read_bytes == 2 * matrices + 4 * 49 * 1024
    assert found.rollout_passes == 256
    assert found.kv_cache_bytes == 256 * of_token


def test_grouped_queries_read_a_smaller_cache():
    whole, grouped = cost("L"), cost(llamagen("L", kv_heads=4))
    assert grouped.kv_cache_bytes * 4 == whole.kv_cache_bytes
    cached = [c.rollout.io_bytes - c.forward.io_bytes for c in (whole, grouped)]
    assert cached[0] == 4 * cached[1]
    assert whole.weights.parameters - grouped.weights.parameters == 24 * 2 * 1024 * 12 * 64


def test_forward_flop_is_that_counted_by_hand():
    found = cost("L").forward.flop
    linear = 2 * 256 * 24 * (4 * 1024**2 + 3 * 1024 * 2816)
    attention = 4 * 24 * (256 * 257 / 2) * 1024
    assert found == linear + attention + 2 * 256 * 1024 * 16384
