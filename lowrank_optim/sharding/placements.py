"""Placements of a DTensor: which mesh dimensions cut which axis, and how to cut another one."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from ..functional.views import Shape
from .collectives import ALONE, Team, chunk

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Placements = tuple[Any, ...]


@cache
def kinds() -> ModuleType:
    """Return torch's module of placements, imported at the first DTensor, since that takes time."""
    return importlib.import_module("torch.distributed.tensor.placement_types")


def is_strided(placement: Any) -> bool:
    """Return whether a placement stands for a cut after the cuts of the dimensions behind it."""
    return isinstance(placement, kinds()._StridedShard)


class Cut(NamedTuple):
    """How a mesh dimension cuts an entry of a state: the axis, its whole length, the placement."""

    axis: int
    length: int
    placement: Any


class Move(NamedTuple):
    """An exchange of columns for rows among the processes of one mesh dimension.

    `axis` is the axis of the parameter that becomes whole; `joined` is its length then, and
    `split` the length of the rows before they are shared out.
    """

    dim: int
    axis: int
    joined: int
    split: int


def moves_to(
    shape: Shape, mesh: DeviceMesh, given: Placements, axis: int
) -> tuple[tuple[Move, ...], Placements]:
    """Return the exchanges that cut along `axis` what is cut along another, except for a stack."""
    kept = {axis, 0} if len(shape) == 3 else {axis}
    placements, order = list(given), cuts(given, axis)
    moves = []
    for source in sorted({p.dim for p in given if axis_of(p) is not None} - kept):
        for dim in reversed(cuts(given, source)):
            split = span(mesh, placements, axis, shape[axis])[1]
            inside = [other for other in order if other > dim]
            factor = math.prod(mesh.size(other) for other in inside)
            placements[dim] = (
                kinds()._StridedShard(axis, split_factor=factor) if inside else kinds().Shard(axis)
            )
            joined = span(mesh, placements, source, shape[source])[1]
            order.append(dim)
            moves.append(Move(dim, source, joined, split))
    if cuts(placements, axis) != order:
        raise ValueError(f"placements {given} cannot be cut along axis {axis} alone")
    return tuple(moves), tuple(placements)


def team_of(mesh: DeviceMesh | None, dims: Sequence[int]) -> Team:
    """Return the team of the processes along some dimensions of a mesh."""
    if mesh is None:
        return ALONE
    groups = [mesh.get_group(dim) for dim in dims if mesh.size(dim) > 1]
    return Team(parts=tuple(groups))


def placements_of(cut_by: Sequence[Cut | None]) -> list[Any]:
    """Return the placements of an entry of a state."""
    return [kinds().Replicate() if cut is None else cut.placement for cut in cut_by]


def axis_of(placement: Any) -> int | None:
    """Return the axis that a placement cuts."""
    return getattr(placement, "dim", None)


def at_axis(placement: Any, axis: int) -> Any:
    """Return a placement that cuts another axis in the same way."""
    if placement.dim == axis:
        return placement
    if is_strided(placement):
        return kinds()._StridedShard(axis, split_factor=placement.split_factor)
    return kinds().Shard(axis)


def cuts(placements: Sequence[Any], axis: int) -> list[int]:
    """Return the mesh dimensions that cut an axis, the outermost cut first.

    Strided placements stand for cuts made after the dimensions behind them have cut (FSDP2 cuts
    what tensor parallelism has cut).
    """
    found = [dim for dim, placement in enumerate(placements) if axis_of(placement) == axis]
    strided = [dim for dim in found if is_strided(placements[dim])]
    return [dim for dim in found if dim not in strided] + strided[::-1]


def span(
    mesh: DeviceMesh | None, placements: Sequence[Any], axis: int, length: int
) -> tuple[int, int]:
    """Return the first index and the number of what this process holds of an axis."""
    first, count = 0, length
    for dim in cuts(placements, axis):
        assert mesh is not None
        begin, count = chunk(count, mesh.size(dim), mesh.get_local_rank(dim))
        first += begin
    return first, count
