"""Strict mode without a GPU: variants of a kernel that rollout and update launch compile to the same arithmetic.

In a process of its own: here the kernels may be interpreted, and then they cannot be compiled.
"""

import os
import subprocess
import sys
import textwrap

SCRIPT = textwrap.dedent(
    """
    import re
    from dataclasses import replace

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from varfast.kernels import adaln, attention_triton, matmul, qkv
    from varfast.kernels.settings import AS_WRITTEN

    def items(module, text):
        return [item for item in module.ahead_of_time() if text in item.name]

    def arithmetic(item, one=(), sixteen=(), constants=None, **options):
        '''Floating-point instructions of the PTX in their order, registers left out.'''
        names, signature = item.kernel.arg_names, dict(item.signature)
        values = dict(item.constants) | (constants or {}) | dict.fromkeys(one, 1)
        signature |= dict.fromkeys(one, "constexpr")
        divisible = {n for n in names if signature[n].startswith("*") or item.attributes.get(n) == 16} | set(sixteen)
        source = ASTSource(
            fn=item.kernel,
            signature={n: signature[n] for n in names},
            constexprs={(names.index(n),): value for n, value in values.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
        )
        options = {"num_warps": item.num_warps, "num_stages": item.num_stages} | options
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        found = re.findall(r"^\\s*(?:@!?%p\\d+ )?([a-z][\\w.]*)", ptx, re.M)
        found = [i for i in found if not i.startswith(("mov", "ld", "st"))]
        return [i for i in found if re.search(r"f32|bf16|shfl|wgmma\\.mma", i)]

    # The first scale has one token, others multiples of 16: Triton compiles each of these lengths anew.
    for item in (*items(adaln, "residual+norm forward bf16 C=1024"), *items(qkv, "to cache bf16 H=16")):
        plain = arithmetic(item)
        assert len(plain) > 50, item.name
        assert arithmetic(item, one=["length"]) == plain, item.name
        assert arithmetic(item, sixteen=["length"]) == plain, item.name
    (to_cache,), (split,) = items(qkv, "to cache bf16 H=16"), items(qkv, "split_heads forward bf16 H=16")
    assert arithmetic(split) == arithmetic(to_cache)

    # GELU with and without its input kept: update and rollout.
    (gelu,) = items(matmul, "fc1 + GELU bf16")
    kept = arithmetic(gelu, **AS_WRITTEN)
    without = arithmetic(gelu, constants={"KEEP_BEFORE": False}, **AS_WRITTEN)
    rest = [i for i in kept if not i.startswith("cvt")]
    assert rest == [i for i in without if not i.startswith("cvt")] and any(i.startswith("wgmma") for i in rest)

    # Masked and unmasked tiles of keys: rounded step by step in both, or fused in one alone.
    forward = items(attention_triton, "attention forward bf16")[0]
    cached = items(attention_triton, "attention cached bf16")[0]
    cached = replace(
        cached, constants=forward.constants, num_warps=forward.num_warps, num_stages=forward.num_stages
    )
    for item in (forward, cached):
        assert "fma.rn.f32" in arithmetic(item), item.name
        assert "fma.rn.f32" not in arithmetic(item, **AS_WRITTEN), item.name
    print("equal")
    """
)


def test_variants_that_rollout_and_update_launch_have_the_same_arithmetic():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "equal"
