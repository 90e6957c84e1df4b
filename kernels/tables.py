"""Tables of addresses and numbers, by which one launch serves many tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

KEPT = 4096
"""Uploads that are kept, two a launch of a step; the least recently used one goes first."""

_tables: OrderedDict[tuple[object, ...], tuple[Tensor, ...]] = OrderedDict()


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device; the host does not wait for it."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Return where tensors begin; the caller keeps them alive."""
    return [tensor.data_ptr() for tensor in tensors]


def tables(device: torch.device, *columns: Sequence[int]) -> tuple[Tensor, ...]:
    """Return lists of numbers, of one length, as int64 tensors on a device, by one upload.

    If the length is odd, a number without meaning follows each, so that all start at multiples of
    16 bytes. Gradients and states mostly lie where they lay in the step before, so tables are kept
    under what they hold. They are uploaded, from pinned memory and in the order of the current
    stream, only when something in them is new; they belong to that stream. In the capture of a
    graph, an upload would be replayed from memory that is gone: there, kernels write the values,
    which are not kept.
    """
    length = len(columns[0])
    shape = (len(columns), length + length % 2)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        table = torch.empty(shape, dtype=torch.int64, device=device)
        for row, values in zip(table.unbind(), columns, strict=True):
            for place, value in zip(row.unbind(), values, strict=False):
                place.fill_(value)
        return table.unbind()
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, *map(tuple, columns))
    kept = _tables.get(key)
    if kept is not None:
        _tables.move_to_end(key)
        return kept
    rows = [[*values, 0] if length % 2 else list(values) for values in columns]
    _tables[key] = upload(torch.tensor(rows, dtype=torch.int64), device).unbind()
    if len(_tables) > KEPT:
        _tables.popitem(last=False)
    return _tables[key]
