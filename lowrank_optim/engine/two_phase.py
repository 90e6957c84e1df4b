"""Steps in two halves with one sum between, for matrices whose rows lie on several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parts.plan import Plan
from ..parts.types import Group, Job
from ..sharding.collectives import Team

HELD = 256 << 20
"""Bytes of projected gradients, directions and bases put together that wait for a sum at once."""


@dataclass
class Half:
    """What is left to do for some matrices after the first half of their step.

    Attributes:
        places: the job of each of the K matrices, and its place in the job's stack.
        sums: `(K, k)` numbers to be summed over the rows of each whole matrix, or None.
        finish: does the second half, given the sums.
    """

    places: list[tuple[Job, int]]
    sums: Tensor | None
    finish: Callable[[Tensor | None], None]

    @property
    def team(self) -> Team:
        """The processes that hold the other rows."""
        return self.places[0][0].layout.team


def chunks(jobs: list[Job], size: Callable[[Job], int], most: int) -> Iterator[list[Job]]:
    """Yield jobs in lists whose sizes come to at most `most`, and at least one in each."""
    some: list[Job] = []
    held = 0
    for job in jobs:
        if some and held + size(job) > most:
            yield some
            some, held = [], 0
        some.append(job)
        held += size(job)
    if some:
        yield some


def summed_chunks(jobs: list[Job], group: Group, plan: Plan) -> Iterator[list[Job]]:
    """Yield jobs in lists, the same on all processes, of which no more than `HELD` bytes wait.

    One list, unless processes have to sum something: then it takes one collective each.
    """
    want = plan.want
    kinds = want.low + want.direction
    cuts = bool(plan.each(group).cut)

    def size(job: Job) -> int:
        site = job.site
        assert site is not None
        if not (want.norms or plan.length.measured) or site.team.size == 1:
            return 0
        lines = kinds * job.layout.rows // site.team.size + cuts * site.cols
        return lines * job.layout.matrices * site.rank * site.dtype.itemsize

    yield from chunks(jobs, size, HELD)


def run(halves: Iterable[Half]) -> None:
    """Finish steps: at once where no sum is needed, else after one sum for each team."""
    waiting: dict[Team, list[Half]] = {}
    for half in halves:
        if half.sums is None or not half.places or half.team.size == 1:
            half.finish(half.sums)
        else:
            waiting.setdefault(half.team, []).append(half)
        del half  # what it holds is not needed while the next one is made
    for team in sorted(waiting, key=lambda team: min(map(first_place, waiting[team]))):
        add_up(waiting[team], team)
        for half in waiting[team]:
            half.finish(half.sums)


def first_place(half: Half) -> int:
    """Return the place of the first parameter, which is the same on all processes."""
    return min(job.position for job, _ in half.places)


def add_up(halves: list[Half], team: Team) -> None:
    """Sum over a team in one collective, in an order that is the same on all processes.

    The halves may be composed differently on each process, because rows are shared out unevenly.
    """
    order = sorted(
        (job.position, place, number, row)
        for number, half in enumerate(halves)
        for row, (job, place) in enumerate(half.places)
    )
    parts = [half.sums.unbind() if half.sums is not None else () for half in halves]
    total = team.sum_(torch.stack([parts[number][row] for _, _, number, row in order]))
    found = {(number, row): line for (_, _, number, row), line in zip(order, total, strict=True)}
    for number, half in enumerate(halves):
        half.sums = torch.stack([found[number, row] for row in range(len(half.places))])
