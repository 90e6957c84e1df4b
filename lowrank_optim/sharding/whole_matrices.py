"""Work on whole matrices of which each process holds some rows: each does some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .collectives import chunk, exchange, gathered
from .layout import Layout


def of_whole_matrices(function: Callable[[Tensor], Tensor], x: Tensor, layout: Layout) -> Tensor:
    """Apply a function to whole matrices of which each process holds some rows; return these rows.

    Processes exchange rows for matrices, so that each has some matrices whole, and back. Each sends
    what it holds, twice. Copies of a process (hybrid sharding, DDP) share the work and gather it.

    Args:
        function: of `(k, rows, rank)`, with a result of that shape, matrix by matrix.
        x: `(..., rows held, rank)`.
        layout: of the parameters.
    """
    if x.shape[-1] == 0:
        return x
    flat = x.flatten(0, -3)
    lengths = []
    for group, rows in reversed(layout.row_levels):
        lengths.append((group, flat.shape[0]))
        flat = exchange(flat, group, 0, 1, rows)
    flat = shared_out(function, flat, layout.team.copies)
    for group, count in reversed(lengths):
        flat = exchange(flat, group, 1, 0, count)
    return flat.view(x.shape)


def shared_out(function: Callable[[Tensor], Tensor], x: Tensor, copies: Sequence[Any]) -> Tensor:
    """Apply a function to matrices that all members of some groups hold; each does a part."""
    if not copies or x.shape[0] == 0:
        return function(x) if x.shape[0] else x
    group, *others = copies
    first, count = chunk(x.shape[0], dist.get_world_size(group), dist.get_rank(group))
    part = shared_out(function, x.narrow(0, first, count), others)
    return gathered(part.contiguous(), group, 0, x.shape[0])
