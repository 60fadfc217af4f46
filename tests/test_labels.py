import torch
from scipy import stats

from varfast.config import RolloutConfig
from varfast.labels import draw_labels, label_pool


def test_label_pool_all_list_and_share():
    assert label_pool(RolloutConfig(), 5, seed=0) == [0, 1, 2, 3, 4]
    assert label_pool(RolloutConfig(labels=[3, 1, 3]), 5, seed=0) == [1, 3]
    half = label_pool(RolloutConfig(label_share=0.5), 1000, seed=0)
    assert len(half) == len(set(half)) == 500
    assert half == label_pool(RolloutConfig(label_share=0.5), 1000, seed=0)
    assert half != label_pool(RolloutConfig(label_share=0.5), 1000, seed=1)


def test_draw_labels_uniform_and_keyed_by_step():
    pool = [2, 5, 7]
    drawn = torch.stack([draw_labels(pool, 32, seed=0, step=step) for step in range(200)])
    counts = [int((drawn == label).sum()) for label in pool]
    assert sum(counts) == drawn.numel()
    assert stats.chisquare(counts).pvalue > 1e-3
    assert torch.equal(drawn[7], draw_labels(pool, 32, seed=0, step=7))
    assert not torch.equal(drawn[7], drawn[8])
