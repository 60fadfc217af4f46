"""Strict mode without a GPU: what rollout and update launch of one op compiles to the same arithmetic.

Triton compiles an op anew for a length of 1, for multiples of 16 and for others, and for what the update keeps for its
backward pass. In a process of its own: here the kernels may be interpreted, and then they cannot be compiled.
"""

import os
import subprocess
import sys
import textwrap

SCRIPT = textwrap.dedent(
    """
    import re
    from functools import partial

    import torch

    from varfast import kernels
    from varfast.kernels.aot import binary, recorded

    BATCH, WIDTH, HEADS, KEYS = 2, 1024, 16, 680
    ENDS = (1, 5, 14, 30, 55, 91, 155, 255, 424, 680)
    LENGTHS = (1, 36, 256)  # of scales: a constant to the compiler, any number, a multiple of 16

    def empty(*shape, dtype=torch.bfloat16, grad=False):
        return torch.empty(shape, dtype=dtype, requires_grad=grad)

    def of_condition():
        return empty(BATCH, 6 * WIDTH).view(BATCH, 6, WIDTH).unbind(1)

    def residual_norm(length):
        x, branch, (gate, scale, shift, *_) = empty(BATCH, length, WIDTH), empty(BATCH, length, WIDTH), of_condition()
        bias = empty(WIDTH, dtype=torch.float32)
        kernels.gated_residual_norm(x, branch, gate, scale, shift, bias_C=bias, impl="triton")

    def norm(length):
        kernels.layer_norm_modulate(empty(BATCH, length, WIDTH), *of_condition()[2:4], impl="triton")

    def split(length):
        bias = empty(3 * WIDTH, dtype=torch.float32)
        if length == KEYS:
            kernels.split_heads(empty(BATCH, length, 3 * WIDTH, grad=True), HEADS, True, bias, impl="triton")
        else:
            k, v = empty(2, BATCH, HEADS, KEYS, 64).unbind()
            qkv = empty(BATCH, length, 3 * WIDTH)
            kernels.split_heads_to_cache(qkv, HEADS, True, k, v, KEYS - length, bias, impl="triton")

    def log_softmax(length):
        logits = empty(BATCH, length, 4096, dtype=torch.float32, grad=length == KEYS)
        kernels.selective_log_softmax(logits, torch.zeros(BATCH, length, dtype=torch.int64), 0.7, impl="triton")

    def linear_gelu(length):
        weight = empty(4 * WIDTH, WIDTH, grad=length == KEYS)
        kernels.invariant_linear(empty(BATCH, length, WIDTH), weight, empty(4 * WIDTH), gelu=True, impl="triton")

    def attention(length):
        scale = torch.ones(HEADS)
        q, k, v = (empty(BATCH, HEADS, rows, 64) for rows in (length, KEYS, KEYS))
        if length == KEYS:
            kernels.block_causal_attention(q, k, v, ENDS, scale, impl="triton_invariant")
        else:
            kernels.cached_attention(q, k, v, KEYS, scale, impl="triton_invariant")

    def arithmetic(item):
        '''Floating-point instructions of the PTX in their order, but for those that only move or store.'''
        found = re.findall(r"^\\s*(?:@!?%p\\d+ )?([a-z][\\w.]*)", binary(item).asm["ptx"], re.M)
        found = [i for i in found if not i.startswith(("mov", "ld", "st"))]
        return [i for i in found if re.search(r"f32|bf16|shfl|wgmma\\.mma", i)]

    for op in (residual_norm, norm, split, log_softmax, linear_gelu):
        binaries = {}
        for length in (*LENGTHS, KEYS):
            for item in recorded(op.__name__, partial(op, length)):
                binaries.setdefault(item.compiled, item)
        lists = [arithmetic(item) for item in binaries.values()]
        if op is linear_gelu:  # the update rounds what GELU is applied to, to keep it
            lists = [[i for i in each if not i.startswith("cvt")] for each in lists]
        assert len(lists) > 1 or op is log_softmax, op.__name__
        assert len(lists[0]) > 30 and all(each == lists[0] for each in lists), op.__name__

    # Masked and unmasked tiles of keys are rounded step by step; fused, they would be in one of the two loops.
    shapes = set()
    for length in (*LENGTHS, KEYS):
        for item in recorded("attention", partial(attention, length)):
            assert not [i for i in arithmetic(item) if i.startswith("fma")], length
            shapes.add((item.constants["BLOCK_M"], item.constants["BLOCK_N"], item.num_warps))
    assert len(shapes) == 1, shapes
    print("equal")
    """
)


def test_what_rollout_and_update_launch_has_the_same_arithmetic():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "equal"
