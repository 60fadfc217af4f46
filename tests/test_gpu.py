"""What only a GPU can show. Skipped, not passed, where there is none."""

import pytest
import torch

from varfast import Policy
from varfast.kernels import sample_tokens
from varfast.train import train

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


def test_train_on_the_gpu(make_config):
    assert train(make_config(run__device="cuda")) == 0
