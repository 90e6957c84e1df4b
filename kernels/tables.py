"""Tables of pointers and numbers, by which one launch serves many tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

KEPT = 1024
"""Tables that are kept; the one that was not used for longest is dropped first."""

_tables: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device, without a wait of the host for it."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def pointers(tensors: Sequence[Tensor]) -> Tensor:
    """Return the addresses of the tensors, int64 `(len(tensors),)`, on their device.

    Args:
        tensors: at least one, all on one device; the caller keeps them alive.
    """
    return integers([tensor.data_ptr() for tensor in tensors], tensors[0].device)


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    """Return the values, int64, on a device, without a wait of the host.

    Gradients and states mostly lie where they lay in the step before, so a table is kept under what
    it holds and uploaded, from pinned memory and in the order of the current stream, only when
    something in it is new; it belongs to that stream. In the capture of a graph, where an upload
    would be replayed from memory that is gone, the values are written by kernels and not kept.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        table = torch.empty(len(values), dtype=torch.int64, device=device)
        for place, value in zip(table.unbind(), values, strict=True):
            place.fill_(value)
        return table
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, tuple(values))
    kept = _tables.get(key)
    if kept is not None:
        _tables.move_to_end(key)
        return kept
    _tables[key] = upload(torch.tensor(values, dtype=torch.int64), device)
    if len(_tables) > KEPT:
        _tables.popitem(last=False)
    return _tables[key]
