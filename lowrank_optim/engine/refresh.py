"""Refreshes: when the subspace of a matrix moves, and what happens then.

`move_subspaces` finds the matrices that are due, `move` learns their subspaces (by `learn` and
`Projector.refresh`), and `carry.py` carries or resets the moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..functional import usable
from ..functional.factors import oriented
from ..parts.plan import Plan
from ..parts.projectors import peaks_of
from ..parts.storage import moments_of, shape_of
from ..parts.types import Group, Job, Matrix, Site, State, site_of
from ..sharding.collectives import agreed
from ..sharding.layout import Layout
from .adaptive_rank import narrow, widened
from .carry import Moved, carry, reset

TOGETHER = 1 << 22
"""Elements of bases that are moved together: the workspace of a refresh grows with them."""

CHOICE = 64
"""Numbers that choosing columns may make for each column."""

ABREAST = 8
"""Up to so many processes, of which each learns some, move so many times as much together."""


Waiting = tuple[State, Layout]


def is_due(site: Site, state: State, group: Group, plan: Plan) -> bool:
    """Return whether the subspace moves in this step.

    It moves in the first step, then every `gap` updates, shifted by the phase of the matrix. The
    turn of a block may also end between two of these.
    """
    if site.step == 0 or (site.step - site.phase) % site.gap == 0:
        return True
    moves = plan.takes_turns and plan.slots
    return bool(moves) and shape_of(state, plan.slots[0])[-1] != plan.projector.width(site)


def move_subspaces(jobs: list[Job], group: Group, plan: Plan) -> list[Waiting]:
    """Move the subspaces whose time has come, in place.

    A matrix that had no usable gradient then (a zero-initialised layer, an expert that no token has
    reached) is tried again after 1, 2, 4, 8, ... updates of its own. Which matrices wait is known
    on the device alone; `pending` says where that is still possible.

    Returns:
        The states that may still wait for a subspace, with their layouts.
    """
    due: list[Job] = []
    late: list[Job] = []
    if capturing():
        if group["update_proj_gap"] == 1:
            if plan.projector.captures != "refresh":
                raise RuntimeError(
                    f"a refresh of {type(plan.projector).__name__} cannot be captured in a CUDA "
                    "graph: take update_proj_gap above 1, and an ordinary step() for the refreshes"
                )
            due = jobs
    else:
        for job in jobs:
            assert job.site is not None
            if is_due(job.site, job.state, group, plan):
                due.append(job)
            elif job.state.get("pending") and is_tried_again(job):
                late.append(job)
    if not due and not late:
        return []
    for part in together(due, plan):
        move(part, group, plan)
    for part in together(late, plan):
        try_again(part, plan)
    tried = (job for job in (*due, *late) if site_of(job).gap > 1)
    return [(job.state, job.layout) for job in tried if job.state.get("pending")]


def capturing() -> bool:
    """Return whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def is_tried_again(job: Job) -> bool:
    """Return whether a matrix that may still have no subspace looks for one in this step."""
    step = site_of(job).step
    return bool(job.state.get("pending")) and step > 0 and step & (step - 1) == 0


def together(jobs: Iterable[Job], plan: Plan) -> Iterator[list[tuple[Job, Matrix]]]:
    """Yield matrices that are `alike`, with their jobs, not too many at a time.

    Each process learns the subspaces of some: the more there are, the more matrices are taken.
    """
    for same in alike(jobs):
        matrices = [(job, Matrix(grad_of(job), job.state, site_of(job))) for job in same]
        grad, _, site = matrices[0][1]
        count = at_a_time(site, grad.shape[:-2].numel(), plan) * min(site.team.size, ABREAST)
        for start in range(0, len(matrices), count):
            yield matrices[start : start + count]


def at_a_time(site: Site, matrices: int, plan: Plan) -> int:
    """Return how many parameters one process moves together, each of so many matrices.

    A projector that chooses columns makes numbers of columns instead of bases.
    """
    lanes = (site.most or site.rank) if plan.projector.decomposes else CHOICE
    return max(1, TOGETHER // max(1, site.cols * lanes * matrices))


def alike(jobs: Iterable[Job]) -> Iterable[list[Job]]:
    """Return lists of jobs whose matrices are of one shape, dtype and device.

    Sharded parameters are grouped by their layout, which gives the same lists on all processes.
    """
    found: dict[Any, list[Job]] = {}
    for job in jobs:
        site, grad = site_of(job), grad_of(job)
        lies = (grad.shape, site.team) if job.layout.mesh is None else job.layout
        kind = (lies, site.most or site.rank, grad.dtype, grad.device, site.dtype)
        found.setdefault(kind, []).append(job)
    return found.values()


def grad_of(job: Job) -> Tensor:
    """Return the gradient, seen with the projected axis last."""
    return oriented(job.grad, job.layout.wide)[1]


def move(part: list[tuple[Job, Matrix]], group: Group, plan: Plan) -> None:
    """Move subspaces, and treat the moments as `on_refresh` says, in place."""
    matrices = [matrix for _, matrix in part]
    changes = matrices[0].site.most is not None
    carries = changes or plan.on_refresh in ("rotate", "align")
    before = [snapshot(m.state, plan.projector.keys) if carries else {} for m in matrices]
    if changes:
        matrices = [widened(matrix, plan) for matrix in matrices]
    moved = learn(matrices, plan, before)
    ranks = [matrix.site.rank for matrix in matrices]
    if changes:
        ranks = narrow(matrices, moved, before, group, plan)
    carried: list[Moved] = []
    for (job, matrix), old, new, rank in zip(part, before, moved, ranks, strict=True):
        same = rank == matrix.site.rank
        matrix.site.rank = rank
        rotates = plan.on_refresh == "rotate" and matrix.site.step > 0
        if plan.on_refresh == "reset":
            reset(job, plan, matrix.site)
        elif plan.slots and (rotates or not same):
            carried.append(Moved(job, old, new, rotates))
    carry(carried, group, plan)


def learn(matrices: list[Matrix], plan: Plan, before: list[State]) -> list[State]:
    """Move subspaces, in place and in the same way on all processes; return them whole.

    Args:
        matrices: of one shape, dtype, device and layout.
        plan: of their group.
        before: what there was, for `on_refresh="align"`.
    """
    projector = plan.projector
    whole: list[State] = [{key: m.state[key] for key in projector.keys} for m in matrices]
    projector.refresh([m._replace(state=own) for m, own in zip(matrices, whole, strict=True)])
    for place, (matrix, own, old) in enumerate(zip(matrices, whole, before, strict=True)):
        site = matrix.site
        if old and plan.on_refresh == "align" and site.step > 0 and site.team.owns(place):
            projector.align(old, own)
    for place, (matrix, own) in enumerate(zip(matrices, whole, strict=True)):
        for key in projector.keys:
            if projector.decomposes:
                matrix.site.team.share_(own[key], place)
            matrix.state[key] = own[key]
    if projector.learns:
        note_set(matrices)
    return whole


def try_again(part: list[tuple[Job, Matrix]], plan: Plan) -> None:
    """Set the subspaces that have seen no gradient, and zero the moments collected before."""
    before = [matrix.state["unset"].clone() for _, matrix in part]
    wanted = [
        matrix._replace(site=replace(matrix.site, wanted=unset[..., None, None]))
        for (_, matrix), unset in zip(part, before, strict=True)
    ]
    learn(wanted, plan, [{} for _ in wanted])
    for (_, matrix), unset in zip(part, before, strict=True):
        found = (unset & ~matrix.state["unset"])[..., None, None]
        for moment in moments_of(matrix.state, plan.slots).values():
            for piece in (moment,) if isinstance(moment, Tensor) else moment:
                piece.masked_fill_(found, 0)


def note_set(matrices: list[Matrix]) -> None:
    """Note which subspaces a refresh has set: the ones with a gradient to learn from."""
    waiting = [m for m in matrices if m.state.get("pending") and m.site.gap > 1]
    if not waiting:
        return
    for matrix, found in zip(waiting, usable(peaks_of(waiting)), strict=True):
        matrix.state["unset"] &= ~found[..., 0, 0]


def snapshot(state: State, keys: tuple[str, ...]) -> State:
    """Return copies of some entries of a state."""
    return {
        key: state[key].clone() if isinstance(state[key], Tensor) else state[key] for key in keys
    }


def set_steps(jobs: list[Job]) -> None:
    """Tell each site how many updates its parameter has had.

    Counts that live on a device are read there, all at once: the one wait of a step with
    `capturable` outside a capture. A capture reads nothing.
    """
    distant: list[Job] = []
    for job in jobs:
        if job.site is not None:
            step = job.state["step"]
            if step.device.type == "cpu":
                job.site.step = int(step)
            else:
                distant.append(job)
    if not distant:
        return
    counts: dict[int, float] = {}
    if not capturing():
        home = distant[0].state["step"].device
        steps = torch.stack([job.state["step"].to(home) for job in distant]).tolist()
        counts = {job.position: step for job, step in zip(distant, steps, strict=True)}
    for job in distant:
        site_of(job).step = int(counts.get(job.position, 1))


class Watch:
    """Which matrices still wait for their subspace: asked in one step, read in the next.

    The answer is on its way while the host goes on, so that no step waits for the device. Results
    do not depend on it: a matrix that has its subspace is never set again.
    """

    def __init__(self, waiting: Sequence[Waiting] = ()) -> None:
        waiting = [pair for pair in waiting if not pair[0]["unset"].is_meta]  # no values to ask for
        self._states = [state for state, _ in waiting]
        self._answer: Tensor | None = None
        self._ready: torch.cuda.Event | None = None
        if not waiting:
            return
        home = self._states[0]["unset"].device
        flags = torch.stack([state["unset"].any().to(home, torch.int32) for state in self._states])
        flags = agreed(flags, [layout.stack_team for _, layout in waiting])
        if home.type != "cuda":
            self._answer = flags
        else:
            self._answer = torch.empty(flags.shape, dtype=torch.int32, pin_memory=True)
            self._answer.copy_(flags, non_blocking=True)
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record(torch.cuda.current_stream(home))

    def read(self) -> None:
        """Note the answer in the states."""
        if self._answer is None or capturing():
            return
        if self._ready is not None:
            self._ready.synchronize()
        for state, waits in zip(self._states, self._answer.tolist(), strict=True):
            state["pending"] = waits
        self._answer = None
