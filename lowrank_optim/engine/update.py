"""One step of a group's parameters: project, moments, residual, write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import (
    NEAR,
    WEIGHT,
    Norms,
    bits_of,
    compute_dtype,
    down,
    lift_write,
    load,
    round_into_,
    row_chunks,
    row_norms,
)
from ..functional.views import oriented
from ..parts.plan import Plan
from ..parts.storage import load_moments, moments_of, store_moments, stored
from ..parts.types import Group, Job, site_of
from . import backend as dispatch
from . import launches as fused
from .feed import fed, keep, servings
from .refresh import ABREAST, Waiting, alike, grad_of, move_subspaces
from .scalars import age_of, in_rows, moment_in_rows, noise_of, rates_of, rounds
from .two_phase import Half, portions, run

WHOLE = 1 << 24
"""Elements of matrices that a rule works on at once, where it takes them whole."""


def step_projected(jobs: list[Job], group: Group, plan: Plan) -> list[Waiting]:
    """Do one step of projected parameters, in place; return which may lack a subspace."""
    waiting: list[Waiting] = []
    for some in servings(jobs, plan):
        waiting += step_together(some, group, plan)
    return waiting


def step_together(jobs: list[Job], group: Group, plan: Plan) -> list[Waiting]:
    """Do what `step_projected` says with parameters whose feeds may be held at once."""
    lessons = jobs
    if plan.feed.slots:
        lessons, jobs = fed(jobs, group, plan)
    waiting = move_subspaces([job for job in lessons if job.low is None], group, plan)
    del lessons
    count(jobs)
    for part in portions(jobs, group, plan):
        with_kernels, others = divided(part, group, plan)
        eager = begin_eagerly(others, group, plan)
        run(chain(eager, fused.begin(with_kernels, group, plan)))
    return waiting


def project(job: Job, group: Group, plan: Plan) -> tuple[Tensor, list[Waiting]]:
    """Return the projected gradient of a job that has none yet, after its subspace has moved.

    With it comes its state if that may lack a subspace. Where `job.low` is given, the gradient is
    added to that, in the same subspace.
    """
    assert job.site is not None
    waiting = [] if job.low is not None else move_subspaces([job], group, plan)
    _, grad = oriented(job.grad, job.layout.wide)
    low = down(grad, plan.projector.factor(job.state, job.site), job.site.dtype)
    return (low if job.low is None else job.low.add_(low)), waiting


def count(jobs: list[Job]) -> None:
    """Count the update of some parameters."""
    counts = [job.state[key] for job in jobs for key in ("step", "age") if key in job.state]
    if counts:
        torch._foreach_add_(counts, 1)


def divided(jobs: list[Job], group: Group, plan: Plan) -> tuple[list[Job], list[Job]]:
    """Return the jobs that kernels do, and those that plain torch does."""
    with_kernels: list[Job] = []
    others: list[Job] = []
    for job in jobs:
        projected = job.site is not None
        by_kernels = (
            job.low is None
            and job.param.numel() > 0
            and job.layout.reaches_all
            and (dispatch.refusal(plan, group, job.param, job.grad, job.state, projected) is None)
        )
        (with_kernels if by_kernels else others).append(job)
    return with_kernels, others


class Begun(NamedTuple):
    """A step whose moments are done: the job, its projected gradient and what was made of it.

    `taken` is what leaves that which a feed has kept, see `Feed.taken`.
    """

    job: Job
    factor: Tensor
    low: Tensor
    direction: Tensor
    taken: Tensor | None


def begin_eagerly(jobs: list[Job], group: Group, plan: Plan) -> Iterator[Half]:
    """Do the first half of steps of parameters whose subspaces are in place, in plain torch."""
    if not plan.rule.whole:
        for job in jobs:
            yield half_of(begin(job, group, plan), group, plan)
        return
    for some in together_whole(jobs, plan):
        begun = [begin(job, group, plan) for job in some]
        directions = plan.rule.complete([each.direction for each in begun], some, group)
        while begun:  # what is done is let go of before the next are begun
            yield half_of(begun.pop()._replace(direction=directions.pop()), group, plan)


def together_whole(jobs: list[Job], plan: Plan) -> Iterator[list[Job]]:
    """Yield jobs that are `alike` and lie in one way, as many as a rule may work on at once."""
    kinds: dict[tuple[bool, int], list[Job]] = {}
    for job in jobs:
        kind = (job.layout.wide, plan.projector.width(site_of(job)))
        kinds.setdefault(kind, []).append(job)
    for (_, width), some in sorted(kinds.items(), key=lambda item: item[0]):
        for same in alike(some):
            layout = same[0].layout
            size = layout.rows * width * layout.matrices
            count = max(1, WHOLE // max(1, size)) * min(layout.team.size, ABREAST)
            for start in range(0, len(same), count):
                yield same[start : start + count]


def begin(job: Job, group: Group, plan: Plan) -> Begun:
    """Project a gradient and do with the moments what the rule does."""
    state, site, rule = job.state, site_of(job), plan.rule
    factor = plan.projector.factor(state, site)
    low = down(grad_of(job), factor, site.dtype) if job.low is None else job.low
    held = moments_of(state, plan.slots)
    ops = dispatch.formats(site)
    moments = load_moments(held, rule, site.dtype, ops)
    for slot in rule.slots:
        if slot in plan.feed.slots:
            whole = load(stored(state, slot), site.dtype, slot in rule.squares, ops)
            moments[slot] = down(whole, factor, site.dtype)
    taken = None if job.kept is None else plan.feed.taken(low, moments, group)
    direction = rule.direction(low, moments, age_of(job, group), group)
    kept = {slot: moments[slot] for slot in held}
    store_moments(held, kept, rule, noise_of(job, group), ops=ops)
    return Begun(job, factor, low, direction, taken)


def half_of(begun: Begun, group: Group, plan: Plan) -> Half:
    """Return what is left to do of a step: the residual's sums, and the write."""
    job, factor, low, direction, _ = begun
    state, site, want, grad = job.state, site_of(job), plan.residual.want, grad_of(job)
    noise, count = noise_of(job, group), age_of(job, group)
    norms = None
    if want.norms:
        norms = Norms(*(row_norms(x, site.dtype) for x in (grad, low, direction)))
    kept = low.unsqueeze(0) if want.low else None
    moved = direction.unsqueeze(0) if want.direction else None
    taken = begun.taken
    del low, direction, begun

    def finish(sums: Tensor | None) -> None:
        uncorrected = plan.rule.uncorrected(count, group)
        if sums is not None and grad.ndim == 2:
            sums = sums[0]
        update = plan.residual.update(norms, sums, state, site, group, uncorrected)
        update = replace(update, low=in_list(update.low), grad=in_list(update.grad))
        matrix, view = oriented(job.param, job.layout.wide)
        lift_write(
            [view],
            [grad],
            [factor],
            kept,
            moved,
            update,
            *rates_of(group),
            [noise] if rounds(job.param, group) else None,
        )
        if matrix.data_ptr() != job.param.data_ptr():
            job.param.copy_(matrix.view(job.param.shape))
        keep(job, taken, factor, noise)

    sums = plan.residual.sums(norms, state, site, group)
    if sums is not None:
        sums = sums.reshape(-1, sums.shape[-1])
    return Half([(job, place) for place in range(grad.shape[:-2].numel())], sums, finish)


def in_list(factor: Tensor | float) -> Tensor | float:
    """Return a factor of one matrix as that of a list of one."""
    return factor.unsqueeze(0) if isinstance(factor, Tensor) else factor


def step_plain(jobs: list[Job], group: Group, plan: Plan) -> None:
    """Do one step of parameters that are not projected, in place.

    What the rule cannot do whole is done by a kernel, or here in the dtype of the arithmetic, some
    rows at a time.
    """
    undone = plan.rule.plain.step_plain(jobs, group)
    count(undone)
    with_kernels, others = divided(undone, group, plan)
    for job in others:
        step_plain_eagerly(job, group, plan)
    if with_kernels:
        fused.step_plain(with_kernels, group, plan)


def step_plain_eagerly(job: Job, group: Group, plan: Plan) -> None:
    """Do one step of a parameter that is not projected, in plain torch."""
    param, rule, dtype = in_rows(job.param), plan.rule.plain, compute_dtype(job.param.dtype)
    noise, count = noise_of(job, group), age_of(job, group)
    step_size, decay = rates_of(group)
    grad = in_rows(job.grad)
    whole = moments_of(job.state, rule.slots)
    stored = {slot: moment_in_rows(moment) for slot, moment in whole.items()}
    length = param.shape[0]
    for rows in row_chunks(length, NEAR * (param.numel() // max(1, length))):
        here = noise._replace(stream=noise.stream + rows.start)
        held = {slot: part_of(moment, rows) for slot, moment in stored.items()}
        moments = load_moments(held, rule, dtype)
        direction = rule.direction(grad[rows].to(dtype), moments, count, group)
        store_moments(held, moments, rule, here, whole=True)
        target = param[rows]
        out = target.to(dtype).mul_(decay).add_(direction * step_size)
        round_into_(
            target, out, bits_of(here, WEIGHT, target, True) if rounds(param, group) else None
        )


def part_of(moment: Any, rows: slice) -> Any:
    """Return some rows of a stored moment."""
    if isinstance(moment, Tensor):
        return moment[rows]
    return tuple(piece[rows] for piece in moment)
