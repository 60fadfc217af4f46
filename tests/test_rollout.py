import pytest
import torch

from varfast import Policy
from varfast.kernels.selection import OPS, configure
from varfast.policies.checks import DTYPES
from varfast.policies.var.config import VARLoRAConfig
from varfast.randomness import Key
from varfast.types import Sampling

SIZES = [
    {"depth": 2, "patch_nums": (1, 2, 3, 4)},
    {"depth": 3, "patch_nums": (2, 3, 5), "vocab_size": 37, "shared_adaln": True},
    {"depth": 1, "patch_nums": (1,), "qk_l2_norm": False},
]


@pytest.fixture
def plain_ops():
    """Every op in plain PyTorch."""
    configure(dict.fromkeys(OPS, "reference"))
    yield
    configure({})


def pair(make_models, sizes, dtype, device="cpu", lora=None):
    for fast in (True, False):
        policy = Policy(*make_models(**sizes), device=device, dtype=dtype, fast=fast)
        if lora is not None:
            policy.add_lora(lora, seed=0)
            for name, parameter in policy.var.named_parameters():
                if ".lora_B." in name:  # at first 0: no adapter to be seen
                    torch.nn.init.constant_(parameter, 0.02)
        yield policy


LORA = [None, VARLoRAConfig(rank=2, targets=("mat_qkv", "fc1", "ada_lin"))]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("inference", [{}, {"cfg": 1.5, "top_k": 9, "top_p": 0.9}])
@pytest.mark.parametrize("lora", LORA)
def test_fast_rollout_equals_the_eager_one(make_models, plain_ops, sizes, dtype, inference, lora):
    fast, eager = pair(make_models, sizes, dtype, lora=lora)
    for step in range(3):
        ours, theirs = (p.sample([0, 1, 2, 3] * 3, 0.8, seed=1, step=step, **inference) for p in (fast, eager))
        assert torch.equal(ours.tokens_BL, theirs.tokens_BL)
        assert torch.equal(ours.logp_BL, theirs.logp_BL)
        assert torch.equal(ours.entropy_BL, theirs.entropy_BL)
        with torch.no_grad():  # new weights, of every kind, reach the next rollout
            for mine, other in zip(fast.var.parameters(), eager.var.parameters(), strict=True):
                mine.mul_(1.05)
                other.mul_(1.05)


def test_sample_images_are_the_decoded_rollout(make_models):
    policy = Policy(*make_models(depth=2))
    rollout, images = policy.sample_images([0, 1, 2, 3], Sampling(0.9), Key(3), micro_batch=2)
    assert torch.equal(rollout.tokens_BL, policy.sample([0, 1, 2, 3], 0.9, seed=3).tokens_BL)
    torch.testing.assert_close(images, policy.decode(rollout.tokens_BL), rtol=0, atol=1e-5)


def test_decode_in_parts_equals_the_whole(make_models):
    policy = Policy(*make_models(depth=2))
    tokens_BL = policy.sample([0, 1, 2, 3, 4], 0.9, seed=3).tokens_BL
    whole = policy.decode(tokens_BL)
    policy._decodable = 2
    torch.testing.assert_close(policy.decode(tokens_BL), whole, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("lora", LORA)
def test_captured_rollout_equals_the_eager_one(make_models, sizes, dtype, lora):
    """The first call runs eagerly, the second is captured, the others replayed, with other keys, labels and weights."""
    fast, eager = pair(make_models, sizes, dtype, "cuda", lora)
    seen = []
    for step in range(4):
        labels = [(i + step) % 5 for i in range(12)]
        ours, theirs = (p.sample(labels, 0.8, seed=1, step=step, micro_batch=4) for p in (fast, eager))
        assert torch.equal(ours.tokens_BL, theirs.tokens_BL)
        assert torch.equal(ours.logp_BL, theirs.logp_BL)
        seen.append(ours.tokens_BL)
        with torch.no_grad():
            for mine, other in zip(fast.var.parameters(), eager.var.parameters(), strict=True):
                mine.mul_(1.05)
                other.mul_(1.05)
    assert fast._sampler._graph is not None
    assert not torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[3][:4], seen[3][4:8])


@pytest.mark.gpu
def test_a_rollout_without_a_graph_keeps_no_memory(make_models):
    policy = Policy(*make_models(depth=2), device="cuda", dtype="bfloat16")
    policy.cuda_graph = False
    policy.sample([0] * 64, 0.7, seed=0)  # makes the copy in 16 bits, tables and workspaces
    before = torch.cuda.memory_allocated()
    for step in range(3):
        policy.sample([0] * 64, 0.7, seed=0, step=step)
    assert policy._sampler._graph is None
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_rollout_waits_for_nothing_on_the_gpu(make_models):
    policy = Policy(*make_models(depth=2), device="cuda", dtype="bfloat16")
    labels = torch.arange(8, device="cuda") % 5
    for step in range(3):
        policy.sample_images(labels, Sampling(0.7), Key(0, step), micro_batch=4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy.sample_images(labels, Sampling(0.7), Key(0, 3), micro_batch=4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("inference", [{}, {"cfg": 1.5, "top_k": 9}])
@pytest.mark.parametrize("fast", [True, False])
def test_a_kept_input_is_what_an_update_would_compute_again(make_models, fast, inference):
    policy = Policy(*make_models(depth=2, patch_nums=(2, 3, 5)), fast=fast)
    rollout, images = policy.sample_images([0, 1, 2, 3], Sampling(0.9, **inference), Key(3), keep_input=True)
    assert rollout.teacher_input.shape == (4, 34, 8)
    assert torch.equal(rollout.teacher_input, policy.teacher_input(rollout.tokens_BL))
    assert torch.equal(images, policy.decode(rollout.tokens_BL))
    index = torch.tensor([3, 1])
    assert torch.equal(rollout.rows(index).teacher_input, rollout.teacher_input[index])
    in_parts, _ = policy.sample_images([0, 1, 2, 3], Sampling(0.9, **inference), Key(3), micro_batch=2, keep_input=True)
    torch.testing.assert_close(in_parts.teacher_input, rollout.teacher_input, rtol=0, atol=1e-5)
    without, _ = policy.sample_images([0, 1], Sampling(0.9, **inference), Key(3))
    assert without.teacher_input is policy.sample([0, 1], 0.9, seed=3, **inference).teacher_input is None
    assert without.rows(index[1:]).teacher_input is None


def test_a_rollout_for_images_looks_every_scale_up_once(make_models, monkeypatch):
    policy = Policy(*make_models(depth=1))
    scales = []
    of_scale = policy.vqvae.quantize.contribution
    monkeypatch.setattr(policy.vqvae.quantize, "contribution", lambda t, s: (scales.append(s), of_scale(t, s))[1])
    policy.sample_images([0, 1], Sampling(0.9), Key(3))
    assert scales == [0, 1, 2]
    policy.sample([0, 1], 0.9, seed=3)
    assert scales == [0, 1, 2, 0, 1]


@pytest.mark.gpu
def test_captured_decode_equals_the_eager_one(make_models):
    captured, eager = (Policy(*make_models(depth=2), device="cuda", dtype="bfloat16") for _ in range(2))
    eager.cuda_graph = False
    for step in range(3):
        rollout = eager.sample([0, 1, 2, 3] * 20, 0.8, seed=1, step=step)
        assert torch.equal(captured.decode(rollout.tokens_BL), eager.decode(rollout.tokens_BL, micro_batch=32))
    assert eager._pixels._graph is None
    assert captured._pixels._graph[0] == 32


@pytest.mark.gpu
@pytest.mark.parametrize("keep_input", [False, True])
def test_captured_rollout_keeps_what_the_eager_one_does(make_models, keep_input):
    fast, eager = pair(make_models, SIZES[0], "bfloat16", "cuda")
    for step in range(4):
        ours, theirs = (
            p.sample_images([0, 1] * 4, Sampling(0.8), Key(1, step), keep_input=keep_input) for p in (fast, eager)
        )
        assert torch.equal(ours[0].tokens_BL, theirs[0].tokens_BL)
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=0.05)
        if keep_input:
            assert torch.equal(ours[0].teacher_input, theirs[0].teacher_input)
