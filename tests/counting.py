"""Counting on the meta device, where models have shapes and no numbers: see tests/models/test_cost.py."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from varfast.kernels.selection import INTERPRETED

as_declared = pytest.mark.skipif(not INTERPRETED, reason="the kernels' shapes are asked for where they are interpreted")


def meta(make):
    with torch.device("meta"):
        return make()


class LiveBytes(TorchDispatchMode):
    """The most bytes there were at once in storages that ops made."""

    def __init__(self):
        super().__init__()
        self.storages, self.bound, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.bound += storage.nbytes()
        if self.bound > self.peak:
            self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
            self.bound = sum(size for _, size in self.storages.values())
            self.peak = max(self.peak, self.bound)
        return out
