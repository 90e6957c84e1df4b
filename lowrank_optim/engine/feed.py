"""Feeds in a step: what is fed is full-size, so only some parameters are fed at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from ..functional import FED, Factor, Noise, bits_of, lift_, load, store
from ..parts.plan import Plan
from ..parts.protocols import Carried
from ..parts.storage import stored
from ..parts.types import Group, Job, site_of
from .refresh import grad_of
from .two_phase import chunks

AT_ONCE = 1 << 23
"""Elements of gradients that are fed at once."""


def fed_chunks(jobs: list[Job], plan: Plan) -> Iterator[list[Job]]:
    """Yield jobs in lists, the same on all processes, whose feeds may be held at once."""
    if not plan.feed.slots:
        yield jobs
        return

    def size(job: Job) -> int:
        layout = job.layout
        return layout.matrices * layout.rows * layout.cols // layout.team.size

    yield from chunks(jobs, size, AT_ONCE)


def fed(jobs: list[Job], group: Group, plan: Plan) -> tuple[list[Job], list[Job]]:
    """Return jobs with what subspaces learn from, and jobs with what is projected, as gradients."""
    lessons, others = [], []
    for job in jobs:
        held = {slot: load_whole(job, slot) for slot in plan.feed.slots}
        made = plan.feed.feed(grad_of(job), held, carried_by(job, plan), group)
        lessons.append(job._replace(grad=as_it_lies(made.lesson, job)))
        others.append(job._replace(grad=as_it_lies(made.grad, job), kept=made.kept))
    return lessons, others


def as_it_lies(matrix: Tensor, job: Job) -> Tensor:
    """Return a matrix, given with the projected axis last, in the orientation of the parameter."""
    return matrix.mT if job.layout.wide else matrix


def load_whole(job: Job, slot: str) -> Tensor:
    """Return a full-size slot in the dtype of the arithmetic."""
    site = site_of(job)
    value = load(stored(job.state, slot), site.dtype, False)
    return value if value.shape[-1] == site.cols else value[..., : site.cols]


def carried_by(job: Job, plan: Plan) -> Carried:
    """Return the moments as the previous step left them."""
    site = site_of(job)

    def moment(slot: str) -> Tensor:
        return load(stored(job.state, slot), site.dtype, slot in plan.rule.squares)

    def lift(low: Tensor) -> Tensor:
        out = low.new_zeros(*low.shape[:-1], site.cols)
        lift_(out, low, plan.projector.factor(job.state, site))
        return out

    return Carried(moment, lift, site.step)


def keep(job: Job, taken: Tensor | None, factor: Factor, noise: Noise) -> None:
    """Store what a feed keeps of a step, minus what the step has used."""
    for place, (slot, value) in enumerate((job.kept or {}).items()):
        if taken is not None:
            lift_(value, taken, factor, scale=-1.0)
        store(stored(job.state, slot), value, False, partial(bits_of, noise, FED[place], value))
