"""One step of a group's parameters: project, moments, residual, write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from ..functional import (
    UNIT,
    Factor,
    Norms,
    down,
    down_some,
    form_sign,
    lift_write,
    load,
    row_norms,
    update_squares,
)
from ..functional.factors import oriented
from ..parts.plan import Plan
from ..parts.protocols import Rule
from ..parts.storage import Held, load_moments, moments_of, store_moments, stored
from ..parts.types import (
    Group,
    Job,
    Moments,
    Rates,
    Site,
    Update,
    age_of,
    count,
    noise_of,
    rates_of,
    rounds,
    site_of,
)
from ..sharding.collectives import ALONE
from . import launches
from .backend import refusal
from .feed import fed, fed_chunks, keep
from .length import Sums, in_list, is_formed, sampled, settled
from .plain import step_plain_eagerly
from .refresh import ABREAST, Waiting, alike, grad_of, move_subspaces
from .two_phase import Half, run, summed_chunks

MATRICES_AT_ONCE = 1 << 24
"""Elements of matrices that a rule works on at once, where it takes them whole."""


FEW = 1 << 18
"""Elements of gradients from which on parameters are stepped one by one.

Below, calls take longer than the arithmetic, and torch makes fewer of them for a list.
"""


def step_projected(jobs: list[Job], group: Group, plan: Plan) -> list[Waiting]:
    """Do one step of projected parameters, in place; return which may lack a subspace."""
    if plan.length.sampled:
        jobs = sampled(jobs, group, plan)
    if not plan.feed.slots:
        return step_together(jobs, group, plan)
    waiting: list[Waiting] = []
    for some in fed_chunks(jobs, plan):
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
    shared = [job for job in jobs if job.layout.team is not ALONE]
    for part in summed_chunks(jobs, group, plan) if shared else [jobs]:
        with_kernels, others = divided(part)
        if others and shared:
            run(begin_eagerly(others, group, plan))
        elif others:
            for _ in begin_eagerly(others, group, plan):
                raise AssertionError("nobody else holds rows, so nothing waits")
        if with_kernels and shared:
            run(launches.begin(with_kernels, group, plan))
        elif with_kernels:
            for half in launches.begin(with_kernels, group, plan):
                half.finish(half.sums)
    return waiting


def project(job: Job, group: Group, plan: Plan) -> tuple[Tensor, list[Waiting]]:
    """Return the projected gradient of a job that has none yet, after its subspace has moved.

    With it comes the state, if that may lack a subspace. Where `job.low` is given, the projected
    gradient is added to it, in the same subspace.
    """
    site = site_of(job)
    waiting = [] if job.low is not None else move_subspaces([job], group, plan)
    low = down(grad_of(job), plan.projector.factor(job.state, site), site.dtype)
    if job.low is not None:
        return job.low.add_(low), waiting
    return (low.clone() if shares(low, job.grad) else low), waiting


def shares(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors share memory, as a gradient and its projection by `UNIT` may."""
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def divided(jobs: list[Job]) -> tuple[list[Job], list[Job]]:
    """Return the projected jobs that launches of kernels do, and those that plain torch does."""
    with_kernels: list[Job] = []
    others: list[Job] = []
    for job in jobs:
        launched = (
            job.site is not None
            and job.site.launches
            and job.low is None
            and job.param.numel() > 0
            and job.layout.reaches_all
        )
        (with_kernels if launched else others).append(job)
    return with_kernels, others


class Begun(NamedTuple):
    """A step whose moments are done: the job, its projected gradient and what was made of it.

    `taken` is what a feed subtracts from what it keeps, see `Feed.taken`.
    """

    job: Job
    factor: Factor
    low: Tensor
    direction: Tensor
    taken: Tensor | None
    age: int | Tensor


def begin_eagerly(jobs: list[Job], group: Group, plan: Plan) -> Iterator[Half]:
    """Step parameters whose subspaces are in place, in plain torch, small ones together.

    Where other processes hold rows of a matrix, yields the rest of its step, which waits for a sum.
    """
    rates = rates_of(group)
    for some in together_whole(jobs, plan) if plan.rule.whole else few_together(jobs):
        begun = begin(some, group, plan)
        if plan.rule.whole:
            made = plan.rule.complete([each.direction for each in begun], some, group)
            begun = [each._replace(direction=n) for each, n in zip(begun, made, strict=True)]
            del made
        if write_together(begun, rates, group, plan):
            continue
        begun.reverse()
        while begun:  # what is done is let go of before the next
            half = ended(begun.pop(), rates, group, plan)
            if half is not None:
                yield half


def few_together(jobs: list[Job]) -> Iterator[list[Job]]:
    """Yield jobs in lists whose gradients have at most `FEW` elements together, or one by one."""
    some: list[Job] = []
    size = 0
    for job in jobs:
        size += job.grad.numel()
        if some and size > FEW:
            yield some
            some, size = [], job.grad.numel()
        some.append(job)
    if some:
        yield some


def together_whole(jobs: list[Job], plan: Plan) -> Iterator[list[Job]]:
    """Yield jobs that are `alike` and oriented alike, as many as a rule may work on at once."""
    kinds: dict[tuple[bool, int], list[Job]] = {}
    for job in jobs:
        kind = (job.layout.wide, plan.projector.width(site_of(job)))
        kinds.setdefault(kind, []).append(job)
    for (_, width), some in sorted(kinds.items(), key=lambda item: item[0]):
        for same in alike(some):
            layout = same[0].layout
            size = layout.rows * width * layout.matrices
            count = max(1, MATRICES_AT_ONCE // max(1, size)) * min(layout.team.size, ABREAST)
            for start in range(0, len(same), count):
                yield same[start : start + count]


def begin(jobs: list[Job], group: Group, plan: Plan) -> list[Begun]:
    """Project gradients, and let the rule update the moments and make directions."""
    rule, slots = plan.rule, plan.slots
    sites = list(map(site_of, jobs))
    factors = [plan.projector.factor(job.state, job.site) for job in jobs if job.site is not None]
    lows = projected(jobs, sites, factors)
    moments: list[Moments] = []
    stored_otherwise: list[tuple[int, Held]] = []
    for place, job in enumerate(jobs):
        state, site, held_here = job.state, sites[place], {}
        for slot in slots:
            moment = state.get(slot)
            if moment is not None and moment.dtype == site.dtype:
                held_here[slot] = moment
        if len(held_here) == len(slots):
            moments.append(held_here)
            continue
        held = moments_of(state, slots)
        moments.append(load_moments(held, rule, site.dtype, site.ops))
        stored_otherwise.append((place, held))
    taken: list[Tensor | None] = [None] * len(jobs)
    if plan.feed.slots:
        for place, job in enumerate(jobs):
            moments[place].update(projected_slots(job, factors[place], plan))
            if job.kept is not None:
                taken[place] = plan.feed.taken(lows[place], moments[place], group)
    ages = [age_of(job, group) for job in jobs]
    directions = directions_of(plan.rule, lows, moments, ages, group)
    for place, held in stored_otherwise:
        kept = {slot: moments[place][slot] for slot in held}
        store_moments(held, kept, rule, noise_of(jobs[place], group), ops=sites[place].ops)
    return list(map(Begun, jobs, factors, lows, directions, taken, ages))


def projected(jobs: list[Job], sites: list[Site], factors: list[Factor]) -> list[Tensor]:
    """Return the projected gradients of some parameters, of those that have none yet."""
    if len(jobs) > 1 and not [job for job in jobs if job.low is not None]:
        return down_some(list(map(grad_of, jobs)), factors, [site.dtype for site in sites])
    return [
        down(grad_of(job), factor, site.dtype) if job.low is None else job.low
        for job, site, factor in zip(jobs, sites, factors, strict=True)
    ]


def projected_slots(job: Job, factor: Factor, plan: Plan) -> Moments:
    """Return the projections of what a feed keeps in place of moments of the rule."""
    site, found = site_of(job), {}
    for slot in plan.rule.slots:
        if slot in plan.feed.slots:
            whole = load(stored(job.state, slot), site.dtype, slot in plan.rule.squares, site.ops)
            found[slot] = down(whole, factor, site.dtype)
    return found


def directions_of(
    rule: Rule, lows: list[Tensor], moments: list[Moments], ages: list[Any], group: Group
) -> list[Tensor]:
    """Return the rule's directions; moments in place."""
    several = getattr(rule, "directions", None)
    if several is not None and len(lows) > 1 and ages == [ages[0]] * len(ages):
        made: list[Tensor] = several(lows, moments, ages[0], group)
        return made
    return [
        rule.direction(low, held, age, group)
        for low, held, age in zip(lows, moments, ages, strict=True)
    ]


def write_together(begun: list[Begun], rates: Rates, group: Group, plan: Plan) -> bool:
    """Write parameters whose updates have equal factors in one call; return whether that was so.

    Only for updates that need no norms and have their published length, of parameters that are
    written in place.
    """
    want = plan.want
    if want.norms or plan.length.measured:
        return False
    jobs = [each.job for each in begun]
    updates: list[Update] = []
    for job in jobs:
        made = plan.residual.update(None, job.state, site_of(job), group)
        by_row = isinstance(made.low, Tensor) or isinstance(made.grad, Tensor)
        if by_row or job.kept is not None or job.param.ndim > 3 or made != (updates or [made])[0]:
            return False
        updates.append(made)
    noises = [noise_of(job, group) for job in jobs] if group["stochastic_rounding"] else None
    lift_write(
        [oriented(job.param, job.layout.wide)[1] for job in jobs],
        [grad_of(job) for job in jobs],
        [each.factor for each in begun],
        [each.low for each in begun] if want.low else None,
        [each.direction for each in begun] if want.direction else None,
        updates[0],
        *rates,
        noises,
    )
    return True


def ended(begun: Begun, rates: Rates, group: Group, plan: Plan) -> Half | None:
    """Do the rest of a step, the residual's sums and the write; return it where it has to wait."""
    job, want = begun.job, plan.want
    grad, site = grad_of(job), site_of(job)
    norms = None
    if want.norms:
        norms = Norms(*(row_norms(x, site.dtype) for x in (grad, begun.low, begun.direction)))
    kept = [begun.low] if want.low else None
    moved = [begun.direction] if want.direction else None
    _, factor, _, _, taken, age = begun
    del begun
    inside = plan.length.inside(group)
    limiting = plan.residual.sums(norms, job.state, site, inside) if want.norms else None
    update = plan.residual.update(norms, job.state, site, inside)
    update = replace(update, low=in_list(update.low), grad=in_list(update.grad))
    lifted, sums = factor, Sums(limiting)
    if plan.length.measured:
        if kept and is_formed(factor, update, grad):
            moved = [form_sign(grad, factor, kept[0], moved[0] if moved else None, update)]
            kept, lifted, update = None, UNIT, Update(direction=update.sign)
        of_list = None if norms is None else Norms(*(norm.unsqueeze(0) for norm in norms))
        squares = update_squares([grad], [lifted], kept, moved, update, of_list)
        sums = Sums(limiting, squares[0], job.sampled)
    del norms

    def finish(total: Tensor | None) -> None:
        found = sums if total is None else sums.split(total[0] if grad.ndim == 2 else total)
        written, length = settled(found, update, job.state, site, age, group, plan, listed=True)
        lengths = None if length is None else [length]
        matrix, view = oriented(job.param, job.layout.wide)
        noises = [noise_of(job, group)] if rounds(job.param, group) else None
        step_size, decay = rates
        lift_write(
            [view], [grad], [lifted], kept, moved, written, step_size, decay, noises, lengths
        )
        if matrix is not job.param and matrix.data_ptr() != job.param.data_ptr():
            job.param.copy_(matrix.view(job.param.shape))
        if job.kept is not None:
            keep(job, taken, factor, noise_of(job, group))

    if job.layout.team is not ALONE and (joined := sums.joined()) is not None:
        places = [(job, place) for place in range(grad.shape[:-2].numel())]
        return Half(places, joined.reshape(-1, joined.shape[-1]), finish)
    finish(None)
    return None


def step_plain(jobs: list[Job], group: Group, plan: Plan) -> None:
    """Do one step of parameters that are not projected, in place.

    What the rule leaves undone is done by a kernel, or in plain torch some rows at a time.
    """
    undone = plan.plain.step_plain(jobs, group)
    count(undone)
    with_kernels = []
    for job in undone:
        lies = job.param.numel() > 0 and job.layout.reaches_all
        if lies and refusal(plan, group, job.param, job.grad, job.state) is None:
            with_kernels.append(job)
        else:
            step_plain_eagerly(job, group, plan)
    if with_kernels:
        launches.step_plain(with_kernels, group, plan)
