"""Bytes that live while something runs."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """Track the bytes of storages that come to life inside, and their peak."""

    def __init__(self, known):
        super().__init__()
        self.live = {}
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if storage.data_ptr() not in self.known and key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
                    self.peak = max(self.peak, sum(self.live.values()))
        return out
