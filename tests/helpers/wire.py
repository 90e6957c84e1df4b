"""What a block of code hands to collectives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = {
    "allreduce_": "all_reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "alltoall_base_": "all_to_all",
    "_allgather_base_": "all_gather",
}
"""The collectives that the package uses, by the names of their operators."""


class Wire(TorchDispatchMode):
    """Notes each collective with the bytes of the tensor that a process hands to it.

    Of an all-gather, those that it gets. An operator of another name would be a KeyError.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            name = NAMES[packet.__name__]
            given = args[1] if name == "all_to_all" else args[0]
            tensors: list[Tensor] = [given] if isinstance(given, Tensor) else list(given)
            self.calls.append((name, sum(x.numel() * x.element_size() for x in tensors)))
        return func(*args, **(kwargs or {}))

    def total(self, name: str) -> int:
        """Return the bytes handed to one collective."""
        return sum(size for called, size in self.calls if called == name)


def counted(step: Any) -> Wire:
    """Return what a call hands to collectives."""
    with torch.no_grad(), Wire() as wire:
        step()
    return wire
