"""How a parameter lies on several processes: with `placements`, all that knows DTensor.

A step works on what a process holds of a parameter, with the projected axis whole: rows are what is
shared out. A `Layout` says which rows those are, and its `Team` adds up the few numbers that depend
on all of them. Neither does anything where a parameter is an ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..functional.views import Shape, is_wide, matrix_shape
from .collectives import ALONE, Team, chunk, exchange, gathered
from .local import here, is_distributed, local_of
from .placements import (
    Cut,
    Move,
    Placements,
    at_axis,
    axis_of,
    cuts,
    kinds,
    moves_to,
    placements_of,
    span,
    team_of,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class Each(NamedTuple):
    """What the entries of a state are kept for: moments for rows, others for matrices.

    `slots` names the moments, `common` the entries that a stack has once for all of its matrices,
    `cut` the bases that are cut along `cols` while they are not in use.
    """

    slots: Sequence[str]
    common: Sequence[str]
    cut: Sequence[str]

    def of(self, key: str) -> str:
        """Return what an entry is kept for: "row", "column", "matrix" or "parameter"."""
        if key.partition(".")[0] in self.slots:
            return "row"
        if key in self.cut:
            return "column"
        return "parameter" if key in self.common else "matrix"


@dataclass(frozen=True)
class Layout:
    """What a process holds of a parameter while it is stepped.

    Attributes:
        shape: of the whole parameter.
        wide: whether it is seen transposed, so that the projected axis is last.
        axis: its axis along which the rows of that view run; None where it is not projected.
        team: the processes that hold other rows, or copies, of the same matrices.
        mesh: the parameter's mesh; None for an ordinary tensor.
        given: the parameter's placements.
        placements: the placements in which it is stepped.
        moves: exchanges from `given` to `placements`; usually empty.
    """

    shape: Shape
    wide: bool = False
    axis: int | None = None
    team: Team = ALONE
    mesh: DeviceMesh | None = None
    given: Placements = ()
    placements: Placements = ()
    moves: tuple[Move, ...] = ()

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First index and number of what is held of each axis of the parameter."""
        axes = range(len(self.shape))
        return tuple(span(self.mesh, self.placements, axis, self.shape[axis]) for axis in axes)

    @property
    def held(self) -> Shape:
        """Shape of what is held."""
        return tuple(count for _, count in self.spans)

    @cached_property
    def rows(self) -> int:
        """Rows of each whole matrix, seen with the projected axis last."""
        return self._matrix[-1] if self.wide else self._matrix[-2]

    @cached_property
    def cols(self) -> int:
        """Length of the projected axis."""
        return self._matrix[-2] if self.wide else self._matrix[-1]

    @cached_property
    def matrices(self) -> int:
        """Number of matrices in the whole parameter, also where it is a stack that is cut."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @cached_property
    def _matrix(self) -> Shape:
        matrix = matrix_shape(self.shape)
        assert matrix is not None
        return matrix

    @cached_property
    def first_row(self) -> int:
        """Number of the first row held, counted over all matrices of a stack."""
        if self.axis is None:
            return self.spans[0][0] if self.spans else 0
        stacked = len(self.shape) == 3 and self.spans[0][0] * self.rows
        return self.spans[self.axis][0] + int(stacked)

    @cached_property
    def reaches_all(self) -> bool:
        """Whether every process of the team has rows of its own."""
        length = self.shape[self.axis] if self.shape and self.axis is not None else 1
        for dim in cuts(self.placements, self.axis) if self.axis is not None else ():
            assert self.mesh is not None
            length = chunk(length, self.mesh.size(dim), self.mesh.size(dim) - 1)[1]
        return length > 0

    @cached_property
    def everyone(self) -> Team:
        """All processes of the mesh, for what has to be agreed on."""
        return team_of(self.mesh, range(self.mesh.ndim)) if self.mesh is not None else ALONE

    @cached_property
    def stack_team(self) -> Team:
        """All processes, if each holds some matrices of the stack alone."""
        cut = len(self.shape) == 3 and any(axis_of(p) == 0 for p in self.placements)
        return self.everyone if cut else ALONE

    @cached_property
    def holders(self) -> Team:
        """The processes that hold other parts of the parameter, for sums over all of it."""
        cut = [dim for dim, placement in enumerate(self.given) if axis_of(placement) is not None]
        return team_of(self.mesh, cut)

    def local(self, param: Tensor) -> Tensor:
        """Return what is worked on: what is held of the parameter, or a copy with whole columns."""
        if self.mesh is None:
            return param
        x = local_of(param)
        for move in self.moves:
            x = exchange(x, self.mesh.get_group(move.dim), self._row_axis, move.axis, move.joined)
        return x

    def gradient(self, grad: Tensor) -> Tensor:
        """Return a gradient in the form of `local`; partial sums are added up first."""
        if self.mesh is None:
            return grad
        whole = cast("DTensor", grad)
        if tuple(whole.placements) != self.given:
            whole = whole.redistribute(self.mesh, self.given)
        return self.local(whole)

    def write_back(self, param: Tensor, local: Tensor) -> None:
        """Write what `local` returned, and a step has changed, into the parameter."""
        if self.mesh is None or not self.moves:
            return
        for move in reversed(self.moves):
            group = self.mesh.get_group(move.dim)
            local = exchange(local, group, move.axis, self._row_axis, move.split)
        here(param).copy_(local)

    @property
    def _row_axis(self) -> int:
        return 0 if self.axis is None else self.axis

    def view(self, state: dict[str, Any], each: Each) -> MutableMapping[str, Any]:
        """Return the state of the parameter as a step sees it: what is held here."""
        return state if self.mesh is None else HeldState(state, self, each)

    def cuts_of(self, per: str, ndim: int) -> list[Cut | None]:
        """Return for each mesh dimension how it cuts an entry of the state; None where not.

        Args:
            per: what the state has an entry for, see `Each.of`.
            ndim: axes of the entry.
        """
        found: list[Cut | None] = []
        for placement in self.placements:
            axis = axis_of(placement)
            of_rows = axis == self.axis or self.axis is None
            if axis is None or per == "parameter" or (per == "matrix" and of_rows):
                found.append(None)
            elif per == "column" and of_rows:
                found.append(Cut(ndim - 2, self.cols, kinds().Shard(ndim - 2)))
            else:
                place = ndim - 2 if axis == self.axis else axis
                found.append(Cut(place, self.shape[axis], at_axis(placement, place)))
        return found

    def wrapped(self, value: Tensor, per: str) -> Tensor:
        """Return what is held of an entry of the state as a DTensor; where all is held, as it is.

        What is kept for each row is always one, as the parameter is.
        """
        assert self.mesh is not None
        found = self.cuts_of(per, value.ndim)
        if per != "row" and not any(found):
            return value
        shape = list(value.shape)
        for cut in filter(None, found):
            shape[cut.axis] = cut.length
        meta = torch.empty(shape, dtype=value.dtype, device="meta")
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            value,
            self.mesh,
            placements_of(found),
            run_check=False,
            shape=meta.shape,
            stride=meta.stride(),
        )

    def kept(self, value: Tensor, per: str, device: torch.device) -> Tensor:
        """Return a copy of an entry that is given whole, or sharded, as the state keeps it."""
        if self.mesh is None or value.ndim == 0:
            return value.to(device, copy=True)
        return self.wrapped(self._part_of(value, per).to(device, copy=True), per)

    def _part_of(self, value: Tensor, per: str) -> Tensor:
        """Return what is held here of an entry; of a whole one, a view."""
        found = self.cuts_of(per, value.ndim)
        placements = placements_of(found)
        if is_distributed(value):
            sharded = cast("DTensor", value)
            return local_of(sharded.redistribute(sharded.device_mesh, placements))
        for cut in {cut.axis: cut for cut in filter(None, found)}.values():
            value = value.narrow(cut.axis, *span(self.mesh, placements, cut.axis, cut.length))
        return value

    @cached_property
    def _column_lengths(self) -> list[tuple[int, int]]:
        """Mesh dimensions that cut rows, with what each leaves of a basis cut before it."""
        return self._levels(sorted(self._row_cuts), self.cols)

    @cached_property
    def row_levels(self) -> list[tuple[Any, int]]:
        """Process groups that cut rows, with the rows that each cuts, the outermost first."""
        levels = self._levels(self._row_cuts, self.rows)
        return [(self.mesh.get_group(dim), length) for dim, length in levels if self.mesh]

    @property
    def _row_cuts(self) -> list[int]:
        """Mesh dimensions that cut rows, the outermost first."""
        return [] if self.axis is None else cuts(self.placements, self.axis)

    def _levels(self, dims: list[int], length: int) -> list[tuple[int, int]]:
        """Return mesh dimensions with the lengths that they cut, one after the other."""
        found = []
        for dim in dims:
            assert self.mesh is not None
            found.append((dim, length))
            length = chunk(length, self.mesh.size(dim), self.mesh.get_local_rank(dim))[1]
        return found

    def columns_of(self, basis: Tensor) -> Tensor:
        """Return a copy of the part of a basis `(..., cols, rank)` that is kept here."""
        for dim, length in self._column_lengths:
            assert self.mesh is not None
            place = chunk(length, self.mesh.size(dim), self.mesh.get_local_rank(dim))
            basis = basis.narrow(-2, *place)
        return basis.clone(memory_format=torch.contiguous_format)

    def put_together(self, part: Tensor) -> Tensor:
        """Return a whole basis from the parts that the processes with other rows keep."""
        for dim, length in reversed(self._column_lengths):
            assert self.mesh is not None
            part = gathered(part, self.mesh.get_group(dim), -2, length)
        return part


class HeldState(MutableMapping[str, Any]):
    """The state of a parameter as a step sees it: the part of each tensor that is held here.

    A basis that is cut is put together when it is read, and cut again when it is written.
    """

    def __init__(self, state: dict[str, Any], layout: Layout, each: Each) -> None:
        self._state, self._layout, self._each = state, layout, each

    def __getitem__(self, key: str) -> Any:
        value = here(self._state[key])
        return self._layout.put_together(value) if key in self._each.cut else value

    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.ndim > 0:
            per = self._each.of(key)
            if per == "column":
                value = self._layout.columns_of(value)
            value = self._layout.wrapped(value, per)
        self._state[key] = value

    def __delitem__(self, key: str) -> None:
        del self._state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def cut_alike(local: Tensor, shape: Shape, like: Tensor) -> Tensor:
    """Return what is held of a tensor of some shape as one that is cut as another is."""
    if not is_distributed(like):
        return local
    from torch.distributed.tensor import DTensor

    sharded = cast("DTensor", like)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def mesh_of(param: Tensor) -> tuple[DeviceMesh | None, Placements]:
    """Return the mesh and the placements of a parameter; None and () for an ordinary tensor."""
    if not is_distributed(param):
        return None, ()
    sharded = cast("DTensor", param)
    return sharded.device_mesh, tuple(sharded.placements)


def layout_of(param: Tensor, side: str | None, exact: bool, copies: Any = None) -> Layout:
    """Return how a parameter is worked on.

    Args:
        param: the parameter.
        side: which axis is projected; None for a parameter that is not projected.
        exact: whether rows of a parameter that is not projected must be whole, because their
            values share an 8-bit scale, or random bits go by row.
        copies: a process group in which ordinary tensors are the same on all.

    Raises:
        ValueError: a sharded convolution whose first axis is to be projected, or a nesting of
            shards that cannot be written down.
    """
    mesh, given = mesh_of(param)
    world = None if mesh is None and copies is None else dist.group.WORLD
    return _layout(tuple(param.shape), mesh, given, side, exact, copies, world)


@lru_cache(maxsize=4096)
def _layout(
    shape: Shape,
    mesh: DeviceMesh | None,
    given: Placements,
    side: str | None,
    exact: bool,
    copies: Any,
    world: Any,
) -> Layout:
    """Do what `layout_of` says; `world` tells meshes of an earlier set of processes apart."""
    matrix = matrix_shape(shape)
    if side is not None:
        assert matrix is not None
    if mesh is None:
        team = ALONE if copies is None or side is None else Team(copies=(copies,))
        wide = side is not None and is_wide(cast(Shape, matrix), side)
        return Layout(shape, wide, None if side is None else 0, team)
    if side is None:
        moves, placements = moves_to(shape, mesh, given, 0) if exact and shape else ((), given)
        return Layout(shape, mesh=mesh, given=given, placements=placements, moves=moves)
    cut = {axis_of(placement) for placement in given}
    axes = (0, 1) if len(shape) > 3 else (len(shape) - 2, len(shape) - 1)
    wide = is_wide(cast(Shape, matrix), side)
    if side == "auto" and len(shape) > 3:
        wide = False
    elif side == "auto" and (axes[0] in cut) != (axes[1] in cut):
        wide = axes[1] in cut
    if wide and len(shape) > 3:
        raise ValueError('a sharded convolution is projected along its rows: take side="right"')
    axis = axes[1] if wide else axes[0]
    moves, placements = moves_to(shape, mesh, given, axis)
    parts = [dim for dim, placement in enumerate(placements) if axis_of(placement) == axis]
    same = [dim for dim, placement in enumerate(placements) if axis_of(placement) is None]
    team = Team(team_of(mesh, parts).parts, team_of(mesh, same).parts)
    return Layout(shape, wide, axis, team, mesh, given, placements, moves)
