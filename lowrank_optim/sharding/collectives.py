"""Collectives: what processes that work on the same matrices tell each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Team:
    """The processes that work on one matrix. By default there is one, and all methods do nothing.

    An all-reduce sums each element in one place and copies the result, so that it has the same bits
    everywhere in a group; copies in several groups (hybrid sharding) take the bits of the first.

    Attributes:
        parts: process groups whose members hold other rows.
        copies: process groups whose members hold the same rows.
    """

    parts: tuple[Any, ...] = ()
    copies: tuple[Any, ...] = ()

    @property
    def groups(self) -> tuple[Any, ...]:
        """All process groups; each process of the team has a place in every one."""
        return self.parts + self.copies

    @cached_property
    def size(self) -> int:
        """Number of processes."""
        return math.prod(dist.get_world_size(group) for group in self.groups)

    def sum_(self, x: Tensor) -> Tensor:
        """Add up what the parts hold, in place; the result is the same, to the bit, on all."""
        return self._reduce(x, "SUM")

    def max_(self, x: Tensor) -> Tensor:
        """Take the largest of what the parts hold, in place; nan counts as infinity."""
        if self.groups and x.is_floating_point():
            x.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        return self._reduce(x, "MAX")

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        if not self.groups or x.numel() == 0:
            return x
        sent = x.contiguous()
        for group in self.parts:
            dist.all_reduce(sent, getattr(dist.ReduceOp, how), group)
        for group in self.copies:
            dist.broadcast(sent, dist.get_global_rank(group, 0), group)
        return x if sent is x else x.copy_(sent)

    def owns(self, number: int) -> bool:
        """Return whether this process does the shared work for the matrix of this number."""
        places = zip(self.groups, self._owner(number), strict=True)
        return all(dist.get_rank(group) == place for group, place in places)

    def collect_(self, x: Tensor, number: int) -> None:
        """Add up what the parts hold, in place, for the owner; others get partial sums."""
        places = list(zip(self.groups, self._owner(number), strict=True))
        parts, copies = places[: len(self.parts)], places[len(self.parts) :]
        if any(dist.get_rank(group) != place for group, place in copies):
            return
        for group, place in parts:
            dist.reduce(x, dist.get_global_rank(group, place), group=group)
            if dist.get_rank(group) != place:
                return

    def share_(self, x: Tensor, number: int) -> None:
        """Give the owner's values to all, in place."""
        for group, place in zip(self.groups, self._owner(number), strict=True):
            dist.broadcast(x, dist.get_global_rank(group, place), group)

    def _owner(self, number: int) -> Iterator[int]:
        """Yield the owner's place in each group: numbers go around the processes."""
        for group in self.groups:
            number, place = divmod(number, dist.get_world_size(group))
            yield place


ALONE = Team()


def several() -> bool:
    """Return whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def any_of(flag: bool, teams: Sequence[Team], device: torch.device) -> bool:
    """Return whether a flag is set on any process of some teams, or here without teams."""
    with_others = [team for team in dict.fromkeys(teams) if team.groups]
    if not with_others:
        return flag
    found = torch.full((1,), int(flag), dtype=torch.int32, device=device)
    for team in with_others:
        team.max_(found)
    return bool(found)


def agreed(flags: Tensor, teams: Sequence[Team]) -> Tensor:
    """Return the largest of each flag over its team; one collective for all flags of a team."""
    for team in dict.fromkeys(teams):
        if team.groups:
            places = [place for place, other in enumerate(teams) if other == team]
            largest = team.max_(torch.stack([flags[place] for place in places]))
            for place, flag in zip(places, largest.unbind(), strict=True):
                flags[place] = flag
    return flags


def chunk(length: int, count: int, place: int) -> tuple[int, int]:
    """Return first index and length of a chunk, as `torch.chunk` cuts: the last may be empty."""
    size = -(-length // count)
    first = min(place * size, length)
    return first, min(size, length - first)


def exchange(x: Tensor, group: Any, split: int, join: int, length: int) -> Tensor:
    """Cut what a process holds along `split` and give the pieces away for those along `join`.

    Every process sends and receives what it holds, except its own piece: nothing is gathered.

    Args:
        x: what is held, cut along `join` over the group.
        group: the processes.
        split, join: axes.
        length: of the axis `join` when it is whole.
    """
    count, place = dist.get_world_size(group), dist.get_rank(group)
    sent = [x.narrow(split, *chunk(x.shape[split], count, k)).reshape(-1) for k in range(count)]
    shape = list(x.shape)
    shape[split] = chunk(x.shape[split], count, place)[1]
    shapes = [
        [chunk(length, count, k)[1] if axis == join else n for axis, n in enumerate(shape)]
        for k in range(count)
    ]
    sizes = [math.prod(each) for each in shapes]
    received = x.new_empty(sum(sizes))
    dist.all_to_all_single(received, torch.cat(sent), sizes, [len(s) for s in sent], group)
    pieces = zip(torch.split(received, sizes), shapes, strict=True)
    return torch.cat([piece.view(each) for piece, each in pieces], dim=join)


def gathered(part: Tensor, group: Any, axis: int, length: int) -> Tensor:
    """Return the whole tensor whose chunks along an axis, cut as by `chunk`, lie on a group."""
    count = dist.get_world_size(group)
    if count == 1:
        return part
    shape = list(part.shape)
    shape[axis] = -(-length // count)
    sent = part.new_zeros(shape)
    sent.narrow(axis, 0, part.shape[axis]).copy_(part)
    received = part.new_empty(count * shape[0], *shape[1:])
    # Torch 2.13 has a new name for it and warns of the old one.
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(received, sent, group)
    pieces = [
        piece.narrow(axis, 0, chunk(length, count, place)[1])
        for place, piece in enumerate(received.view(count, *shape).unbind())
    ]
    return torch.cat(pieces, dim=axis)
