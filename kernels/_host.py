"""What the launches share on the host: types, run-time numbers, places in memory.

One launch serves many tensors: it is given tables of their addresses.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

Stored = Tensor | tuple[Tensor, Tensor]
"""A moment as it lies in memory: a tensor, or 8-bit codes and their scales."""

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
    torch.int64: tl.int64,
}


def tl_type(tensor: Tensor) -> tl.dtype:
    """Return the type that a kernel knows the elements by."""
    return TYPES[tensor.dtype]


def types_of(exp_avg: Stored, exp_avg_sq: Stored) -> tuple[tl.dtype, tl.dtype, bool]:
    """Return the types of both moments, and whether they are 8-bit codes."""
    if isinstance(exp_avg, Tensor) and isinstance(exp_avg_sq, Tensor):
        return tl_type(exp_avg), tl_type(exp_avg_sq), False
    return tl.uint8, tl.uint8, True


def places_of_moments(
    exp_avg: Sequence[Stored], exp_avg_sq: Sequence[Stored]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return where both moments and their scales begin; without scales, the moments again."""
    values = [[x if isinstance(x, Tensor) else x[0] for x in xs] for xs in (exp_avg, exp_avg_sq)]
    scales = [[x if isinstance(x, Tensor) else x[1] for x in xs] for xs in (exp_avg, exp_avg_sq)]
    first, second = map(addresses, values)
    if values[0][0] is scales[0][0]:
        return first, second, first, second
    return first, second, addresses(scales[0]), addresses(scales[1])


def over(size: int, part: int) -> int:
    """Return how many parts cover a size; triton's own costs ten times as much a call."""
    return -(-size // part)


def matrix_shape(like: Tensor) -> tuple[int, int]:
    """Return rows and columns of a whole parameter: first axis and rest; a vector is a row."""
    rows = like.shape[0] if like.ndim > 1 else 1
    return rows, like.numel() // max(1, rows)


def corrections(
    counts: Sequence[int | Tensor], beta1: float, beta2: float
) -> tuple[float | Tensor, float | Tensor, bool]:
    """Return 1 - b1^t, sqrt(1 - b2^t), and whether they are tensors of one value a matrix.

    Raises:
        ValueError: counts on the host that differ within one launch.
    """
    t, counted = numbers(counts)
    if isinstance(t, Tensor):
        exact = t.to(torch.float64)
        return (1 - beta1**exact).float(), (1 - beta2**exact).sqrt().float(), counted
    return float(1 - beta1**t), math.sqrt(1 - beta2**t), counted


def numbers(values: Sequence[int | Tensor]) -> tuple[int | Tensor, bool]:
    """Return one number for all, or a tensor of one a matrix where they lie on the device."""
    if isinstance(values[0], Tensor):
        return torch.stack([torch.as_tensor(value) for value in values]), True
    if any(value != values[0] for value in values):
        raise ValueError(f"matrices of one launch have the same count, but got {list(values)}")
    return values[0], False


def rates(
    step_size: float | Tensor, decay: float | Tensor
) -> tuple[float | Tensor, float | Tensor, bool]:
    """Return step size and decay, and whether they are tensors; both are if one is."""
    if not isinstance(step_size, Tensor) and not isinstance(decay, Tensor):
        return float(step_size), float(decay), False  # an integer would be another kernel
    like = step_size if isinstance(step_size, Tensor) else decay
    assert isinstance(like, Tensor)
    both = [
        torch.as_tensor(rate).to(like.device, torch.float32)
        if isinstance(rate, Tensor)
        else torch.full((), rate, dtype=torch.float32, device=like.device)
        for rate in (step_size, decay)
    ]
    return both[0], both[1], True


def aligned(*places: Sequence[int]) -> bool:
    """Return whether all tensors start at multiples of 16 bytes."""
    return all(place % 16 == 0 for some in places for place in some)


@cache
def roomy(device: torch.device) -> bool:
    """Return whether a program may take 192 KiB of shared memory, as on H100 and H200."""
    if device.type != "cuda":
        return False
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return bool(properties["max_shared_mem"] >= 192 << 10)


def precision() -> str:
    """Return how products of float32 are made: as torch's are, which by default is exactly."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


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
