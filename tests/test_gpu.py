"""What only a GPU can show. Skipped, not passed, where there is none."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from varfast import Policy
from varfast.kernels import sample_tokens
from varfast.randomness import Key
from varfast.train import train
from varfast.types import Batch, Sampling

from .learners import make_learner

pytestmark = pytest.mark.gpu


def test_sample_tokens_on_the_gpu_equals_the_cpu():
    logits = 4 * torch.randn(16, 100, 4096, generator=torch.Generator().manual_seed(0))
    key = torch.tensor([3, 2, 1])
    on_cpu = sample_tokens(logits, key, 5, 0.7)
    on_gpu = sample_tokens(logits.cuda(), key.cuda(), 5, 0.7)
    assert float((on_cpu[0] == on_gpu[0].cpu()).float().mean()) > 0.999  # but for draws within rounding of a boundary
    same = on_cpu[0] == on_gpu[0].cpu()
    torch.testing.assert_close(on_gpu[1].cpu()[same], on_cpu[1][same], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.3)])
@torch.no_grad()
def test_rollout_logp_equals_teacher_forced_on_the_gpu(make_models, dtype, tolerance):
    policy = Policy(*make_models(patch_nums=(1, 2, 3, 4, 5, 6, 8), depth=4), device="cuda", dtype=dtype)
    rollout = policy.sample([0, 1, 2, 3] * 8, 0.7, seed=0)
    forced = policy.token_logp(rollout.labels_B, rollout.tokens_BL, 0.7)
    assert float((forced - rollout.logp_BL).abs().max()) < tolerance


def test_tokens_are_those_of_the_interpreter_for_the_same_seed(tmp_path):
    logits = 4 * torch.randn(4, 40, 4096, generator=torch.Generator().manual_seed(1))
    key = torch.tensor([5, 6, 7])
    torch.save({"logits": logits, "key": key}, tmp_path / "given.pt")
    code = (
        "import sys, torch; from varfast.kernels import sample_tokens; x = torch.load(sys.argv[1]); "
        "torch.save(sample_tokens(x['logits'], x['key'], 9, 0.7, impl='triton')[0], sys.argv[2])"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    files = [str(tmp_path / name) for name in ("given.pt", "tokens.pt")]
    subprocess.run([sys.executable, "-c", code, *files], env=environment, check=True)
    on_gpu, _, _ = sample_tokens(logits.cuda(), key.cuda(), 9, 0.7, impl="triton")
    assert torch.equal(torch.load(files[1]), on_gpu.cpu())


def test_update_waits_for_the_device_as_often_for_eight_minibatches_as_for_one(make_models):
    policy = Policy(*make_models(depth=2), device="cuda", dtype="bfloat16")
    rollout = policy.sample([0, 1] * 8, 0.7, seed=0)
    scored = Batch.of(rollout, torch.randn(16, device="cuda"))
    counts = []
    for minibatch in (2, 16):
        learner = make_learner(policy, minibatch=minibatch)
        learner.step(scored, 0)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                learner.step(scored, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchron" in str(warning.message) for warning in caught))
    assert 0 < counts[0] == counts[1] <= 4


def test_decoding_beside_the_rollout_takes_one_stream_for_all_steps(make_models):
    policy = Policy(*make_models(depth=2), device="cuda", dtype="bfloat16")
    policy.sample_images([0, 1, 2, 3], Sampling(0.7), Key(0), micro_batch=2)
    stream = policy._pixels._stream
    policy.sample_images([0, 1, 2, 3], Sampling(0.7), Key(1), micro_batch=2)
    assert policy._pixels._stream is stream


def test_train_on_the_gpu(make_config):
    assert train(make_config(run__device="cuda")) == 0
